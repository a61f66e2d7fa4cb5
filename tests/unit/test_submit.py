"""What --submit sends to a cluster, and what it says when there is none."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from raycascade.errors import ConfigError
from raycascade.flows.submit import entrypoint, runtime_env, submit_job


class Refusing(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(403)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def refusing() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("words", [
    ["--submit", "http://h:1"], ["--submit=http://h:1"], ["--submit", "http://h:1", "--address", "ray://x"],
])
def test_the_job_runs_the_same_command_on_its_own_cluster(words: list[str]):
    command = entrypoint(["train", "configs/my run.yaml", *words, "train.epochs=2", "--json"])
    assert command == "python -m raycascade train 'configs/my run.yaml' train.epochs=2 --json --address auto"


def test_a_checkout_travels_with_the_job_and_elsewhere_nothing_does(tmp_path: Path):
    assert runtime_env(tmp_path) == {}
    root = Path(__file__).resolve().parents[2]
    assert runtime_env(root) == {"working_dir": str(root), "py_modules": [str(root / "platform" / "raycascade")]}


def test_a_url_where_nothing_answers_is_one_line():
    with pytest.raises(ConfigError, match="nothing answers there; give the URL") as error:
        submit_job("http://127.0.0.1:9", ["prepare", "x.yaml"])
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="expected the URL of a Ray dashboard"):
        submit_job("cluster:8265", ["prepare", "x.yaml"])


def test_a_refused_token_is_one_line(refusing: str):
    with pytest.raises(ConfigError, match="the token was refused; set RAY_AUTH_MODE") as error:
        submit_job(refusing, ["prepare", "x.yaml"])
    assert "\n" not in str(error.value)

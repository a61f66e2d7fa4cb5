"""The command line as a script meets it: exit status, one line on standard error, JSON on the last line."""

import json
from pathlib import Path
from typing import Any

import pytest

from raycascade import cli
from raycascade.errors import DataError, ExpectationError


@pytest.fixture
def prepare_gives(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces the flow behind `prepare`, and the cluster, by what a test wants to come out."""
    from raycascade.flows import _cluster, prepare

    def set_result(result: Any) -> None:
        def flow(config: object) -> Any:
            if isinstance(result, BaseException):
                raise result
            return result

        monkeypatch.setattr(prepare, "prepare", flow)
        monkeypatch.setattr(_cluster, "connect", lambda address=None: None)

    return set_result


DEMO = str(Path(__file__).parents[2] / "configs" / "demo.yaml")


@pytest.mark.parametrize("arguments", [
    ["bogus"], ["train"], ["score", "x", "--requests"], ["prepare", "nothing.yaml"], ["prepare", DEMO, "train.epocs=2"],
    ["compare", DEMO], ["compare", DEMO, "--losses", "bce,lcorn"], ["compare", DEMO, "--losses", "bce", "--seeds", "0"],
    ["prepare", DEMO, "no-equals-sign"], ["evaluate", "/no/such/bundle"], ["evaluate", "/no/such/bundle", "train.lr=1"],
    ["semantic-ids", DEMO], ["semantic-ids", DEMO, "semantic_ids.main.contents=x"],
    ["explain", "/no/such/bundle", "--user", "1", "--item", "2"],
])
def test_wrong_usage_or_input_is_one_line_and_exit_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("raycascade: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_the_result_is_one_json_object_on_the_last_line(prepare_gives: Any, capsys: pytest.CaptureFixture[str]):
    prepare_gives({"shards": "s", "requests": {"train": 3}, "items": 2, "seconds": 0.5})
    assert cli.run(["prepare", DEMO, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["requests"] == {"train": 3}


def test_without_json_the_result_is_a_table(prepare_gives: Any, capsys: pytest.CaptureFixture[str]):
    prepare_gives({"shards": "s", "requests": {"train": 31}, "items": 2, "seconds": 0.5})
    assert cli.run(["prepare", DEMO]) == 0
    table = capsys.readouterr().out
    assert "requests" in table
    assert "31" in table


@pytest.mark.parametrize(("problem", "status", "said"), [
    (DataError("log.csv: two\nlines"), 2, "raycascade: log.csv: two lines\n"),
    (ExpectationError("below"), 1, "raycascade: below\n"),
    (KeyboardInterrupt(), 1, "raycascade: interrupted\n"),
    (RuntimeError("a bug"), 1, "raycascade: RuntimeError: a bug (run again with --debug for the traceback)\n"),
])
def test_errors_have_their_status_and_one_line(
    problem: BaseException, status: int, said: str, prepare_gives: Any, capsys: pytest.CaptureFixture[str]
):
    prepare_gives(problem)
    assert cli.run(["prepare", DEMO]) == status
    assert capsys.readouterr().err == said


def test_what_others_print_while_a_verb_works_goes_to_standard_error(
    prepare_gives: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from raycascade.flows import prepare

    prepare_gives({})
    monkeypatch.setattr(prepare, "prepare", lambda config: print("(raylet) a worker died") or {"items": 1})
    assert cli.run(["prepare", DEMO, "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.out == '{"items": 1}\n'
    assert "worker died" in printed.err


def test_debug_shows_the_traceback(prepare_gives: Any, capsys: pytest.CaptureFixture[str]):
    prepare_gives(DataError("broken"))
    assert cli.run(["prepare", DEMO, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_config_stands_for_its_newest_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from raycascade.bundle import latest, remember_latest
    from raycascade.config import load_config

    override = f"paths.bundles={tmp_path}"
    assert cli.run(["evaluate", DEMO, override]) == 2
    assert "no bundle was trained into this folder" in capsys.readouterr().err
    remember_latest(str(tmp_path), "somewhere/run-1")
    assert latest(load_config(DEMO, [override])) == "somewhere/run-1"

"""The benchmark of serving: bars can be missed, the client reads HTTP, and both sides give the same answers."""

import json
import socket
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The scripts find one another in their folder."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {name: import_module(f"_serve_{name}") for name in ("client", "report", "reference", "world")}
    finally:
        sys.path.remove(str(BENCHMARKS))


Modules = dict[str, ModuleType]


# ---------------------------------------------------------------- the report
def rows(report: ModuleType, *, fused: float = 12.0, composed: float = 18.0, rate: float = 200.0, long: float = 90.0
         ) -> list[dict[str, Any]]:
    """Summaries with in process at 10 ms and the server by hand at 150 requests a second."""

    def row(arm: str, clients: int, p50: float, rate: float = 100.0, p99: float = 50.0) -> dict[str, Any]:
        return {"arm": arm, "clients": clients, "requests": 7, "p50": p50, "p95": 2 * p50, "p99": p99, "rate": rate,
                "processor": 1.0, "client": 0.1}

    return [row(report.IN_PROCESS, 0, 10.0), row(report.ALONE, 0, 8.0), row(report.AGAIN, 0, 11.0),
            row(report.FUSED, 1, fused), row(report.FUSED, 16, 80.0, rate), row(report.COMPOSED, 1, composed),
            row(report.COMPOSED, 16, 90.0, 120.0), row(report.BY_HAND, 1, 7.0), row(report.BY_HAND, 16, 99.0, 150.0),
            row(report.BY_HAND_2, 16, 99.0, 160.0), row(report.LONG, 1, 40.0, p99=long)]


def test_all_bars_are_met_on_their_edge(modules: Modules):
    report = modules["report"]
    bars = report.bars_of(rows(report, fused=15.0, composed=19.0, rate=150.0, long=100.0))
    assert [bar.found for bar in bars] == [1.5, 8.0, 1.0, 100.0]
    assert all(bar.met for bar in bars)


@pytest.mark.parametrize(("place", "worse"), [
    (0, {"fused": 15.01}), (1, {"composed": 19.01}), (2, {"rate": 149.9}), (3, {"long": 100.1})])
def test_each_bar_is_missed_by_its_own_figure_alone(modules: Modules, place: int, worse: dict[str, float]):
    report = modules["report"]
    bars = report.bars_of(rows(report, **worse))
    assert [number for number, bar in enumerate(bars) if not bar.met] == [place]


def test_a_page_keeps_what_stands_around_its_tables_and_says_what_was_missed(modules: Modules, tmp_path: Path):
    report, page = modules["report"], tmp_path / "page.md"
    summaries = rows(report, fused=16.0)
    line = {"command": "python it", "size": {"items": 100_000, "keeps": {"a": 500, "b": 100}}, "rounds": 7, "cores": 2,
            "torch": "2", "ray": "2", "load": [0.5, 2.5], "rows": summaries,
            "bars": report.plain(report.bars_of(summaries))}
    page.write_text(f"# Serving\n{report.BEGIN}\nold\n{report.END}\n## Faults\n")
    report.write_report(page, line)
    text = page.read_text()
    assert text.startswith("# Serving\n")
    assert text.endswith(f"{report.END}\n## Faults\n")
    assert "old" not in text
    assert "| fused, p50 / in process, p50 | 1.60 | at most 1.5 | **missed** |" in text
    assert "| fused | 16 | 80.00 | 160.00 | 50.00 | 200 | 1.00 | 0.10 |" in text
    assert "server by hand in two workers: 1.25" in text


def test_a_summary_has_quantiles_of_all_rounds_and_the_median_rate(modules: Modules):
    clocked = modules["report"].Clocked("fused", 1, [n / 1000 for n in range(1, 101)], [50.0, 70.0, 60.0], 0.2, 0.1)
    found = clocked.summary()
    assert [found[name] for name in ("p50", "p95", "p99", "rate")] == [50.0, 95.0, 99.0, 60.0]
    assert (found["processor"], found["client"]) == (pytest.approx(2.0), pytest.approx(1.0))


# ---------------------------------------------------------------- the client
def test_a_body_is_read_once_it_is_whole(modules: Modules):
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nx: y\r\n\r\nhello"
    body_of = modules["client"].body_of
    assert [body_of(whole[:end]) for end in range(len(whole))] == [None] * len(whole)
    assert body_of(whole) == b"hello"
    with pytest.raises(ConnectionError, match="503"):
        body_of(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")


def test_a_closed_loop_asks_once_for_every_user_and_keeps_the_answers_apart(modules: Modules):
    users = list(range(40))
    with socket.create_server(("127.0.0.1", 0)) as server:
        for _ in range(3):
            threading.Thread(target=_echo, args=(server,), daemon=True).start()
        loop = modules["client"].closed_loop(server.getsockname()[1], 3, users)
    assert [json.loads(answer)["user_id"] for answer in loop.answers] == users
    assert all(0 < seconds <= loop.seconds for seconds in loop.latency)


def _echo(server: socket.socket) -> None:
    """Answers one connection's requests with their own bodies."""
    connection, _ = server.accept()
    with connection:
        while received := connection.recv(1 << 16):
            body = received.partition(b"\r\n\r\n")[2]
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)


# ---------------------------------------------------------------- the world
def test_the_server_by_hand_gives_the_answers_of_the_cascade(modules: Modules, tmp_path: Path):
    world = modules["world"].make(tmp_path, modules["world"].SMALL)
    in_process, by_hand = modules["world"].InProcess(world.cascade), modules["reference"].Reference(world.cascade)
    users = world.users[:30]
    answers = [in_process.answer(user) for user in users]
    assert len({tuple(item for item, _ in answer) for answer in answers}) > 20  # users get lists of their own
    for user, answer in zip(users, answers, strict=True):
        found = by_hand.answer(user)
        assert [item for item, _ in found] == [item for item, _ in answer]
        assert [score for _, score in found] == pytest.approx([score for _, score in answer], rel=1e-4, abs=1e-4)

"""The traffic log: which requests it takes, what its rows say, and when its files appear."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raycascade import storage
from raycascade.bundle import Bundle, load_bundle
from raycascade.datasets import _traffic_files as files
from raycascade.errors import ConfigError
from raycascade.serving.stages import Survivors
from raycascade.serving.telemetry import NoTelemetry
from raycascade.serving.traffic import TrafficLog, in_sample
from raycascade.serving.traffic_rows import TrafficRecord, request_rows
from raycascade.serving.users import NewEvent
from tests.tiny_world import item_id, raw_requests
from tests.traffic_world import served

NOW_MS = 1_767_225_600_000  # 2026-01-01
WAIT_S = 30.0  # for a test that would hang


@pytest.fixture(scope="module")
def bundle(tiny_bundle: str) -> Bundle:
    return load_bundle(tiny_bundle)


class Clock:
    def __init__(self) -> None:
        self.now_s = NOW_MS / 1000

    def __call__(self) -> float:
        return self.now_s


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.01)


def rows_in(folder: Path, kind: files.Kind) -> list[dict[str, Any]]:
    return [row for file in files.find(str(folder), kind) for row in files.read(str(folder), file.path).to_pylist()]


def record_of(bundle: Bundle, levels: dict[str, list[int]], shown: list[int], **more: Any) -> TrafficRecord:
    """A record by hand: places in the catalogue that each stage let through, best first; scores fall from 9."""
    survivors = {name: Survivors(np.array([[place + 2 for place in places] + [0]], np.int32),
                                 np.arange(9, 8 - len(places), -1, dtype=np.float32)[None])
                 for name, places in levels.items()}
    raw = pa.table({"request_id": ["q"], "user_id": [100]})
    return TrafficRecord(request_id="q", user_id=100, time_ms=NOW_MS, served_at_ms=NOW_MS + 7, bundle=bundle, raw=raw,
                         encoded=bundle.encode(raw), survivors=survivors,
                         shown_rows=np.array([place + 2 for place in shown]), **more)


# ---------------------------------------------------------------- rows
def test_a_row_holds_every_survivor_once_at_the_deepest_level_it_reached(bundle: Bundle):
    levels = {"retriever": [5, 1, 2, 3, 4], "pre_ranker": [3, 1, 2], "ranker": [2, 3]}
    (row,) = request_rows([record_of(bundle, levels, shown=[2], user_source="store")]).to_pylist()
    assert row["candidates"] == [item_id(place) for place in (2, 3, 1, 5, 4)]
    assert row["reached"] == [4, 3, 2, 1, 1]
    assert row["rank"] == [1, 1, 1, 1, 2]
    assert row["exposed"] == [True, False, False, False, False]
    assert row["served_score"] == [9.0, 8.0, 8.0, 9.0, 5.0]
    assert (row["request_id"], row["user_id"], row["time_ms"], row["served_at_ms"]) == ("q", 100, NOW_MS, NOW_MS + 7)
    assert row["served_stages"] == ["retriever", "pre_ranker", "ranker"]
    assert (row["served_version"], row["served_user"], row["served_degraded"]) == (bundle.version, "store", False)


def test_where_a_stage_did_not_answer_its_level_is_empty(bundle: Bundle):
    levels = {"retriever": [5, 1, 2], "pre_ranker": [1, 2]}
    (row,) = request_rows([record_of(bundle, levels, shown=[1], degraded=True)]).to_pylist()
    assert dict(zip(row["candidates"], row["reached"], strict=True)) == {item_id(1): 4, item_id(2): 2, item_id(5): 1}
    (row,) = request_rows([record_of(bundle, {}, shown=[7, 8], degraded=True)]).to_pylist()  # the most popular ones
    assert (row["reached"], row["rank"], row["exposed"]) == ([4, 4], [1, 2], [True, True])
    assert np.isnan(row["served_score"]).all()


def test_what_was_sent_is_logged_as_it_was_and_the_rest_as_the_bundle_knows_it(bundle: Bundle):
    sent = pa.table({"request_id": ["q"], "user_id": [101], "city": ["atlantis"], "device": ["phone"]})
    plain = pa.table({"request_id": ["q"], "user_id": [101]})
    both = request_rows([served(bundle, sent, time_ms=NOW_MS), served(bundle, plain, time_ms=NOW_MS + 1)])
    row, other = both.to_pylist()
    assert (row["city"], row["device"]) == ("atlantis", "phone")  # the vocabulary does not know atlantis
    assert (other["city"], other["device"]) == ("city 1", None)  # device is hashed, which cannot be undone
    assert row["income"] == other["income"] == pytest.approx(1.0, abs=1e-5)
    last = raw_requests().to_pylist()[2 * 8 - 1]  # of user 101
    assert last["user_id"] == 101
    assert len(last["history"]) > 0
    for name in ("history", "history_time_ms", "history_action"):
        assert row[name] == other[name] == last[name], name


def test_a_row_encodes_to_what_the_models_saw(bundle: Bundle):
    """The log's raw row, encoded again with the bundle that served it, is the same request."""
    sent = pa.table({"request_id": ["q"], "user_id": [102], "device": ["desk"], "city": ["city 3"],
                     "history": pa.array([[item_id(4), item_id(9)]]), "history_action": [["click", "new"]],
                     "history_time_ms": [[NOW_MS - 9, NOW_MS - 5]]})
    known, unknown = (pa.table({"request_id": ["q"], "user_id": [user]}) for user in (103, 77))
    for raw in (sent, known, unknown):
        record = served(bundle, raw, time_ms=NOW_MS, request_id="q")
        columns = [*raw.column_names, "time_ms"]
        rows = request_rows([record])
        again = bundle.state.encode_requests(rows.drop_columns(["candidates", "reached", "rank"]), where="again",
                                             strict=False)
        lost = {"device", "exclude"} if "device" not in columns else {"exclude"}
        for name in set(record.encoded.column_names) - lost:
            first, second = ([value or [] if name.startswith("history") else value for value in table[name].to_pylist()]
                             for table in (record.encoded, again))
            assert first == (pytest.approx(second, abs=1e-5) if name == "income" else second), name


def test_events_of_the_store_that_continue_a_history_do_not_stand_for_all_of_it(bundle: Bundle):
    past = {"history": pa.array([[item_id(4), item_id(9), item_id(2)]]), "history_action": [["click", "skip", "click"]]}
    record = served(bundle, pa.table({"user_id": [77], **past}), time_ms=NOW_MS)
    newest = pa.table({"user_id": [77], "history": pa.array([[item_id(2)]]), "history_action": [["click"]]})
    (row,) = request_rows([replace(record, raw=newest)]).to_pylist()
    assert row["history"] == [item_id(4), item_id(9), item_id(2)]
    assert row["history_action"] == ["click", "skip", "click"]


def test_rows_made_together_are_those_made_one_by_one(bundle: Bundle):
    history = {"history": pa.array([[item_id(4), 6, item_id(9)]]), "history_action": [["click", "skip", None]]}
    sent = [{"user_id": [101]}, {"user_id": [101], **history}, {"user_id": [77]}, {"user_id": [77], "device": ["desk"]},
            {"user_id": [102], "income": [None], "exclude": [[item_id(1)]]},
            {"user_id": [77], "history": [[item_id(2)]]}]
    records = [served(bundle, pa.table(one), time_ms=NOW_MS + place) for place, one in enumerate(sent)]
    alone = [{name: value or None for name, value in row.items()} for one in records
             for row in request_rows([one]).to_pylist()]
    rows = request_rows(records).to_pylist()
    for row, other in zip(rows, alone, strict=True):
        missing = {name: row[name] for name in row.keys() - other.keys()}
        assert not any(value for values in missing.values() for value in values or ()), missing
        assert {name: row[name] or None for name in other} == other
    assert rows[1]["history"] == [item_id(4), item_id(9)]  # there is no item 6
    assert rows[1]["history_action"] == ["click", None]


def test_a_user_whose_id_cannot_be_in_the_training_log_is_left_out(bundle: Bundle):
    records = [record_of(bundle, {"retriever": [1]}, shown=[1]) for _ in range(3)]
    records[1] = replace(records[1], user_id="nobody")
    records[2] = replace(records[2], user_id="17")
    assert request_rows(records)["user_id"].to_pylist() == [100, 17]
    assert len(request_rows(records[1:2])) == 0


# ---------------------------------------------------------------- files
def test_files_appear_whole_with_names_that_say_what_they_cover(bundle: Bundle, tmp_path: Path):
    log = TrafficLog(str(tmp_path), rotate_rows=2)
    for moment in (NOW_MS + 5, NOW_MS):
        assert log.offer(served(bundle, pa.table({"user_id": [101]}), time_ms=moment))
    wait_for(lambda: log.count("requests", "written") == 2)
    (file,) = files.find(str(tmp_path), "requests")
    assert (file.first_ms, file.last_ms) == (NOW_MS, NOW_MS + 5)
    assert file.path.startswith(f"requests/2026-01-01/{NOW_MS:015d}-{NOW_MS + 5:015d}-")
    assert log.close()
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".parquet"]


def test_an_open_part_is_closed_after_its_time(bundle: Bundle, tmp_path: Path):
    clock = Clock()
    log = TrafficLog(str(tmp_path), rotate_s=60, clock=clock)
    log.offer(served(bundle, pa.table({"user_id": [101]}), time_ms=NOW_MS))
    wait_for(lambda: log.held("requests") == 1)
    clock.now_s += 59
    log.offer_events([NewEvent(event_id="e", user_id=1, item_id=2)])
    wait_for(lambda: log.held("events") == 1)
    assert rows_in(tmp_path, "requests") == []
    clock.now_s += 2
    wait_for(lambda: len(rows_in(tmp_path, "requests")) == 1)
    assert rows_in(tmp_path, "events") == []  # two seconds old
    log.close()
    (event,) = rows_in(tmp_path, "events")
    assert (event["user_id"], event["item_id"], event["time_ms"]) == ("1", "2", NOW_MS + 59_000)


def test_every_event_is_logged_with_what_it_says(tmp_path: Path):
    log = TrafficLog(str(tmp_path), sample=0.0)
    assert log.offer_events([NewEvent(event_id="e1", user_id="u", item_id=5, time_ms=9, features={"b": 1, "a": "x"})])
    assert log.close()
    (row,) = rows_in(tmp_path, "events")
    assert {name: row[name] for name in ("event_id", "user_id", "item_id", "time_ms")} == {
        "event_id": "e1", "user_id": "u", "item_id": "5", "time_ms": 9}
    assert json.loads(row["features"]) == {"a": "x", "b": 1}


def test_a_full_queue_drops_and_counts(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    entered, go_on = threading.Event(), threading.Event()

    def slow(records: list[TrafficRecord]) -> pa.Table:
        entered.set()
        assert go_on.wait(WAIT_S)
        return request_rows(records)

    monkeypatch.setattr("raycascade.serving.traffic.request_rows", slow)
    telemetry = NoTelemetry()
    log = TrafficLog(str(tmp_path), most_queued=3, telemetry=telemetry)
    record = record_of(bundle, {"retriever": [1]}, shown=[1])
    assert log.offer(record)
    assert entered.wait(WAIT_S)  # the thread is busy with the first one
    assert [log.offer(record) for _ in range(5)] == [True] * 3 + [False] * 2
    go_on.set()
    assert log.close()
    assert (log.count("requests", "written"), log.count("requests", "dropped")) == (4, 2)
    assert not log.offer(record)
    totals = telemetry.totals()
    assert totals["raycascade_traffic_rows_total", "requests", "written"] == 4
    assert totals["raycascade_traffic_rows_total", "requests", "dropped"] == 3


def test_a_place_that_cannot_be_written_to_for_a_while_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, broken, tried, clock = files.write, threading.Event(), threading.Event(), Clock()
    broken.set()

    def flaky(*args: Any, **named: Any) -> str:
        if broken.is_set():
            tried.set()
            raise OSError("no route to the store")
        return real(*args, **named)

    monkeypatch.setattr(files, "write", flaky)
    log = TrafficLog(str(tmp_path), rotate_rows=1, clock=clock)
    for number in range(3):
        log.offer_events([NewEvent(event_id=f"e{number}", user_id=1, item_id=2)])
    wait_for(tried.is_set)
    broken.clear()
    clock.now_s += 60
    wait_for(lambda: log.count("events", "written") == 3)
    log.close()
    assert sorted(row["event_id"] for row in rows_in(tmp_path, "events")) == ["e0", "e1", "e2"]


def test_what_can_never_be_written_is_counted_as_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*args: Any, **named: Any) -> str:
        raise OSError("no route to the store")

    monkeypatch.setattr(files, "write", broken)
    log = TrafficLog(str(tmp_path), rotate_rows=1)
    log.offer_events([NewEvent(event_id="e", user_id=1, item_id=2)])
    assert log.close()
    assert log.count("events", "lost") == 1


def test_a_record_that_cannot_be_a_row_does_not_end_the_log(bundle: Bundle, tmp_path: Path):
    log = TrafficLog(str(tmp_path))
    log.offer(replace(record_of(bundle, {"retriever": [1]}, shown=[1]), shown_rows=np.array([10_000])))
    wait_for(lambda: log.count("requests", "lost") == 1)
    log.offer(record_of(bundle, {"retriever": [1]}, shown=[1]))
    log.close()
    assert len(rows_in(tmp_path, "requests")) == 1


def test_two_processes_never_write_the_same_file(bundle: Bundle, tmp_path: Path):
    logs = [TrafficLog(str(tmp_path)) for _ in range(2)]
    for log in logs:
        log.offer(record_of(bundle, {"retriever": [1]}, shown=[1]))
        log.close()
    assert len(files.find(str(tmp_path), "requests")) == 2


def test_a_killed_process_leaves_whole_files_and_loses_only_the_open_part(tmp_path: Path):
    code = """
import sys, time
from raycascade.serving.traffic import TrafficLog
from raycascade.serving.users import NewEvent
log = TrafficLog(sys.argv[1], rotate_rows=10)
for number in range(25):
    log.offer_events([NewEvent(event_id=str(number), user_id=1, item_id=2)])
    while number % 10 == 9 and log.count("events", "written") <= number:
        time.sleep(0.01)
print("ready", flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGKILL)
        process.wait(WAIT_S)
    finally:
        process.kill()
        process.communicate()
    assert sorted(int(row["event_id"]) for row in rows_in(tmp_path, "events")) == list(range(20))
    for path in tmp_path.rglob("*.parquet"):
        pq.read_table(path)


def test_a_place_that_cannot_be_a_folder_is_refused_at_once(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^traffic\.uri: .*file/log cannot be written to"):
        TrafficLog(str(tmp_path / "file" / "log"))
    with pytest.raises(ConfigError, match=r"^traffic\.uri: nowhere://log cannot be written to"):
        TrafficLog("nowhere://log")


def test_an_object_store_that_is_away_does_not_keep_a_gateway_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def away(uri: str) -> Any:
        raise OSError("no route to the store")

    real = storage.resolve
    monkeypatch.setattr(storage, "resolve", away)
    log = TrafficLog("s3://bucket/log", rotate_rows=1)
    assert "does not answer now" in caplog.text
    log.offer_events([NewEvent(event_id="e", user_id=1, item_id=2)])
    wait_for(lambda: "cannot be written now" in caplog.text)
    monkeypatch.setattr(storage, "resolve", lambda uri: real(str(uri).replace("s3://bucket", str(tmp_path))))
    log.close()
    assert len(rows_in(tmp_path / "log", "events")) == 1


# ---------------------------------------------------------------- the sample
def test_the_sample_depends_on_the_id_alone_and_larger_shares_hold_smaller_ones(tmp_path: Path):
    ids = [f"request-{number}" for number in range(20_000)]
    shares = {share: {one for one in ids if in_sample(one, share)} for share in (0.0, 0.01, 0.1, 0.5, 1.0)}
    assert [len(chosen) for chosen in shares.values()] == pytest.approx([0, 200, 2_000, 10_000, 20_000], rel=0.1)
    sizes = list(shares.values())
    assert all(small <= large for small, large in pairwise(sizes))
    log = TrafficLog(str(tmp_path), sample=0.1)
    assert {one for one in ids if log.wants(one)} == shares[0.1]
    log.close()

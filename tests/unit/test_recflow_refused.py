"""What RecFlow's loader refuses, what it settles and counts, and that it neither runs a file nor holds a day."""

import collections
import os
import pickle
import re
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest

from raycascade.datasets import _recflow_buckets, _recflow_day, _recflow_pickle
from raycascade.datasets._recflow_pickle import read_pairs
from raycascade.errors import ConfigError, DataError
from tests import recflow_world as world
from tests.recflow_broken import change_pickle, change_rows
from tests.recflow_cases import BY_HAND, DAY, RANKS, by_id, dataset, one_request, rows_of

DAYS = ["2024-01-13", "2024-01-14", "2024-01-15"]
PER_DAY = 12


def broken(root: Path, kind: str) -> Path:
    world.write_recflow(root, DAYS, PER_DAY, 5, broken=kind)
    return root


def _pass_over(log: Any) -> None:
    for piece in log.slices():
        for _ in log.read(piece):
            pass
    log.items()


def refusal(raw: Path, **options: Any) -> str:
    """The one line of the error of a first pass over log and items."""
    log = dataset(raw, **options)
    with pytest.raises(DataError) as seen:
        _pass_over(log)
    assert "\n" not in str(seen.value)
    assert str(raw) in str(seen.value)
    return str(seen.value)


@pytest.mark.parametrize(("kind", "words"), [
    ("empty_file", "2024-01-15.feather is empty: the repository ships placeholders, download the data itself"),
    ("empty_pickle", "request_id_dict/2024-01-15.pkl is empty: the repository ships placeholders"),
    ("hostile_pickle", r"(posix|nt).mkdir is not allowed in a RecFlow pickle \(.*request_id_dict/2024-01-15.pkl\); the "
                       "file may be corrupt or hostile"),
    ("wrong_width", r"request_id_dict: request \d+, stage rank_pos: expected int64 \[n, 8\], got float64 \[3, 7\]"),
    ("object_array", "arrays of type 'O8' are not allowed in a RecFlow pickle"),
    ("no_dictionary", r"request \d+: expected a dictionary of stages, got ndarray"),
    ("text_key", "the key 'first' is not a request id"),
    ("narrow_history", r"seq_effective_50_dict: request \d+: expected int64 \[50, 10\], got int64 \[50, 9\]"),
    ("cut_pickle", "request_id_dict/2024-01-15.pkl: the file ends in the middle"),
    ("missing_column", r"missing column\(s\) rank_index, like; found request_id, request_timestamp, user_id"),
    ("clashing_columns", "two columns are called 'like' but for spaces"),
    ("fractional_column", r"column age must hold integers, got \d.5 in row 3"),
    ("missing_history", r"7 requests have no history in seq_effective_50_dict: 24, 25, 26, 27, 28;"),
    ("missing_rank", r"no rank_index for \(request \d+, video \d+\): all_stage has no such row with rank_pos = 1"),
    ("unknown_request", "1 requests of request_id_dict have no row in all_stage, so no user and no time: 987654"),
    ("user_conflict", "user fields differ within 12 of 12 requests, more than 0.1 %"),
    ("other_day", r"\d+ of 12 requests lie outside the file's day in UTC\+8"),
    ("id_over_count", r"video_id \d+ >= id_cnt 1000"),
    ("feather_1", "is Feather version 1, which is not read in pieces; rewrite it as version 2"),
])
def test_a_damaged_log_is_refused_in_one_line(tmp_path: Path, kind: str, words: str):
    raw = broken(tmp_path, kind)
    line = refusal(raw)
    assert re.search(words, line), line


def test_a_folder_that_is_no_root_is_refused_with_what_it_holds(tmp_path: Path):
    (tmp_path / "kuairand").mkdir()
    (tmp_path / "kuairand/log.csv").write_text("x")
    assert "not a RecFlow root: expected all_stage/" in refusal(tmp_path)
    assert "found kuairand" in refusal(tmp_path)
    assert "found nothing" in refusal(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"paths.raw: is empty"):
        dataset(Path()).__class__(dataset(Path()).config, raw="").slices()


def test_a_missing_day_is_refused_with_every_file_it_lacks_or_left_out_on_request(tmp_path: Path):
    raw = broken(tmp_path, "missing_day")
    line = refusal(raw)
    for file in ("all_stage/2024-01-14.feather", "request_id_dict/2024-01-14.pkl"):
        assert file in line
    assert "issue 8" in line
    assert "seq_effective_50_dict/2024-01-14.pkl" not in line
    log = dataset(raw, missing_days="skip")
    assert log.slices() == [DAYS[0], DAYS[2]]
    assert sum(log.notes.values()) == 2
    assert "all_stage/2024-01-16.feather" in refusal(raw, first_day="2024-01-15", last_day="2024-01-16")


def test_a_log_without_stage_candidates_has_no_lists(tmp_path: Path):
    world.write_recflow(tmp_path, DAYS, PER_DAY, 5)
    for day in DAYS:
        (tmp_path / f"request_id_dict/{day}.pkl").unlink()
    assert "the folder request_id_dict/ is missing" in refusal(tmp_path)
    assert len(rows_of(tmp_path, source="all_stage")) == 3 * PER_DAY


def test_a_hostile_pickle_runs_nothing(tmp_path: Path):
    raw = broken(tmp_path, "hostile_pickle")
    refusal(raw)
    assert not (raw / "marker").exists()
    pickle.loads((raw / f"request_id_dict/{DAYS[-1]}.pkl").read_bytes())
    assert (raw / "marker").exists(), "a reader that executes the file makes it, so that the test can fail"


@pytest.mark.parametrize("kind", ["float_column", "extra_column", "extra_stage"])
def test_what_does_no_harm_changes_no_row_but_is_noted(tmp_path: Path, kind: str):
    world.write_recflow(tmp_path / "clean", DAYS, PER_DAY, 5)
    raw = broken(tmp_path / "broken", kind)
    log = dataset(raw)
    rows = pa.concat_tables([table for piece in log.slices() for table in log.read(piece)])
    assert rows.equals(rows_of(tmp_path / "clean"))
    noted = {"float_column": None, "extra_column": "files with the unknown column 'watched', which is not read",
             "extra_stage": "requests with the unknown stage key 'recall_neg', which is not read"}[kind]
    assert {message for message in log.notes if "unknown" in message} == ({noted} if noted else set())


def test_repeated_rows_join_their_flags_and_keep_the_first_rank(tmp_path: Path):
    world.write_recflow(tmp_path / "clean", DAYS, PER_DAY, 5)
    raw = broken(tmp_path / "broken", "duplicate_rows")
    log = dataset(raw)
    rows = pa.concat_tables([table for piece in log.slices() for table in log.read(piece)])
    assert rows.equals(rows_of(tmp_path / "clean"))
    (noted,) = (count for message, count in log.notes.items() if "repeat a (request, video)" in message)
    assert noted == 20


def test_a_request_without_history_may_get_an_empty_one(tmp_path: Path):
    raw = broken(tmp_path, "missing_history")
    log = dataset(raw, missing_history="empty")
    rows = by_id(pa.concat_tables([table for piece in log.slices() for table in log.read(piece)]))
    assert [rows[request]["history"] for request in range(24, 31)] == [None] * 7
    assert log.notes["requests have no history, and got an empty one (missing_history: empty)"] == 7


def test_a_candidate_without_rank_may_get_the_worst_of_its_group(tmp_path: Path):
    one_request(tmp_path, BY_HAND, {5: 3, 9: 0, 2: 20})
    assert "no rank_index for (request 17, video 9)" in refusal(tmp_path)
    (row,) = rows_of(tmp_path, missing_rank="last").to_pylist()
    assert row["relevance"][:3] == [27, 10, 10]


def test_a_short_group_may_be_refused(tmp_path: Path):
    one_request(tmp_path, BY_HAND, RANKS)
    assert "request 17 has 3 candidates of 10 in rank_pos; set short_list" in refusal(tmp_path, short_list="raise")


def test_a_user_that_differs_in_one_of_many_requests_is_the_first_rows(tmp_path: Path):
    clean = rows_of(_grown(tmp_path, 18))

    def change(table: pa.Table) -> pa.Table:
        last = int(np.flatnonzero(table["request_id"].to_numpy() == 7)[-1])
        age = table["age"].to_numpy().copy()
        age[last] += 1
        return table.set_column(table.column_names.index("age"), "age", pa.array(age))

    change_rows(tmp_path, DAY, change)
    log = dataset(tmp_path)
    assert pa.concat_tables(list(log.read(DAY))).equals(clean)
    assert log.notes["requests have user fields that differ; the first row's are kept"] == 1


def test_a_video_whose_fields_differ_keeps_the_first_ones(tmp_path: Path):
    world.write_recflow(tmp_path, [DAY], PER_DAY, 5)

    def change(content: dict[int, dict[str, np.ndarray]]) -> None:
        request = content[max(content)]["rank_pos"]
        changed = request.copy()
        changed[0, 1] += 1
        content[max(content)]["prerank_neg"] = np.concatenate([changed[:1], content[max(content)]["prerank_neg"]])

    before = dataset(tmp_path).items()
    change_pickle(tmp_path, "request_id_dict", DAY, change)
    log = dataset(tmp_path)
    after = {row["item_id"]: row for row in log.items().to_pylist()}
    for row in before.to_pylist():
        assert after.get(row["item_id"], row) == row
    assert sum(log.notes.values()) == 1


def test_a_pyarrow_without_lz4_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    world.write_recflow(tmp_path, [DAY], PER_DAY, 5)

    class NoCodec:
        @staticmethod
        def is_available(name: str) -> bool:
            return name != "lz4"

    monkeypatch.setattr(pa, "Codec", NoCodec)
    assert "this pyarrow has no LZ4; install" in refusal(tmp_path)


def test_the_readmes_name_of_a_test_set_comes_before_the_codes(tmp_path: Path):
    world.write_recflow(tmp_path, [DAY], PER_DAY, 5, test_names="code")
    log = dataset(tmp_path)
    assert log.files.test_set("retrieval") == "others/recall_test.feather"
    assert sum(len(table) for table in log.test_set("rank")) == len(
        pyarrow.feather.read_table(str(tmp_path / f"all_stage/{DAY}.feather")))
    world.write_feather(tmp_path / "others/retrieval_test.feather", pa.table({" x": [1]}))
    both = dataset(tmp_path)
    assert both.files.test_set("retrieval") == "others/retrieval_test.feather"
    assert next(both.test_set("retrieval")).column_names == ["x"]
    (tmp_path / "others/prerank_test.feather").unlink()
    without = dataset(tmp_path)
    with pytest.raises(DataError, match=r"neither others/coarse_rank_test.feather nor"):
        without.files.test_set("coarse_rank")


def test_a_request_outside_its_files_day_counts_at_its_edge(tmp_path: Path):
    world.write_recflow(tmp_path, [DAY], 200, 5, edge_cases=False)

    def change(table: pa.Table) -> pa.Table:
        time_ms = table["request_timestamp"].to_numpy().copy()
        time_ms[table["request_id"].to_numpy() == 9] = world.midnight_ms(DAY) - 5
        return table.set_column(1, "request_timestamp", pa.array(time_ms))

    change_rows(tmp_path, DAY, change)
    assert by_id(rows_of(tmp_path))[9]["time_ms"] == world.midnight_ms(DAY)


# ---------------------------------------------------------------- the reader of pickles
def _write(path: Path, content: object, protocol: int) -> str:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return str(path)


def _same(one: object, other: object) -> bool:
    if isinstance(other, np.ndarray):
        return isinstance(one, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(other, dict):
        return isinstance(one, dict) and all(_same(one[key], other[key]) for key in other) and len(one) == len(other)
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_reader_gives_what_pickle_gives(tmp_path: Path, protocol: int):
    draw = np.random.default_rng(0)
    shared = np.zeros((0, 8), np.int64)
    content: dict[Any, Any] = {
        1: draw.integers(0, 9, (50, 10)), 70_000: np.asfortranarray(draw.integers(0, 9, (4, 8))), 2**40: shared,
        -3: {"rank_pos": shared, "realshow": draw.integers(0, 2**40, (300, 8)).astype(">i8")}, "text": (1, "a", None),
        5: [True, 2.5, b"bytes" * 100, "x" * 400], 6: draw.normal(size=(2, 3)).astype(np.float32), 7: (), 8: {},
    }
    uri = _write(tmp_path / "x.pkl", content, protocol)
    assert _same(dict(pair for pairs in read_pairs(uri) for pair in pairs), content)


@pytest.mark.parametrize("protocol", [2, 4])
def test_an_array_that_many_requests_share_is_found_again(tmp_path: Path, protocol: int):
    shared = np.arange(16).reshape(2, 8)
    content = {number: {"rank_pos": shared if number % 3 else np.full((1, 8), number)} for number in range(3_000)}
    batches = list(read_pairs(_write(tmp_path / "x.pkl", content, protocol)))
    assert len(batches) > 2
    assert [key for pairs in batches for key, _ in pairs] == list(content)
    assert _same(dict(pair for pairs in batches for pair in pairs), content)


class _Calls:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class _WithState:
    def __reduce__(self) -> Any:
        return collections.OrderedDict, (), {"x": 1}


@pytest.mark.parametrize("value", [
    _Calls(os.getcwd), _Calls(eval, "1"), _Calls(getattr, 1, "real"), _WithState(), os.getcwd, {1, 2},
    _Calls(bytes, 99), _Calls(int, "5"), np.array(["text"]), np.array([None]), np.zeros(2, [("a", int)]),
    np.ma.ones(2), 1j, str, range(3),
], ids=["getcwd called", "eval", "getattr", "with a state", "getcwd", "set", "bytes of a number", "int of a text",
         "array of texts", "array of objects", "records", "masked", "complex", "type", "range"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_but_plain_values_is_read(tmp_path: Path, value: Any, protocol: int):
    uri = _write(tmp_path / "x.pkl", {1: value}, protocol)
    with pytest.raises(DataError, match=r"x\.pkl"):
        list(read_pairs(uri))


@pytest.mark.parametrize("content", [
    b"", b"no pickle", b"\x80\x03}q\x00.x"[:4], pickle.dumps([1]), pickle.dumps({1: 2}, protocol=0),
    b"\x80\x03}K\x01B\xff\xff\xff\xff.", b"\x80\x03h\x05.", b"\x80\x03R.", b"\x80\x03u.", b"\x80\x03(.",
    b"\x80\x04\x82\x01.", b"\x80\x03}cos\nsystem\n.", b"\x80\x03}X\x01\x00\x00\x00\xff.",
])
def test_damaged_pickles_are_refused_in_one_line(tmp_path: Path, content: bytes):
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.pkl") as seen:
        list(read_pairs(str(tmp_path / "x.pkl")))
    assert "\n" not in str(seen.value)


@pytest.mark.parametrize("module", ["utils", "__main__", "os"])
def test_the_authors_factories_are_replaced_and_their_modules_never_imported(tmp_path: Path, module: str):
    named = f"c{module}\ndefaultdict_tuple\n".encode()
    (tmp_path / "x.pkl").write_bytes(b"\x80\x03ccollections\ndefaultdict\n" + named + b"\x85RK\x05K\x06s.")
    assert list(read_pairs(str(tmp_path / "x.pkl"))) == [[(5, 6)]]
    assert "utils" not in sys.modules


# ---------------------------------------------------------------- memory
class _SmallBatches(pickle._Pickler):  # type: ignore[name-defined]
    """A dictionary is written, and so read, 1,000 entries at a time, which is more than this test's small day has."""

    _BATCHSIZE = 50


def _grown(root: Path, times: int) -> Path:
    """A day of one log, so many times over under new request ids, in record batches of 4,096 rows."""
    folders = ("request_id_dict", "seq_effective_50_dict")
    world.write_recflow(root, [DAY], 60, 5, edge_cases=False)
    path = root / f"all_stage/{DAY}.feather"
    table = pyarrow.feather.read_table(str(path), memory_map=False)
    ids = table["request_id"].to_numpy()
    copies = [table.set_column(0, "request_id", pa.array(ids + 1_000 * n)) for n in range(times)]
    world.write_feather(path, pa.concat_tables(copies).combine_chunks(), rows=4_096)
    for folder in folders:
        content = pickle.loads((root / folder / f"{DAY}.pkl").read_bytes())
        copied = {key + 1_000 * n: value.copy() if folder == folders[1] else {k: v.copy() for k, v in value.items()}
                  for n in range(times) for key, value in content.items()}
        with (root / folder / f"{DAY}.pkl").open("wb") as stream:
            _SmallBatches(stream, 3).dump(copied)
    return root


def _peak(raw: Path) -> tuple[int, int]:
    """The most bytes that Python, NumPy and Arrow hold while a day is read; and its requests."""
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    log = dataset(raw)
    log.slices()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        requests = sum(len(table) for table in log.read(DAY))
        peak = tracemalloc.get_traced_memory()[1] + (pool.max_memory() or 0)
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    return peak, requests


def test_a_day_that_grows_ten_times_takes_no_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_recflow_day, "BUCKET_BYTES", 1 << 18)
    monkeypatch.setattr(_recflow_buckets, "HELD_BYTES", 1 << 18)
    monkeypatch.setattr(_recflow_pickle, "PAIRS_AT_A_TIME", 16)
    monkeypatch.setattr(_recflow_pickle, "BUFFER_BYTES", 1 << 14)
    _peak(_grown(tmp_path / "warm", 1))  # modules that are imported on first use
    small, few = _peak(_grown(tmp_path / "small", 3))
    raw = _grown(tmp_path / "large", 30)
    large, many = _peak(raw)
    assert many == 10 * few
    assert large < 1.5 * small
    rows = pyarrow.feather.read_table(str(raw / f"all_stage/{DAY}.feather"))
    assert large < rows.nbytes / 2

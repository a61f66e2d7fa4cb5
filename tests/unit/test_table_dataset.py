"""The log that is described in YAML: every option against hand-written files, every bad input against its one line."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from raycascade import plugins
from raycascade.datasets import _files
from raycascade.datasets._impressions import to_requests
from raycascade.errors import ConfigError, DataError, RaycascadeError

FEATURES: list[dict[str, Any]] = [
    {"kind": "id", "name": "city", "side": "user"}, {"kind": "dense", "name": "age_years", "side": "user"},
    {"kind": "id", "name": "author", "side": "item"}, {"kind": "ids", "name": "tags", "side": "item"},
    {"kind": "clock", "name": "hour", "part": "hour"}, {"kind": "history", "max_len": 3},
    {"kind": "id", "name": "action", "side": "event"}, {"kind": "age", "name": "event_age", "side": "event"},
]
OPTIONS: dict[str, Any] = {
    "log": "log*", "columns": {"user_id": "uid", "item_id": "vid", "time": "ts", "request_id": "rid"},
    "features": FEATURES, "labels": {"long_view": {"column": "watch_ratio", "above": 0.7}, "click": "clicked"},
    "positive": "long_view", "event_columns": {"action": "long_view"}, "list_separator": "|",
}
LOG = pa.table({
    "uid": ["ann", "ann", "bob", "ann"], "vid": [7, 8, 7, 9], "ts": [1_000, 2_000, 3_000, 4_000],
    "rid": ["r1", "r1", "r2", "r3"], "city": [1, 1, None, 1], "age_years": [30.5, 30.5, None, 31.0],
    "author": [70, 80, 71, 90], "tags": ["x|y", None, "z", "y"], "watch_ratio": [0.7, 0.9, None, 1.5],
    "clicked": [0, 1, None, 1],
})
SUFFIXES = ["parquet", "csv", "csv.gz"]


def write(folder: Path, name: str, table: pa.Table) -> None:
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(table, path)
    elif name.endswith(".gz"):
        sink = pa.BufferOutputStream()
        pacsv.write_csv(table, sink)
        path.write_bytes(gzip.compress(sink.getvalue().to_pybytes()))
    else:
        pacsv.write_csv(table, path)


def dataset(raw: "Path | str", **options: Any) -> Any:
    plugin, config = plugins.options("datasets", {"name": "table", **OPTIONS, **options}, "dataset")
    return plugin(config, raw=str(raw))


def rows_of(log: Any) -> pa.Table:
    return pa.concat_tables([table for piece in log.slices() for table in log.read(piece)], promote_options="default")


def replaced(name: str, values: Any) -> pa.Table:
    column = values if isinstance(values, pa.Array) else pa.array(values)
    return LOG.set_column(LOG.column_names.index(name), name, column)


def read_everything(raw: Path, **options: Any) -> None:
    log = dataset(raw, **options)
    rows_of(log)
    log.items()


def refused(raw: Path, expected: str, **options: Any) -> None:
    """Reading the items and all rows fails with one line that holds `expected`."""
    with pytest.raises(RaycascadeError, match=expected) as caught:
        read_everything(raw, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_same_canonical_rows(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, f"log.{suffix}", LOG)
    rows = rows_of(dataset(tmp_path))
    assert rows.to_pydict() == {
        "user_id": ["ann", "ann", "bob", "ann"], "item_id": [7, 8, 7, 9], "request_id": ["r1", "r1", "r2", "r3"],
        "time_ms": [1_000, 2_000, 3_000, 4_000], "city": [1, 1, None, 1], "age_years": [30.5, 30.5, None, 31.0],
        "long_view": [0, 1, None, 1], "click": [0, 1, None, 1], "action": [0, 1, None, 1],
    }
    assert rows.schema.field("long_view").type == pa.int8()
    assert rows.schema.field("time_ms").type == pa.int64()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_without_an_items_table_items_are_those_of_the_log_with_their_earliest_features(
    tmp_path: Path, suffix: str
) -> None:
    later = replaced("author", [1, 2, 3, 4]).slice(0, 1).set_column(2, "ts", pa.array([9_000]))
    write(tmp_path, f"log_1.{suffix}", later)
    write(tmp_path, f"log_2.{suffix}", LOG)
    items = dataset(tmp_path).items()
    assert items.to_pydict() == {"item_id": [7, 8, 9], "author": [70, 80, 90], "tags": [["x", "y"], [], ["y"]]}


def test_the_distinct_items_do_not_depend_on_how_often_they_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    size = 5_000
    log = pa.table({"uid": rng.integers(9, size=size), "vid": rng.integers(200, size=size), "ts": rng.permutation(size),
                    "author": rng.integers(99, size=size)})
    pq.write_table(log, tmp_path / "log.parquet", row_group_size=100)
    options = {"features": [FEATURES[2]], "labels": {}, "positive": "", "event_columns": {}, "request_by": "row"}
    options["columns"] = {"user_id": "uid", "item_id": "vid", "time": "ts"}
    monkeypatch.setattr("raycascade.datasets.table.ITEM_ROWS", 150)
    monkeypatch.setattr(_files, "PIECE_BYTES", 1)
    expected = log.to_pandas().sort_values("ts").drop_duplicates("vid").sort_values("vid")
    items = dataset(tmp_path, **options).items()
    assert items["item_id"].to_pylist() == expected["vid"].to_list()
    assert items["author"].to_pylist() == expected["author"].to_list()


def test_an_items_table_gives_the_catalogue_and_is_not_part_of_the_log(tmp_path: Path) -> None:
    write(tmp_path, "log.parquet", LOG.drop_columns(["author", "tags"]))
    items = pa.table({"vid": [9, 7, 8], "author": ["a", "b", None], "tags": [[1, 2], None, [3]]})
    write(tmp_path, "log_items.parquet", items)
    log = dataset(tmp_path, items="log_items.parquet")
    assert len(rows_of(log)) == 4
    assert log.items().to_pydict() == {"item_id": [9, 7, 8], "author": ["a", "b", None], "tags": [[1, 2], [], [3]]}


def test_the_rows_become_requests_with_the_users_past_as_history(tmp_path: Path) -> None:
    write(tmp_path, "log.parquet", LOG)
    log = dataset(tmp_path, exclude_seen=True)
    table = next(to_requests(rows_of(log), log.schema(), history_len=log.history_len, exclude_seen=log.exclude_seen,
                             duplicates=log.duplicates, gap_minutes=log.gap_minutes))
    last = table.to_pylist()[1]
    assert (last["request_id"], last["candidates"]) == ("r3", [9])
    assert (last["history"], last["history_action"]) == ([7, 8], [0, 1])
    assert last["exclude"] == [7, 8]


@pytest.mark.parametrize(("unit", "values", "expected"), [
    ("ms", [1_650_812_741_436], 1_650_812_741_436),
    ("s", [1_650_812_741.436], 1_650_812_741_436),
    ("us", [1_650_812_741_436_999], 1_650_812_741_436),
    ("iso", ["2022-04-24T15:05:41.436Z"], 1_650_812_741_436),
    ("iso", ["2022-04-24 23:05:41.436+08:00"], 1_650_812_741_436),
    ("iso", ["2022-04-24T23:05:41.436"], 1_650_812_741_436),  # the zone is the one of utc_offset_hours
    ("iso", ["2022-04-25"], 1_650_816_000_000),
])
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_every_unit_of_time_gives_unix_milliseconds(
    tmp_path: Path, suffix: str, unit: str, values: list[Any], expected: int
) -> None:
    write(tmp_path, f"log.{suffix}", LOG.slice(0, 1).set_column(2, "ts", pa.array(values)))
    log = dataset(tmp_path, time_unit=unit, utc_offset_hours=8)
    assert rows_of(log)["time_ms"].to_pylist() == [expected]


def test_timestamps_of_parquet_need_no_unit(tmp_path: Path) -> None:
    moments = pa.array([0, 1_500_000, 2_000_000, 3_000_000], pa.timestamp("us", "Europe/Berlin"))
    write(tmp_path, "log.parquet", replaced("ts", moments))
    assert rows_of(dataset(tmp_path))["time_ms"].to_pylist() == [0, 1_500, 2_000, 3_000]


def test_requests_can_be_made_of_days_gaps_or_rows(tmp_path: Path) -> None:
    write(tmp_path, "log.parquet", LOG.drop_columns(["rid"]))
    columns = {"user_id": "uid", "item_id": "vid", "time": "ts"}
    by = {by: dataset(tmp_path, columns=columns, request_by=by, request_gap_minutes=1 / 60, utc_offset_hours=-1)
          for by in ("day", "row", "gap")}
    days = rows_of(by["day"])["request_id"].to_pylist()
    assert days == ["ann-19691231", "ann-19691231", "bob-19691231", "ann-19691231"]
    assert rows_of(by["row"])["request_id"].to_pylist() == ["ann-1000-7", "ann-2000-8", "bob-3000-7", "ann-4000-9"]
    assert rows_of(by["gap"])["request_id"].null_count == 4
    assert (by["gap"].gap_minutes, by["day"].gap_minutes) == (1 / 60, None)


def test_event_features_read_a_label_a_mapped_column_or_their_own(tmp_path: Path) -> None:
    write(tmp_path, "log.parquet", LOG.append_column("action", pa.array(["a", "b", "c", "d"])))
    assert rows_of(dataset(tmp_path, event_columns={}))["action"].to_pylist() == ["a", "b", "c", "d"]
    assert rows_of(dataset(tmp_path, event_columns={"action": "author"}))["action"].to_pylist() == [70, 80, 71, 90]


def test_all_csv_files_are_read_with_the_types_of_the_first(tmp_path: Path) -> None:
    write(tmp_path, "log_1.csv", replaced("city", ["a", "b", "c", None]))
    write(tmp_path, "log_2.csv", replaced("city", [1, 2, None, None]))
    write(tmp_path, "log_3.csv", replaced("city", pa.nulls(4)))
    log = dataset(tmp_path)
    tables = [table for piece in log.slices() for table in log.read(piece)]
    assert pa.concat_tables(tables)["city"].to_pylist()[3:7] == [None, "1", "2", None]
    write(tmp_path, "log_1.csv", LOG)
    write(tmp_path, "log_2.csv", replaced("city", ["a", "b", "c", None]))
    refused(tmp_path, "log_2.csv: cannot be read as CSV .*invalid value 'a'")


def test_numbers_can_be_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,time_ms\n007,1,5\n7,2,6\n")
    options = {"columns": {}, "labels": {}, "positive": "", "event_columns": {}, "request_by": "row"}
    features = [{"kind": "history"}]
    assert rows_of(dataset(tmp_path, features=features, **options))["user_id"].to_pylist() == [7, 7]
    rows = rows_of(dataset(tmp_path, features=features, text_columns=["user_id"], **options))
    assert rows["user_id"].to_pylist() == ["007", "7"]


def test_pieces_are_ranges_of_row_groups_that_hold_every_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(LOG, tmp_path / "log.parquet", row_group_size=1)
    monkeypatch.setattr(_files, "PIECE_BYTES", 2_000)
    log = dataset(tmp_path)
    assert len(log.slices()) > 1
    assert rows_of(log)["item_id"].to_pylist() == LOG["vid"].to_pylist()


def test_tables_stay_below_the_bound_even_where_a_batch_is_larger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_files, "TABLE_BYTES", 20_000)
    many = pa.concat_tables([LOG] * 500)
    for suffix in SUFFIXES:
        write(tmp_path, f"log.{suffix}", many)
        log = dataset(tmp_path)
        tables = list(log.read(log.slices()[0]))
        assert sum(map(len, tables)) == 2_000
        assert max(table.nbytes for table in tables) < 40_000
        (tmp_path / f"log.{suffix}").unlink()


def test_a_pattern_reaches_into_folders_only_where_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "day=1" / "hour=2").mkdir(parents=True)
    write(tmp_path, "day=1/hour=2/log.parquet", LOG)
    for pattern in ("day=*/*/log.parquet", "**/log.parquet"):
        assert len(rows_of(dataset(tmp_path, log=pattern))) == 4
    refused(tmp_path, "no file matches 'log.parquet'; the folder holds day=1/hour=2/log.parquet", log="log.parquet")


REQUESTS = pa.table({
    "rid": ["a", "b"], "uid": [1, 2], "ts": [5, 6], "city": ["x", None], "age_years": [1, 2],
    "history": [[7, 8], []], "history_time_ms": [[1, 2], []], "history_action": [[1, 0], []],
    "shown": [[9, 7], [8]], "watch_ratio": [[0.9, None], [0.1]], "clicked": [[1, 0], [None]],
    "reached": [[2, 1], [2]], "untouched": [0, 0],
})
REQUEST_OPTIONS: dict[str, Any] = {
    "layout": "requests", "event_columns": {}, "features": [f for f in FEATURES if f.get("side") != "item"],
    "columns": {"user_id": "uid", "time": "ts", "request_id": "rid", "candidates": "shown"},
}


def test_lists_of_requests_pass_under_canonical_names_and_labels_are_thresholded_inside_them(tmp_path: Path) -> None:
    write(tmp_path, "log.parquet", REQUESTS)
    log = dataset(tmp_path, **REQUEST_OPTIONS)
    assert log.form == "requests"
    assert rows_of(log).to_pydict() == {
        "request_id": ["a", "b"], "user_id": [1, 2], "time_ms": [5, 6], "city": ["x", None], "age_years": [1.0, 2.0],
        "candidates": [[9, 7], [8]], "history": [[7, 8], []], "history_action": [[1, 0], []], "reached": [[2, 1], [2]],
        "history_time_ms": [[1, 2], []], "long_view": [[1, None], [0]], "click": [[1, 0], [None]],
    }
    assert log.items().to_pydict() == {"item_id": [7, 8, 9]}


def test_requests_with_item_features_need_an_items_table_and_parquet(tmp_path: Path) -> None:
    write(tmp_path, "log.parquet", REQUESTS)
    refused(tmp_path, "feature 'author' needs an items table", **{**REQUEST_OPTIONS, "features": FEATURES})
    columns = {**REQUEST_OPTIONS["columns"], "candidates": "untouched"}
    refused(tmp_path, "log.parquet: column 'untouched' must hold lists, got int64",
            **{**REQUEST_OPTIONS, "columns": columns})
    (tmp_path / "log.parquet").unlink()
    write(tmp_path, "log.csv", LOG)
    refused(tmp_path, "layout: requests needs Parquet", **REQUEST_OPTIONS)


@pytest.mark.parametrize(("name", "values", "expected"), [
    ("uid", ["a", None, "b", "c"], r"column 'uid' is null in row 1 \(1 such rows\)"),
    ("vid", [1.5, 2.0, 3.0, 4.0], "column 'vid' holds ids that are not whole numbers"),
    ("vid", [[1], [2], [3], [4]], "column 'vid' must hold integers or text, got list"),
    ("rid", ["a", None, "b", "c"], "column 'rid' is null in row 1"),
    ("ts", [1, None, 3, 4], "column 'ts' is null in row 1"),
    ("ts", [1, -2, 3, 4], "column 'ts' with time_unit ms gives -2 ms, which is not a time from 1970 to 2200"),
    ("ts", [1_650_812_741_436_999] * 4, "time_unit ms gives 1.65081e.15 ms, which is not a time"),
    ("ts", [1.0, float("nan"), 3.0, 4.0], "gives nan ms, which is not a time"),
    ("ts", ["2022-04-30"] * 4, r"column 'ts' must hold times as numbers \(ms\), got text; set time_unit: iso"),
    ("clicked", [0, 1, 2, 0], r"label 'click' must be 0, 1 or null, got 2 in column 'clicked'; .*\{column: "),
    ("clicked", [0.0, 0.5, 1.0, 0.0], "label 'click' must be 0, 1 or null, got 0.5"),
    ("clicked", ["no", "no", "no", "yes"], "column 'clicked' must hold numbers, got string"),
    ("watch_ratio", [0.1, float("nan"), 0.3, 0.4], "label 'long_view': column 'watch_ratio' holds NaN; write null"),
    ("age_years", ["old"] * 4, "column 'age_years' must hold numbers, got string; cast the column or declare it"),
    ("tags", [1, 2, 3, 4], "column 'tags' must hold lists, got int64"),
])
def test_a_bad_column_of_parquet_is_one_line_with_the_files_name(
    tmp_path: Path, name: str, values: list[Any], expected: str
) -> None:
    write(tmp_path, "log.parquet", replaced(name, values))
    refused(tmp_path, f"log.parquet: .*{expected}")


@pytest.mark.parametrize("name", ["ts", "clicked", "age_years"])
def test_text_among_the_numbers_of_a_csv_is_one_line_with_the_files_name(tmp_path: Path, name: str) -> None:
    write(tmp_path, "log.csv", replaced(name, ["0", "1", "soon", "0"]))
    refused(tmp_path, "log.csv: cannot be read as CSV .*invalid value 'soon'")


def test_a_time_that_cannot_be_parsed_is_shown(tmp_path: Path) -> None:
    write(tmp_path, "log.parquet", replaced("ts", ["2022-04-30", "2022-04-30T10:00Z", "30.4.2022", "2022-05-01"]))
    refused(tmp_path, "log.parquet: column 'ts' holds '30.4.2022', which is not a time; write ISO", time_unit="iso")
    write(tmp_path, "log.parquet", LOG)
    refused(tmp_path, "log.parquet: column 'ts' must hold times as text, got int64; set time_unit", time_unit="iso")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_column_is_named_with_what_it_is_for_and_the_nearest_one(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, f"log.{suffix}", LOG.rename_columns({"uid": "u_id"}))
    refused(tmp_path, rf"log.{suffix}: column 'uid' \(for user_id\) is missing; did you mean 'u_id'")
    write(tmp_path, f"log.{suffix}", LOG.drop_columns(["watch_ratio"]))
    refused(tmp_path, rf"log.{suffix}: column 'watch_ratio' \(for label long_view\) is missing")
    write(tmp_path, f"log.{suffix}", LOG.drop_columns(["author"]))
    refused(tmp_path, rf"log.{suffix}: column 'author' is missing")
    write(tmp_path, f"log.{suffix}", LOG.drop_columns(["rid"]))
    refused(tmp_path, r"column 'rid' \(for request_id\) is missing; .*or set request_by to day, gap or row")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_empty_truncated_and_foreign_files_are_one_line_with_the_files_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"log.{suffix}"
    kind = "Parquet" if suffix == "parquet" else "CSV"
    write(tmp_path, path.name, pa.concat_tables([LOG] * 1000))
    whole = path.read_bytes()
    path.write_bytes(b"")
    refused(tmp_path, f"log.{suffix}: cannot be read as {kind} ")
    if suffix != "csv":  # a CSV that ends early is a shorter CSV
        path.write_bytes(whole[: len(whole) // 2])
        refused(tmp_path, f"log.{suffix}: cannot be read as {kind} ")
        path.write_bytes(b"this is something else" * 50)
        refused(tmp_path, f"log.{suffix}: cannot be read as {kind} ")


def test_a_csv_row_with_too_few_values_is_one_line_with_the_files_name(tmp_path: Path) -> None:
    write(tmp_path, "log.csv", LOG)
    with (tmp_path / "log.csv").open("a") as file:
        file.write("zoe,7\n")
    refused(tmp_path, "log.csv: cannot be read as CSV .*Expected 10 columns, got 2")


def test_a_log_without_rows_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "log.parquet", LOG.slice(0, 0))
    refused(tmp_path, "log.parquet: no file has any rows")
    (tmp_path / "log.parquet").unlink()
    write(tmp_path, "log.csv", LOG.slice(0, 0))
    with pytest.raises(DataError, match="the log has no rows, so there are no items"):
        dataset(tmp_path).items()


def test_files_that_are_not_there_or_there_twice_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, r"no file matches 'log\*'; it is empty or absent")
    refused(tmp_path / "nowhere", r"no file matches 'log\*'; it is empty or absent")
    write(tmp_path, "log.parquet", LOG)
    refused(tmp_path, "no file matches 'items.parquet'", items="items.parquet")
    refused(tmp_path, "matches only the items table log.parquet", items="log.parquet")
    write(tmp_path, "log.csv", LOG)
    refused(tmp_path, "log.csv and log.parquet are one file in two formats")
    (tmp_path / "log.csv").unlink()
    (tmp_path / "log.txt").write_text("notes")
    refused(tmp_path, "log.txt: not a format that can be read")


def test_an_empty_raw_path_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"paths.raw: is empty; set it to the folder"):
        dataset("").slices()


def test_bad_items_tables_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "log.parquet", LOG)
    items = pa.table({"vid": [1, 2, 1], "author": [1, 2, 3], "tags": [[1], [2], [3]]})
    write(tmp_path, "items.csv", items.drop_columns(["tags"]))
    refused(tmp_path, "items.csv: column 'tags' is missing", items="items.csv")
    write(tmp_path, "items.parquet", items)
    refused(tmp_path, "items.parquet: item 1 has 2 rows; keep one row per item", items="items.parquet")
    write(tmp_path, "items.parquet", items.slice(0, 0))
    refused(tmp_path, "items.parquet: has no rows", items="items.parquet")


def test_files_that_disagree_on_a_type_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "log_1.parquet", LOG)
    write(tmp_path, "log_2.parquet", replaced("author", ["a", "b", "c", "d"]))
    with pytest.raises(DataError, match=r"files disagree on a column's type .*author"):
        dataset(tmp_path).items()


@pytest.mark.parametrize(("options", "expected"), [
    ({"features": [{"kind": "idd", "name": "city", "side": "user"}]}, "dataset.features.0: .*'idd'"),
    ({"features": []}, "dataset.features: "),
    ({"layuot": "requests"}, "layuot: unknown key; did you mean 'layout'"),
    ({"time_unit": "minutes"}, "dataset.time_unit: .*got 'minutes'"),
    ({"columns": {"user": "uid"}}, "columns: 'user' is not a canonical column or a feature; did you mean 'user_id'"),
    ({"event_columns": {"acton": "click"}}, "'acton' is not a feature of side event; did you mean 'action'"),
    ({"positive": "like"}, "positive 'like' is not a label"),
    ({"labels": {"city": "clicked"}, "positive": "city"}, "'city' is declared twice"),
    ({"request_gap_minutes": 0}, "dataset.request_gap_minutes: .*greater than 0"),
])
def test_bad_options_are_one_line(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        dataset("anywhere", **options)
    assert "\n" not in str(caught.value)

"""KuaiRand in its official file layout, by hand-made files; and the real slice where it is there."""

import datetime as dt
import gzip
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from raycascade import plugins
from raycascade.datasets._impressions import check_duplicates, to_requests
from raycascade.datasets.kuairand import LABELS, LOG_COLUMNS, USER_IDS, USER_NUMBERS, VIDEO_COLUMNS
from raycascade.errors import ConfigError, DataError, RaycascadeError
from raycascade.schema import ClockFeature, HistoryFeature

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "kuairand"
CHINA = dt.timezone(dt.timedelta(hours=8))
MIDNIGHT = int(dt.datetime(2022, 4, 25, tzinfo=CHINA).timestamp() * 1000)


def exposures(rows: list[tuple[int, int, int, int]]) -> pa.Table:
    """The official 19 columns for (user, video, milliseconds after 25 April, long_view); every exposure a click."""
    user, video, after, watched = (list(column) for column in zip(*rows, strict=True))
    columns: dict[str, Any] = dict.fromkeys((
        "user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "is_like", "is_follow", "is_comment",
        "is_forward", "is_hate", "long_view", "play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time",
        "is_profile_enter", "is_rand", "tab"), [0] * len(rows))
    moments = [MIDNIGHT + value for value in after]
    return pa.table(columns | {"user_id": user, "video_id": video, "time_ms": moments, "long_view": watched,
                               "is_click": [1] * len(rows), "tab": [1] * len(rows), "date": [20220425] * len(rows)})


LOG = exposures([(5, 100, 0, 1), (5, 101, 1_000, 0), (6, 100, 2_000, 0), (5, 102, 86_400_000, 1)])
USERS = pa.table({
    "user_id": [6, 5], **{name: [1, 0] for name in USER_IDS}, **{name: [-124, 12] for name in USER_NUMBERS},
    "user_active_degree": ["full_active", "UNKNOWN"], "is_live_streamer": [-124, 1], "onehot_feat4": [2.0, None],
    "follow_user_num_range": ["0", "(10,50]"],
})
VIDEOS = pa.table({
    "video_id": [101, 100, 102], "author_id": [7, 8, 7], "video_type": ["NORMAL", "AD", "NORMAL"],
    "upload_dt": ["2022-04-10", "2022-04-09", "2022-04-11"], "upload_type": ["Web", "Web", "ShortImport"],
    "visible_status": [0.0] * 3, "video_duration": [5000.0, None, 7000.0], "music_id": [0, 9107419068, 5],
    "music_type": [9.0, None, 4.0], "tag": ["1,22", "39", None],
})
SEQUENCES = pa.table({
    "user_id": [5, 7], "history_len": [3, 9], "last_time_ms": [MIDNIGHT - 5_000, MIDNIGHT + 9_000],
    "watch_seq": [[101, 100, 102], []], "long_watch_seq": [[55, 100], []], "like_seq": [[102], []],
})
SEQUENCE_FILE = "user_sequences_to_20220424.parquet"


def write(path: Path, table: pa.Table) -> None:
    if path.name.endswith(".parquet"):
        pq.write_table(table, path)
        return
    sink = pa.BufferOutputStream()
    pacsv.write_csv(table, sink)
    content = sink.getvalue().to_pybytes()
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)


@pytest.fixture(params=["csv", "csv.gz", "parquet"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write(tmp_path / f"log_standard_4_25_to_4_30_pure.{request.param}", LOG)
    write(tmp_path / f"user_features_pure.{request.param}", USERS)
    write(tmp_path / f"video_features_basic_pure.{request.param}", VIDEOS)
    return tmp_path


def dataset(raw: Path, **options: Any) -> Any:
    plugin, config = plugins.options("datasets", {"name": "kuairand", **options}, "dataset")
    return plugin(config, raw=str(raw))


def rows_of(log: Any) -> pa.Table:
    return pa.concat_tables([table for piece in log.slices() for table in log.read(piece)])


def test_an_exposure_becomes_an_impression_with_the_users_features(folder: Path) -> None:
    rows = rows_of(dataset(folder)).to_pylist()
    assert [(row["user_id"], row["item_id"], row["time_ms"] - MIDNIGHT, row["long_view"]) for row in rows] == [
        (5, 100, 0, 1), (5, 101, 1_000, 0), (6, 100, 2_000, 0), (5, 102, 86_400_000, 1)]
    assert [row["request_id"] for row in rows] == ["5-20220425", "5-20220425", "6-20220425", "5-20220426"]
    first, third = rows[0], rows[2]
    assert (first["click"], first["like"], first["watched"], first["tab"]) == (1, 0, 1, 1)
    assert (first["user_active_degree"], first["is_live_streamer"], first["onehot_feat4"]) == ("UNKNOWN", 1, None)
    assert (first["follow_user_num"], first["register_days"]) == (12.0, 12.0)
    assert (third["is_live_streamer"], third["follow_user_num"], third["onehot_feat4"]) == (None, None, 2)


def test_videos_become_items_by_id_with_marks_of_missing_values_as_null(folder: Path) -> None:
    assert dataset(folder).items().to_pydict() == {
        "item_id": [100, 101, 102], "author_id": [8, 7, 7], "video_type": ["AD", "NORMAL", "NORMAL"],
        "upload_type": ["Web", "Web", "ShortImport"], "music_id": [9107419068, None, 5], "music_type": [None, 9, 4],
        "tag": [[39], [1, 22], []], "video_duration": [None, 5000.0, 7000.0],
        "upload_ms": [MIDNIGHT - days * 86_400_000 for days in (16, 15, 14)],
    }


def test_every_declared_column_is_there(folder: Path) -> None:
    log = dataset(folder, history_len=7)
    schema, rows, items = log.schema(), rows_of(log), log.items()
    stored = [f.name for f in schema.side("user", "context") if not isinstance(f, ClockFeature | HistoryFeature)]
    assert {*stored, *schema.labels, "watched"} <= set(rows.column_names)
    assert {f.name for f in schema.side("item") if f.kind in ("id", "ids", "dense")} <= set(items.column_names)
    assert (schema.history.max_len, log.history_len) == (7, 7)
    assert (schema.positive, schema.utc_offset_hours) == ("long_view", 8.0)


def test_a_user_without_features_has_nulls(folder: Path) -> None:
    write(folder / "log_standard_5_01_to_5_08_pure.csv", exposures([(9, 100, 0, 0)]))
    row = rows_of(dataset(folder)).to_pylist()[-1]
    assert row["user_id"] == 9
    assert {row[name] for name in (*USER_IDS, *USER_NUMBERS)} == {None}


def test_later_files_join_the_log_and_random_ones_only_on_request(folder: Path) -> None:
    write(folder / "log_standard_5_01_to_5_08_1k.csv", exposures([(6, 102, 864_000_000, 0)]))
    write(folder / "log_random_4_22_to_5_08_pure.csv", exposures([(6, 101, 5, 0)] * 2))
    (folder / "video_features_statistic_pure.csv").write_text("leaks")
    assert len(rows_of(dataset(folder))) == 5
    assert len(rows_of(dataset(folder, use_random=True))) == 7


def test_the_initial_history_is_spread_evenly_in_its_order_and_cut_into_days(folder: Path) -> None:
    late = SEQUENCES.slice(0, 1).set_column(2, "last_time_ms", pa.array([MIDNIGHT + 9_000]))
    for table, last in ((SEQUENCES, MIDNIGHT - 5_000), (late, MIDNIGHT - 1)):
        write(folder / SEQUENCE_FILE, table)
        log = dataset(folder)
        rows = rows_of(log).to_pylist()[len(LOG):]
        assert [row["item_id"] for row in rows] == [101, 100, 102]
        step = (last - (MIDNIGHT - 16 * 86_400_000)) / 3  # three exposures from 9 April on
        assert [row["time_ms"] for row in rows] == [last - math.ceil(2 * step), last - math.ceil(step), last]
        assert [row["request_id"] for row in rows] == ["5-20220414", "5-20220419", "5-20220424"]
        assert [(row["long_view"], row["watched"], row["like"]) for row in rows] == [(0, 0, 0), (1, 1, 0), (0, 0, 1)]
        untold = ("click", "follow", "comment", "forward", "hate", "tab")
        assert {row[name] for row in rows for name in untold} == {None}
        assert {row["register_days"] for row in rows} == {12.0}
    assert len(rows_of(dataset(folder, use_sequences=False))) == len(LOG)


def test_requests_of_the_log_see_the_initial_history(folder: Path) -> None:
    write(folder / SEQUENCE_FILE, SEQUENCES)
    for by, request_id in (("day", "5-20220425"), ("gap", f"5-{MIDNIGHT}")):
        log = dataset(folder, request_by=by)
        table = pa.concat_tables(to_requests(rows_of(log), log.schema(), history_len=2, exclude_seen=log.exclude_seen,
                                             duplicates=log.duplicates, gap_minutes=log.gap_minutes))
        request = next(row for row in table.to_pylist() if row["request_id"] == request_id)
        assert (request["history"], request["history_watched"]) == ([100, 102], [1, 0])
        assert (request["candidates"], request["long_view"]) == ([100, 101], [1, 0])
        assert request["exclude"] == [101, 100, 102]


def test_a_log_that_begins_within_the_initial_history_would_count_twice(folder: Path) -> None:
    write(folder / SEQUENCE_FILE, SEQUENCES)
    write(folder / "log_standard_4_08_to_4_21_pure.csv", LOG)
    with pytest.raises(ConfigError, match=r"log_standard_4_08_to_4_21_pure.csv begins before user_seq.* use_sequences"):
        dataset(folder).slices()
    assert len(dataset(folder, use_sequences=False).slices()) == 2


def test_rows_are_duplicates_only_if_all_their_columns_are_equal(folder: Path) -> None:
    again = LOG.slice(0, 2).set_column(3, "hourmin", pa.array([0, 100]))  # the second differs in a column not kept
    write(folder / "log_standard_5_01_to_5_08_pure.parquet", again)
    log = dataset(folder)
    assert len(rows_of(log)) == 6
    assert len(check_duplicates(rows_of(log), log.duplicates)) == 5


PURE = {"log_standard_4_25_to_4_30_pure.csv": LOG, "user_features_pure.csv": USERS,
        "video_features_basic_pure.csv": VIDEOS, SEQUENCE_FILE: SEQUENCES}


def read_everything(raw: Path) -> None:
    log = dataset(raw)
    rows_of(log)
    log.items()


@pytest.mark.parametrize(("file", "column"), [
    *(("log_standard_4_25_to_4_30_pure.csv", name) for name in LOG_COLUMNS),
    *(("video_features_basic_pure.csv", name) for name in VIDEO_COLUMNS),
    ("user_features_pure.csv", "user_id"), ("user_features_pure.csv", "onehot_feat17"), (SEQUENCE_FILE, "watch_seq"),
])
def test_a_missing_column_is_one_line_with_the_files_name(tmp_path: Path, file: str, column: str) -> None:
    for name, table in PURE.items():
        write(tmp_path / name, table.drop_columns([column]) if name == file else table)
    with pytest.raises(DataError, match=f"^{file}: column '{column}' is missing; "):
        read_everything(tmp_path)


@pytest.mark.parametrize(("file", "column", "values", "expected"), [
    ("log_standard_4_25_to_4_30_pure.csv", "long_view", [0, 1, 2, 0], "label 'long_view' must be 0, 1 or null"),
    ("log_standard_4_25_to_4_30_pure.csv", "user_id", [0, None, 2, 0], "column 'user_id' is null in row 1"),
    ("log_standard_4_25_to_4_30_pure.csv", "time_ms", [0, None, 2, 0], "column 'time_ms' is null in row 1"),
    ("log_standard_4_25_to_4_30_pure.csv", "time_ms", ["a"] * 4, "cannot be read as CSV .*invalid value 'a'"),
    ("user_features_pure.csv", "user_id", [5, 5], "user_id 5 has 2 rows; keep one row each"),
    ("user_features_pure.csv", "onehot_feat3", [0.5, 1.0], "'onehot_feat3' holds ids that are not whole numbers"),
    ("video_features_basic_pure.csv", "video_id", [1, 2, 1], "video_id 1 has 2 rows"),
    ("video_features_basic_pure.csv", "tag", ["1", "2,x", "3"], "'tag' must hold comma-separated integers"),
    ("video_features_basic_pure.csv", "upload_dt", ["2022-04-10", "yesterday", ""], "'upload_dt' holds 'yesterday'"),
    (SEQUENCE_FILE, "watch_seq", [1, 2], "'watch_seq' must hold lists, got int64"),
    (SEQUENCE_FILE, "last_time_ms", [None, 1], "'last_time_ms' is null in row 0"),
])
def test_a_bad_value_is_one_line_with_the_files_name(
    tmp_path: Path, file: str, column: str, values: list[Any], expected: str
) -> None:
    for name, table in PURE.items():
        if name == file:
            table = table.set_column(table.column_names.index(column), column, pa.array(values))
        write(tmp_path / name, table)
    with pytest.raises(RaycascadeError, match=f"^{file}: .*{expected}") as caught:
        read_everything(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("file", "pattern"), [
    ("log_standard_4_25_to_4_30_pure.csv", r"log_standard\*"), ("user_features_pure.csv", r"user_features\*"),
    ("video_features_basic_pure.csv", r"video_features_basic\*"),
])
def test_a_missing_or_empty_file_is_one_line(tmp_path: Path, file: str, pattern: str) -> None:
    for name, table in PURE.items():
        write(tmp_path / name, table)
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(DataError, match=f"^{file}: cannot be read as CSV"):
        read_everything(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(DataError, match=f"no file matches '{pattern}'; the folder holds "):
        read_everything(tmp_path)


def test_an_initial_history_without_a_day_in_its_name_is_refused(folder: Path) -> None:
    write(folder / "user_sequences_to_april.parquet", SEQUENCES)
    with pytest.raises(DataError, match=r"user_sequences_to_april.parquet: the name must end in the last day"):
        dataset(folder).slices()


@pytest.mark.skipif(not REAL.exists(), reason=f"the KuaiRand slice is not at {REAL}")
def test_the_real_slice_has_the_rows_users_and_videos_of_its_description() -> None:
    log = dataset(REAL, use_sequences=False)
    rows = rows_of(log)
    assert len(rows) == 94_784
    kept = check_duplicates(rows, log.duplicates)
    assert len(kept) == 94_784 - 2_750
    assert len(set(kept["user_id"].to_pylist())) == 21_184
    assert len(set(kept["item_id"].to_pylist())) == 5_564
    items = set(log.items()["item_id"].to_pylist())
    assert len(items) == 7_583
    assert set(kept["item_id"].to_pylist()) <= items
    assert all(kept[name].null_count == 0 for name in ("is_video_author", "register_days", *LABELS))


@pytest.mark.skipif(not REAL.exists(), reason=f"the KuaiRand slice is not at {REAL}")
def test_the_real_initial_history_lies_before_midnight_in_its_own_order() -> None:
    log = dataset(REAL)
    piece = next(piece for piece in log.slices() if piece.startswith("user_sequences"))
    rows = pa.concat_tables(list(log.read(piece)))
    assert len(rows) == 817_187
    assert max(rows["time_ms"].to_numpy()) < MIDNIGHT
    sequences = pq.read_table(REAL / SEQUENCE_FILE)
    assert rows["item_id"].combine_chunks().equals(sequences["watch_seq"].combine_chunks().flatten())
    some = sequences.slice(0, 1000).to_pylist()
    expected = [int(item in set(row["long_watch_seq"])) for row in some for item in row["watch_seq"]]
    assert rows["long_view"].slice(0, len(expected)).to_pylist() == expected

"""From a raw table to published shards with Ray: the numbers by hand, any number of pieces, and every bad input refused
in one line that leaves nothing behind."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import yaml

from raycascade.batch import collate
from raycascade.cli import run
from raycascade.config import Config, parse_config
from raycascade.errors import RaycascadeError
from raycascade.flows.prepare import check_items, prepare
from raycascade.shards import ShardReader, Shards

pytestmark = pytest.mark.ray

DAY_MS, START_MS = 86_400_000, 1_704_067_200_000  # 2024-01-01
FEATURES: list[dict[str, Any]] = [
    {"kind": "id", "name": "user_id", "side": "user"}, {"kind": "dense", "name": "age", "side": "user"},
    {"kind": "id", "name": "item_id", "side": "item"}, {"kind": "id", "name": "author", "side": "item"},
    {"kind": "count", "name": "views"}, {"kind": "match", "name": "same_author", "field": "author"},
    {"kind": "history", "max_len": 4}, {"kind": "id", "name": "action", "side": "event"},
    {"kind": "age", "name": "event_age", "side": "event"},
]
OPTIONS: dict[str, Any] = {
    "name": "table", "log": "log*", "items": "items*", "features": FEATURES, "labels": {"click": "click"},
    "positive": "click", "event_columns": {"action": "click"}, "columns": {"time": "ts"}, "exclude_seen": True,
}
STAGES = [{"name": "retriever", "keep": 4, "exclude": ["pair"], "model": {"name": "two_tower"}},
          {"name": "ranker", "keep": 2, "model": {"name": "mlp"}}]
ITEMS = pa.table({"item_id": np.arange(10, 20), "author": [f"author {i % 3}" for i in range(10)]})


def log() -> pa.Table:
    """Five days of twelve users, one to three items a request; every third age is missing."""
    draw, rows = np.random.default_rng(1), []
    for number in range(150):
        user, time = int(draw.integers(0, 12)), START_MS + int(draw.integers(0, 5 * DAY_MS // 1000)) * 1000
        rows += [{"request_id": f"r{number}", "user_id": user, "ts": time + 10 * i, "item_id": int(item),
                  "age": None if user % 3 == 0 else 20.0 + user, "click": int(draw.integers(0, 2))}
                 for i, item in enumerate(draw.choice(np.arange(10, 20), draw.integers(1, 4), replace=False))]
    return pa.Table.from_pylist(rows)


def write(folder: Path, name: str, table: pa.Table) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / name) if name.endswith("parquet") else pacsv.write_csv(table, folder / name)


def raw(folder: Path, *tables: pa.Table, items: pa.Table = ITEMS, suffix: str = "parquet") -> Path:
    for number, table in enumerate(tables or (log(),)):
        write(folder / "raw", f"log_{number}.{suffix}", table)
    write(folder / "raw", f"items.{suffix}", items)
    return folder


def tree(folder: Path, *, splits: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return {
        "paths": {"raw": str(folder / "raw"), "shards": str(folder / "shards")}, "dataset": {**OPTIONS, **options},
        "splits": splits or {"valid_from": "2024-01-04", "test_from": "2024-01-05"}, "stages": STAGES,
    }


def config(folder: Path, **changes: Any) -> Config:
    return parse_config(tree(folder, **changes), where="test")


def encoded(root: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of every split by request id, without the order that partitions give them."""
    shards = Shards.open(root)
    return {split: sorted(shards.table(f"requests/{split}").to_pylist(), key=lambda row: row["request_id"])
            for split in shards.splits}


@pytest.fixture(scope="module")
def prepared(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = raw(tmp_path_factory.mktemp("prepared"))
    return Shards.open(prepare(config(folder))["shards"])


# ---------------------------------------------------------------- what is in the shards
def test_requests_are_split_by_the_time_of_their_first_row(prepared: Shards):
    first: dict[str, int] = {}
    for row in log().to_pylist():
        first[row["request_id"]] = min(row["ts"], first.get(row["request_id"], 1 << 62))
    bounds = {"train": (0, 3), "valid": (3, 4), "test": (4, 99)}
    for split, (start, stop) in bounds.items():
        expected = sorted(one for one, time in first.items() if start <= (time - START_MS) // DAY_MS < stop)
        assert sorted(prepared.table(f"requests/{split}")["request_id"].to_pylist()) == expected
        assert prepared.splits[split] == len(expected) > 0


def test_an_encoded_request_is_the_one_found_by_hand(prepared: Shards):
    rows = sorted(log().to_pylist(), key=lambda row: row["ts"])
    items, state = prepared.items, prepared.state
    training = [row for row in rows if row["ts"] < START_MS + 3 * DAY_MS]
    known = [row["age"] for row in training if row["age"] is not None]
    mean, std = np.mean(known), np.std(known)
    for split in ("train", "valid", "test"):
        for seen in prepared.table(f"requests/{split}").to_pylist()[::5]:
            mine = [row for row in rows if row["request_id"] == seen["request_id"]]
            first = mine[0]
            past = [row for row in rows if row["user_id"] == first["user_id"] and row["ts"] < first["ts"]]
            assert (seen["user_key"], seen["time_ms"]) == (first["user_id"], first["ts"])
            assert items.ids_of(np.array(seen["candidates"])) == [row["item_id"] for row in mine]
            assert seen["click"] == [row["click"] for row in mine]
            assert items.ids_of(np.array(seen["history"])) == [row["item_id"] for row in past[-4:]]
            assert seen["history_time_ms"] == [row["ts"] for row in past[-4:]]
            actions = state.vocabularies["action"].lookup(pa.array([row["click"] for row in past[-4:]], pa.int64()))
            assert seen["history_action"] == actions.tolist()
            assert set(items.ids_of(np.array(seen["exclude"]))) == {row["item_id"] for row in past}
            assert seen["age"] == pytest.approx(0 if first["age"] is None else (first["age"] - mean) / std, abs=1e-6)
            assert seen["age_missing"] == float(first["age"] is None)


def test_counts_are_of_earlier_days_of_the_training_log(prepared: Shards):
    table, items = prepared.table("requests/test"), prepared.items
    batch, (mean, std) = collate(table, items), items.count_stats["views"]
    shown = [row["item_id"] for row in log().to_pylist() if row["ts"] < START_MS + 3 * DAY_MS]
    for q in range(0, len(table), 3):
        rows = batch.candidates_QC[q][batch.mask_QC[q]].numpy()
        expected = [(np.log1p(shown.count(item)) - mean) / std for item in items.ids_of(rows)]
        np.testing.assert_allclose(batch.item["views"][q, :len(rows)].numpy(), expected, atol=1e-5)


def test_every_user_of_the_training_log_has_a_state_at_its_end(prepared: Shards):
    rows = [row for row in log().to_pylist() if row["ts"] < START_MS + 3 * DAY_MS]
    users = {row["user_key"]: row for row in prepared.table("users").to_pylist()}
    assert set(users) == {row["user_id"] for row in rows}
    assert prepared.state.as_of_ms == START_MS + 3 * DAY_MS
    for user, state in users.items():
        past = sorted((row for row in rows if row["user_id"] == user), key=lambda row: row["ts"])
        assert prepared.items.ids_of(np.array(state["history"])) == [row["item_id"] for row in past[-4:]]
        assert state["time_ms"] == prepared.state.as_of_ms
        assert "click" not in state


def test_the_reader_gives_every_training_request_once(prepared: Shards):
    read = [one for table in ShardReader(prepared, "train", 7).batches(0) for one in table["request_id"].to_pylist()]
    assert sorted(read) == sorted(prepared.table("requests/train")["request_id"].to_pylist())


def test_a_row_group_holds_the_requests_of_one_day(prepared: Shards):
    for split in prepared.splits:
        for name, group, _ in prepared.groups(split):
            days = {time // DAY_MS for time in prepared.read_group(name, group)["time_ms"].to_pylist()}
            assert days == {prepared.day_of(name, group)}


def test_nothing_but_the_manifest_and_its_version_is_left(prepared: Shards):
    root = Path(prepared.folder).parent
    assert sorted(path.name for path in root.iterdir()) == ["manifest.json", Path(prepared.folder).name]


@pytest.mark.parametrize("form", ["three parquet files", "csv"])
def test_other_pieces_and_formats_give_the_same_shards(prepared: Shards, tmp_path: Path, form: str):
    table = log()
    if form == "csv":
        raw(tmp_path, table, suffix="csv")
    else:
        order = np.random.default_rng(0).permutation(len(table))
        shuffled = table.take(pa.array(order))
        raw(tmp_path, shuffled.slice(0, 40), shuffled.slice(40, 5), shuffled.slice(45))
    root = prepare(config(tmp_path))["shards"]
    assert encoded(root) == encoded(str(Path(prepared.folder).parent))
    mine, other = Shards.open(root).state, prepared.state
    assert mine.dense == other.dense
    assert mine.counters.to_arrow().equals(other.counters.to_arrow(), check_metadata=True)
    assert mine.vocabularies["author"].values.equals(other.vocabularies["author"].values)


# ---------------------------------------------------------------- bad input
def changed(name: str, values: Any) -> pa.Table:
    table = log()
    return table.set_column(table.column_names.index(name), name, pa.array(values))


def with_row(name: str, value: Any, *, from_day: int = 0) -> pa.Table:
    """The log with one value changed, in the first row of a request of that day or later."""
    values, rows = log()[name].to_pylist(), log().to_pylist()
    heads = [i for i, row in enumerate(rows) if i == 0 or rows[i - 1]["request_id"] != row["request_id"]]
    values[next(i for i in heads if rows[i]["ts"] >= START_MS + from_day * DAY_MS)] = value
    return changed(name, values)


def truncated(folder: Path) -> None:
    path = folder / "raw" / "log_0.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def nothing_left(folder: Path) -> None:
    left = [path.name for path in (folder / "shards").iterdir()] if (folder / "shards").exists() else []
    assert left == [], left


BAD: dict[str, tuple[pa.Table, dict[str, Any], str]] = {
    "a missing column": (log().drop_columns(["age"]), {}, r"log_0.parquet: column 'age' is missing"),
    "text for a number": (changed("age", ["old"] * len(log())), {},
                          r"log_0.parquet: column 'age' must hold numbers, got string"),
    "NaN in training": (with_row("age", float("nan")), {}, r"column 'age' holds nan in row \d+ \(1 such rows\); write"),
    "NaN in test": (with_row("age", float("nan"), from_day=4), {}, r"column 'age' holds nan in row \d+"),
    "a label outside its range": (with_row("click", 3), {}, r"label 'click' must be 0, 1 or null, got 3"),
    "an item that is not in the catalogue": (with_row("item_id", 99), {}, r"candidate 99 is not in the items table"),
    "a row twice": (pa.concat_tables([log(), log().slice(3, 1)]), {}, r"logged more than once, equal in every column"),
    "an empty split": (log(), {"splits": {"valid_from": "2024-01-04", "test_from": "2024-02-01"}},
                       r"split 'test' is empty: .* covers 2024-01-01T\d\d:\d\dZ to 2024-01-05T.*; move the dates"),
    "an empty training split": (log(), {"splits": {"valid_from": "2023-01-01"}}, r"split 'train' is empty"),
    "a null user": (with_row("user_id", None), {}, r"column 'user_id' is null in row \d+"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(ray_cluster: None, tmp_path: Path, case: str):
    table, changes, expected = BAD[case]
    raw(tmp_path, table)
    with pytest.raises(RaycascadeError, match=expected) as caught:
        prepare(config(tmp_path, **changes))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2
    nothing_left(tmp_path)


def test_files_that_disagree_on_the_type_of_a_column_are_refused(ray_cluster: None, tmp_path: Path):
    table = log()
    raw(tmp_path, table.slice(0, 100), table.slice(100).set_column(
        table.column_names.index("user_id"), "user_id", pa.array(["ann"] * (len(table) - 100))))
    with pytest.raises(RaycascadeError, match="both int64 and string") as caught:
        prepare(config(tmp_path))
    assert "\n" not in str(caught.value)
    nothing_left(tmp_path)


def test_items_twice_or_without_an_id_are_refused():
    for items, expected in (
        (pa.concat_tables([ITEMS, ITEMS.slice(4, 1)]), "items table: item 14 stands in 2 rows; keep one row per item"),
        (pa.table({"item_id": pa.array([1, None])}), "item_id is null in 1 rows"),
        (ITEMS.slice(0, 0), "items table: no rows"), (ITEMS.drop_columns(["item_id"]), "column 'item_id' is missing"),
    ):
        with pytest.raises(RaycascadeError, match=expected) as caught:
            check_items(items)
        assert "\n" not in str(caught.value)


def test_duplicate_items_and_damaged_or_absent_files_are_refused_before_anything_is_written(tmp_path: Path):
    def refused(folder: Path, expected: str, **options: Any) -> None:
        with pytest.raises(RaycascadeError, match=expected) as caught:
            prepare(config(folder, **options))
        assert "\n" not in str(caught.value)
        nothing_left(folder)

    twice = pa.concat_tables([ITEMS, ITEMS.slice(4, 1)])
    refused(raw(tmp_path / "twice", items=twice), "item 14 has 2 rows; keep one row per item")
    listed = r"no file matches 'lgo\*'; the folder holds items.parquet, log_0.parquet"
    refused(raw(tmp_path / "none"), listed, log="lgo*")
    damaged = raw(tmp_path / "damaged")
    truncated(damaged)
    refused(damaged, r"log_0.parquet: cannot be read as Parquet")


# ---------------------------------------------------------------- the command line
def command(folder: Path, capsys: pytest.CaptureFixture[str], **changes: Any) -> tuple[int, str, str]:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree(folder, **changes)))
    status = run(["prepare", str(path), "--json"])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_command_line_prints_the_result_as_its_last_line(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    status, out, _ = command(raw(tmp_path), capsys)
    assert status == 0
    result = json.loads(out.splitlines()[-1])
    assert result["shards"] == str(tmp_path / "shards")
    assert result["items"] == 10
    assert result["requests"] == Shards.open(result["shards"]).splits


@pytest.mark.parametrize(("changes", "expected"), [
    ({"labels": {"click": "clik"}}, "raycascade: log_0.parquet: column 'clik'"),
    ({"features": [{"kind": "idd", "name": "x", "side": "user"}]}, "dataset.features.0"),
])
def test_bad_input_ends_the_command_with_status_two_and_one_line(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, expected: str
):
    status, out, error = command(raw(tmp_path), capsys, **changes)
    assert (status, out) == (2, "")
    assert expected in error
    assert len(error.strip().splitlines()) == 1
    nothing_left(tmp_path)

"""RecFlow: lists, histories and items worked out by hand, and what must not change a row."""

import datetime as dt
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch

from raycascade import plugins
from raycascade.batch import collate
from raycascade.cascade import Cascade
from raycascade.config import load_config
from raycascade.datasets import recflow
from raycascade.errors import ConfigError
from raycascade.fitting import FitPart, required_columns
from raycascade.items import ItemTable
from raycascade.truth import top_k_membership
from tests import recflow_world as world
from tests.recflow_broken import change_pickle, change_rows, replaced
from tests.recflow_cases import BY_HAND, DAY, RANKS, by_id, dataset, one_request, rows_of

DAYS = [DAY, "2024-01-14"]
PER_DAY = 20
MIDNIGHT_MS = world.midnight_ms(DAY)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recflow")
    world.write_recflow(folder, DAYS, PER_DAY, 3)
    return folder


# ---------------------------------------------------------------- one request by hand
@pytest.mark.parametrize(("options", "candidates", "reached", "relevance", "truth"), [
    ({}, [5, 9, 2, 7, 5, 0], [3, 3, 3, 2, 2, 0], [27, 29, 10, 7, 7, 5], [1, 1, 1, 0, 0, 0]),
    ({"dedupe": "deepest"}, [5, 9, 2, 7, 0], [3, 3, 3, 2, 0], [27, 29, 10, 7, 5], [1, 1, 1, 0, 0]),
    ({"per_group": 2}, [5, 9, 7, 5, 0], [3, 3, 2, 2, 0], [27, 29, 7, 7, 5], [1, 1, .5, .5, 0]),
    ({"negative_codes": "paper"}, [5, 9, 2, 7, 5, 0], [3, 3, 3, 2, 2, 0], [27, 29, 10, 9, 9, 7], [1, 1, 1, 0, 0, 0]),
])
def test_the_two_stage_list_is_the_one_found_by_hand(
    tmp_path: Path, options: dict[str, Any], candidates: list[int], reached: list[int], relevance: list[float],
    truth: list[float],
):
    one_request(tmp_path, BY_HAND, RANKS)
    (row,) = rows_of(tmp_path, **options).to_pylist()
    assert (row["candidates"], row["reached"], row["relevance"]) == (candidates, reached, relevance)
    relevance_QC = torch.tensor([row["relevance"]])
    assert top_k_membership(relevance_QC, torch.ones_like(relevance_QC, dtype=torch.bool), 3).tolist() == [truth]


def test_the_three_stage_list_has_five_groups_and_the_ranks_of_the_rerank_stage(tmp_path: Path):
    stages = {"rerank_pos": [4, 6], "rerank_neg": [8], "rank_neg": [1], "coarse_neg": [3], "prerank_neg": [0],
              "rank_pos": [9]}
    one_request(tmp_path, stages, {4: 7, 6: 2})
    change_rows(tmp_path, DAY, lambda table: replaced(table, "rerank_index", table["rank_index"].combine_chunks()))
    (row,) = rows_of(tmp_path, protocol="lcron_three_stage").to_pylist()
    assert row["candidates"] == [4, 6, 8, 1, 3, 0]
    assert (row["reached"], row["relevance"]) == ([4, 4, 3, 2, 1, 0], [23, 28, 8, 7, 6, 5])


def test_without_a_protocol_every_logged_video_has_its_deepest_level(tmp_path: Path):
    stages = {"prerank_neg": [1], "coarse_neg": [2], "rank_neg": [3], "rank_pos": [4, 6], "rerank_neg": [5, 6],
              "rerank_pos": [7], "realshow": [7, 8]}
    one_request(tmp_path, stages, {4: 9})
    change_rows(tmp_path, DAY, lambda table: replaced(table, "rerank_index", np.array([0, 0, 0, 0, 2, 1, 3, 0])))
    (row,) = rows_of(tmp_path, protocol="full").to_pylist()
    level = dict(zip(row["candidates"], row["reached"], strict=True))
    assert level == {1: 0, 2: 1, 3: 2, 4: 3, 5: 3, 6: 3, 7: 5, 8: 5}
    assert dict(zip(row["candidates"], row["rank"], strict=True)) == {1: 0, 2: 0, 3: 0, 4: 0, 5: 2, 6: 1, 7: 3, 8: 0}
    assert row["candidates"] == [7, 8, 6, 5, 4, 3, 2, 1], "deepest first, then by rank"
    assert row["exposed"] == [True, True, *[False] * 6]
    assert row["like"] == [0, 0, *[None] * 6]
    assert "relevance" not in row


@pytest.mark.parametrize("history", [(), (0, 4), tuple(range(50))])
def test_a_history_is_its_valid_rows_oldest_first(tmp_path: Path, history: tuple[int, ...]):
    one_request(tmp_path, BY_HAND, RANKS, history=history)
    (row,) = rows_of(tmp_path).to_pylist()
    assert row["history"] == list(history)
    assert row["history_time_ms"] == sorted(row["history_time_ms"])
    (newest,) = rows_of(tmp_path, history_len=1).to_pylist()
    assert newest["history"] == list(history[-1:])


def test_user_clocks_and_items_are_those_of_the_file(tmp_path: Path):
    one_request(tmp_path, BY_HAND, RANKS, history=(77, 5))
    log = dataset(tmp_path)
    (row,) = rows_of(tmp_path).to_pylist()
    assert (row["request_id"], row["user_id"], row["age"], row["day"]) == (17, 3, 1, DAY)
    assert (row["weekday"], row["hour"], row["minute"]) == (5, 9, 41)
    items = log.items()
    assert items["item_id"].to_pylist() == [0, 2, 5, 7, 9, 77]
    assert items["author_id"].to_pylist() == [50, 52, 55, 57, 59, 127]
    assert items.to_pylist()[0] == {
        "item_id": 0, "author_id": 50, "category_level_one": 1, "category_level_two": 0, "upload_type": 0,
        "upload_time_s": 1_700_000_000, "upload_ms": 1_700_000_000_000, "duration": 9_000, "first_day": DAY}


def test_tensors_of_a_request_have_the_published_fields_with_shared_tables(tmp_path: Path):
    one_request(tmp_path, BY_HAND, RANKS, history=(77, 5))
    log = dataset(tmp_path)
    rows, schema = rows_of(tmp_path), log.schema()
    part = FitPart(schema)
    part.add_requests(rows, where="recflow")
    part.add_items(log.items(), where="recflow")
    state = part.finish(log.items(), as_of_ms=MIDNIGHT_MS + world.DAY_MS)
    items = ItemTable.from_encoded(state.encode_items(log.items(), where="recflow"), state)
    batch = collate(state.encode_requests(rows, where="recflow"), items, keep=(4, 3), k=3)
    assert len(state.space.of("request")) == len(state.space.of("item")) == 8
    assert set(batch.history) == set(recflow.PUBLISHED_FIELDS)
    rows_of_tables = {state.space[name].table: state.space[name].num_rows for name in ("weekday", "hour", "minute")}
    assert rows_of_tables == {"weekday": 9, "hour": 26, "minute": 62}
    for part_of_time in rows_of_tables:
        assert state.space[f"upload_{part_of_time}"].table == part_of_time
    assert batch.user["minute"].tolist() == [2 + 41]
    uploaded = dt.datetime.fromtimestamp(1_700_000_000, world.CHINA)
    assert batch.item["upload_minute"][0, 0] == 2 + uploaded.minute
    assert batch.item["upload_hour"][0, 0] == 2 + uploaded.hour
    assert batch.item["upload_weekday"][0, 0] == 2 + uploaded.weekday()
    assert batch.targets is not None
    assert batch.targets.relevance_QC.tolist() == [[27, 29, 10, 7, 7, 5]]
    assert batch.targets.reached_QC.tolist() == [[3, 3, 3, 2, 2, 0]]


# ---------------------------------------------------------------- the generated log
def test_the_generator_keeps_its_contract(raw: Path):
    table = pyarrow.feather.read_table(str(raw / f"all_stage/{DAY}.feather"), memory_map=False)
    assert [name.strip() for name in table.column_names] == list(world.COLUMNS)
    assert set(table.schema.types) == {pa.int64()}
    columns = {name.strip(): table[name].to_numpy() for name in table.column_names}
    ids = columns["request_id"]
    assert (np.diff(ids) < 0).sum() > len(ids) // 4, "rows of a request do not stand together"
    shown = columns["realshow"] == 1
    for label in world.LABELS:
        assert not columns[label][~shown].any()
    assert not (columns["long_view"] > columns["effective_view"]).any()
    start = MIDNIGHT_MS
    assert ((columns["request_timestamp"] >= start) & (columns["request_timestamp"] < start + world.DAY_MS)).all()
    full = [request for request in np.unique(ids) if request not in world.CASES]
    for request in full:
        mine = ids == request
        sizes = {stage: int(columns[stage][mine].sum()) for stage in world.STAGES}
        assert (sizes["rank_pos"], sizes["rerank_pos"]) == (10, 10)
        assert min(sizes[stage] for stage in ("rank_neg", "rerank_neg", "coarse_neg", "prerank_neg")) >= 10
        ranks = columns["rank_index"][mine & (columns["rank_pos"] == 1)]
        assert len(set(ranks)) == 10
        assert 1 <= ranks.min() <= ranks.max() <= 20
    assert not columns["rank_index"][(columns["rank_pos"] + columns["rank_neg"]) == 0].any()


def test_every_edge_case_comes_through(raw: Path):
    log = dataset(raw)
    rows = by_id(pa.concat_tables([table for piece in log.slices() for table in log.read(piece)]))
    assert sorted(rows) == list(range(2 * PER_DAY))
    edge = {case: rows[request] for case, request in world.EDGES.items()}
    sizes = {case: Counter(row["reached"]) for case, row in edge.items()}
    assert sizes["missing_stage"] == {3: 10, 2: 10, 0: 10}
    assert sizes["no_rows"] == {3: 10, 1: 10, 0: 10}
    assert sizes["short_rank_pos"] == {3: 7, 2: 10, 1: 10, 0: 10}
    assert edge["empty_history"]["history"] == []
    assert len(edge["full_history"]["history"]) == 50
    assert len(set(edge["two_groups"]["candidates"])) == 39 < len(edge["two_groups"]["candidates"])
    assert max(edge["rank_20"]["rank"]) == 20
    assert min(edge["rank_20"]["relevance"][:10]) == 10
    assert sizes["wide_coarse"] == {3: 10, 2: 10, 1: 10, 0: 10}
    assert [row["day"] for row in rows.values() if row["user_id"] == world.ONE_DAY_USER] == [DAY]
    assert edge["numpy_key"]["candidates"]
    shown = by_id(rows_of(raw, protocol="full"))[world.EDGES["nine_shown"]]
    assert sum(shown["realshow"]) == 9
    assert log.notes["requests have a group of fewer than 10 candidates (short_list: keep)"] == 3
    assert log.notes["candidates stand in their list a second time (dedupe: none)"] == 1


def test_both_sources_hold_the_same_candidates_where_groups_are_not_cut(raw: Path):
    lists, rows = by_id(rows_of(raw, per_group=100)), by_id(rows_of(raw, per_group=100, source="all_stage"))
    assert lists.keys() == rows.keys()
    for request, row in lists.items():
        pairs = [set(zip(one["reached"], one["candidates"], one["relevance"], one["like"], strict=True))
                 for one in (row, rows[request])]
        assert pairs[0] == pairs[1], request


@pytest.mark.parametrize(("short", "left"), [("keep", 2 * PER_DAY), ("drop", 2 * PER_DAY - 3)])
def test_requests_with_a_short_group_stay_or_go(raw: Path, short: str, left: int):
    assert len(rows_of(raw, short_list=short)) == left


@pytest.mark.parametrize("change", [
    {"space_in_column": False}, {"id_cnt_style": "photo_id"}, {"pickle_style": "defaultdict_tuple"},
    {"pickle_style": "defaultdict_str"}, {"test_names": "code"}, *({"protocol": p} for p in (2, 4, 5)),
], ids=str)
def test_spellings_and_pickle_styles_change_no_row(raw: Path, tmp_path: Path, change: dict[str, Any]):
    world.write_recflow(tmp_path, DAYS, PER_DAY, 3, **change)
    assert rows_of(tmp_path).equals(rows_of(raw))
    assert dataset(tmp_path).items().equals(dataset(raw).items())
    assert dataset(tmp_path).files.id_counts == dataset(raw).files.id_counts


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="the zone of a process cannot be changed here")
def test_the_zone_of_the_machine_changes_no_row(raw: Path, monkeypatch: pytest.MonkeyPatch):
    before = rows_of(raw)
    for zone in ("America/Los_Angeles", "Asia/Tokyo"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        assert rows_of(raw).equals(before)
    monkeypatch.delenv("TZ")
    time.tzset()


@pytest.mark.parametrize("options", [{}, {"protocol": "lcron_three_stage"}, {"protocol": "full"}], ids=str)
def test_the_order_of_rows_in_a_file_changes_no_row(raw: Path, tmp_path: Path, options: dict[str, Any]):
    world.write_recflow(tmp_path, DAYS, PER_DAY, 3)
    order = np.random.default_rng(0).permutation
    for day in DAYS:
        change_rows(tmp_path, day, lambda table: table.take(pa.array(order(len(table)))))
        change_pickle(tmp_path, "request_id_dict", day, _reversed)
    assert rows_of(tmp_path, **options).equals(rows_of(raw, **options))


def _reversed(content: dict[int, Any]) -> None:
    for key in list(content)[::-1]:
        content[key] = content.pop(key)


def test_canonical_rows_survive_a_parquet_file(raw: Path, tmp_path: Path):
    for options in ({}, {"protocol": "full"}):
        rows = rows_of(raw, **options)
        pq.write_table(rows, tmp_path / "rows.parquet")
        assert pq.read_table(tmp_path / "rows.parquet").cast(rows.schema).equals(rows)


def test_every_declared_column_is_there_and_every_candidate_is_an_item(raw: Path):
    for options in ({}, {"protocol": "lcron_three_stage"}, {"protocol": "full"}, {"source": "all_stage"}):
        log = dataset(raw, **options)
        rows, items = rows_of(raw, **options), log.items()
        assert set(required_columns(log.schema(), log.form)) <= set(rows.column_names)
        known = set(items["item_id"].to_pylist())
        assert set(rows["candidates"].combine_chunks().flatten().to_pylist()) <= known
        assert set(rows["history"].combine_chunks().flatten().to_pylist()) <= known
        videos = pa.concat_tables([pyarrow.feather.read_table(str(raw / f"all_stage/{day}.feather")) for day in DAYS])
        author = dict(zip(videos["video_id"].to_pylist(), videos["author_id"].to_pylist(), strict=True))
        for item in items.to_pylist():
            assert author.get(item["item_id"], item["author_id"]) == item["author_id"]


def test_days_come_from_the_period_and_its_bounds(raw: Path):
    assert dataset(raw).slices() == DAYS
    assert dataset(raw, last_day=DAY).slices() == [DAY]
    assert dataset(raw, period=1, last_day=DAYS[1]).slices() == DAYS
    with pytest.raises(ConfigError, match="first_day 2024-02-05 must not lie after last_day 2024-01-14"):
        dataset(raw, period=2, last_day=DAYS[1])


def test_the_smaller_edition_gives_shown_videos_and_no_lists(raw: Path, tmp_path: Path):
    (tmp_path / "learning").mkdir()
    os.symlink(raw / "realshow", tmp_path / "learning/realshow")
    os.symlink(raw / "seq_effective_50_dict", tmp_path / "learning/seq_effective_50")
    rows = by_id(rows_of(tmp_path, protocol="full"))
    for request, row in by_id(rows_of(raw, protocol="full")).items():
        shown = [video for video, seen in zip(row["candidates"], row["realshow"], strict=True) if seen]
        assert sorted(rows[request]["candidates"]) == sorted(shown)


def test_the_notice_of_the_licence_is_printed_once(raw: Path, capsys: pytest.CaptureFixture[str]):
    recflow._print_notice.cache_clear()
    for _ in range(3):
        dataset(raw).slices()
    seen = capsys.readouterr()
    assert seen.err == f"{recflow.NOTICE}\n"
    assert "non-commercial" in seen.err
    assert seen.out == ""


def test_the_package_reads_the_log_without_the_pickle_module():
    for name in ("recflow", "_recflow_pickle", "_recflow_files", "_recflow_day", "_recflow_lists", "_recflow_buckets"):
        assert not hasattr(sys.modules[f"raycascade.datasets.{name}"], "pickle")


@pytest.mark.parametrize(("file", "hidden"), [
    ("recflow.yaml", {"ranker": [168, 128, 128, 32, 1]}),
    ("recflow_three_stage.yaml", {"pre_ranker": [168, 128, 64, 32, 1], "ranker": [168, 128, 128, 32, 1]}),
])
def test_the_configs_have_the_published_widths(raw: Path, file: str, hidden: dict[str, list[int]]):
    config = load_config(str(Path(__file__).parents[2] / "configs" / file), [f"paths.raw={raw}"])
    train = config.train
    assert (train.batch_size, train.lr, train.epochs, train.order, config.lists.k) == (1024, 0.01, 1, "time", 10)
    plugin, options = plugins.options("datasets", config.dataset, "dataset")
    log = plugin(options, raw=str(raw))
    state = FitPart(log.schema()).finish(pa.table({"item_id": [1]}), as_of_ms=0)
    models: dict[str, Any] = dict(Cascade(config, state.space).models.items())
    tower = models["retriever"]
    assert _widths(tower.user_tower) == [104, 128, 64, 32]
    assert _widths(tower.item_tower) == [64, 128, 64, 32]
    assert {name: _widths(models[name].mlp) for name in hidden} == hidden
    assert {model.inputs.tables.embedding_dim for model in models.values()} == {8}


def _widths(network: torch.nn.Module) -> list[int]:
    """What goes into the first matrix, and what comes out of every one."""
    shapes = {name: parameter.shape for name, parameter in network.named_parameters() if parameter.ndim == 2}
    first = [shape for name, shape in shapes.items() if name.startswith("first.")]  # of the request, of the candidate
    return [sum(into for _, into in first), first[0][0], *(out for name, (out, _) in shapes.items() if "upper" in name)]

"""Encoded items of a bundle: the same answers as from the items' fields, of this bundle alone, and nothing missing."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from raycascade.batch import Batch
from raycascade.bundle import Bundle, load_bundle, verify, write_manifest
from raycascade.cascade import StageOutcome
from raycascade.errors import BundleError, ConfigError
from raycascade.flows.index import index
from raycascade.item_cache import ItemCache, Precision, read_item_cache, write_item_cache
from raycascade.models.gesr import Gesr
from raycascade.schema import FIRST_ROW
from raycascade.serving.options import ServeOptions
from raycascade.serving.replicas import StageReplica
from raycascade.serving.stages import Lost, pack
from tests import three_stages as three
from tests.early_stages import CHANGING, MODELS, config, write_bundle
from tests.tiny_world import KEEPS, NUM_ITEMS, encoded_users

CACHED = ("pre_ranker", "ranker")
TOLERANCES = {"float32": 1e-6, "float16": 1e-2}


@pytest.fixture(scope="module")
def uris(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same weights with and without encoded items."""
    folder = tmp_path_factory.mktemp("early")
    return {name: write_bundle(str(folder / name), config(item_cache=None if name == "none" else name))
            for name in ("none", *TOLERANCES)}


@pytest.fixture
def bundles(uris: dict[str, str]) -> dict[str, Bundle]:
    return {name: load_bundle(uri) for name, uri in uris.items()}


def everything(bundle: Bundle) -> tuple[Batch, StageOutcome]:
    """All users, and a stage before that let the whole catalogue through, five of them masked."""
    batch = bundle.batch(encoded_users(bundle.state))
    rows_QC = np.tile(bundle.items.all_rows, (batch.num_requests, 1))
    mask_QC = np.ones_like(rows_QC, bool)
    mask_QC[::2, 7:12] = False
    return batch, StageOutcome("all", NUM_ITEMS, rows_QC, np.zeros(rows_QC.shape, np.float32), mask_QC)


def narrowed(bundle: Bundle, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores by item of every user, and the rows that are kept."""
    batch, before = everything(bundle)
    outcome = bundle.cascade.narrow(name, KEEPS[name], batch, before, bundle.items)
    scores = np.full((batch.num_requests, NUM_ITEMS + FIRST_ROW), np.nan)
    for q, mask in enumerate(outcome.mask_QC):
        scores[q, outcome.rows_QC[q][mask]] = outcome.scores_QC[q][mask]
    return scores, outcome.kept()[0]


def tolerance(precision: str, scores: np.ndarray) -> float:
    """float32 is exact up to the order of sums, whose error grows with what is summed."""
    return TOLERANCES[precision] * (max(1.0, float(np.nanmax(np.abs(scores)))) if precision == "float32" else 1.0)


# ---------------------------------------------------------------- the same answers
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", CACHED)
def test_a_stage_scores_by_its_encoded_items_as_by_their_fields(
    bundles: dict[str, Bundle], name: str, precision: str
):
    (live, kept_live), (cached, kept_cached) = (narrowed(bundles[one], name) for one in ("none", precision))
    assert np.array_equal(np.isnan(live), np.isnan(cached))
    assert np.nanmax(np.abs(live - cached)) <= tolerance(precision, live)
    assert np.nanmax(live) - np.nanmin(live) > 0.1, "equal scores would prove nothing"
    shared = [len(set(a) & set(b)) / len(a) for a, b in zip(kept_live.tolist(), kept_cached.tolist(), strict=True)]
    assert np.mean(shared) >= 0.999
    cache = bundles[precision].cascade.item_caches[name]
    assert (cache.asked, cache.missing) == (int((~np.isnan(live)).sum()), 0)


def test_the_items_fields_are_not_even_read(bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch):
    batch, before = everything(bundles["float32"])

    def never(*_: object) -> Batch:
        raise AssertionError("fields were gathered")

    monkeypatch.setattr(Batch, "with_candidates", never)
    cascade, items = bundles["float32"].cascade, bundles["float32"].items
    assert cascade.narrow("ranker", 5, batch, before, items).rows_QC.shape[1] == NUM_ITEMS
    with pytest.raises(AssertionError, match="fields were gathered"):
        bundles["none"].cascade.narrow("ranker", 5, batch, before, items)


@pytest.mark.parametrize("precision", TOLERANCES)
def test_batch_scoring_and_the_served_stages_answer_from_the_cache_alike(
    bundles: dict[str, Bundle], precision: str
):
    asked = [{"user_id": user} for user in (100, 101, 102, 999)]
    table = pa.table({"user_id": pa.array([query["user_id"] for query in asked], pa.int64())})
    batch, served = three.answers_of(bundles[precision], table), three.served_in_process(bundles[precision], asked)
    assert three.greatest_difference(served, batch) <= 1e-5
    assert all(cache.asked for cache in bundles[precision].cascade.item_caches.values())
    live = three.answers_of(bundles["none"], table)
    if precision == "float32":
        assert three.greatest_difference(batch, live) <= 1e-5
    for (items, scores), (others, expected) in zip(batch, live, strict=True):
        known = dict(zip(others, expected, strict=True))
        assert max(abs(score - known[item]) for item, score in zip(items, scores, strict=True) if item in known) <= 1e-2


def test_a_first_stage_that_ranks_what_requests_bring_reads_its_cache(bundles: dict[str, Bundle]):
    bundle = bundles["float32"]
    cascade, (batch, before) = bundle.cascade, everything(bundle)
    mask_QC, rows_QC = torch.from_numpy(before.mask_QC), torch.from_numpy(before.rows_QC)
    asked = batch.with_candidates(rows_QC, mask_QC, bundle.items)
    cascade.names, cascade.keeps = cascade.names[1:], cascade.keeps[1:]
    cached = cascade.choose(asked, bundle.items)
    assert cascade.item_caches["pre_ranker"].asked == int((mask_QC).sum())
    cascade.item_caches.clear()
    live = cascade.choose(asked, bundle.items)
    assert np.array_equal(cached.rows_QC[:, :15], live.rows_QC[:, :15])
    np.testing.assert_allclose(cached.scores_QC, live.scores_QC, atol=1e-6)


# ---------------------------------------------------------------- what is not in it
def test_items_that_the_cache_does_not_hold_are_encoded_now_and_counted(bundles: dict[str, Bundle]):
    cascade = bundles["float32"].cascade
    held = cascade.item_caches["ranker"]
    short = ItemCache({name: values[:40] for name, values in held.arrays.items()}, left_out=frozenset({5, 6}))
    cascade.item_caches["ranker"] = short
    found, expected = narrowed(bundles["float32"], "ranker")[0], narrowed(bundles["none"], "ranker")[0]
    assert np.nanmax(np.abs(found - expected)) <= tolerance("float32", expected)
    absent = np.isin(np.arange(NUM_ITEMS + FIRST_ROW), [5, 6, *range(40, NUM_ITEMS + FIRST_ROW)])
    assert short.missing == int((~np.isnan(expected))[:, absent].sum())
    assert short.asked == int((~np.isnan(expected)).sum())


def test_a_number_that_the_precision_cannot_hold_leaves_its_item_out(tmp_path: Path):
    values = torch.tensor([[0.0], [1.0], [7e4], [2.0]])
    cases: tuple[tuple[Precision, set[int]], ...] = (("float16", {2}), ("float32", set()))
    for precision, left_out in cases:
        folder = str(tmp_path / precision)
        write_item_cache(folder, iter([{"vector": values}]), num_rows=4, precision=precision, made_of={})
        cache = read_item_cache(folder, made_of={})
        assert cache.left_out == left_out
        encoded, missing = cache.gather(torch.tensor([[2, 3]]), torch.ones(1, 2, dtype=torch.bool), like=values)
        assert missing.tolist() == [[2 in left_out, False]]
        assert encoded["vector"][0, 1].tolist() == [2.0]
        assert encoded["vector"].isfinite().all()


def test_pieces_become_one_file_with_ids_as_they_are(tmp_path: Path):
    draw = torch.Generator().manual_seed(0)
    numbers, large = torch.randn(7, 2, 3, generator=draw), (1 << 60) + torch.arange(14).view(7, 2)

    def pieces() -> Iterator[dict[str, Tensor]]:
        for rows in (slice(0, 3), slice(3, 6), slice(6, 7)):
            yield {"keys": numbers[rows], "ids.tags": large[rows]}

    write_item_cache(str(tmp_path), pieces(), num_rows=7, precision="float16", made_of={})
    cache = read_item_cache(str(tmp_path), made_of={})
    assert np.array_equal(cache.arrays["keys"], numbers.half().numpy())
    assert np.array_equal(cache.arrays["ids.tags"], large.numpy())
    assert all(isinstance(values, np.memmap) for values in cache.arrays.values())


@pytest.mark.parametrize(("exclude", "expected"), [(CHANGING, set(CACHED)), (("age",), set()), (("views",), set())])
def test_a_stage_that_sees_a_field_which_changes_with_time_has_no_cache(
    tmp_path: Path, exclude: tuple[str, ...], expected: set[str]
):
    uri = write_bundle(str(tmp_path / "bundle"), config(exclude=exclude))
    bundle = load_bundle(uri)
    assert set(bundle.cascade.item_caches) == expected
    assert any(file.startswith("stages/ranker/items/") for file in verify(uri)["files"]) == bool(expected)
    assert np.isfinite(bundle.recommend(encoded_users(bundle.state)).final.scores_QC[:, :5]).all()


# ---------------------------------------------------------------- of this bundle alone
@pytest.fixture
def copy(uris: dict[str, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(uris["float16"], tmp_path / "copy"))


def test_a_changed_byte_is_found(copy: Path):
    file = copy / "stages/ranker/items/vector.npy"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"vector\.npy: changed since it was written"):
        load_bundle(str(copy))


@pytest.mark.parametrize("name", CACHED)
def test_encoded_items_of_another_bundle_are_refused(copy: Path, tmp_path: Path, name: str):
    other = Path(write_bundle(str(tmp_path / "other"), config(item_cache="float16"), seed=12))
    shutil.rmtree(copy / f"stages/{name}/items")
    shutil.copytree(other / f"stages/{name}/items", copy / f"stages/{name}/items")
    write_manifest(str(copy), fingerprint=verify(str(other))["fingerprint"])
    with pytest.raises(BundleError, match=f"items: .*another bundle, whose stages/{name}/weights.safetensors differs"):
        load_bundle(str(copy))


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff"])
def test_a_damaged_description_is_named(copy: Path, content: bytes):
    (copy / "stages/ranker/items/cache.json").write_bytes(content)
    write_manifest(str(copy), fingerprint=json.loads((copy / "manifest.json").read_text())["fingerprint"])
    with pytest.raises(BundleError, match=r"cache\.json: damaged"):
        load_bundle(str(copy))


def test_a_stage_refuses_requests_that_another_bundle_has_encoded(bundles: dict[str, Bundle], tmp_path: Path):
    here, there = bundles["float16"], bundles["float32"]
    assert here.version != there.version
    message = pack(here.encode(pa.table({"user_id": [100]})), version=here.version)

    def replica(bundle: Bundle, name: str) -> StageReplica:
        return StageReplica(bundle.uri, name, ServeOptions(), str(tmp_path / "release.json"))

    async def work() -> None:
        survivors = await replica(here, "retriever").run(message, None, 30.0)
        assert len((await replica(here, "ranker").run(message, survivors, 30.0)).rows_QK[0]) == KEEPS["ranker"]
        with pytest.raises(Lost, match=f"version {here.version} is not loaded here"):
            await replica(there, "ranker").run(message, survivors, 30.0)

    asyncio.run(work())


def test_a_rebuilt_index_brings_rebuilt_encoded_items(uris: dict[str, str]):
    new = index(uris["float16"])["bundle"]
    old_files, new_files = (verify(uri)["files"] for uri in (uris["float16"], new))
    cached = {file for file in old_files if "/items/" in file}
    assert len(cached) > 4
    assert {file: new_files[file] for file in cached} == {file: old_files[file] for file in cached}
    assert load_bundle(new).cascade.item_caches.keys() == set(CACHED)


def test_a_precision_for_a_model_that_encodes_no_items_is_refused():
    with pytest.raises(ConfigError, match=r"stages\.1 \(pre_ranker\): item_cache: mlp encodes no items"):
        write_bundle("nowhere", config(item_cache="float32", models={**MODELS, "pre_ranker": {"name": "mlp"}}))


# ---------------------------------------------------------------- micro-batches
WITH_OTHERS = {**MODELS, "pre_ranker": {"name": "din", "dim": 4}, "ranker": {"name": "hstu", "dim": 4, "width": 8}}


@pytest.mark.parametrize("models", [MODELS, WITH_OTHERS], ids=["int_tower and gesr", "din and hstu"])
@pytest.mark.parametrize("item_cache", [None, "float16"])
def test_micro_batches_of_candidates_give_the_scores_of_all_at_once(
    tmp_path: Path, models: dict, item_cache: str | None
):
    bundle = load_bundle(write_bundle(str(tmp_path / "bundle"), config(models=models, item_cache=item_cache)))
    for name in CACHED:
        expected, kept = narrowed(bundle, name)
        for most in (1, 7, NUM_ITEMS):
            stage = bundle.cascade.stages[name]
            bundle.cascade.stages[name] = stage.model_copy(update={"micro_batch": most})
            found, also_kept = narrowed(bundle, name)
            np.testing.assert_allclose(found, expected, atol=1e-5)
            assert np.array_equal(kept, also_kept)


def test_the_request_is_encoded_once_whatever_the_micro_batches(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
):
    calls: list[str] = []
    for half in ("encode_request", "score_encoded"):
        honest = getattr(Gesr, half)
        monkeypatch.setattr(Gesr, half, lambda *a, half=half, honest=honest: (calls.append(half), honest(*a))[1])
    for bundle in (bundles["none"], bundles["float16"]):
        stages = bundle.cascade.stages
        stages["ranker"] = stages["ranker"].model_copy(update={"micro_batch": 50})
        narrowed(bundle, "ranker")
        assert calls == ["encode_request", *["score_encoded"] * 3]
        calls.clear()


def test_trees_refuse_micro_batches():
    tree = {**MODELS, "ranker": {"name": "gbdt"}}
    chosen = config(models=tree, item_cache=None)
    stages = tuple(s.model_copy(update={"micro_batch": 3}) if s.name == "ranker" else s for s in chosen.stages)
    with pytest.raises(ConfigError, match="micro_batch: gbdt keeps nothing of a request"):
        write_bundle("nowhere", chosen.model_copy(update={"stages": stages}))


def test_parts_of_a_batch_are_its_candidates_in_order(bundles: dict[str, Bundle]):
    bundle = bundles["none"]
    batch, before = everything(bundle)
    whole = batch.with_candidates(torch.from_numpy(before.rows_QC), torch.from_numpy(before.mask_QC), bundle.items)
    parts = list(whole.in_parts(50))
    assert [part.mask_QC.shape[1] for part in parts] == [50, 50, 20]
    assert torch.equal(torch.cat([part.candidates_QC for part in parts], 1), whole.candidates_QC)
    for name, values in whole.item.items():
        assert torch.equal(torch.cat([part.item[name] for part in parts], 1), values)
    assert [part is whole for part in whole.in_parts(None)] == [True]
    empty = replace(batch, item={})
    assert [part is empty for part in empty.in_parts(3)] == [True]

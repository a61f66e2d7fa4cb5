"""The guard: a variant against itself in float32, by hand and by making it wrong."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raycascade import guard
from raycascade.batch import collate
from raycascade.bundle import Bundle, load_bundle
from raycascade.cascade import Cascade
from raycascade.errors import ExpectationError
from raycascade.guard import Guarded, measure, record, require_faithful
from raycascade.linears import Bf16Linear
from raycascade.shards import Shards
from raycascade.variants_config import Guard
from tests.tiny_shards import write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    root = str(tmp_path_factory.mktemp("guard") / "shards")
    return Shards.open(write_shards(root))


def bundle_of(tiny_bundle: str, name: str, **options: Any) -> Bundle:
    """The bundle in float32 whose config serves a stage otherwise."""
    held = load_bundle(tiny_bundle)
    stages = tuple(s.model_copy(update=options if s.name == name else {}) for s in held.config.stages)
    config = held.config.model_copy(update={"stages": stages, "guard": Guard(requests=20)})
    cascade = Cascade(config, held.state.space).eval()
    for stage in cascade.names:
        cascade.load_stage_state(stage, held.cascade.stage_state(stage))
    return Bundle("", {}, config, held.items, cascade, held.index)


def made(**facts: Any) -> Guarded:
    return Guarded(**{"stage": "ranker", "precision": "int8", "compile": False, "requests": 40, "auc": 0.75,
                      "auc_fp32": 0.7503, "overlap": 0.995, "non_finite": 0, **facts})


# ---------------------------------------------------------------- limits
@pytest.mark.parametrize(("facts", "reason"), [
    ({"auc": 0.7496}, r"AUC changes by -0\.00070, at most 0\.0005 is allowed"),
    ({"auc": 0.7510}, r"AUC changes by \+0\.00070"),
    ({"overlap": 0.98}, r"overlap of what it keeps 0\.9800 < 0\.99"),
    ({"non_finite": 3}, "3 scores are not finite"),
])
def test_beyond_a_limit_one_line_names_the_stage_and_what_to_do(facts: dict[str, Any], reason: str):
    require_faithful([made()], Guard())
    with pytest.raises(ExpectationError, match=reason) as caught:
        require_faithful([made(stage="pre_ranker"), made(**facts)], Guard())
    text = str(caught.value)
    assert "stage 'ranker' as served (int8)" in text
    assert "stages.ranker.precision=fp32" in text
    assert "\n" not in text
    assert caught.value.exit_status == 1


def test_what_is_not_defined_is_not_held_against_a_stage():
    require_faithful([made(auc=None, overlap=None)], Guard(max_auc_change=0.0, min_overlap=1.0))


def test_the_record_is_json_with_the_limits_beside_the_figures():
    kept = record([made()], Guard())["guard"]
    assert kept["limits"]["min_overlap"] == 0.99
    assert kept["stages"]["ranker"]["auc_change"] == pytest.approx(-0.0003)
    assert record([], Guard()) == {}


# ---------------------------------------------------------------- measured
def test_a_cascade_that_is_served_as_trained_is_not_measured(tiny_bundle: str, shards: Shards):
    assert measure(bundle_of(tiny_bundle, "ranker"), shards) == []


@pytest.mark.parametrize("name", ["retriever", "pre_ranker", "ranker"])
def test_bf16_is_close_but_not_equal(tiny_bundle: str, shards: Shards, name: str):
    (found,) = measure(bundle_of(tiny_bundle, name, precision="bf16"), shards)
    assert (found.stage, found.precision, found.requests, found.non_finite) == (name, "bf16", 20, 0)
    assert found.overlap is not None
    assert 0.9 < found.overlap <= 1.0
    assert found.auc_change is not None
    assert abs(found.auc_change) < 0.02


def test_the_auc_in_float32_is_that_of_pairs_counted_one_by_one(tiny_bundle: str, shards: Shards):
    bundle = bundle_of(tiny_bundle, "ranker", precision="bf16")
    (found,) = measure(bundle, shards)
    first = shards.table("requests/valid").slice(0, 20)
    batch = collate(first, bundle.items)
    assert batch.targets is not None
    with torch.no_grad():
        scores = bundle.cascade(batch)["ranker"][batch.mask_QC].numpy()
    labels = batch.targets.labels["click"][batch.mask_QC].numpy()
    above = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    assert found.auc_fp32 == pytest.approx(np.mean(above), abs=1e-6)


@pytest.mark.parametrize(("wrong", "sign"), [(-1.0, 0), (torch.nan, 1)])
def test_a_variant_that_is_wrong_is_found(
    tiny_bundle: str, shards: Shards, monkeypatch: pytest.MonkeyPatch, wrong: float, sign: int
):
    right = Bf16Linear.product
    monkeypatch.setattr(Bf16Linear, "product", lambda self, x_ND: wrong * right(self, x_ND))
    (found,) = measure(bundle_of(tiny_bundle, "ranker", precision="bf16"), shards)
    assert (found.non_finite > 0) == bool(sign)
    with pytest.raises(ExpectationError, match=r"stage 'ranker'"):
        require_faithful([found], Guard(max_auc_change=0.01, min_overlap=0.9))


def test_the_slice_is_the_first_of_the_validation_split_or_of_training(shards: Shards, tmp_path: Path):
    pieces = list(guard._slice(shards, 20, size=8))
    assert [len(piece) for piece in pieces] == [8, 5, 7]  # 13 rows in the first file, then 7 of 12
    ids = [value for piece in pieces for value in piece["request_id"].to_pylist()]
    assert ids == shards.table("requests/valid")["request_id"].to_pylist()[:20]
    bare = Shards(shards.folder, {**shards.manifest, "requests": {**shards.splits, "valid": 0}})
    first = next(guard._slice(bare, 3, size=8))
    assert first["request_id"].to_pylist() == shards.table("requests/train")["request_id"].to_pylist()[:3]

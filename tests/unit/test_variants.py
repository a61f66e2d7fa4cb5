"""The variants of a loaded stage: padded to buckets, compiled or not, in fewer bits, weights shared."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from raycascade import storage, variants
from raycascade.bundle import Bundle, load_bundle, write_manifest
from raycascade.cascade import Cascade
from raycascade.config import Config, Stage, parse_config
from raycascade.errors import ConfigError
from raycascade.linears import NarrowLinear
from raycascade.variants import bucket, compiled, missing_for_compiling, with_padded_candidates, with_variants
from tests.model_cases import HISTORY_LEN, TORCH_MODELS, build, random_batch
from tests.tiny_world import encoded_users, fitted

CPU = torch.device("cpu")


def uncompiled(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    """In place of torch.compile."""
    return function


def changed(config: Config, name: str, **options: Any) -> Config:
    stages = tuple(stage.model_copy(update=options if stage.name == name else {}) for stage in config.stages)
    return config.model_copy(update={"stages": stages})


def bundle_with(tiny_bundle: str, folder: Path, name: str, **options: Any) -> str:
    """A copy of the bundle whose config serves a stage otherwise."""
    uri = str(shutil.copytree(tiny_bundle, folder / "copy"))
    config = changed(load_bundle(tiny_bundle).config, name, **options)
    storage.write_bytes(f"{uri}/config.yaml", yaml.safe_dump(config.model_dump(mode="json")).encode())
    write_manifest(uri, fingerprint=fitted().schema.fingerprint())
    return uri


def narrowed(cascade: Cascade) -> dict[str, int]:
    return {name: sum(isinstance(module, NarrowLinear) for module in model.modules())
            for name, model in cascade.models.items()}


# ---------------------------------------------------------------- widths
def test_buckets_hold_the_width_and_are_few():
    assert [bucket(width) for width in (0, 1, 64, 65, 500, 1024, 1025, 2049)] == [
        64, 64, 64, 128, 512, 1024, 2048, 3072]
    assert [bucket(width, most=50) for width in (0, 7, 50)] == [50, 50, 50]
    assert bucket(0, most=0) == 0
    assert len({bucket(width) for width in range(1025)}) == len(variants.BUCKETS)


def test_padded_candidates_are_masked_and_the_others_stay():
    batch = random_batch()
    wide = with_padded_candidates(batch)
    assert wide.mask_QC.shape == (8, 64)
    assert not wide.mask_QC[:, 5:].any()
    assert wide.mask_QC.dtype == torch.bool
    assert torch.equal(wide.item["tags"][:, :5], batch.item["tags"])
    assert not wide.item["tags"][:, 5:].any()


@pytest.mark.parametrize("name", TORCH_MODELS)
def test_a_model_padded_to_buckets_gives_the_same_logits(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", uncompiled)
    for events in (0, 4):
        batch, model = random_batch(history_len=events), build(name, {}, num_tasks=2)
        with torch.no_grad():
            expected = model(batch)
        padded = compiled(model, history_len=HISTORY_LEN)
        found = padded(batch)
        assert found.shape == expected.shape
        torch.testing.assert_close(found[batch.mask_QC], expected[batch.mask_QC])
        alone = padded.score_candidates(padded.encode_request(batch), batch)
        torch.testing.assert_close(alone[batch.mask_QC], expected[batch.mask_QC])


# ---------------------------------------------------------------- of a bundle
def test_a_loaded_stage_is_what_its_config_serves_and_the_others_are_as_trained(tiny_bundle: str, tmp_path: Path):
    uri = bundle_with(tiny_bundle, tmp_path, "ranker", precision="bf16")
    served, trained = load_bundle(uri), load_bundle(uri, served=())
    assert narrowed(trained.cascade) == {"retriever": 0, "pre_ranker": 0, "ranker": 0}
    found = narrowed(served.cascade)
    assert found.pop("ranker") > 0
    assert not any(found.values())
    assert narrowed(load_bundle(uri, served=("retriever",)).cascade)["ranker"] == 0
    users = encoded_users(served.state)
    left, right = served.recommend(users), trained.recommend(users)
    assert (left["pre_ranker"].scores_QC == right["pre_ranker"].scores_QC).all()
    difference = abs(left.final.scores_QC - right.final.scores_QC).max()
    assert 0 < difference < 0.1 * right.final.scores_QC.std()


def test_a_variant_shares_the_tables_and_leaves_the_trained_model_alone(tiny_bundle: str):
    bundle = load_bundle(tiny_bundle)
    cascade = bundle.cascade
    before = {name: value.clone() for name, value in cascade.state_dict().items()}
    cascade.stages["ranker"] = cascade.stages["ranker"].model_copy(update={"precision": "bf16"})
    varied = with_variants(cascade, history_len=10)
    assert varied is not cascade
    assert varied.models["retriever"] is cascade.models["retriever"]
    tables = [m.weight for m in cascade.models["ranker"].modules() if isinstance(m, torch.nn.Embedding)]
    assert tables
    assert {id(w) for w in tables} <= {id(w) for w in varied.models["ranker"].parameters()}
    assert narrowed(cascade)["ranker"] == 0
    assert all(torch.equal(value, before[name]) for name, value in cascade.state_dict().items())


def test_a_stage_too_small_for_its_precision_is_said(tiny_bundle: str, tmp_path: Path, caplog: Any):
    uri = bundle_with(tiny_bundle, tmp_path, "pre_ranker", precision="int8")
    with caplog.at_level(logging.WARNING):
        load_bundle(uri)
    (record,) = caplog.records
    assert "stage 'pre_ranker': no linear map is large enough for precision int8" in record.getMessage()


def test_without_a_compiler_a_stage_is_served_uncompiled_and_one_line_says_so(
    tiny_bundle: str, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        bundle = load_bundle(bundle_with(tiny_bundle, tmp_path, "ranker", compile=True))
    assert [record.getMessage() for record in caplog.records] == [
        "stage 'ranker': not compiled, because there is no C++ compiler; it is served uncompiled"]
    users = encoded_users(bundle.state)
    expected = load_bundle(tiny_bundle).recommend(users).final.scores_QC
    assert (bundle.recommend(users).final.scores_QC == expected).all()


def test_a_compiled_stage_has_run_when_its_bundle_is_loaded(
    tiny_bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[int, ...]] = []

    def counted(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        assert options["dynamic"] is True

        def call(*arguments: Any) -> Any:
            seen.append(tuple(arguments[-1].mask_QC.shape))
            return function(*arguments)

        return call

    monkeypatch.setattr(torch, "compile", counted)
    monkeypatch.setattr(variants, "missing_for_compiling", lambda device: "")
    uri = bundle_with(tiny_bundle, tmp_path, "ranker", compile=True)
    load_bundle(uri, served=("retriever",))
    assert not seen
    load_bundle(uri)
    assert {(1, 64), (2, 64)} <= set(seen)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # by its own compiler
@pytest.mark.skipif(bool(missing_for_compiling(CPU)), reason=f"there is no {missing_for_compiling(CPU)}")
def test_a_compiled_model_scores_and_orders_as_the_uncompiled_one(tiny_bundle: str):
    bundle: Bundle = load_bundle(tiny_bundle)
    cascade = bundle.cascade
    batch = bundle.batch(encoded_users(bundle.state))
    rows_QC = torch.from_numpy(bundle.items.all_rows[:15].copy()).repeat(25, 1)
    wide = batch.with_candidates(rows_QC, torch.ones_like(rows_QC, dtype=torch.bool), bundle.items)
    with torch.no_grad():
        expected = cascade.score("pre_ranker", wide)
    stage = cascade.stages["pre_ranker"].model_copy(update={"compile": True})
    cascade.models["pre_ranker"] = variants.variant(cascade.model("pre_ranker"), stage, history_len=10)  # type: ignore[arg-type]
    found = cascade.score("pre_ranker", wide)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert torch.equal(found.topk(5).indices.sort().values, expected.topk(5).indices.sort().values)


# ---------------------------------------------------------------- config
def test_what_cannot_be_served_is_refused():
    with pytest.raises(ConfigError, match="stage 'a': int8 products cannot be compiled"):
        Stage(name="a", keep=1, model={"name": "mlp"}, precision="int8", compile=True)
    trees = [{"name": "retriever", "keep": 9, "model": {"name": "two_tower"}, "exclude": ["pair"]},
             {"name": "ranker", "keep": 5, "model": {"name": "gbdt"}, "precision": "bf16"}]
    config = parse_config({"dataset": {"name": "simulated"}, "stages": trees}, where="x")
    with pytest.raises(ConfigError, match="precision and compile are for models of torch, which gbdt is not"):
        Cascade(config, fitted().space)
    with pytest.raises(ConfigError, match=r"guard.*max_auc_chang"):
        parse_config({"dataset": {"name": "simulated"}, "stages": trees, "guard": {"max_auc_chang": 1}}, where="x")

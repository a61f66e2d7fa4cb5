"""Every file in models/ keeps the promises of a torch model (M1-M19), under its defaults and some variants."""

import copy
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from raycascade import plugins
from raycascade.batch import Batch
from raycascade.models._first_order import FirstOrder
from raycascade.models._layers import SplitLinear
from raycascade.schema import FIRST_ROW, UNKNOWN, FeatureSpace, Field
from tests.model_cases import (
    CASES,
    HISTORY_FIELDS,
    SPACE,
    TORCH_MODELS,
    accepted,
    build,
    case_id,
    dense_grad,
    one_candidate_a_request,
    padded_candidates,
    padded_history,
    random_batch,
    requests_at,
    values,
    with_candidates,
    with_generic_parameters,
    with_history,
    with_other_values,
)

every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=case_id)
every_model = pytest.mark.parametrize("name", TORCH_MODELS)
# Of the history, the time of each event kept.
ORDER_MATTERS = {"din": False, "dien": True, "bst": True, "hstu": True, "gesr": True}
LINEAR_MODELS = {"lr"}  # cannot learn an exclusive or
SIGNED = {"int_tower": {"heads": 1}}  # a sum of maxima over many random heads is hardly ever negative
SMALL = {"gesr": {"width": 8, "vector_dim": 8, "layers": 1, "key_dim": 4, "value_dim": 4, "seeds": 1},
         "hstu": {"width": 16, "layers": 1, "key_dim": 8, "value_dim": 8}}  # wide ones learn too, in a minute


def assert_close(actual: Tensor, expected: Tensor, *, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def weighted_loss(model: Any, batch: Batch, *, seed: int = 0) -> Tensor:
    """Logits times fixed random weights, plus the model's own losses."""
    logits, extra = model.train_outputs(batch)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
    return (logits * weights).sum() + sum(extra.values())


# ---------------------------------------------------------------- shapes and masks
@every_case
@pytest.mark.parametrize("training", [False, True])
def test_one_request_with_one_candidate_and_no_history_is_scored(name: str, options: dict[str, Any], training: bool):
    batch = random_batch()
    single = with_history(with_candidates(requests_at(batch, [0]), lambda x: x[:, :1]), lambda x: x[:, :1])
    model = build(name, options, num_tasks=2).train(training)
    logits = model(single)
    assert logits.shape == (1, 1, 2)
    assert logits.isfinite().all()
    if not training:
        assert_close(logits[0, 0], model(batch)[0, 0])


@every_case
def test_logits_are_float32_numbers_below_0_and_above_1(name: str, options: dict[str, Any]):
    """Wide parameters, because a cosine with a scale near 1 cannot leave [-1, 1] by itself."""
    options = {**options, **SIGNED.get(name, {})}
    models = [build(name, options, seed=seed, std=1.0).float() for seed in range(5)]
    logits = torch.cat([model(random_batch(seed=seed)) for seed, model in enumerate(models)])
    assert logits.dtype == torch.float32
    assert logits.min() < 0
    assert logits.max() > 1


@every_case
def test_no_candidates_and_histories_of_no_length_are_fine(name: str, options: dict[str, Any]):
    model = build(name, options).train()
    assert model(random_batch(num_candidates=0)).shape == (8, 0, 1)
    without_history = with_history(random_batch(), lambda x: x[:, :0])
    logits = model(without_history)
    logits.sum().backward()
    masked = replace(random_batch(), history_mask_QL=torch.zeros(8, 6, dtype=torch.bool))
    assert_close(model.eval()(without_history), model(masked))


@every_case
@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_masked_events_change_nothing(name: str, options: dict[str, Any], front: bool, training: bool):
    batch, model = random_batch(), build(name, options).train(training)
    twin = copy.deepcopy(model)
    assert_close(twin(padded_history(batch, front=front))[batch.mask_QC], model(batch)[batch.mask_QC])
    assert_close(torch.cat([b.flatten() for b in twin.buffers()]), torch.cat([b.flatten() for b in model.buffers()]))


@every_case
@pytest.mark.parametrize("training", [False, True])
def test_masked_candidates_change_nothing(name: str, options: dict[str, Any], training: bool):
    batch, model = random_batch(), build(name, options).train(training)
    twin = copy.deepcopy(model)
    more = twin(padded_candidates(batch))
    assert more.isfinite().all()
    assert_close(more[:, :5][batch.mask_QC], model(batch)[batch.mask_QC])
    assert_close(torch.cat([b.flatten() for b in twin.buffers()]), torch.cat([b.flatten() for b in model.buffers()]))


@every_case
def test_permuting_candidates_permutes_logits(name: str, options: dict[str, Any]):
    batch, model, order = random_batch(), build(name, options), torch.tensor([3, 0, 4, 1, 2])
    assert_close(model(with_candidates(batch, lambda x: x[:, order])), model(batch)[:, order])


@every_case
def test_a_candidate_is_scored_alone(name: str, options: dict[str, Any]):
    batch, other, model = random_batch(), random_batch(seed=1), build(name, options)
    others = replace(batch, item={n: torch.cat([x[:, :1], other.item[n][:, 1:]], 1) for n, x in batch.item.items()})
    assert_close(model(others)[:, 0], model(batch)[:, 0])
    assert (model(others)[:, 1:] - model(batch)[:, 1:]).abs().max() > 1e-6


# ---------------------------------------------------------------- everything counts
@every_case
def test_every_parameter_learns(name: str, options: dict[str, Any]):
    # In training, batch norm takes away every constant, a projection's bias too; in evaluation it does not.
    modes = (True, False) if options.get("norm") == "batch" else (True,)
    alive: set[str] = set()
    for seed, training in product(range(3), modes):
        model = build(name, options, num_tasks=2, seed=seed).train(training)
        weighted_loss(model, random_batch(seed=seed), seed=seed).backward()
        alive |= {n for n, p in model.named_parameters() if p.grad is not None and dense_grad(p).abs().max() > 1e-12}
    assert {n for n, _ in model.named_parameters()} - alive == set()


@every_case
def test_no_declared_feature_is_ignored(name: str, options: dict[str, Any]):
    space, model, batch = accepted(name, options), build(name, options), random_batch()
    logits = model(batch)[batch.mask_QC]
    for field in space.of("request", "item", "pair"):
        changed = model(with_other_values(batch, field, seed=5))[batch.mask_QC]
        assert (changed - logits).abs().max() > 1e-6, field.name
    for field in HISTORY_FIELDS:
        new = values(field, (8, 6), torch.Generator().manual_seed(5))
        changed = model(replace(batch, history={**batch.history, field.name: new}))[batch.mask_QC]
        assert (changed - logits).abs().max() > 1e-6, f"history.{field.name}"


@every_case
def test_attention_and_gates_are_alive(name: str, options: dict[str, Any]):
    batch = replace(random_batch(), history_mask_QL=torch.ones(8, 6, dtype=torch.bool),
                    mask_QC=torch.ones(8, 5, dtype=torch.bool))
    for key, weights in build(name, options).explain(batch).items():
        assert weights.std(-1).max() > 1e-6, key
        rows = weights.flatten(0, -2)
        of_edcn = key.endswith(("cross_gates", "deep_gates"))  # the same for every candidate
        assert of_edcn or (rows - rows[0]).abs().max() > 1e-6, key


@every_case
def test_extreme_inputs_give_finite_logits_and_gradients(name: str, options: dict[str, Any]):
    batch = random_batch()
    extreme = {"id": lambda x: torch.full_like(x, UNKNOWN), "ids": torch.zeros_like, "vector": torch.zeros_like,
               "dense": lambda x: torch.where(x > 0, 5.0, -5.0)}

    def group(old: Any) -> dict[str, Tensor]:
        return {n: extreme[SPACE[n].form](x) for n, x in old.items()}

    masks = {"mask_QC": torch.arange(5).expand(8, 5) < 1, "history_mask_QL": torch.zeros(8, 6, dtype=torch.bool)}
    batch = replace(batch, user=group(batch.user), item=group(batch.item), history=group(batch.history), **masks)
    model = build(name, options).train()
    loss = weighted_loss(model, batch)
    loss.backward()
    assert loss.isfinite()
    assert all(dense_grad(p).isfinite().all() for p in model.parameters() if p.grad is not None)


# ---------------------------------------------------------------- one code path
@every_case
def test_candidates_are_scored_from_the_state_without_the_request_side(name: str, options: dict[str, Any]):
    batch, model = random_batch(), build(name, options)
    bare = replace(batch, user={}, history={}, history_mask_QL=torch.zeros(8, 0, dtype=torch.bool),
                   history_rows_QL=torch.zeros(8, 0, dtype=torch.long))
    assert_close(model.score_candidates(model.encode_request(batch), bare), model(batch))


@every_case
def test_the_request_side_runs_once_a_request(name: str, options: dict[str, Any]):
    """Rows through tables while the request is encoded, and through the request's half of split layers at all times."""
    rows = []
    counts: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counts.append(output[..., 0].numel())

    for num_candidates in (1, 7):
        batch, model = random_batch(num_candidates=num_candidates), build(name, options)
        for module in model.modules():
            if isinstance(module, SplitLinear) and module.request is not None:
                module.request.register_forward_hook(count)
        model(batch)
        for module in model.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                module.register_forward_hook(count)
        model.encode_request(batch)
        rows.append(sum(counts))
        counts.clear()
    assert rows[0] == rows[1] > 0


@every_case
def test_a_list_of_candidates_equals_a_table_with_one_candidate_a_row(name: str, options: dict[str, Any]):
    batch, model = random_batch(), build(name, options, num_tasks=2)
    assert_close(model(one_candidate_a_request(batch)).view(8, 5, 2), model(batch))


# ---------------------------------------------------------------- state
@every_case
def test_a_pass_leaves_config_space_and_batch_as_they_were(name: str, options: dict[str, Any]):
    cls, config = plugins.options("models", {"name": name, **options}, "model")
    space, batch = accepted(name, options), random_batch()
    before, dumps = copy.deepcopy(batch), (config.model_dump(), space.model_dump())
    model = with_generic_parameters(cls(config, space).double(), seed=0)
    weighted_loss(model, batch).backward()
    assert (config.model_dump(), space.model_dump()) == dumps
    for key in ("user", "item", "history"):
        assert all(torch.equal(x, getattr(before, key)[n]) for n, x in getattr(batch, key).items())
    assert torch.equal(batch.mask_QC, before.mask_QC)
    assert torch.equal(batch.history_mask_QL, before.history_mask_QL)
    twin = cls(config, space).double()
    storages = {p.data_ptr() for p in model.state_dict().values() if p.numel()}
    assert storages.isdisjoint(p.data_ptr() for p in twin.state_dict().values() if p.numel())


@every_case
def test_saved_and_loaded_weights_score_bitwise_equally(name: str, options: dict[str, Any]):
    model = build(name, options).train()
    model(random_batch(seed=1))  # moves running statistics
    fresh = build(name, options, seed=1)
    fresh.load_state_dict(load(save(model.state_dict())))
    assert torch.equal(fresh(random_batch()), model.eval()(random_batch()))


def step(model: Any, optimisers: list[torch.optim.Optimizer], loss: Tensor) -> None:
    for optimiser in optimisers:
        optimiser.zero_grad()
    loss.backward()
    for optimiser in optimisers:
        optimiser.step()


def optimisers_of(model: Any, lr: float) -> list[torch.optim.Optimizer]:
    """Sparse ones for tables, as the training loop has them."""
    groups = model.param_groups()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    sparse = [p for p in groups["linear"] + groups["embedding"] if id(p) in tables]
    dense = [p for p in groups["linear"] + groups["dense"] if id(p) not in tables]
    chosen: list[torch.optim.Optimizer] = [torch.optim.SparseAdam(sparse, lr=lr)] if sparse else []
    return [*chosen, torch.optim.AdamW(dense, lr=lr, weight_decay=0.0)] if dense else chosen


@every_case
def test_every_parameter_is_in_one_group_and_tables_have_sparse_gradients(name: str, options: dict[str, Any]):
    model = build(name, options)
    groups = model.param_groups()
    assert set(groups) == {"linear", "embedding", "dense"}
    assert sorted(id(p) for group in groups.values() for p in group) == sorted(id(p) for p in model.parameters())
    weighted_loss(model, random_batch()).backward()
    assert all(p.grad is not None and p.grad.is_sparse for p in groups["embedding"])
    assert all(p.grad is None or not p.grad.is_sparse for p in groups["dense"])


@every_case
def test_first_order_weights_are_one_per_value_and_number_and_apart_from_the_embeddings(
    name: str, options: dict[str, Any]
):
    model = build(name, options, num_tasks=2)
    groups = model.param_groups()
    apart = {p.data_ptr() for p in groups["embedding"] + groups["dense"]}
    assert apart.isdisjoint(p.data_ptr() for p in groups["linear"])
    owned = {id(p) for module in model.first_order() for p in module.parameters()}
    assert owned == {id(p) for p in groups["linear"]}
    fields = accepted(name, options, num_tasks=2).fields
    values = sum(num_rows - 1 for num_rows in {f.table: f.num_rows for f in fields if f.table}.values())
    numbers = sum(f.width for f in fields if not f.table)
    for module in model.first_order():
        if isinstance(module, FirstOrder):  # for each task; one padding row and w_0 stand beside the weights
            assert sum(p.numel() for p in module.parameters()) == 2 * (values + numbers + 2)


@every_case
def test_the_same_seed_trains_to_the_same_logits(name: str, options: dict[str, Any]):
    results = []
    for _ in range(2):
        model = build(name, options, generic=False, seed=3).train()
        optimisers = optimisers_of(model, 0.01)
        for seed in range(3):
            step(model, optimisers, weighted_loss(model, random_batch(seed=seed)))
        results.append(model.eval()(random_batch()))
    assert torch.equal(*results)


# ---------------------------------------------------------------- ids
@every_model
def test_large_ids_reach_the_tables_exactly(name: str):
    """A float32 detour would turn 16777217 into 16777216. The tables are small; a hook maps the rows into them."""
    big, model = 1 << 24, build(name, {})
    seen: set[int] = set()

    def into_the_table(module: nn.Embedding, inputs: tuple[Tensor]) -> tuple[Tensor]:
        assert inputs[0].dtype == torch.int64
        seen.update(inputs[0].flatten().tolist())
        return (torch.where(inputs[0] >= big, FIRST_ROW + inputs[0] % 2, inputs[0]),)

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(into_the_table)
    batch = random_batch(num_requests=2)
    twice = replace(batch, item={n: x[:, :1].expand_as(x) for n, x in batch.item.items()})
    ids = torch.tensor([[big, big + 1, big, big + 1, big]] * 2)
    logits = model(replace(twice, item={**twice.item, "item_id": ids}, candidates_QC=ids))
    assert any({row, row + 1} <= seen for row in seen if row >= big)  # first-order rows lie behind other vocabularies
    assert (logits[:, 0] - logits[:, 1]).abs().min() > 1e-6
    assert_close(logits[:, 0], logits[:, 2])


# ---------------------------------------------------------------- learning
def auc(scores: Tensor, labels: Tensor) -> float:
    """Share of (positive, negative) pairs in the right order; ties count one half."""
    gaps = scores[labels > 0][:, None] - scores[labels == 0][None]
    return float((gaps > 0).double().mean() + 0.5 * (gaps == 0).double().mean())


@every_model
def test_an_exclusive_or_of_user_and_item_is_learnt(name: str):
    space = FeatureSpace(  # 12 values drawn, half of them even: neither side alone tells anything
        fields=(Field(name="user_id", side="request", form="id", table="user_id", num_rows=13),
                Field(name="item_id", side="item", form="id", table="item_id", num_rows=13)),
        history_len=2, history_fields=("item_id",))
    batch = random_batch(num_requests=400, history_len=2, space=space)
    batch = replace(batch, mask_QC=torch.ones_like(batch.mask_QC))
    label = ((batch.user["user_id"][:, None] + batch.item["item_id"]) % 2).double()
    model = build(name, SMALL.get(name, {}), space=space, generic=False).train()
    optimisers = optimisers_of(model, 0.03)
    for _ in range(120):
        logits = model.train_outputs(batch)[0][..., 0]
        step(model, optimisers, nn.functional.binary_cross_entropy_with_logits(logits, label))
    reached = auc(model.eval()(batch)[..., 0].detach().flatten(), label.flatten())
    assert reached < 0.6 if name in LINEAR_MODELS else reached > 0.95


@pytest.mark.parametrize("name", [n for n in TORCH_MODELS if n in ORDER_MATTERS])
def test_sequence_models_read_the_target_and_the_order_they_promise(name: str):
    model = build(name, {}, space=SPACE.without(("action", "gap")))
    batch = replace(random_batch(), history_mask_QL=torch.ones(8, 6, dtype=torch.bool))
    weights = next(iter(model.explain(batch).values()))
    other = next(iter(model.explain(replace(batch, item=random_batch(seed=1).item)).values()))
    assert (weights - other).abs().max() > 1e-6
    flipped = replace(batch, history={n: x.flip(1) for n, x in batch.history.items()})
    changed = (model(flipped) - model(batch))[batch.mask_QC].abs().max()
    assert changed > 1e-6 if ORDER_MATTERS[name] else changed < 1e-10

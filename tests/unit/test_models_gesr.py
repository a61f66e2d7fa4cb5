"""gesr: the two_tower inside it, its gates and parts against their definitions, cached items, and what it learns."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raycascade import plugins
from raycascade.batch import Batch, Targets, collate
from raycascade.errors import ConfigError, DataError
from raycascade.item_cache import ItemCache
from raycascade.items import ItemTable
from raycascade.models import _match_attention
from raycascade.models._cross_attention import CrossAttention
from raycascade.models._encoded_items import encode_catalogue, score_from_cache
from raycascade.models._gating import GatedLogits
from raycascade.models._match import ComparedEvents
from raycascade.models.gesr import with_towers_of
from raycascade.schema import FIRST_ROW, FeatureSpace, Field
from tests import tiny_world
from tests.f3 import assign, close
from tests.model_cases import SPACE, accepted, build, random_batch

SWITCHES = ("hma", "self", "nro", "ro")
SMALL = {"width": 8, "vector_dim": 6, "key_dim": 4, "value_dim": 3, "seeds": 2, "gate_rank": 5, "match_dim": 3}
COMBINATIONS = [dict(zip(SWITCHES, chosen, strict=True)) for chosen in product((False, True), repeat=4)]
CASES = [{**on, "mlpg": mlpg, "ro_kv": ro_kv} for on, mlpg, ro_kv in product(COMBINATIONS, (True, False),
                                                                             ("item", "history"))
         if (ro_kv == "item" or on["ro"]) and (mlpg or any(on.values()))]
OWN_SPACE = accepted("gesr", {})


def words(case: dict[str, Any]) -> str:
    return "+".join([key for key, on in case.items() if on is True] or ["nothing"]) + f",{case.get('ro_kv', '')}"


# ---------------------------------------------------------------- the two_tower inside
@pytest.mark.parametrize("options", [{}, {"similarity": "dot", "item_bias": True, "user_history": "attention"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_its_parts_logits_it_is_a_two_tower_with_the_same_weights_to_the_bit(
    options: dict[str, Any], dtype: torch.dtype
):
    model = build("gesr", {**SMALL, **options}, num_tasks=2).to(dtype)
    tower = build("two_tower", {"vector_dim": 6, **options}, num_tasks=2).to(dtype)
    model.load_state_dict(with_towers_of(model.state_dict(), tower.state_dict()))
    batch = random_batch()
    assert (model(batch) - tower(batch)).abs().max() > 1e-6
    assign(model.gated.shares, torch.zeros(4, 2))
    assert torch.equal(model(batch), tower(batch))
    off = build("gesr", {**SMALL, **options, **dict.fromkeys(SWITCHES, False)}, num_tasks=2).to(dtype)
    off.load_state_dict({f"tower.{name}": x for name, x in tower.state_dict().items()})
    assert torch.equal(off(batch), tower(batch))


def test_towers_of_another_shape_are_refused_by_name():
    model, tower = build("gesr", SMALL), build("two_tower", {"vector_dim": 7})
    with pytest.raises(ConfigError, match=r"init_from: .*'item_tower\.upper\.linears\.0\.bias': \(7,\) there, \(6,\)"):
        with_towers_of(model.state_dict(), tower.state_dict())


def test_weights_given_to_the_towers_are_not_shared_with_the_two_tower():
    model, tower = build("gesr", SMALL), build("two_tower", {"vector_dim": 6})
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with_towers_of(model.state_dict(), tower.state_dict())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


# ---------------------------------------------------------------- switches
@pytest.mark.parametrize("case", CASES, ids=words)
def test_every_combination_of_parts_trains_all_the_parameters_it_has(case: dict[str, Any]):
    model, still = build("gesr", {**SMALL, **case}).train(), set()
    assert model.parts.names == tuple(name for name in SWITCHES if case[name])
    for seed in range(3):
        batch = random_batch(seed=seed)
        noise = torch.randn(8, 5, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        (model(batch) * noise).sum().backward()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        moved = gradient is not None and (gradient.to_dense() if gradient.is_sparse else gradient).abs().max() > 1e-12
        still |= set() if moved else {name}
    assert still == set()
    before = model(random_batch()).detach()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert (model(random_batch()) - before).abs().max() > 0


def test_a_part_that_is_off_has_no_parameters():
    def size(name: str, options: dict[str, Any]) -> int:
        return sum(p.numel() for p in build(name, options).parameters())

    sizes = [size("gesr", {**SMALL, **case}) for case in COMBINATIONS]
    assert len(set(sizes)) == 16
    assert min(sizes) == size("two_tower", {"vector_dim": 6})


# ---------------------------------------------------------------- gates
def test_logits_add_up_with_their_shares():
    gated = GatedLogits(("one", "other"), user_width=2, item_width=2, width=3, num_tasks=1, rank=0, hidden=(),
                        start=0.1, gated=False).double()
    for name, value in (("one", 0.8), ("other", -0.3)):
        head: Any = gated.heads[name]
        assign(head.first.weight, torch.zeros(1, 3))
        assign(head.first.bias, [value])
    nothing = torch.zeros(1, 1, 2).double()
    parts = dict.fromkeys(("one", "other"), torch.ones(1, 1, 3).double())
    close(0.5 + gated(None, nothing, nothing, parts), [[[0.55]]])


@pytest.mark.parametrize("rank", [0, 3])
def test_gates_start_at_one(rank: int):
    model, batch = build("gesr", {**SMALL, "gate_rank": rank}, generic=False), random_batch()
    close(model.explain(batch)["gates"], torch.ones(8, 5, 4, 8))


def test_gates_equal_their_definition_written_out():
    model, batch = build("gesr", SMALL, num_tasks=2), random_batch()
    state, encoded = model.encode_request(batch), model.encode_items(batch.item, (8, 5))
    parts, gated = model.parts(state.parts, encoded, batch), model.gated
    weight = torch.cat([gated.squeeze.request.weight, gated.squeeze.candidate.weight], 1)
    gates = model.explain(batch)["gates"]
    for q, c in ((0, 0), (1, 2), (5, 4)):
        u, v = state.users_QTD[q], encoded["vector"][q, c]
        s = torch.cat([gated.user_norm(u.flatten()), gated.item_norm(v), gated.product_norm((u * v).flatten()),
                       *(gated.norms[name](parts[name][q, c]) for name in SWITCHES)])
        out = gated.gates.weight @ nn.functional.silu(weight @ s) + gated.gates.bias
        close(gates[q, c], 2 / (1 + (-out).exp()).view(4, 8), atol=1e-10)
        heads = [gated.heads[name](parts[name][q, c] * gates[q, c, k]) for k, name in enumerate(SWITCHES)]
        z = model.tower.scale * (u @ v) + model.tower.bias + (gated.shares * torch.stack(heads)).sum(0)
        close(model(batch)[q, c], z, atol=1e-10)


def test_the_gates_give_the_towers_vectors_no_gradient():
    model, batch = build("gesr", {**SMALL, "self": False, "nro": False, "ro": False}), random_batch()
    (model(batch) - model.primary(model.encode_request(batch), model.encode_items(batch.item, (8, 5)))).sum().backward()
    own = [p.grad for p in (model.tower.log_scale, *model.tower.item_tower.parameters())]
    assert all(gradient is None or float(gradient.abs().max()) < 1e-12 for gradient in own)


# ---------------------------------------------------------------- parts
def test_cross_attention_equals_its_definition_head_by_head():
    module, draw = CrossAttention(6, 3).double(), torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        assign(parameter, 0.5 * torch.randn(parameter.shape, generator=draw))
    x, rows = (torch.randn(2, n, 6, generator=draw, dtype=torch.float64) for n in (4, 5))
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    out = module(x, module.query(x), module.key(rows), module.value(rows), mask)
    for b, r in product(range(2), range(4)):
        seen, heads = rows[b][mask[b]], []
        for h in range(3):
            part = slice(2 * h, 2 * h + 2)
            query, key = module.query.weight[part] @ x[b, r], seen @ module.key.weight[part].T
            heads.append((key @ query / 2**0.5).softmax(0) @ (seen @ module.value.weight[part].T))
        z = module.attended(x[b, r] + module.out.weight @ torch.cat(heads))
        close(out[b, r], module.fed(z + module.narrow(module.wide(z).relu())), atol=1e-10)


def test_the_request_reads_each_candidates_fields_and_its_own_history():
    batch = random_batch()
    for ro_kv, reads in (("item", True), ("history", False)):
        model = build("gesr", {**SMALL, "hma": False, "self": False, "nro": False, "ro_kv": ro_kv})
        state, encoded = model.encode_request(batch), model.encode_items(batch.item, (8, 5))
        answer = model.parts(state.parts, encoded, batch)["ro"]
        assert answer.shape == (8, 5 if reads else 1, 8)
        assert ("keys" in encoded) == reads
        other = model.encode_request(replace(batch, history=random_batch(seed=1).history)).parts.answer_Q1D
        assert reads if other is None else (other - answer)[1].abs().max() > 1e-6


def test_one_candidates_answer_of_the_request_part_equals_a_plain_loop():
    model, batch = build("gesr", {**SMALL, "hma": False, "self": False, "nro": False}), random_batch()
    part, inputs, q, c = model.parts.ro, model.tower.inputs, 3, 1
    state, encoded = model.encode_request(batch), model.encode_items(batch.item, (8, 5))
    flat = inputs.matrix(batch.item, inputs.item_fields, (8, 5))[q, c].split(part.fields.widths)
    rows = torch.stack([project(field) for project, field in zip(part.fields.projections, flat, strict=True)])
    asks = torch.cat([part.seeds, part.of_user(state.users_QTD[q].flatten())[None]])
    attention = part.attention
    read = attention(asks, attention.query(asks), attention.key(rows), attention.value(rows))
    answer = part.out_of_seeds(read[:-1].flatten()) + part.out(read[-1])
    close(model.parts(state.parts, encoded, batch)["ro"][q, c], answer, atol=1e-10)


def test_compared_and_sorted_events_give_the_same_logits(monkeypatch: pytest.MonkeyPatch):
    model, batch = build("gesr", SMALL), random_batch()
    batch = replace(batch, history_rows_QL=batch.candidates_QC[:, [0, 1, 1, 2, 3, 1]])
    expected = model(batch)
    monkeypatch.setattr(_match_attention, "event_ids", ComparedEvents)
    assert torch.equal(model(batch), expected)
    assert not torch.equal(model(replace(batch, history_rows_QL=torch.zeros(8, 6).long())), expected)


# ---------------------------------------------------------------- the loss beside the stage's
def labelled(labels: dict[str, Tensor]) -> Batch:
    batch, zeros = random_batch(), torch.zeros(8, 5)
    return replace(batch, targets=Targets(relevance_QC=zeros, reached_QC=zeros.long(), mask_QC=batch.mask_QC, keep=(),
                                          k=1, labels=labels))


def test_the_primary_loss_is_the_cross_entropy_of_the_towers_logit_over_known_labels():
    model = build("gesr", {**SMALL, "primary_weight": 0.5}, num_tasks=2)
    draw = torch.Generator().manual_seed(0)
    click, like = (torch.rand(8, 5, generator=draw).round() for _ in range(2))
    like[2:] = torch.nan
    batch = labelled({"click": click, "like": like})
    logits, extra = model.train_outputs(batch)
    primary = model.primary(model.encode_request(batch), model.encode_items(batch.item, (8, 5)))
    expected = torch.zeros(()).double()
    for task, truth in enumerate((click, like)):
        known = batch.mask_QC & truth.isfinite()
        p = primary[..., task][known].sigmoid()
        y = truth[known].double()
        expected = expected - 0.5 * (y * p.log() + (1 - y) * (1 - p).log()).mean()
    close(extra["primary"], expected, atol=1e-10)
    assert torch.equal(logits, model(batch))


def test_the_labels_of_the_primary_loss_are_those_of_the_tasks():
    click, like = torch.zeros(8, 5), torch.ones(8, 5)
    batch = labelled({"click": click, "like": like})
    chosen = build("gesr", {**SMALL, "primary_label": "like"})
    of_log, of_task = build("gesr", SMALL), build("gesr", SMALL)
    of_task.task_labels = ("like",)
    losses = [model.train_outputs(batch)[1]["primary"].item() for model in (of_log, chosen, of_task)]
    assert losses[0] != losses[1] == losses[2]
    with pytest.raises(ConfigError, match="belong to its 3 tasks is not known; set task_labels"):
        build("gesr", SMALL, num_tasks=3).train_outputs(batch)
    with pytest.raises(DataError, match="needs the label 'click'"):
        of_log.train_outputs(labelled({"like": like}))
    assert build("gesr", {**SMALL, "primary_weight": 0.0}).train_outputs(batch)[1] == {}


# ---------------------------------------------------------------- cached items
@pytest.fixture(scope="module")
def world() -> tuple[ItemTable, Batch]:
    """A catalogue, and requests over all of it."""
    state = tiny_world.fitted()
    items = ItemTable.from_encoded(state.encode_items(tiny_world.raw_items(), where="tiny"), state)
    requests = tiny_world.raw_requests().slice(0, 30)
    batch = collate(state.encode_requests(requests, where="tiny"), items)
    rows_QC = torch.from_numpy(items.all_rows).expand(30, -1)
    return items, batch.with_candidates(rows_QC, torch.ones_like(rows_QC, dtype=torch.bool), items)


@pytest.mark.parametrize(("name", "options"), [("gesr", {}), ("gesr", {"ro_kv": "history", "item_bias": True}),
                                               ("int_tower", {})])
def test_a_cache_of_the_catalogue_gives_the_logits_of_live_items(
    world: tuple[ItemTable, Batch], name: str, options: dict[str, Any]
):
    items, batch = world
    space = items.state.space.without(("age", "views"))  # what changes with time is not cached as of the request
    model = build(name, options, space=space, generic=False).float()
    names = tuple(field.name for field in space.of("item"))
    pieces = list(encode_catalogue(model, items, names, chunk=50))
    arrays = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    assert {len(values) for values in arrays.values()} == {tiny_world.NUM_ITEMS + FIRST_ROW}
    assert {values.dtype for key, values in arrays.items() if key.startswith("ids.")} <= {torch.int64}
    cache = ItemCache({name: (x.half() if x.is_floating_point() else x).numpy() for name, x in arrays.items()})
    cached = score_from_cache(model, model.encode_request(batch), replace(batch, item={}), cache, items, names)
    live = model(batch)
    assert (cached - live).abs().max() < 1e-2
    kept = [logits[:, :, 0].topk(40).indices for logits in (cached, live)]
    shared = np.mean([len(set(a) & set(b)) / 40 for a, b in zip(kept[0].tolist(), kept[1].tolist(), strict=True)])
    assert shared >= 0.999


def test_ids_reach_the_cache_exactly():
    model, large = build("gesr", {**SMALL, "self": False, "nro": False, "ro": False}), (1 << 40) + 1
    ids = model.parts.of_items({"tags": torch.tensor([[large, 0, 0]])}, torch.zeros(1, 0), (1,))["ids.tags"]
    assert ids.tolist() == [[large, 0, 0]]


# ---------------------------------------------------------------- learning
def creators(seed: int) -> tuple[Batch, Tensor]:
    """Requests whose label is: the candidate's creator occurs at least twice among the last ten of 16 events."""
    space = CREATORS
    batch = random_batch(num_requests=200, num_candidates=6, history_len=16, seed=seed, space=space)
    draw = torch.Generator().manual_seed(seed + 100)
    favourites = torch.randint(FIRST_ROW, 300, (200, 6), generator=draw)
    events, candidates = (favourites.gather(1, torch.randint(0, 6, (200, n), generator=draw)) for n in (16, 6))
    batch = replace(batch, history={**batch.history, "creator": events}, item={**batch.item, "creator": candidates},
                    history_mask_QL=torch.ones(200, 16, dtype=torch.bool), mask_QC=torch.ones(200, 6, dtype=torch.bool))
    return batch, ((candidates[:, :, None] == events[:, None, -10:]).sum(-1) >= 2).double()


CREATORS = FeatureSpace(
    fields=(Field(name="user_id", side="request", form="id", table="user_id", num_rows=30),
            Field(name="item_id", side="item", form="id", table="item_id", num_rows=40),
            Field(name="creator", side="item", form="id", table="creator", num_rows=300)),
    history_len=16, history_fields=("item_id", "creator"))


def auc_on_new_requests(name: str, options: dict[str, Any]) -> float:
    model = build(name, options, space=CREATORS, generic=False).float().train()
    batch, labels = creators(0)
    tables = [p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()]
    sparse = {id(p) for p in tables}
    optimisers = [torch.optim.SparseAdam(tables, lr=0.01),
                  torch.optim.Adam([p for p in model.parameters() if id(p) not in sparse], lr=0.01)]
    for _ in range(60):
        for optimiser in optimisers:
            optimiser.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(batch)[..., 0], labels.float()).backward()
        for optimiser in optimisers:
            optimiser.step()
    batch, labels = creators(1)
    scores = model.eval()(batch)[..., 0].flatten().detach()
    gaps = scores[labels.flatten() > 0][:, None] - scores[labels.flatten() == 0]
    return ((gaps > 0).double().mean() + 0.5 * (gaps == 0).double().mean()).item()


def test_match_counts_alone_teach_what_two_towers_cannot_see():
    only_counts = {**SMALL, "self": False, "nro": False, "ro": False}
    reached, of_towers = auc_on_new_requests("gesr", only_counts), auc_on_new_requests("two_tower", {"vector_dim": 6})
    assert reached > 0.95
    assert reached - of_towers >= 0.1


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(("options", "space", "words"), [
    ({}, SPACE, "gesr: 'user_id x type' depends on the user and the item together"),
    ({}, OWN_SPACE.without(("history",)), "gesr: the stage sees no history of items"),
    ({"self": False, "nro": False}, OWN_SPACE.without(("history",)), "gesr: hma counts events"),
    ({"heads": 3}, OWN_SPACE, "heads 3 must divide width 64"),
    ({"in_batch_weight": 0.1}, OWN_SPACE, "in_batch_weight is of a two_tower alone"),
    ({"primary_label": "clik"}, OWN_SPACE, "'clik' is not a label.*did you mean 'click'"),
    ({"rab": True, "layers": 1}, OWN_SPACE, "gesr: rab acts between events"),
    ({"pairs": [{"event": "tag", "candidate": "tags"}]}, OWN_SPACE, "'tag' is not an id field of the event"),
])
def test_it_refuses_what_it_cannot_use(options: dict[str, Any], space: FeatureSpace, words: str):
    cls, config = plugins.options("models", {"name": "gesr", **options}, "model")
    with pytest.raises(ConfigError, match=words):
        cls(config, space)

"""hstu: its layer against numbers computed by hand, the cached form against the dense one, and what isolation means."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycascade import plugins
from raycascade.batch import Batch, Targets
from raycascade.errors import ConfigError
from raycascade.models._hstu import HstuLayer, HstuStack
from raycascade.models._sequence import SequenceOptions, SequenceRows
from tests import f3
from tests.f3 import T, assign, close
from tests.model_cases import SPACE, build, padded_candidates, padded_history, random_batch, with_candidates

EVENTS = ((0.1, 0.4), (-0.3, 0.2), (0.5, -0.1))
CANDIDATES = ((0.3, -0.4), (0.2, 0.5))
MODELS = ("hstu", "gesr")
of_both = pytest.mark.parametrize("name", MODELS)


def layer_of_two(*, last: bool) -> HstuLayer:
    """One head of width two, with the hand-set weights."""
    options = SequenceOptions(width=2, layers=1, heads=1, key_dim=2, value_dim=2)
    layer = HstuLayer(options, num_rows=4, dropout=0.0, last=last).double().eval()
    u, v, q, k = (2 * T((8, 2), 1)).split(2)
    u_bias, v_bias, q_bias, k_bias = T((8,), 2).split(2)
    for part, weights, biases in ((layer.gate_query, (u, q), (u_bias, q_bias)),
                                  (layer.value_key, (v, k), (v_bias, k_bias))):
        assign(part.weight, torch.cat(weights))
        assign(part.bias, torch.cat(biases))
    assign(layer.out.weight, T((2, 2), 3))
    assign(layer.out.bias, T((2,), 4))
    return layer


@pytest.mark.parametrize("masked_in_front", [False, True])
def test_a_layer_equals_the_hand_computed_rows(masked_in_front: bool):
    events = ((9.0, 9.0), *EVENTS) if masked_in_front else EVENTS
    rows, mask = torch.tensor([events]).double(), torch.tensor([[e != (9.0, 9.0) for e in events]])
    layer = layer_of_two(last=False)
    after, key, value = layer.of_history(rows, mask)
    close(after[0, -3:], [(-0.675050, 0.174089), (-1.087808, -0.036998), (-0.057181, -0.158517)])
    candidates, read, own = layer.of_candidates(torch.tensor([CANDIDATES]).double(), key, value)
    close(candidates[0], [(0.056733, -0.141935), (-0.589522, 0.261513)])
    assert (read.shape, own.shape) == ((1, 1, 2, len(events)), (1, 1, 2, 1))
    assert read[..., :-3].abs().sum() == 0


def test_the_last_layer_gives_the_same_keys_and_values_and_leaves_the_rows():
    rows, mask = torch.tensor([EVENTS]).double(), torch.ones(1, 3, dtype=torch.bool)
    after, *kept = layer_of_two(last=True).of_history(rows, mask)
    assert torch.equal(after, rows)
    for one, other in zip(kept, layer_of_two(last=False).of_history(rows, mask)[1:], strict=True):
        assert torch.equal(one, other)


# ---------------------------------------------------------------- cached = dense
def dense(stack: HstuStack, history: Tensor, candidates: Tensor, mask: Tensor, options: SequenceOptions) -> Tensor:
    """All rows of a request at once, with a mask of who reads whom; one request and one head at a time."""
    length, size = history.shape[1], options.key_dim
    results = []
    for q in range(len(history)):
        x = torch.cat([history[q], candidates[q]])
        reads = torch.eye(len(x)).bool()
        reads[:length, :length] = torch.ones(length, length).tril().bool()
        reads[length:, :length] = True
        reads[:, :length] &= mask[q]
        rank = mask[q].cumsum(0)
        for layer in stack.layers:
            normed = nn.functional.layer_norm(x, x.shape[1:], layer.before.weight, layer.before.bias, 1e-6)  # type: ignore[union-attr,arg-type]
            gate, query = layer.gate_query(normed).split(layer.sizes, -1)  # type: ignore[operator,arg-type]
            value, key = layer.value_key(normed).split(layer.sizes, -1)  # type: ignore[operator,arg-type]
            activate = nn.functional.silu if options.silu == "all" else lambda part: part
            gate, query, key, value = nn.functional.silu(gate), activate(query), activate(key), activate(value)
            heads = []
            for h in range(options.heads):
                part, own = slice(h * size, (h + 1) * size), slice(h * options.value_dim, (h + 1) * options.value_dim)
                scores = query[:, part] @ key[:, part].T / size**0.5
                if layer.distance_bias is not None:
                    apart = (rank[:, None] - rank).clamp(min=0)
                    scores[:length, :length] += layer.distance_bias[apart]  # type: ignore[index]
                heads.append((nn.functional.silu(scores) * reads) @ value[:, own] / layer.num_rows)  # type: ignore[operator]
            mixed = torch.cat(heads, -1)
            gated = layer.after(mixed) * gate  # type: ignore[operator]
            x = x + layer.out(torch.cat([gate, mixed, gated], -1) if options.block_out == "concat3" else gated)  # type: ignore[operator]
        results.append(x[length:])
    return torch.stack(results)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("silu", "block_out", "rab"), [("all", "gate", False), ("u", "concat3", True)])
def test_the_cached_form_equals_the_dense_one(layers: int, silu: Any, block_out: Any, rab: bool):
    options = SequenceOptions(width=6, layers=layers, heads=3, key_dim=4, value_dim=5, silu=silu, block_out=block_out,
                              rab=rab)
    draw = torch.Generator().manual_seed(layers)
    stack = HstuStack(options, num_rows=9).double().eval()
    for parameter in stack.parameters():
        assign(parameter, 0.5 * torch.randn(parameter.shape, generator=draw))
    history, candidates = (torch.randn(4, n, 6, generator=draw, dtype=torch.float64) for n in (7, 5))
    mask = torch.rand(4, 7, generator=draw) < 0.6
    mask[0] = False
    close(stack(stack.read(history, mask), candidates), dense(stack, history, candidates, mask, options), atol=1e-10)


def test_only_layers_whose_rows_are_read_have_a_bias_between_events():
    stack = HstuStack(SequenceOptions(layers=3, rab=True), num_rows=5)
    assert [layer.distance_bias is None for layer in stack.layers] == [False, False, True]


# ---------------------------------------------------------------- rows
def test_positions_count_from_the_newest_event_and_candidates_share_position_0():
    rows = SequenceRows(2, 3, 2, num_events=2, num_context=2, std=1.0).double()
    for layer in (rows.of_item, rows.of_event):
        assert layer is not None
        assign(layer.weight, torch.zeros_like(layer.weight))
    mask = torch.tensor([[False, True, True, True, False]])
    nothing = torch.zeros(1, 5, 2).double(), torch.zeros(1, 5, 3).double(), mask
    close(rows.of_events(*nothing)[0, 1:4], rows.positions[[2, 2, 1]])  # the oldest is beyond the table
    close(rows.of_candidates(torch.zeros(1, 4, 2).double())[0], rows.positions[[0] * 4])
    close(rows.of_context(), rows.positions[[4, 3]])


def test_a_candidate_has_a_learned_vector_in_place_of_what_happened():
    rows = SequenceRows(2, 3, 2, num_events=2, std=1.0)
    assert rows.of_event is not None
    assert rows.no_event is not None
    expected = rows.of_item.bias + rows.positions[0] + rows.of_event.weight @ rows.no_event
    close(rows.of_candidates(rows.of_item(torch.zeros(1, 1, 2)))[0, 0], expected)


def test_the_context_stands_before_the_events():
    """The first field's row is read by every event; it reads itself alone."""
    model, batch = build("hstu", {"layers": 2}), random_batch()
    seen: list[Tensor] = []
    state = model.encode_request(batch)
    context = torch.ones(8, 5, dtype=torch.bool)  # user_id, interests, age, persona, hour
    for key, _ in state.keys_values:
        assert torch.equal((key != 0).any(-1).any(1), torch.cat([context, batch.history_mask_QL], 1))
    other = replace(batch, history={n: x.flip(1) for n, x in batch.history.items()})
    for (key, _), (other_key, _) in zip(state.keys_values, model.encode_request(other).keys_values, strict=True):
        seen.append((key - other_key).abs().amax((0, 1, 3)))
    assert all(change[:5].max().item() == 0.0 for change in seen)
    assert all(change[5:].max().item() > 1e-6 for change in seen)


# ---------------------------------------------------------------- what isolation means
@of_both
def test_other_candidates_do_not_change_a_bit_of_a_logit(name: str):
    model, batch, other = build(name, {}).float(), random_batch(), random_batch(seed=1)
    mixed = replace(batch, item={n: torch.cat([x[:, :2], other.item[n][:, 2:]], 1) for n, x in batch.item.items()},
                    candidates_QC=torch.cat([batch.candidates_QC[:, :2], other.candidates_QC[:, 2:]], 1))
    logits = model(batch)
    assert torch.equal(model(mixed)[:, :2], logits[:, :2])
    fewer = model(with_candidates(batch, lambda x: x[:, :2]))
    torch.testing.assert_close(fewer, logits[:, :2], atol=1e-5, rtol=1e-5)


@of_both
def test_padding_never_changes_a_logit_because_the_divisor_is_constant(name: str):
    model, batch = build(name, {}), random_batch()
    wider = padded_history(padded_history(batch, front=True, num_events=6), front=False, num_events=6)
    close(model(wider)[batch.mask_QC], model(batch)[batch.mask_QC])
    close(model(padded_candidates(batch))[:, :5], model(batch))


@of_both
def test_what_became_of_the_candidates_never_reaches_a_logit(name: str):
    model, batch = build(name, {}), random_batch()

    def labelled(seed: int) -> Batch:
        labels = torch.rand(8, 5, generator=torch.Generator().manual_seed(seed)).round()
        return replace(batch, targets=Targets(relevance_QC=labels, reached_QC=labels.long(), mask_QC=batch.mask_QC,
                                              keep=(2,), k=1, labels={"click": labels, "like": 1 - labels}))

    outputs = [model.train_outputs(labelled(seed))[0] for seed in (0, 1)]
    assert torch.equal(*outputs)


@of_both
@pytest.mark.parametrize("size", [1, 2, 5])
def test_candidates_in_small_batches_get_the_same_logits(name: str, size: int):
    model, batch = build(name, {}), random_batch()
    state = model.encode_request(batch)
    parts = [model.score_candidates(state, with_candidates(batch, lambda x, start=start: x[:, start:start + size]))
             for start in range(0, 5, size)]
    close(torch.cat(parts, 1), model(batch), atol=1e-10)


@of_both
@pytest.mark.parametrize("num_candidates", [1, 7])
def test_the_history_runs_through_every_layer_once_a_request(name: str, num_candidates: int):
    model, batch, rows = build(name, {"layers": 3}), random_batch(num_candidates=num_candidates), []
    stack = next(m for m in model.modules() if isinstance(m, HstuStack))
    handles = [layer.value_key.register_forward_hook(lambda m, inputs, out: rows.append(out[..., 0].numel()))  # type: ignore[union-attr]
               for layer in stack.layers]
    context = 5 if name == "hstu" else 0
    state = model.encode_request(batch)
    assert rows == [8 * (6 + context)] * 3
    rows.clear()
    model.score_candidates(state, batch)
    assert rows == [8 * num_candidates] * 3
    assert len(handles) == 3


def test_only_the_newest_events_are_read():
    batch = random_batch()
    model = build("hstu", {"history": 2})
    close(model(batch), model(batch.newest_events(2)), atol=1e-12)


# ---------------------------------------------------------------- the head
def test_the_head_equals_its_definition_written_out():
    model, batch = build("hstu", {}, num_tasks=2), random_batch()
    fields = model.inputs.candidate_matrix(batch)
    rows = model.stack(model.encode_request(batch), model._rows(fields))

    def norm(x: Tensor, module: nn.LayerNorm) -> Tensor:
        spread = (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
        return (x - x.mean(-1, keepdim=True)) / (spread + 1e-6).sqrt() * module.weight + module.bias

    def swish(x: Tensor, module: Any) -> Tensor:
        return x / (1 + (-norm(x, module.norm)).exp())

    item = swish(fields @ model.item[0].weight.T + model.item[0].bias, model.item[1])
    item = norm(item @ model.item[2].weight.T + model.item[2].bias, model.item_norm)
    hidden = (norm(rows, model.row_norm) * item) @ model.hidden[0].weight.T + model.hidden[0].bias
    close(model(batch), swish(hidden, model.hidden[1]) @ model.logits.weight.T + model.logits.bias, atol=1e-10)


@pytest.mark.parametrize(("options", "space", "words"), [
    ({}, f3.SPACE, "no history of items"), ({"rab": True, "layers": 1}, SPACE, "rab acts between events")])
def test_it_refuses_what_it_cannot_use(options: dict[str, Any], space: Any, words: str):
    cls, config = plugins.options("models", {"name": "hstu", **options}, "model")
    with pytest.raises(ConfigError, match=f"hstu: .*{words}"):
        cls(config, space)

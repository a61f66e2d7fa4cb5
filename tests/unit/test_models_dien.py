"""dien against numbers computed by hand: its extractor, its evolution, its attention and its auxiliary loss."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycascade import plugins
from raycascade.batch import Batch
from raycascade.errors import ConfigError, DataError
from raycascade.models.dien import Evolution
from tests import f3, model_cases
from tests.f3 import EVENTS, T, assign, close
from tests.model_cases import random_batch


def assign_evolution(evolution: Evolution) -> None:
    """(W, U, b) of u, r and n with the seeds 2 to 10."""
    assign(evolution.input.weight, torch.cat([T((2, 2), s) for s in (2, 5, 8)]))
    assign(evolution.recurrent, torch.cat([T((2, 2), s) for s in (3, 6, 9)]))
    assign(evolution.input.bias, torch.cat([T((2,), s) for s in (4, 7, 10)]))


LARGER = f3.WITH_HISTORY.model_copy(update={"fields": tuple(
    f.model_copy(update={"num_rows": 10}) if f.name == "i" else f for f in f3.FIELDS)})  # room for two negatives


def hand_set(**options: Any) -> Any:
    model = f3.build("dien", LARGER, dim=2, **options)
    w, u, b = (torch.cat([sign * T(shape, s) for sign, s in ((1, 4 + n), (-1, 1 + n), (1, 7 + n))])
               for n, shape in enumerate([(2, 2), (2, 2), (2,)]))  # PyTorch: r, z = 1 - u, n
    assign(model.extractor.gru.weight_ih_l0, torch.cat([w, b[:, None]], 1))
    assign(model.extractor.gru.weight_hh_l0, u)
    assign(model.attention.weight, T((2, 2), 6))
    assign_evolution(model.evolution)
    return model


def with_negatives(batch: Batch, model: Any) -> Batch:
    """(0.2, 0.2) beside e_2 and (-0.4, 0.1) beside e_3, as rows of the table."""
    assign(model.inputs.tables.of("i")[7:9], [(0.2, 0.2), (-0.4, 0.1)])
    rows_QL = torch.tensor([[7, 7, 8, 9]])[:, -batch.history_mask_QL.shape[1]:]
    return replace(batch, history_negatives={"i": rows_QL})


def entering(model: Any, batch: Batch) -> Tensor:
    """What enters the MLP from the candidate's side [Q, C, ...]."""
    seen: list[Tensor] = []
    model.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    model(batch)
    return seen[0]


# ---------------------------------------------------------------- by hand
@pytest.mark.parametrize(("weight", "expected"), [
    (0.3, (0.386752, 0.199959)), (0.0, (0.4, 0.3)), (1.0, (0.355839, -0.033469))])
def test_one_step_of_the_evolution_equals_the_hand_computed_state(weight: float, expected: tuple[float, float]):
    """From the state (0.4, 0.3), which a first step of weight 1 is made to reach."""
    evolution = Evolution(2).double()
    assign_evolution(evolution)
    x_Q1D, state = torch.tensor([[[0.2, -0.1]]], dtype=torch.float64), torch.tensor([0.4, 0.3], dtype=torch.float64)
    gates = evolution.of_interests(x_Q1D)
    first = torch.cat([torch.full((4,), 50.0, dtype=torch.float64), torch.atanh(state)])  # u = r = 1, tanh(n) = state
    weights_QCL = torch.tensor([[[1.0, weight]]], dtype=torch.float64)
    close(evolution(torch.cat([first[None, None], gates], 1), weights_QCL)[0, 0], expected)


@pytest.mark.parametrize(("events", "mask"), EVENTS)
def test_the_whole_equals_the_hand_computed_states_and_weights(events: tuple[int, ...], mask: tuple[bool, ...]):
    model, batch = hand_set(), f3.batch(events, mask)
    close(model.encode_request(batch).interests_QLN[0, :3],
          [(0.006224, 0.198944), (-0.085726, 0.267714), (0.115640, 0.427804)])
    close(model.explain(batch)["attention"][0, :, :3],
          [(0.325169, 0.323737, 0.351094), (0.341162, 0.340786, 0.318052)])
    close(entering(model, batch)[0, :, -2:], [(0.107276, -0.132528), (0.107547, -0.131514)])


@pytest.mark.parametrize(("events", "mask"), EVENTS)
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_auxiliary_loss_equals_the_hand_computed_one(
    events: tuple[int, ...], mask: tuple[bool, ...], alpha: float
):
    model = hand_set(alpha=alpha)
    logits, extra = model.train_outputs(with_negatives(f3.batch(events, mask), model))
    assert list(extra) == ["aux"]
    close(extra["aux"], alpha * 1.420478)
    close(logits, model(f3.batch(events, mask)))


# ---------------------------------------------------------------- by another way
def test_the_fused_extractor_equals_its_equations_step_by_step():
    model, batch = model_cases.build("dien", {}), random_batch()
    state = model.encode_request(batch)
    x_QLD = torch.cat([model.inputs.history_matrix(batch), model.inputs.event_matrix(batch)], -1)
    w_r, w_z, w_n = model.extractor.gru.weight_ih_l0.chunk(3)
    u_r, u_z, u_n = model.extractor.gru.weight_hh_l0.chunk(3)
    for q in range(8):
        h = torch.zeros(model.inputs.history_width, dtype=torch.float64)
        for t, x in enumerate(x_QLD[q][batch.history_mask_QL[q]]):
            x = torch.cat([x, torch.ones(1)])
            update, r = 1 - torch.sigmoid(w_z @ x + u_z @ h), torch.sigmoid(w_r @ x + u_r @ h)
            h = (1 - update) * h + update * torch.tanh(w_n @ x + r * (u_n @ h))
            close(state.interests_QLN[q, t], h, atol=1e-10)


def test_an_evolution_is_a_weighted_mean_of_the_old_state_and_a_plain_gru_step():
    torch.manual_seed(1)
    evolution, cell = Evolution(4).double(), nn.GRUCell(4, 4).double()
    for ours, theirs in ((evolution.input.weight, cell.weight_ih), (evolution.recurrent, cell.weight_hh)):
        u, r, n = ours.chunk(3)
        assign(theirs, torch.cat([r, -u, n]))  # PyTorch's gate keeps
    assign(cell.bias_ih, torch.zeros(12))
    assign(cell.bias_hh, torch.zeros(12))
    x_QLD, weights_QCL = torch.randn(1, 5, 4).double(), torch.rand(1, 2, 5).double()
    state = torch.zeros(2, 4, dtype=torch.float64)
    for t in range(5):
        state = torch.lerp(state, cell(x_QLD[0, t].expand(2, -1), state), weights_QCL[0, :, t, None])
    close(evolution(evolution.of_interests(x_QLD), weights_QCL)[0], state, atol=1e-10)


def test_pooling_adds_the_sum_of_the_history_and_its_product_with_the_target():
    model, batch = hand_set(pooled=True), f3.batch(*EVENTS[1])
    total, own = torch.tensor((0.3, 0.5)), torch.tensor([(0.3, -0.4), (0.2, 0.5)])
    close(entering(model, batch)[0, :, -2:], total * own)
    assert model.mlp.first.request.in_features == 2 + 2


def test_attention_by_an_mlp_is_a_softmax_over_the_real_events():
    model, batch = model_cases.build("dien", {"attention": "mlp"}), random_batch()
    weights = model.explain(batch)["attention"]
    has_events = batch.history_mask_QL.any(1)
    close(weights.sum(-1), has_events[:, None].expand(-1, 5).double(), atol=1e-10)


def test_the_auxiliary_loss_of_histories_without_a_pair_is_zero_and_of_the_rest_a_mean_over_pairs():
    model, batch = model_cases.build("dien", {}), random_batch()
    long = batch.history_mask_QL.sum(1) > 1
    loss = model.train_outputs(batch)[1]["aux"]
    close(model.train_outputs(batch.take(long))[1]["aux"], loss, atol=1e-10)
    each = [model.train_outputs(batch.take(torch.arange(8) == q))[1]["aux"] for q in range(8)]
    pairs = (batch.history_mask_QL.sum(1) - 1).clamp(min=0)
    close(loss, sum(float(n) * x for n, x in zip(pairs, each, strict=True)) / pairs.sum(), atol=1e-10)
    assert all(float(x.detach()) == 0.0 for n, x in zip(pairs, each, strict=True) if n == 0)


def test_only_the_newest_events_are_read_with_their_negatives():
    batch = random_batch()
    longest, newest = model_cases.build("dien", {}), model_cases.build("dien", {"max_events": 3})
    for one, other in zip(newest.train_outputs(batch), longest.train_outputs(batch.newest_events(3)), strict=True):
        close(*((x["aux"] if isinstance(x, dict) else x) for x in (one, other)), atol=1e-10)


# ---------------------------------------------------------------- what cannot be done
def test_without_negatives_only_a_model_without_the_auxiliary_loss_trains():
    batch = replace(random_batch(), history_negatives=None)
    with pytest.raises(DataError, match=r"history_negatives.*alpha: 0"):
        model_cases.build("dien", {}).train_outputs(batch)
    quiet = model_cases.build("dien", {"alpha": 0.0})
    assert quiet.train_outputs(batch)[1] == {}
    assert (quiet.training_needs, model_cases.build("dien", {}).training_needs) == (set(), {"history_negatives"})


def test_a_space_without_history_is_refused():
    cls, config = plugins.options("models", {"name": "dien"}, "model")
    with pytest.raises(ConfigError, match=r"dien: .*no history"):
        cls(config, f3.SPACE)

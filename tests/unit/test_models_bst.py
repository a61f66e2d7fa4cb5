"""bst against numbers computed by hand, and its two masks against each other."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycascade import plugins
from raycascade.batch import Batch
from raycascade.errors import ConfigError
from raycascade.schema import Field
from tests import f3, model_cases
from tests.f3 import EVENTS, T, assign, close
from tests.model_cases import random_batch

POSITIONED = f3.WITH_HISTORY.model_copy(update={
    "fields": (*f3.FIELDS, Field(name="position", side="event", form="dense"))})


def one_block(position: str) -> Any:
    """One block with one head and the hand-set weights, its rows three wide: item i and a position."""
    model = f3.build("bst", POSITIONED, dim=2, heads=1, position=position)
    block = model.blocks[0]
    for part, value in ((block.query, 3 * T((3, 3), 1)), (block.key, 3 * T((3, 3), 2)), (block.value, T((3, 3), 3)),
                        (block.out, T((3, 3), 4)), (block.wide, T((6, 3), 5)), (block.narrow, T((3, 6), 7))):
        assign(part.weight, value)
    assign(block.wide.bias, T((6,), 6))
    assign(block.narrow.bias, T((3,), 8))
    assign(model.target_beside, torch.zeros(1))
    return model


def positioned_batch(events: tuple[int, ...], mask: tuple[bool, ...]) -> Batch:
    batch = f3.batch(events, mask)
    entries = torch.tensor([[9.0, 0.6, -0.2, 0.3]], dtype=torch.float64)[:, -len(events):]
    return replace(batch, history={**batch.history, "position": entries})


def output_of_the_blocks(model: Any, batch: Batch) -> Tensor:
    """What enters the MLP in front of the candidate's own fields [Q, C, D]."""
    seen: list[Tensor] = []
    model.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1][..., :3]))
    model(batch)
    return seen[0]


@pytest.mark.parametrize(("events", "mask"), EVENTS)
def test_a_block_equals_the_hand_computed_weights_and_rows(events: tuple[int, ...], mask: tuple[bool, ...]):
    model, batch = one_block("events"), positioned_batch(events, mask)
    weights = model.explain(batch)["attention"][0, :, 0]
    close(weights[:, -4:], [(0.322168, 0.140433, 0.317845, 0.219554), (0.219533, 0.300784, 0.250117, 0.229566)])
    close(weights[:, :-4], torch.zeros(2, len(events) - 3))
    close(output_of_the_blocks(model, batch)[0], [(1.102861, -1.318082, 0.215221), (-0.110915, 1.276427, -1.165512)])


def test_with_one_block_and_the_targets_row_both_masks_are_equal_and_with_more_they_are_not():
    batch = random_batch()
    for options, equal in (({}, True), ({"blocks": 2}, False), ({"pool": "mean"}, False)):
        isolated, full = (model_cases.build("bst", {**options, "mask": mask}) for mask in ("isolated", "full"))
        gap = (isolated(batch) - full(batch))[batch.mask_QC].abs().max()
        assert gap < 1e-10 if equal else gap > 1e-6, options


def test_rows_that_read_events_alone_equal_a_transformer_over_each_history():
    """Two blocks, pool mean, written with one history and one candidate at a time."""
    model, batch = model_cases.build("bst", {"blocks": 2, "pool": "mean", "heads": 3}), random_batch()
    inputs = model.inputs
    seen: list[Tensor] = []
    model.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    model(batch)
    events = torch.cat([inputs.history_matrix(batch), inputs.event_matrix(batch)], -1)
    own = inputs.as_event(inputs.candidate_matrix(batch))
    for q, c in ((0, 0), (1, 2), (3, 1), (5, 0)):
        rows = events[q][batch.history_mask_QL[q]]
        rows = torch.cat([rows, model.positions[:len(rows)].flip(0)], -1)
        target = torch.cat([own[q, c], model.target_beside])[None]
        for block in model.blocks:
            target, rows = naive(block, target, torch.cat([rows, target])), naive(block, rows, rows)
        close(seen[0][q, c, :rows.shape[1]], torch.cat([rows, target]).mean(0), atol=1e-10)


def naive(block: Any, x: Tensor, others: Tensor) -> Tensor:
    """The equations of a block, head by head."""
    size, heads = block.query.out_features // block.heads, []
    for h in range(block.heads):
        part = slice(h * size, (h + 1) * size)
        query, key, value = x @ block.query.weight[part].T, others @ block.key.weight[part].T, block.value.weight[part]
        heads.append((query @ key.T / size**0.5).softmax(-1) @ (others @ value.T))
    s = block.attended(x + torch.cat(heads, -1) @ block.out.weight.T)
    return block.fed(s + block.narrow(nn.functional.leaky_relu(block.wide(s))))


def test_positions_count_from_the_newest_event():
    model, batch = model_cases.build("bst", {}), random_batch()
    before = model(batch)
    assign(model.positions[3:], model.positions[3:] + 1.0)
    changed = (model(batch) - before).abs().sum((1, 2)) > 1e-9
    assert changed.tolist() == (batch.history_mask_QL.sum(1) > 3).tolist()


def test_only_the_newest_events_are_read():
    batch = random_batch()
    longest, newest = model_cases.build("bst", {}), model_cases.build("bst", {"max_events": 2})
    close(newest(batch), longest(batch.newest_events(2)), atol=1e-10)
    assert (newest(batch) - longest(batch)).abs().max() > 1e-6


@pytest.mark.parametrize(("options", "space", "words"), [
    ({}, f3.SPACE, "no history"), ({"position": "events"}, f3.WITH_HISTORY, "event feature")])
def test_it_refuses_a_space_in_which_it_cannot_read_a_sequence(options: dict[str, Any], space: Any, words: str):
    cls, config = plugins.options("models", {"name": "bst", **options}, "model")
    with pytest.raises(ConfigError, match=f"bst: .*{words}"):
        cls(config, space)

"""Batches cut in the number of requests or of events: what is left is what a loop over requests would leave."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from raycascade.batch import Batch, collate
from raycascade.items import ItemTable
from tests import tiny_world

CHOSEN = torch.tensor([False, True, True, False, False, True, False, False, True, False, False, False])


@pytest.fixture(scope="module")
def items() -> ItemTable:
    state = tiny_world.fitted()
    return ItemTable.from_encoded(state.encode_items(tiny_world.raw_items(), where="items"), state)


@pytest.fixture(scope="module")
def batch(items: ItemTable) -> Batch:
    """Twelve requests of users 3 and 4, the first of whom excludes items; user 3 has his first history emptied."""
    requests = items.state.encode_requests(tiny_world.raw_requests().slice(22, 12), where="log")
    full = collate(requests, items, keep=(4, 3, 2), k=2)
    assert full.targets is not None
    log_q = torch.randn(full.mask_QC.shape, generator=torch.Generator().manual_seed(1))
    mask_QL = full.history_mask_QL.clone()
    mask_QL[2] = False
    return replace(full, history_mask_QL=mask_QL, targets=replace(full.targets, log_q_QC=log_q))


def parts(batch: Batch) -> dict[str, Tensor]:
    """Every tensor of a batch by name."""
    assert batch.targets is not None
    own = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    told = {f"targets.{name}": v for name, v in vars(batch.targets).items() if isinstance(v, Tensor)}
    groups = {"user": batch.user, "item": batch.item, "history": batch.history, "labels": batch.targets.labels}
    return {**own, **told, **{f"{g}.{n}": value for g, group in groups.items() for n, value in group.items()}}


def test_taking_requests_takes_their_row_of_every_tensor_and_their_ids_and_exclusions(batch: Batch):
    before = {name: value.clone() for name, value in parts(batch).items()}
    taken = batch.take(CHOSEN)
    assert len(before) > 25
    assert parts(taken).keys() == before.keys()
    for name, value in parts(taken).items():
        assert torch.equal(value, torch.stack([before[name][q] for q in (1, 2, 5, 8)])), name
        assert torch.equal(parts(batch)[name], before[name]), name  # the batch itself stays as it was
    assert taken.num_requests == 4
    assert taken.request_ids == tuple(batch.request_ids[q] for q in (1, 2, 5, 8))
    for one, q in zip(taken.exclude, (1, 2, 5, 8), strict=True):
        assert np.array_equal(one, batch.exclude[q])
    assert [len(one) for one in taken.exclude] == [0, 5, 5, 5]
    assert taken.targets is not None
    assert (taken.targets.keep, taken.targets.k) == ((4, 3, 2), 2)


def test_requests_taken_are_the_requests_collated_alone(batch: Batch, items: ItemTable):
    places = [1, 5, 8]
    alone = collate(items.state.encode_requests(tiny_world.raw_requests().take([22 + q for q in places]), where="log"),
                    items, keep=(4, 3, 2), k=2)
    taken = batch.take(torch.isin(torch.arange(12), torch.tensor(places)))
    width = alone.history_mask_QL.shape[1]
    for name, value in parts(alone).items():
        other = parts(taken)[name]
        assert torch.equal(other[:, :width] if "history" in name else other, value), name
    assert taken.request_ids == alone.request_ids


def test_none_and_all_of_the_requests_can_be_taken(batch: Batch):
    nothing = batch.take(torch.zeros(12, dtype=torch.bool))
    assert nothing.num_requests == len(nothing.request_ids) == len(nothing.exclude) == 0
    assert all(len(value) == 0 and value.shape[1:] == parts(batch)[name].shape[1:]
               for name, value in parts(nothing).items())
    everything = batch.take(torch.ones(12, dtype=torch.bool))
    assert all(torch.equal(value, parts(batch)[name]) for name, value in parts(everything).items())
    anonymous = replace(batch, request_ids=(), exclude=(), targets=None).take(CHOSEN)
    assert (anonymous.request_ids, anonymous.exclude, anonymous.targets) == ((), (), None)


@pytest.mark.parametrize("num_events", [1, 3, 7, 9])
def test_the_newest_events_are_the_last_of_each_history_in_their_order(batch: Batch, num_events: int):
    cut = batch.newest_events(num_events)
    assert cut.history_mask_QL.shape == cut.history_rows_QL.shape == (12, num_events)
    shortened = 0
    for q in range(12):
        length = int(batch.history_mask_QL[q].sum())
        first, count = max(0, length - num_events), min(length, num_events)
        shortened += first > 0
        assert cut.history_mask_QL[q].tolist() == [True] * count + [False] * (num_events - count)
        assert torch.equal(cut.history_rows_QL[q, :count], batch.history_rows_QL[q, first:length])
        for name, values in batch.history.items():
            assert torch.equal(cut.history[name][q, :count], values[q, first:length]), name
    assert shortened > 1
    assert cut.history["tags"].shape == (12, num_events, 3)
    for name, value in parts(cut).items():
        assert "history" in name or torch.equal(value, parts(batch)[name]), name


def test_histories_that_are_short_enough_stay_as_they_are(batch: Batch):
    width = batch.history_mask_QL.shape[1]
    assert width == 10
    for num_events in (width, width + 1, 1000):
        assert batch.newest_events(num_events) is batch

"""Match counts: a dict of counts, the dense comparison and the sorted look-up give the same numbers."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from raycascade.errors import ConfigError
from raycascade.models._match import ComparedEvents, EventIds, SortedEvents, count_rows, event_ids
from raycascade.models._match_attention import HardMatching, Match, Pair, Selection, declared_pairs, default_pairs
from raycascade.schema import FIRST_ROW, FeatureSpace, Field
from tests.f3 import close
from tests.model_cases import SPACE, random_batch

FORMS = (ComparedEvents, SortedEvents.of)
EDGE = torch.iinfo(torch.int64).max


def counted(form: Any, ids: Any, masks: Any, candidates: Any, known: Any) -> Tensor:
    events: EventIds = form(torch.as_tensor(ids), torch.as_tensor(masks))
    return events.count(torch.as_tensor(candidates), torch.as_tensor(known))


def by_dict(ids: Tensor, masks: Tensor, candidates: Tensor, known: Tensor) -> Tensor:
    """One request, one pair and one candidate at a time."""
    counts = torch.zeros(*candidates.shape[:2], masks.shape[1], dtype=torch.int64)
    for q in range(len(ids)):
        for p in range(masks.shape[1]):
            seen = Counter(ids[q][masks[q, p]].tolist())
            for c in range(candidates.shape[1]):
                counts[q, c, p] = sum(seen[value] for value in candidates[q, c][known[q, c]].tolist())
    return counts


@pytest.mark.parametrize("form", FORMS)
def test_events_of_one_creator_are_counted_and_masked_or_missing_ones_are_not(form: Any):
    ids, masks = [[7, 7, 3, 9, 7]], [[[True, True, True, True, False]]]
    counts = counted(form, ids, masks, [[[7], [3], [5], [7]]], [[[True], [True], [True], [False]]])
    assert counts[0, :, 0].tolist() == [2, 1, 0, 0]
    assert count_rows(counts, clip=1)[0, :, 0].tolist() == [1, 1, 0, 0]


def test_a_thousand_random_histories_are_counted_alike_in_three_ways():
    draw, cases = torch.Generator().manual_seed(0), 0
    for width in (1, 2, 3, 7):
        for length in (0, 1, 5, 12):
            low = 0 if length % 2 else EDGE - 4  # ids as large as they get, too
            num = 63

            def some(*shape: int, low: int = low) -> Tensor:
                return low + torch.randint(0, 5, shape, generator=draw)

            ids, candidates = some(num, length), some(num, 3, width)
            masks = torch.rand(num, 4, length, generator=draw) < 0.6
            known = torch.rand(num, 3, width, generator=draw) < 0.7
            expected = by_dict(ids, masks, candidates, known)
            for form in FORMS:
                assert torch.equal(counted(form, ids, masks, candidates, known), expected)
            cases += num
    assert cases > 1000


def test_on_a_cpu_events_are_sorted():
    assert isinstance(event_ids(torch.zeros(1, 2).long(), torch.ones(1, 1, 2).bool()), SortedEvents)


@pytest.mark.parametrize(("num_pairs", "clip"), [(2, 16), (5, 1), (1, 3)])
def test_every_pair_and_count_has_a_row_of_its_own(num_pairs: int, clip: int):
    counts = torch.arange(clip + 3)[None, :, None].expand(1, -1, num_pairs)
    rows = count_rows(counts, clip=clip)[0]
    assert sorted(rows[:clip + 1].flatten().tolist()) == list(range(num_pairs * (clip + 1)))
    assert torch.equal(rows[clip + 1:], rows[clip].expand(2, -1))
    if (num_pairs, clip) == (2, 16):
        assert rows[16].tolist() == [16, 33]  # a stride of 16 would give (0, 16) and (1, 0) the same row


# ---------------------------------------------------------------- counts of batches
def matching(matches: tuple[Match, ...]) -> HardMatching:
    return HardMatching(matches, clip=3, match_dim=2, width=4, std=1.0).double()


def counts_of(module: HardMatching, batch: Any) -> Tensor:
    return module.counts(module.of_request(batch), module.of_items(batch.item, 2), batch)


def test_counts_of_a_batch_equal_a_loop_over_events():
    pairs = (Pair(event="item_id", candidate="item_id"),
             Pair(event="tags", candidate="tags", actions=("like", "click")),
             Pair(event="tags", candidate="tags", window=2), Pair(event="item_id", candidate="item_id", window=3))
    module, batch = matching(declared_pairs(pairs, SPACE)), random_batch()
    rows = torch.randint(1, 5, (8, 6), generator=torch.Generator().manual_seed(1))  # 1 is an unknown item
    batch = replace(batch, history_rows_QL=rows, candidates_QC=torch.arange(1, 6).expand(8, 5))
    counts = counts_of(module, batch)
    for q in range(8):
        events = [e for e in range(6) if batch.history_mask_QL[q, e]]
        for c in range(5):
            item, tags = int(batch.candidates_QC[q, c]), batch.item["tags"][q, c].tolist()

            def same_item(chosen: list[int], q: int = q, item: int = item) -> int:
                return sum(int(rows[q, e]) == item for e in chosen) if item >= FIRST_ROW else 0

            def same_tags(chosen: list[int], q: int = q, tags: list[int] = tags) -> int:
                values = [v for e in chosen for v in batch.history["tags"][q, e].tolist()]
                return sum(values.count(tag) for tag in tags if tag >= FIRST_ROW)

            acted = [e for e in events if int(batch.history["action"][q, e]) in (3, 4)]  # click and like
            expected = [same_item(events), same_item(events[-3:]), same_tags(acted), same_tags(events[-2:])]
            assert counts[q, c].tolist() == expected
    assert int(counts.max()) > 1


def test_unknown_and_missing_values_match_nothing():
    module = matching(declared_pairs((Pair(event="tags", candidate="tags"),), SPACE))
    batch = random_batch()
    item, history = {"tags": torch.ones(8, 5, 3).long()}, {**batch.history, "tags": torch.ones(8, 6, 3).long()}
    counts = counts_of(module, replace(batch, item=item, history=history))
    assert int(counts.abs().max()) == 0


def test_a_count_changes_the_vector_of_its_own_pair_alone():
    module = matching(default_pairs(SPACE))
    num_pairs = len(module.vectors) // 4
    counts = torch.zeros(1, 1, num_pairs, dtype=torch.long)
    seen: list[Tensor] = []
    module.mlp.register_forward_pre_hook(lambda mlp, inputs: seen.append(inputs[0]))
    for n in (0, 2):
        module(counts.index_fill(2, torch.tensor([1]), n))
    before, after = seen
    changed = (before - after).abs().view(num_pairs, 2).sum(-1) > 0
    assert changed.nonzero().tolist() == [[1]]
    close(after.view(num_pairs, 2)[1], module.vectors[4 + 2])


# ---------------------------------------------------------------- which pairs
def test_the_default_pairs_are_fields_times_actions_times_windows():
    rarer = ("action", (3, 4))
    chosen = (Selection(window=10), Selection(), Selection(*rarer, window=10), Selection(*rarer))
    assert default_pairs(SPACE) == (Match("item_id", "item_id", chosen), Match("tags", "tags", chosen))
    without = SPACE.without(("action", "tags"))
    assert default_pairs(without) == (Match("item_id", "item_id", chosen[:2]),)


@pytest.mark.parametrize(("pair", "words"), [
    ({"event": "tag", "candidate": "tags"}, "'tag' is not an id field of the event; did you mean 'tags'"),
    ({"event": "tags", "candidate": "price"}, "'price' is not an id field of the candidate"),
    ({"event": "tags", "candidate": "type"}, "do not share a vocabulary"),
    ({"event": "tags", "candidate": "tags", "actions": ("liked",)}, "'liked' is a value of none; did you mean 'like'"),
    ({"event": "tags", "candidate": "tags", "actions": ("like", "0")}, "'0' is a value of none"),
])
def test_pairs_that_cannot_be_compared_are_refused(pair: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        declared_pairs((Pair(**pair),), SPACE)


def test_actions_that_several_event_features_know_are_refused():
    other = Field(name="again", side="event", form="id", table="again", num_rows=4, values=("like", "click"))
    space = FeatureSpace(**{**SPACE.model_dump(), "fields": (*SPACE.fields, other)})
    with pytest.raises(ConfigError, match="2 of them have all of"):
        declared_pairs((Pair(event="tags", candidate="tags", actions=("like",)),), space)

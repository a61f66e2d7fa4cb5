"""Events that are not before their request: left out of every history column, counted, and without a say."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from raycascade.batch import Batch, collate
from raycascade.bundle import Bundle, load_bundle
from raycascade.cascade import Cascade
from raycascade.errors import ConfigError, DataError
from raycascade.items import ItemTable
from raycascade.past import moments, without_later_events
from raycascade.serving.requests import Query, checked, table_of
from tests.early_stages import MODELS, SMALL, cascade_of, config
from tests.tiny_world import DAY_MS, fitted, item_id, raw_items, raw_requests

NOW = 1_704_500_000_000


@pytest.fixture(scope="module")
def items() -> ItemTable:
    state = fitted()
    return ItemTable.from_encoded(state.encode_items(raw_items(), where="tiny"), state)


def log(times: Sequence[Sequence[int | None] | None], *, lengths: tuple[int, ...] = (4, 3, 2)) -> pa.Table:
    """Raw requests at NOW with histories of items 0, 1, 2 ... and the actions click, skip, click ..."""
    count = len(times)
    table = raw_requests().slice(0, count)
    columns = {"time_ms": pa.array([NOW] * count), "history": [[item_id(i) for i in range(n)] for n in lengths[:count]],
               "history_time_ms": pa.array(times, pa.list_(pa.int64())),
               "history_action": [["click" if i % 2 == 0 else "skip" for i in range(n)] for n in lengths[:count]]}
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    return table


TIMES: list[list[int] | None] = [[NOW - 9, NOW, NOW - 1, NOW + 5], [NOW - 3, 0, NOW - 2], None]


def test_events_at_or_after_their_request_are_left_out_of_every_column(items: ItemTable):
    batch = collate(items.state.encode_requests(log(TIMES), where="log"), items)
    assert batch.dropped_events == 2
    seen = [items.ids_of(rows[mask].numpy()) for rows, mask in
            zip(batch.history_rows_QL, batch.history_mask_QL, strict=True)]
    assert seen == [[item_id(0), item_id(2)], [item_id(0), item_id(1), item_id(2)], [item_id(0), item_id(1)]]
    actions = items.state.vocabularies["action"].lookup(pa.array(["click", "skip"])).tolist()
    assert batch.history["action"].tolist() == [[actions[0]] * 2 + [0], [*actions, actions[0]], [*actions, 0]]
    assert batch.history_time_ms_QL is not None
    assert batch.history_time_ms_QL.tolist() == [[NOW - 9, NOW - 1, 0], [NOW - 3, 0, NOW - 2], [0, 0, 0]]


def test_an_event_whose_time_is_null_is_one_whose_time_is_not_known(items: ItemTable, tiny_bundle: str):
    """As 0 is, and as a query of JSON that leaves the time of an event out says."""
    bundle = load_bundle(tiny_bundle)
    nulls, zeros = (log([[NOW - 9, unknown, NOW - 1], [unknown, unknown]], lengths=(3, 2)) for unknown in (None, 0))
    null, zero = (collate(items.state.encode_requests(table, where="log"), items) for table in (nulls, zeros))
    assert null.history_time_ms_QL is not None
    assert null.history_time_ms_QL.tolist() == [[NOW - 9, 0, NOW - 1], [0, 0, 0]]
    assert null.history["event_age"].tolist() == zero.history["event_age"].tolist()
    assert null.history["event_age"][0, 0] != null.history["event_age"][0, 1]
    past = [{"item_id": item_id(0), "time_ms": NOW - 9}, {"item_id": item_id(1)},
            {"item_id": item_id(2), "time_ms": NOW - 1}]
    query = Query.model_validate({"user_id": 100, "time_ms": NOW, "history": past})
    columns = {"request_id": ["q"], "user_id": [100], "time_ms": [NOW], "history": nulls["history"][:1],
               "history_time_ms": nulls["history_time_ms"][:1]}
    raw = checked(pa.table(columns), bundle, where="log")
    sent, read = (bundle.recommend(bundle.encode(table)).final.scores_QC
                  for table in (table_of(query, bundle, request_id="q"), raw))
    np.testing.assert_array_equal(read, sent)


def test_requests_that_hold_no_such_event_are_not_touched():
    table = log([[NOW - 9, NOW - 8, NOW - 7, NOW - 1]])
    assert without_later_events(table) == (table, 0)
    bare = table.drop_columns(["history_time_ms"])
    assert without_later_events(bare) == (bare, 0)


def test_an_event_of_the_moment_itself_has_no_say_in_any_score(items: ItemTable):
    """Neither have the labels of what is scored."""
    cascade = cascade_of(config(models={**MODELS, "pre_ranker": {"name": "hstu", "dim": 4, "width": 8}}))
    before = log([[NOW - 9, NOW - 8]], lengths=(2,))
    more = log([[NOW - 9, NOW - 8, NOW, NOW + 7]])
    other = more.set_column(more.column_names.index("click"), "click", pa.array([[1, 0, 1, 0, 1, 1]]))
    scores = []
    for table in (before, more, other, log([[NOW - 9, NOW - 8, NOW - 1, NOW + 7]])):
        batch = collate(items.state.encode_requests(table, where="log"), items)
        with torch.no_grad():
            scores.append(torch.stack(list(cascade(batch).values())))
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])
    assert ((scores[0] - scores[3]).abs().amax((1, 2)) > 1e-4).all()


def test_a_request_without_a_time_is_about_the_moment_after_its_newest_event(tiny_bundle: str):
    bundle: Bundle = load_bundle(tiny_bundle)
    end = bundle.state.as_of_ms
    queries = [Query.model_validate({"user_id": 100, "history": [{"item_id": item_id(3), "time_ms": time_ms}]})
               for time_ms in (end - 5, end + 5)]
    for query, expected in zip(queries, (end, end + 6), strict=True):
        encoded = bundle.encode(table_of(query, bundle, request_id="r"))
        assert encoded["time_ms"].to_pylist() == [expected]
        batch = bundle.batch(encoded)
        assert (batch.dropped_events, batch.history_mask_QL.tolist()) == (0, [[True]])
    raw = pa.table({"user_id": [100, 101], "time_ms": pa.array([None, end + 2]),
                    "history": pa.array([[item_id(3)]] * 2), "history_time_ms": pa.array([[end + 5]] * 2)})
    kept = checked(raw, bundle, where="requests")
    assert kept["time_ms"].to_pylist() == [end + 6, end + 2]
    assert bundle.batch(bundle.encode(kept)).dropped_events == 1
    assert moments(pa.table({"user_id": [1, 2]}), 7).tolist() == [7, 7]


# ---------------------------------------------------------------- max_age_days
def with_option(days: float | None) -> Cascade:
    models = {**MODELS, "pre_ranker": {"name": "hstu", "dim": 4, "width": 8, "max_age_days": days},
              "ranker": {"name": "gesr", **SMALL, "max_age_days": days}}
    return cascade_of(config(models=models))


def test_older_events_are_not_read_and_those_of_unknown_age_are(items: ItemTable):
    old = [[NOW - 3 * DAY_MS, NOW - 2 * DAY_MS, NOW - DAY_MS, NOW - 1], [0, NOW - 3 * DAY_MS, NOW - 1], None]
    batch = collate(items.state.encode_requests(log(old), where="log"), items)
    assert batch.events_since(DAY_MS).history_mask_QL.tolist() == [
        [False, False, True, True], [True, False, True, False], [True, True, False, False]]
    limited, free = with_option(1.0), with_option(None)
    changed = replace(batch, history={name: values.clone() for name, values in batch.history.items()},
                      history_rows_QL=batch.history_rows_QL.clone())
    for values in (*changed.history.values(), changed.history_rows_QL):
        values[0, :2] = values[1, 0]  # what the old events of the first request were
    for cascade, reads in ((limited, False), (free, True)):
        for name in ("pre_ranker", "ranker"):
            parts = cascade.models[name]
            with torch.no_grad():
                logits = [_parts_alone(parts, name, one, batch) for one in (batch, changed)]
            assert torch.equal(*logits) != reads, (name, reads)


def _parts_alone(model: Any, name: str, past: Batch, batch: Batch) -> torch.Tensor:
    """Logits of the parts that read the sequence; the towers of gesr read all of the history."""
    if name == "pre_ranker":
        return model(past)
    state = model.encode_request(past)
    state = replace(state, users_QTD=torch.ones_like(state.users_QTD), gates_QR=torch.ones_like(state.gates_QR))
    asking = tuple(torch.ones_like(part) for part in state.parts.asking)
    state = replace(state, parts=replace(state.parts, asking=asking))
    return model.score_encoded(state, model.encode_items(batch.item, batch.mask_QC.shape), batch)


def test_an_age_without_times_is_refused(items: ItemTable):
    raw = log([[1, 2, 3, 4]]).drop_columns(["history_time_ms"])
    batch = collate(items.state.encode_requests(raw, where="log"), items)
    with pytest.raises(DataError, match="max_age_days: the histories have no times"):
        with_option(1.0)(batch)
    nothing = replace(batch, history_mask_QL=batch.history_mask_QL & False)
    assert nothing.events_since(1) is nothing
    with pytest.raises(ConfigError, match="max_age_days"):
        with_option(0.0)


def test_the_newest_events_keep_their_times(items: ItemTable):
    batch = collate(items.state.encode_requests(log([[NOW - 9, NOW - 8, NOW - 7, NOW - 6]]), where="log"), items)
    cut = batch.newest_events(2).history_time_ms_QL
    assert cut is not None
    assert np.array_equal(cut.numpy(), [[NOW - 7, NOW - 6]])

"""Histories of any shape, held against the cascade called by hand: sent with a request, or event by event before it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, strategies as st

from raycascade.bundle import Bundle, load_bundle
from raycascade.serving.gateway import Gateway
from raycascade.serving.options import ServeOptions
from raycascade.serving.users import open_user_store
from tests.api_client import Caller, api_over, gateway_over
from tests.api_fuzzing import steady
from tests.tiny_world import DAY_MS, NUM_ITEMS, START_MS, item_id, raw_requests

END_MS = START_MS + 7 * DAY_MS  # of the log
ITEMS = st.integers(0, NUM_ITEMS - 1).map(item_id) | st.sampled_from([1, -5, 1 << 40])  # the last ones are unknown
MOMENTS = st.integers(START_MS, END_MS + DAY_MS) | st.sampled_from([END_MS - 1, END_MS, END_MS + 1])
ACTIONS = st.sampled_from(["click", "skip", "never seen"])
PAST = st.lists(st.tuples(ITEMS, MOMENTS, ACTIONS), max_size=25)
USERS = st.sampled_from([100, 104, 113, 777_777])  # the last one is not in the log
LAST_ROWS = {row["user_id"]: row for row in raw_requests().to_pylist()}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: str) -> Bundle:
    return load_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def gateway(bundle: Bundle) -> Gateway:
    return gateway_over(bundle, ServeOptions(deadline_ms=60_000))


@pytest.fixture(scope="module")
def caller(gateway: Gateway) -> Iterator[Caller]:
    with Caller(api_over(gateway, gateway.options)) as caller:
        yield caller


def by_hand(bundle: Bundle, user: int, past: "list[tuple[int | None, int, str | None]]",
            moment_ms: int | None) -> tuple[list[Any], list[float]]:
    """What the whole cascade says of a raw row with this history."""
    columns = {"user_id": pa.array([user]), "history": pa.array([[item for item, _, _ in past]], pa.list_(pa.int64())),
               "history_time_ms": pa.array([[time_ms for _, time_ms, _ in past]], pa.list_(pa.int64())),
               "history_action": pa.array([[action for _, _, action in past]], pa.list_(pa.string()))}
    if moment_ms is not None:
        columns["time_ms"] = pa.array([moment_ms])
    final = bundle.recommend(bundle.encode(pa.table(columns))).final
    rows_QK, mask_QK = final.kept()
    return bundle.items.ids_of(rows_QK[0][mask_QK[0]]), final.scores_QC[0, :final.keep][mask_QK[0]].tolist()


def assert_same(reply: Any, wanted: tuple[list[Any], list[float]]) -> None:
    assert reply.status_code == 200, reply.text
    items = reply.json()["items"]
    assert [item["item_id"] for item in items] == wanted[0]
    np.testing.assert_allclose([item["score"] for item in items], wanted[1], rtol=1e-5, atol=1e-5)


def asked(user: int, moment_ms: int | None) -> dict[str, Any]:
    return {"user_id": user} if moment_ms is None else {"user_id": user, "time_ms": moment_ms}


def test_a_history_in_a_request_is_the_history_of_the_cascade(bundle: Bundle, caller: Caller):
    ids = ITEMS | ITEMS.map(str) | st.sampled_from(["gone", "1e3", "5000x"])
    anything = st.lists(st.tuples(ids, st.none() | MOMENTS, st.none() | ACTIONS), max_size=25)

    @steady(40, 1)
    @given(USERS, anything, st.none() | MOMENTS)
    def one(user: int, past: list[tuple[Any, int | None, str | None]], moment_ms: int | None) -> None:
        events = []
        for item, time_ms, action in past:
            event = {"item_id": item, "time_ms": time_ms, "features": {} if action is None else {"action": action}}
            events.append(item if (time_ms, action) == (None, None) else event)
        reply = caller.post("/v1/recommend", {**asked(user, moment_ms), "history": events})
        raw = [(int(item) if str(item).lstrip("-").isdecimal() else None, time_ms or 0, action)
               for item, time_ms, action in past]  # 0: not known
        assert_same(reply, by_hand(bundle, user, raw, moment_ms))

    one()


def test_events_in_any_order_and_however_often_are_the_history_that_they_make(
    bundle: Bundle, gateway: Gateway, caller: Caller
):
    def expected(user: int, past: list[tuple[int, int, str]], moment_ms: int | None) -> list[tuple[int, int, str]]:
        """What the log has of the user, then the events; in order of time, and of arrival where that is the same."""
        row = LAST_ROWS.get(user, {"history": [], "history_time_ms": [], "history_action": []})
        logged = list(zip(row["history"], row["history_time_ms"], row["history_action"], strict=True))[-10:]
        known = {(item, time_ms) for item, time_ms, _ in logged}
        fresh = [event for event in past if event[:2] not in known]
        whole = sorted([*logged, *fresh], key=lambda event: event[1])
        return [event for event in whole if moment_ms is None or event[1] < moment_ms]

    @steady(40, 2)
    @given(USERS, PAST, st.none() | MOMENTS, st.randoms(use_true_random=False))
    def one(user: int, past: list[tuple[int, int, str]], moment_ms: int | None, chance: Any) -> None:
        gateway.users = open_user_store(gateway.options.users, bundle)
        events = [{"event_id": f"e{i}", "user_id": user, "item_id": item, "time_ms": time_ms,
                   "features": {"action": action}} for i, (item, time_ms, action) in enumerate(past)]
        sent = [event for event in events for _ in range(chance.randint(1, 3))]
        chance.shuffle(sent)
        arrived = list(dict.fromkeys(int(event["event_id"][1:]) for event in sent))
        accepted = 0
        while sent:
            count = chance.randint(1, len(sent))
            piece, sent = sent[:count], sent[count:]
            recorded = caller.post("/v1/events", {"events": piece}).json()
            assert recorded["accepted"] + recorded["duplicates"] == count
            accepted += recorded["accepted"]
        assert accepted == len(events)
        reply = caller.post("/v1/recommend", asked(user, moment_ms))
        history = expected(user, [past[i] for i in arrived], moment_ms)
        inline = [{"item_id": item, "time_ms": time_ms, "features": {"action": action}}
                  for item, time_ms, action in history]
        again = caller.post("/v1/recommend", {**asked(user, moment_ms), "history": inline})
        assert reply.json()["items"] == again.json()["items"]
        assert_same(reply, by_hand(bundle, user, [*history], moment_ms))

    one()

"""Stages near and far: joined requests get what they would get alone, replicas that die are asked again, and a stage
that does not answer is left out of the answer, which says so."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raycascade.bundle import Bundle, load_bundle
from raycascade.errors import DeadlineExceeded, NotReady, Overloaded
from raycascade.serving.answers import Answer
from raycascade.serving.breaker import Breaker
from raycascade.serving.context import RequestContext
from raycascade.serving.gateway import Gateway
from raycascade.serving.options import ServeOptions
from raycascade.serving.replicas import StageReplica
from raycascade.serving.requests import Query
from raycascade.serving.stages import LocalStage, Lost, RemoteStage, Stage, StageServer, Survivors, pack
from raycascade.serving.telemetry import Telemetry
from tests.served import patient
from tests.tiny_world import KEEPS, item_id

QUERIES = [*(Query(user_id=user, trace=True) for user in (100, 103, 110, 124, 31)),
           Query.model_validate({"user_id": 100, "history": [item_id(4), item_id(9)], "trace": True}),
           Query(user_id="nobody", exclude=[item_id(1), item_id(2)], trace=True),
           Query(user_id=101, context={"device": "desk"}, trace=True)]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: str) -> Bundle:
    return load_bundle(tiny_bundle)


def near(bundle: Bundle, **options: Any) -> dict[str, Stage]:
    chosen = patient(stages={"default": options})
    return {name: LocalStage(StageServer(bundle, name), chosen.stage(name)) for name in bundle.cascade.names}


async def alive() -> bool:
    return True


def far(bundle: Bundle, tmp_path: Any, options: ServeOptions | None = None) -> dict[str, Stage]:
    """Stages behind calls that carry bytes, as between processes, each answered by what runs in a replica."""
    options = options or patient()
    stages: dict[str, Stage] = {}
    for name in bundle.cascade.names:
        replica = StageReplica(bundle.uri, name, options, str(tmp_path / "release.json"))
        stages[name] = RemoteStage(name, replica.run, alive, options.stage(name))
    return stages


def asked(work: Callable[[], Awaitable[Any]]) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(60.0):
            return await work()

    return asyncio.run(limited())


@pytest.fixture(scope="module")
def alone(bundle: Bundle) -> list[Answer]:
    """Every query by itself, one after the other, in batches of one."""
    gateway = Gateway(bundle, near(bundle, batch={"max_size": 1}), patient())

    async def work() -> list[Answer]:
        return [await gateway.recommend(query) for query in QUERIES]

    return asked(work)


def assert_same(found: list[Answer], expected: list[Answer]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.trace is not None
        assert other.trace is not None
        assert (one.degraded, one.known_user, one.user_source) == (False, other.known_user, other.user_source)
        for left, right in zip(one.trace, other.trace, strict=True):
            assert [item.item_id for item in left.items] == [item.item_id for item in right.items], left.stage
            np.testing.assert_allclose([item.score for item in left.items], [item.score for item in right.items],
                                       rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("max_size", [2, 3, 16])
@pytest.mark.parametrize("kind", ["near", "far"])
def test_queries_of_the_same_moment_get_the_answers_that_each_gets_alone(
    bundle: Bundle, tmp_path: Any, kind: str, max_size: int, alone: list[Answer]
):
    batch = {"max_size": max_size}
    stages = near(bundle, batch=batch) if kind == "near" else far(bundle, tmp_path, patient(
        stages={"default": {"batch": batch}}))
    gateway = Gateway(bundle, stages, patient())

    async def work() -> list[Answer]:
        return list(await asyncio.gather(*(gateway.recommend(query) for query in QUERIES)))

    assert_same(asked(work), alone)


def test_stages_join_what_was_not_encoded_together(bundle: Bundle, alone: list[Answer]):
    """The pre-ranker takes all at once, what comes before it three at a time."""
    options = patient(stages={"default": {"batch": {"max_size": 3}}, "pre_ranker": {"batch": {"max_size": 16}}})
    sizes: dict[str, list[int]] = {name: [] for name in KEEPS}

    class Counted(StageServer):
        def run(self, batch: Any, before: Survivors | None) -> Survivors:
            sizes[self.name].append(batch.num_requests)
            return super().run(batch, before)

    slow = {"pre_ranker": {"max_size": 16, "wait_ms": 300.0}}
    stages: dict[str, Stage] = {}
    for name in bundle.cascade.names:
        own = options.stage(name)
        chosen = own.batch.model_validate(slow[name]) if name in slow else own.batch
        stages[name] = LocalStage(Counted(bundle, name), own.model_copy(update={"batch": chosen}))
    gateway = Gateway(bundle, stages, options)

    async def work() -> list[Answer]:
        return list(await asyncio.gather(*(gateway.recommend(query) for query in QUERIES)))

    assert_same(asked(work), alone)
    assert sum(sizes["pre_ranker"]) == len(QUERIES)
    assert max(sizes["pre_ranker"]) > 3
    assert max(sizes["retriever"]) <= 3


def test_a_call_of_many_queries_gets_the_answers_of_single_ones_under_ids_of_their_own(
    bundle: Bundle, alone: list[Answer]
):
    gateway = Gateway(bundle, near(bundle), patient())
    context = RequestContext.new(deadline_ms=30_000, request_id="many")
    answers = asked(lambda: gateway.recommend_many(QUERIES, context))
    assert_same(answers, alone)
    assert [answer.request_id for answer in answers] == [f"many.{n}" for n in range(len(QUERIES))]


# ---------------------------------------------------------------- replicas that die
class Mortal:
    """A stage behind calls: the first `deaths` of them find a replica that dies."""

    def __init__(self, bundle: Bundle, name: str, tmp_path: Any, *, deaths: int) -> None:
        self.replica = StageReplica(bundle.uri, name, patient(), str(tmp_path / "release.json"))
        self.deaths, self.calls = deaths, 0

    async def __call__(self, message: bytes, before: Survivors | None, left_s: float) -> Survivors:
        self.calls += 1
        if self.calls <= self.deaths:
            raise Lost("gone")
        return await self.replica.run(message, before, left_s)


def mortal_gateway(
    bundle: Bundle, tmp_path: Any, name: str, *, deaths: int, breaker: Breaker | None = None
) -> tuple[Gateway, Mortal]:
    mortal = Mortal(bundle, name, tmp_path, deaths=deaths)
    stages = near(bundle) | {name: RemoteStage(name, mortal, alive, breaker=breaker)}
    return Gateway(bundle, stages, patient()), mortal


def test_a_replica_that_dies_is_followed_by_another_and_the_answer_is_whole(
    bundle: Bundle, tmp_path: Any, alone: list[Answer]
):
    gateway, mortal = mortal_gateway(bundle, tmp_path, "ranker", deaths=1)
    answer = asked(lambda: gateway.recommend(QUERIES[0]))
    assert_same([answer], alone[:1])
    assert mortal.calls == 2


def test_after_two_dead_replicas_the_order_of_the_stage_before_stands(
    bundle: Bundle, tmp_path: Any, alone: list[Answer]
):
    gateway, mortal = mortal_gateway(bundle, tmp_path, "ranker", deaths=100)
    answer = asked(lambda: gateway.recommend(QUERIES[0]))
    assert (answer.degraded, answer.degraded_at, answer.reason) == (True, "ranker", "unavailable")
    before = alone[0].trace
    assert before is not None
    assert answer.items == before[-2].items[:KEEPS["ranker"]]
    assert mortal.calls == 2


def test_a_stage_that_stays_away_is_not_asked_by_every_request_and_is_found_when_it_is_back(
    bundle: Bundle, tmp_path: Any
):
    now = [0.0]
    gateway, mortal = mortal_gateway(bundle, tmp_path, "ranker", deaths=8,
                                     breaker=Breaker(failures=3, pause_s=1.0, clock_s=lambda: now[0]))

    async def reasons(count: int) -> list[str | None]:
        return [(await gateway.recommend(Query(user_id=100))).reason for _ in range(count)]

    async def work() -> None:
        assert (await reasons(10), mortal.calls) == (["unavailable"] * 10, 6)  # three requests, two calls each
        now[0] = 1.0
        assert (await reasons(3), mortal.calls) == (["unavailable"] * 3, 8)  # one finds out
        now[0] = 2.0
        assert (await reasons(3), mortal.calls) == ([None] * 3, 11)

    asked(work)


def test_a_stage_that_is_full_is_not_taken_for_one_that_is_gone(bundle: Bundle):
    calls: list[float] = []

    async def full(message: bytes, before: Survivors | None, left_s: float) -> Survivors:
        calls.append(left_s)
        raise Overloaded("full", retry_after_s=3)

    gateway = Gateway(bundle, near(bundle) | {"ranker": RemoteStage("ranker", full, alive)}, patient())

    async def work() -> list[str | None]:
        return [(await gateway.recommend(Query(user_id=100))).reason for _ in range(6)]

    assert asked(work) == ["overloaded"] * 6
    assert len(calls) == 6  # a call that was refused is not made again


def test_every_call_takes_along_what_is_left_of_the_requests_time(bundle: Bundle, tmp_path: Any):
    left: list[float] = []

    def noting(call: Callable[..., Awaitable[Survivors]]) -> Callable[..., Awaitable[Survivors]]:
        async def noted(message: bytes, before: Survivors | None, left_s: float) -> Survivors:
            left.append(left_s)
            return await call(message, before, left_s)
        return noted

    stages: dict[str, Stage] = {}
    for name in KEEPS:
        replica = StageReplica(bundle.uri, name, patient(), str(tmp_path / "release.json"))
        stages[name] = RemoteStage(name, noting(replica.run), alive)
    answer = asked(lambda: Gateway(bundle, stages, patient()).recommend(
        QUERIES[0], RequestContext.new(deadline_ms=20_000)))
    assert not answer.degraded
    assert 20.0 > left[0] > left[1] > left[2] > 0.0


def test_a_call_whose_replica_dies_at_the_end_of_the_requests_time_is_not_made_again(bundle: Bundle):
    calls: list[float] = []

    async def dying(message: bytes, before: Survivors | None, left_s: float) -> Survivors:
        calls.append(left_s)
        until = time.monotonic() + left_s
        while time.monotonic() <= until:  # the event loop has no turn: nobody is told that the time is over
            pass
        raise Lost("gone")

    gateway = Gateway(bundle, near(bundle) | {"ranker": RemoteStage("ranker", dying, alive)}, patient())
    answer = asked(lambda: gateway.recommend(QUERIES[0], RequestContext.new(deadline_ms=3_000)))
    assert (answer.degraded_at, answer.reason, len(calls)) == ("ranker", "deadline", 1)


# ---------------------------------------------------------------- what is joined in a replica
@pytest.mark.parametrize(("excluded", "batches"), [((0, 3), [1, 1]), ((2, 3), [2])])
def test_a_replica_joins_no_searches_of_different_widths(
    bundle: Bundle, tmp_path: Any, excluded: tuple[int, int], batches: list[int]
):
    """A graph that looks for more items finds others: joined, a request would not get what it gets alone."""
    replica = StageReplica(bundle.uri, "retriever", patient(), str(tmp_path / "release.json"))
    (server,) = replica._servers.values()
    sizes: list[int] = []

    class Counted(StageServer):
        def run(self, batch: Any, before: Survivors | None) -> Survivors:
            sizes.append(batch.num_requests)
            return super().run(batch, before)

    replica._servers[bundle.version] = Counted(server.bundle, "retriever")
    lists = [[item_id(n) for n in range(count)] for count in excluded]
    raw = pa.table({"request_id": ["a", "b"], "user_id": [100, 101], "exclude": pa.array(lists, pa.list_(pa.int64()))})
    encoded = bundle.encode(raw)
    messages = [pack(encoded.slice(row, 1), version=bundle.version) for row in range(2)]

    async def work() -> None:
        await asyncio.gather(*(replica.run(message, None, 30.0) for message in messages))

    asked(work)
    assert sizes == batches


# ---------------------------------------------------------------- late, full and broken stages
class Stuck(LocalStage):
    async def run(self, request: Any, before: Survivors | None, *, deadline: float) -> Survivors:
        await asyncio.sleep(max(0.0, deadline - time.monotonic()))
        raise DeadlineExceeded("stuck")


class Full(LocalStage):
    async def run(self, request: Any, before: Survivors | None, *, deadline: float) -> Survivors:
        raise Overloaded("full", retry_after_s=3)


class Gone(LocalStage):
    async def run(self, request: Any, before: Survivors | None, *, deadline: float) -> Survivors:
        raise NotReady("gone")


@pytest.mark.parametrize(("kind", "reason"), [(Stuck, "deadline"), (Full, "overloaded"), (Gone, "unavailable")])
@pytest.mark.parametrize("name", ["pre_ranker", "ranker"])
def test_without_a_later_stage_the_order_of_the_one_before_it_stands_and_is_counted(
    bundle: Bundle, kind: type[LocalStage], reason: str, name: str, alone: list[Answer]
):
    telemetry = Telemetry(stages=tuple(KEEPS))
    gateway = Gateway(bundle, near(bundle) | {name: kind(StageServer(bundle, name))}, patient(), telemetry=telemetry)
    answer = asked(lambda: gateway.recommend(QUERIES[0], RequestContext.new(deadline_ms=1_500)))
    trace, position = alone[0].trace, list(KEEPS).index(name)
    assert trace is not None
    assert answer.items == trace[position - 1].items[:KEEPS["ranker"]]
    assert (answer.degraded, answer.degraded_at, answer.reason) == (True, name, reason)
    assert answer.trace == trace[:position]
    totals = telemetry.totals()
    assert totals["raycascade_degradations_total", name, reason] == 1
    assert totals["raycascade_requests_total", "degraded"] == 1


class Silent(LocalStage):
    """Is never done, and does not look at the time."""

    async def run(self, request: Any, before: Survivors | None, *, deadline: float) -> Survivors:
        raise TimeoutError


@pytest.mark.parametrize(("kind", "error"), [(Full, Overloaded), (Gone, NotReady), (Silent, DeadlineExceeded)])
def test_without_the_first_stage_and_without_a_count_of_the_log_nothing_is_answered(
    bundle: Bundle, kind: type[LocalStage], error: type[Exception]
):
    gateway = Gateway(bundle, near(bundle) | {"retriever": kind(StageServer(bundle, "retriever"))}, patient())
    gateway.active.popularity = None
    with pytest.raises(error):
        asked(lambda: gateway.recommend(QUERIES[0]))


def test_without_the_first_stage_the_most_popular_items_are_answered_but_for_excluded_ones(bundle: Bundle):
    gateway = Gateway(bundle, near(bundle) | {"retriever": Gone(StageServer(bundle, "retriever"))}, patient())
    popularity = gateway.active.popularity
    assert popularity is not None
    best = bundle.items.ids_of(popularity.order_N[:KEEPS["ranker"] + 1])
    answer = asked(lambda: gateway.recommend(Query(user_id="nobody", exclude=[best[0]])))  # type: ignore[list-item]
    assert [item.item_id for item in answer.items] == best[1:]
    assert (answer.degraded_at, answer.reason) == ("retriever", "unavailable")


def test_a_full_first_stage_is_the_callers_to_wait_for(bundle: Bundle):
    gateway = Gateway(bundle, near(bundle) | {"retriever": Full(StageServer(bundle, "retriever"))}, patient())
    with pytest.raises(Overloaded) as refused:
        asked(lambda: gateway.recommend(QUERIES[0]))
    assert refused.value.retry_after_s == 3


def test_a_request_whose_time_is_over_is_not_computed(bundle: Bundle):
    computed: list[str] = []

    class Noted(StageServer):
        def run(self, batch: Any, before: Survivors | None) -> Survivors:
            computed.append(self.name)
            return super().run(batch, before)

    gateway = Gateway(bundle, {name: LocalStage(Noted(bundle, name)) for name in KEEPS}, patient())
    with pytest.raises(DeadlineExceeded):
        asked(lambda: gateway.recommend(QUERIES[0], RequestContext("late", time.monotonic() - 1.0)))
    assert computed == []

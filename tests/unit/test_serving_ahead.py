"""Fused, a batch goes through its stages right behind its encoding: the answers are those of stages that are asked one
by one, and what is late or fails costs the stage, not the answer."""

import asyncio
import threading
import time

import pytest

from raycascade.batch import Batch
from raycascade.bundle import Bundle, load_bundle
from raycascade.serving.answers import Answer
from raycascade.serving.context import RequestContext
from raycascade.serving.gateway import Gateway
from raycascade.serving.options import ServeOptions
from raycascade.serving.requests import Query
from raycascade.serving.stages import LocalStage, StageServer, Survivors
from raycascade.serving.telemetry import Telemetry
from tests.served import patient
from tests.tiny_world import KEEPS, item_id

WIDE = [item_id(number) for number in range(40)]
QUERIES = [*(Query(user_id=user, trace=True) for user in (100, 103, 110, 124, 31)),
           Query.model_validate({"user_id": 100, "history": [item_id(4), item_id(9)], "trace": True}),
           Query.model_validate({"user_id": "nobody", "exclude": WIDE, "trace": True}),
           Query(user_id=101, context={"device": "desk"}, trace=True)]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: str) -> Bundle:
    return load_bundle(tiny_bundle)


class Counted(StageServer):
    """Notes the sizes of its batches."""

    def __init__(self, bundle: Bundle, name: str) -> None:
        super().__init__(bundle, name)
        self.sizes: list[int] = []

    def run(self, batch: Batch, before: Survivors | None) -> Survivors:
        self.sizes.append(len(batch.time_ms_Q))
        return super().run(batch, before)


class Held(Counted):
    """Does not go on before it is let go."""

    def __init__(self, bundle: Bundle, name: str) -> None:
        super().__init__(bundle, name)
        self.go = threading.Event()

    def run(self, batch: Batch, before: Survivors | None) -> Survivors:
        assert self.go.wait(60.0)
        return super().run(batch, before)


class Broken(Counted):
    def run(self, batch: Batch, before: Survivors | None) -> Survivors:
        super().run(batch, before)
        raise RuntimeError("broken")


def fused(bundle: Bundle, telemetry: Telemetry | None = None, options: ServeOptions | None = None,
          **kinds: type[Counted]) -> tuple[Gateway, dict[str, Counted]]:
    options = options or patient(mode="fused")
    servers = {name: kinds.get(name, Counted)(bundle, name) for name in bundle.cascade.names}
    stages = {name: LocalStage(server, options.stage(name)) for name, server in servers.items()}
    return Gateway(bundle, stages, options, telemetry=telemetry), servers


def assert_same(answers: list[Answer], expected: list[Answer]) -> None:
    """The same but for ids and times of the requests; scores within what batches of other sizes round otherwise."""
    assert len(answers) == len(expected)
    for answer, wanted in zip(answers, expected, strict=True):
        different = {"request_id", "timings_ms", "items", "trace"}
        assert answer.model_dump(exclude=different) == wanted.model_dump(exclude=different)
        assert answer.trace is not None
        assert wanted.trace is not None
        lists = [(answer.items, wanted.items), *((own.items, other.items) for own, other in
                                                 zip(answer.trace, wanted.trace, strict=True))]
        for own, other in lists:
            assert [item.item_id for item in own] == [item.item_id for item in other]
            assert [item.score for item in own] == pytest.approx([item.score for item in other], rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def one_by_one(bundle: Bundle) -> list[Answer]:
    """The answers of a gateway that asks every stage."""
    gateway = Gateway(bundle, {name: LocalStage(StageServer(bundle, name)) for name in bundle.cascade.names}, patient())

    async def ask() -> list[Answer]:
        return [await gateway.recommend(query) for query in QUERIES]

    return asyncio.run(ask())


@pytest.fixture
def no_stage_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object, **__: object) -> Survivors:
        raise AssertionError("the stage was asked")

    monkeypatch.setattr(LocalStage, "run", never)


def test_the_time_of_a_stage_is_not_counted_to_the_encoding_too(bundle: Bundle, no_stage_is_asked: None):
    gateway, _ = fused(bundle)

    async def ask() -> None:
        for query in QUERIES:
            started = time.perf_counter()
            answer = await gateway.recommend(query)
            assert answer.timings_ms is not None
            assert set(answer.timings_ms) == {"users", "encode", *KEEPS}
            assert sum(answer.timings_ms.values()) <= 1000 * (time.perf_counter() - started) + 0.01  # they are rounded

    asyncio.run(ask())


def test_batches_go_through_every_stage_once_and_no_stage_is_asked(
    bundle: Bundle, one_by_one: list[Answer], no_stage_is_asked: None
):
    telemetry = Telemetry(stages=tuple(KEEPS))
    gateway, servers = fused(bundle, telemetry)
    together = [query for query in QUERIES if not query.exclude]

    async def ask() -> list[Answer]:
        return list(await asyncio.gather(*(gateway.recommend(query) for query in together)))

    answers = asyncio.run(ask())
    expected = [answer for query, answer in zip(QUERIES, one_by_one, strict=True) if not query.exclude]
    assert_same(answers, expected)
    # user 103 has seen many items, and her search is wider than that of the others
    assert {name: tuple(sorted(server.sizes)) for name, server in servers.items()} == dict.fromkeys(
        KEEPS, (1, len(together) - 1))
    for answer in answers:
        assert answer.timings_ms is not None
        assert all(answer.timings_ms[name] > 0 for name in KEEPS)
    assert telemetry.totals()["raycascade_candidates_out_total", "ranker"] == len(together) * KEEPS["ranker"]


def test_requests_that_cannot_be_one_batch_get_the_same_answers(bundle: Bundle, one_by_one: list[Answer]):
    for options in (patient(mode="fused"), patient(mode="fused", stages={"ranker": {"batch": {"max_size": 2}}})):
        gateway, servers = fused(bundle, options=options)

        async def ask(gateway: Gateway = gateway) -> list[Answer]:
            return list(await asyncio.gather(*(gateway.recommend(query) for query in QUERIES)))

        assert_same(asyncio.run(ask()), one_by_one)
        assert sum(servers["ranker"].sizes) == len(QUERIES)
    assert max(servers["ranker"].sizes) <= 2


def test_a_stage_that_is_late_is_left_out_and_the_answer_is_in_time(bundle: Bundle, one_by_one: list[Answer]):
    gateway, servers = fused(bundle, ranker=Held)
    held = servers["ranker"]
    assert isinstance(held, Held)

    async def ask() -> tuple[Answer, Answer]:
        late = await gateway.recommend(QUERIES[0], RequestContext.new(deadline_ms=2_000))
        held.go.set()
        return late, await gateway.recommend(QUERIES[1])

    late, whole = asyncio.run(ask())
    trace = one_by_one[0].trace
    assert trace is not None
    assert (late.degraded, late.degraded_at, late.reason) == (True, "ranker", "deadline")
    assert late.trace == trace[:2]
    assert late.items == trace[1].items[:KEEPS["ranker"]]
    assert_same([whole], one_by_one[1:2])


def test_a_stage_that_fails_is_left_out(bundle: Bundle, one_by_one: list[Answer]):
    gateway, servers = fused(bundle, pre_ranker=Broken)
    answer = asyncio.run(gateway.recommend(QUERIES[0]))
    trace = one_by_one[0].trace
    assert trace is not None
    assert (answer.degraded, answer.degraded_at, answer.reason) == (True, "pre_ranker", "unavailable")
    assert answer.items == trace[0].items[:KEEPS["ranker"]]
    assert servers["retriever"].sizes == [1]

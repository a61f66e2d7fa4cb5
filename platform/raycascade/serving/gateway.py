"""The gateway of a served cascade: a raw query through the stages to items and scores. Plain asyncio, no Ray.

A request passes the bounded door (`slots.py`), gets what the user store holds of its user, is encoded with those of the
same moment (`joint_encoding.py`) and goes through the stages (`funnel.py`), all with one version of the bundle
(`versions.py`) and within its deadline.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from raycascade.bundle import Bundle
from raycascade.errors import DataError, DeadlineExceeded, NotReady, Overloaded
from raycascade.explain import fates
from raycascade.schema import PADDING
from raycascade.serving.answers import Answer, Explanation, ItemView, StageFate, StageTrace
from raycascade.serving.context import RequestContext
from raycascade.serving.funnel import Passage, descend
from raycascade.serving.joint_encoding import Entry
from raycascade.serving.lanes import Lanes
from raycascade.serving.logs import within
from raycascade.serving.options import ServeOptions
from raycascade.serving.requests import Query
from raycascade.serving.served import ServedModel
from raycascade.serving.slots import Slots
from raycascade.serving.stages import Stage
from raycascade.serving.telemetry import NoTelemetry, Telemetry
from raycascade.serving.traffic import TrafficLog
from raycascade.serving.traffic_rows import TrafficRecord
from raycascade.serving.users import (
    NewEvent,
    Recorded,
    StoreUnavailable,
    UserState,
    UserStore,
    check_events,
    open_user_store,
)
from raycascade.serving.versions import Versions

logger = logging.getLogger(__name__)
MOST_EXPLAINED = 2  # at a time: each looks at the whole catalogue


class Gateway:
    """Answers queries with the active one of the models that it holds; the first one is active from the start.

    DataError for what does not fit the bundle; Overloaded, DeadlineExceeded or NotReady where nothing can be answered.
    An answer that lacks a stage says so. Belongs to one event loop.
    """

    def __init__(
        self, bundle: Bundle, stages: Mapping[str, Stage], options: ServeOptions | None = None, *,
        users: UserStore | None = None, telemetry: Telemetry | None = None, traffic: TrafficLog | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        self.options = options or ServeOptions()
        self.telemetry = telemetry or NoTelemetry()
        self.users = users or open_user_store(self.options.users, bundle)
        self.versions = Versions(ServedModel(bundle, stages, self.options, lanes))
        self.telemetry.model(bundle.version)
        self._traffic = traffic
        door = self.options.gateway
        self._slots = Slots(most=door.max_ongoing, most_queued=door.max_queued)
        self._explaining = Slots(most=MOST_EXPLAINED, most_queued=4 * MOST_EXPLAINED)
        self._explainers = Lanes(MOST_EXPLAINED)  # what was given up in the middle goes on, and must not add up

    @property
    def active(self) -> ServedModel:
        """What new requests are answered with."""
        return self.versions.active

    # ---------------------------------------------------------------- asking the cascade
    async def recommend(self, query: Query, context: RequestContext | None = None) -> Answer:
        """The answer to one query."""
        (answer,) = await self._recommend([query], context, named=False)
        return answer

    async def recommend_many(self, queries: Sequence[Query], context: RequestContext | None = None) -> list[Answer]:
        """The answers to several queries, in their order; DataError says which query does not fit."""
        return await self._recommend(queries, context, named=True)

    async def _recommend(
        self, queries: Sequence[Query], context: RequestContext | None, *, named: bool
    ) -> list[Answer]:
        context = context or RequestContext.new(deadline_ms=self.options.deadline_ms)
        started = time.monotonic()
        try:
            async with self._begun(len(queries), context) as model:
                answers = await self._answers(queries, model, context, named=named)
        except Exception as error:
            for _ in queries:
                self.telemetry.request(_outcome(error), time.monotonic() - started)
            if isinstance(error, Overloaded):
                self.telemetry.overloaded("gateway")
            raise
        for answer in answers:
            self.telemetry.request("degraded" if answer.degraded else "ok", time.monotonic() - started)
        return answers

    async def _answers(
        self, queries: Sequence[Query], model: ServedModel, context: RequestContext, *, named: bool
    ) -> list[Answer]:
        """`named`: whether several queries came together, and errors and ids say which one is meant."""
        for position, query in enumerate(queries):
            if query.k is not None and query.k > model.most:
                where = f"queries.{position}.k" if named else "k"
                raise DataError(f"{where}: {query.k} is more than the last stage keeps; ask for at most {model.most}")
        started = time.monotonic()
        states = await self._states(queries, context)
        users_ms = round((time.monotonic() - started) * 1000, 3)
        contexts = [replace(context, request_id=f"{context.request_id}.{position}") if named else context
                    for position in range(len(queries))]
        entries = await self._entries(queries, model, contexts, states, named=named)
        encoded_ms = (time.monotonic() - started) * 1000 - users_ms
        timings_ms = [{"users": users_ms, "encode": round(encoded_ms - 1000 * entry.request.ahead_s, 3)}
                      for entry in entries]
        try:
            return await asyncio.gather(*(
                self._answer(query, model, context, entry, before_ms)
                for query, context, entry, before_ms in zip(queries, contexts, entries, timings_ms, strict=True)))
        finally:
            for entry in entries:
                entry.leave()

    async def _answer(
        self, query: Query, model: ServedModel, context: RequestContext, entry: Entry, timings_ms: dict[str, float]
    ) -> Answer:
        try:
            with within(context.request_id):
                passage = await descend(model, entry.request, deadline=context.deadline, telemetry=self.telemetry)
        finally:
            entry.leave()
        final = passage.final
        assert final is not None, "a passage ends with an order or an error"
        items = model.scored(final, model.most if query.k is None else query.k)
        self._count(entry, model, empty=not items)
        answer = Answer.model_construct(
            request_id=context.request_id, user_id=query.user_id, items=items, model=model.name, version=model.version,
            known_user=entry.known, user_source=entry.source, degraded=passage.degraded_at is not None,
            degraded_at=passage.degraded_at, reason=passage.reason,
            trace=_trace(passage, model) if query.trace else None,
            timings_ms={**timings_ms, **passage.timings_ms} if query.trace else None)
        if self._traffic is not None and self._traffic.wants(context.request_id):
            rows = final.rows_QK[0]
            self._traffic.offer(TrafficRecord(
                request_id=context.request_id, user_id=query.user_id,
                time_ms=context.received_ms if query.time_ms is None else query.time_ms,
                served_at_ms=context.received_ms, bundle=model.bundle, encoded=entry.encoded, raw=entry.raw,
                survivors=passage.passed, shown_rows=rows[rows != PADDING][:len(items)], degraded=answer.degraded,
                user_source=entry.source))
        return answer

    async def explain(self, query: Query, item_id: int | str, context: RequestContext | None = None) -> Explanation:
        """Where in the cascade an item is lost for a query. Computed in this process, for a few queries at a time."""
        context = context or RequestContext.new(deadline_ms=self.options.deadline_ms)
        async with self._explaining.taking(deadline=context.deadline), self._begun(1, context) as model:
            row = model.item_row(item_id)
            states = await self._states([query], context)
            (entry,) = await self._entries([query], model, [context], states, named=False)
            entry.leave()
            try:
                async with asyncio.timeout(max(0.0, context.left_s)):
                    lost_at, stages = await self._explainers.run(fates, model.bundle, entry.encoded, row)
            except TimeoutError:
                raise DeadlineExceeded("explain looks at the whole catalogue and was not done in time; give the "
                                       "request a longer deadline_ms") from None
        (raw_id,) = model.bundle.items.ids_of(np.array([row]))
        return Explanation.model_validate({
            "request_id": context.request_id, "user_id": query.user_id, "item_id": raw_id, "model": model.name,
            "version": model.version, "known_user": entry.known, "user_source": entry.source, "lost_at": lost_at,
            "stages": [StageFate(stage=name, **fate) for name, fate in stages.items()]})

    # ---------------------------------------------------------------- users
    async def record(self, events: Sequence[NewEvent], context: RequestContext | None = None) -> Recorded:
        """Adds events to histories, each once. NotReady where the user store does not answer: some may be recorded, and
        the same events can be sent again."""
        context = context or RequestContext.new(deadline_ms=self.options.deadline_ms)
        check_events(events, self.active.bundle)
        recorded = await self.users.append(events, timeout_s=max(0.0, context.left_s))
        if self._traffic is not None:
            self._traffic.offer_events(events)
        return recorded

    async def _states(self, queries: Sequence[Query], context: RequestContext) -> "list[UserState | None] | None":
        """What the store holds of the users; None where it does not answer in its time."""
        timeout_s = min(self.options.users.timeout_ms / 1000, max(0.0, context.left_s))
        try:
            return await self.users.fetch([query.user_id for query in queries], timeout_s=timeout_s)
        except StoreUnavailable as error:
            logger.debug("no users: %s", error)  # the store itself warns, once
            return None

    # ---------------------------------------------------------------- what is known without asking a stage
    def item(self, item_id: int | str) -> ItemView:
        """An item of the catalogue; DataError for one that it does not have."""
        return self.active.item(item_id)

    def about(self) -> dict[str, Any]:
        """What is served."""
        return {**self.active.about(), "mode": self.options.mode, "held": list(self.versions.held)}

    async def ready(self) -> dict[str, bool]:
        """Which stages can answer."""
        stages = self.active.stages
        answers = await asyncio.gather(*(stage.ready() for stage in stages.values()), return_exceptions=True)
        return {name: answer is True for name, answer in zip(stages, answers, strict=True)}

    # ---------------------------------------------------------------- versions
    def activate(self, version: str) -> None:
        """Answers new requests with another version that is held; those on their way keep theirs."""
        self.versions.activate(version)
        self.telemetry.model(version)

    # ---------------------------------------------------------------- inside
    @asynccontextmanager
    async def _begun(self, count: int, context: RequestContext) -> AsyncIterator[ServedModel]:
        """Room for so many requests, and the version that answers all of them."""
        async with self._slots.taking(count, deadline=context.deadline):
            with self.versions.using() as model:
                yield model

    async def _entries(
        self, queries: Sequence[Query], model: ServedModel, contexts: Sequence[RequestContext],
        states: "Sequence[UserState | None] | None", *, named: bool,
    ) -> list[Entry]:
        """The encoded queries; DataError for the first one that does not fit."""
        available = states is not None
        calls = [asyncio.ensure_future(model.encoder.encode(
            query, state, available=available, request_id=context.request_id, deadline=context.deadline))
            for query, context, state in zip(queries, contexts, states or [None] * len(queries), strict=True)]
        try:
            found = await asyncio.gather(*calls, return_exceptions=True)
        except asyncio.CancelledError:
            for call in calls:
                call.add_done_callback(_leave)
            raise
        entries = [entry for entry in found if isinstance(entry, Entry)]
        for position, problem in enumerate(found):
            if isinstance(problem, BaseException):
                for entry in entries:
                    entry.leave()
                if isinstance(problem, DataError) and named:
                    raise DataError(f"queries.{position}.{problem}")
                raise problem
        return entries

    def _count(self, entry: Entry, model: ServedModel, *, empty: bool) -> None:
        self.telemetry.user_store(entry.source)
        self.telemetry.encoded(entry.encoded, model.bundle.state)
        if not entry.known:
            self.telemetry.unknown_user()
        if empty:
            self.telemetry.empty()


def _leave(call: "asyncio.Future[Entry]") -> None:
    """Whoever waited for a query to be encoded is gone."""
    if not call.cancelled() and call.exception() is None:
        call.result().leave()


def _trace(passage: Passage, model: ServedModel) -> list[StageTrace]:
    keeps = dict(zip(model.bundle.cascade.names, model.bundle.cascade.keeps, strict=True))
    return [StageTrace.model_construct(stage=name, keep=keeps[name], items=model.scored(survivors, keeps[name]))
            for name, survivors in passage.passed.items()]


def _outcome(error: Exception) -> str:
    """What the metrics call it."""
    if isinstance(error, Overloaded):
        return "overloaded"
    if isinstance(error, DeadlineExceeded):
        return "late"
    if isinstance(error, NotReady):
        return "not_ready"
    return "invalid" if isinstance(error, DataError) else "failed"

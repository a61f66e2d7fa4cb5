"""The HTTP interface of a gateway: typed endpoints under /v1 behind keys, rates and limits. Errors are problems."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Path, Request, Response
from pydantic import BaseModel

from raycascade import __version__
from raycascade.errors import DataError
from raycascade.serving import interface
from raycascade.serving.admission import Admission, Reception
from raycascade.serving.answers import Answer, Explanation, ItemView
from raycascade.serving.arrival import arrival_of
from raycascade.serving.bodies import (
    Answers,
    BodyLimit,
    ItemQuery,
    ModelView,
    NewEvents,
    Queries,
    Ready,
    StrictRoute,
    require_batch_within,
    require_within,
)
from raycascade.serving.context import RequestContext
from raycascade.serving.gateway import Gateway
from raycascade.serving.keys import KeyRing
from raycascade.serving.options import ServeOptions
from raycascade.serving.page import mount_page
from raycascade.serving.problems import explain_errors, problem, try_later
from raycascade.serving.rates import Rates
from raycascade.serving.requests import Query
from raycascade.serving.users import Recorded

BODIES: dict[str, type[BaseModel]] = {
    "/v1/recommend": Query, "/v1/recommend:batch": Queries, "/v1/events": NewEvents, "/v1/explain": ItemQuery}
ASKED = (401, 413, 415, 422, 429, 503, 504)  # the problems of an endpoint that asks the cascade
LOOKED_UP = (401, 429)


def build_api(gateway: Gateway, options: ServeOptions | None = None, *, names_answers: bool = True) -> FastAPI:
    """The application over a gateway; ConfigError where the file of keys cannot be used.

    `names_answers`: whether it adds the header x-request-id to answers; False behind a server that does."""
    options = options or ServeOptions()
    keys = KeyRing(options.keys.file) if options.keys.file else None
    rates = Rates()
    api = FastAPI(title="raycascade", version=__version__, summary=interface.SUMMARY, docs_url=None, redoc_url=None,
                  redirect_slashes=False)
    for router in (_cascade(gateway, options, rates), _catalogue(gateway), _probes(gateway)):
        api.include_router(router)
    explain_errors(api, BODIES)
    interface.describe(api, keyed=keys is not None)
    # The last one that is added is the first that a request meets.
    api.add_middleware(BodyLimit, most_bytes=options.limits.body_bytes)
    api.add_middleware(Admission, keys=keys, rates=rates, per_second=options.limits.per_second)
    api.add_middleware(Reception, telemetry=gateway.telemetry, names_answers=names_answers)
    mount_page(api, peers=options.page.peers)
    return api


def _cascade(gateway: Gateway, options: ServeOptions, rates: Rates) -> APIRouter:
    """What asks the stages, or tells them something."""
    router = APIRouter(route_class=StrictRoute)
    limits = options.limits

    def context_of(request: Request, deadlines_ms: Sequence[int | None] = ()) -> RequestContext:
        """The shortest deadline of what came together holds for all of it."""
        asked = [deadline_ms for deadline_ms in deadlines_ms if deadline_ms is not None]
        return arrival_of(request.scope).context(deadline_ms=min(asked, default=options.deadline_ms))

    @router.post("/v1/recommend", response_model=Answer, **interface.documented("recommend", *ASKED))
    async def recommend(query: Query, request: Request) -> Response:
        """The best items of the catalogue for a user."""
        require_within(query, limits)
        return _json(await gateway.recommend(query, context_of(request, [query.deadline_ms])))

    @router.post("/v1/recommend:batch", response_model=Answers, **interface.documented("recommend_batch", *ASKED))
    async def recommend_batch(body: Queries, request: Request) -> Response:
        """The answers to several queries, in their order. One that does not fit is a problem that says which, and
        nothing is answered. To the rate of a key, each query counts."""
        rates.owe(arrival_of(request.scope).key_name, len(body.queries) - 1)
        require_batch_within(body.queries, limits)
        context = context_of(request, [query.deadline_ms for query in body.queries])
        return _json(Answers(answers=await gateway.recommend_many(body.queries, context)))

    @router.post("/v1/events", response_model=Recorded, **interface.documented("record", *ASKED))
    async def record(body: NewEvents, request: Request) -> Response:
        """Adds events to the histories of users. An event whose id was seen before changes nothing, so the same call
        may be made again when its answer was lost."""
        return _json(await gateway.record(body.events, context_of(request)))

    @router.post("/v1/explain", response_model=Explanation, **interface.documented("explain", *ASKED))
    async def explain(body: ItemQuery, request: Request) -> Response:
        """Where an item is lost for a query: its rank and score at every stage, and the score that it had to reach."""
        require_within(body, limits)
        query = Query.model_construct(**{name: getattr(body, name) for name in Query.model_fields})
        return _json(await gateway.explain(query, body.item_id, context_of(request, [body.deadline_ms])))

    return router


def _catalogue(gateway: Gateway) -> APIRouter:
    """What is known without asking a stage."""
    router = APIRouter()

    @router.get("/v1/items/{item_id:path}", response_model=ItemView,
                **interface.documented("item", 404, 422, *LOOKED_UP))
    async def item(item_id: Annotated[str, Path(min_length=1, max_length=512)], request: Request) -> Response:
        """An item of the catalogue."""
        try:
            return _json(gateway.item(item_id))
        except DataError as error:
            return problem(request.scope, 404, str(error))

    @router.get("/v1/model", response_model=ModelView, **interface.documented("model", *LOOKED_UP))
    async def model() -> dict[str, Any]:
        """What is served."""
        return gateway.about()

    return router


def _probes(gateway: Gateway) -> APIRouter:
    """What a supervisor asks; no key is needed."""
    router = APIRouter()

    @router.get("/healthz", **interface.documented("healthz", open_to_all=True))
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @router.get("/readyz", response_model=Ready, **interface.documented("readyz", 503, open_to_all=True))
    async def readyz(request: Request) -> Response:
        """Every stage answers; 503 with the stages that do not."""
        stages = await gateway.ready()
        if all(stages.values()):
            return _json(Ready(status="ready", stages=stages))
        missing = ", ".join(name for name, ready in stages.items() if not ready)
        return try_later(request.scope, 503, f"no answer from: {missing}; try again in a few seconds", retry_after_s=2)

    return router


def _json(answer: BaseModel) -> Response:
    """Written as it is: the gateway's models need not be validated again."""
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")

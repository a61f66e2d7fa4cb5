"""The gateway of a served cascade: a raw query through the stages to items and scores. Plain asyncio, no Ray."""

import asyncio
import uuid
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from pydantic import BaseModel

from raycascade.bundle import Bundle
from raycascade.errors import DataError
from raycascade.schema import PADDING
from raycascade.serving.requests import Query, table_of
from raycascade.serving.stages import Stage, Survivors, pack


class Scored(BaseModel):
    """An item and the score that the stage gave it."""

    item_id: int | str
    score: float


class StageTrace(BaseModel):
    """What one stage let through, best first."""

    stage: str
    keep: int
    items: list[Scored]


class Answer(BaseModel):
    """The recommendations for one query, best first, with the last stage's scores."""

    request_id: str
    user_id: int | str
    items: list[Scored]
    model: str  # the bundle's id
    known_user: bool  # whether the training log holds the user
    degraded: bool = False  # whether a stage was left out
    trace: list[StageTrace] | None = None


class Gateway:
    """Encodes a query with the bundle and hands it from stage to stage."""

    def __init__(self, bundle: Bundle, stages: Mapping[str, Stage]) -> None:
        assert tuple(stages) == bundle.cascade.names, (tuple(stages), bundle.cascade.names)
        self.bundle = bundle
        self.stages = stages

    @property
    def model(self) -> str:
        """The bundle's id: the last part of its URI."""
        return self.bundle.uri.rstrip("/").rsplit("/", 1)[-1]

    @property
    def most(self) -> int:
        """How many items an answer can hold."""
        return self.bundle.cascade.keeps[-1]

    async def recommend(self, query: Query) -> Answer:
        """The answer; DataError for a query that does not fit the bundle."""
        k = self.most if query.k is None else query.k
        if k > self.most:
            raise DataError(f"k: {k} is more than the last stage keeps; ask for at most {self.most}")
        request_id = uuid.uuid4().hex
        requests, known_user = await asyncio.to_thread(self._encode, query, request_id)
        message, survivors = pack(requests, version=self.bundle.version), None
        passed: dict[str, Survivors] = {}
        for name, stage in self.stages.items():
            passed[name] = survivors = await stage.run(message, survivors)
        assert survivors is not None, "a cascade has at least one stage"
        trace = None
        if query.trace:
            keeps = zip(passed.items(), self.bundle.cascade.keeps, strict=True)
            trace = [StageTrace(stage=name, keep=keep, items=self._scored(kept)) for (name, kept), keep in keeps]
        return Answer(request_id=request_id, user_id=query.user_id, items=self._scored(survivors)[:k], model=self.model,
                      known_user=known_user, trace=trace)

    async def ready(self) -> dict[str, bool]:
        """Which stages can answer."""
        answers = await asyncio.gather(*(stage.ready() for stage in self.stages.values()), return_exceptions=True)
        return {name: answer is True for name, answer in zip(self.stages, answers, strict=True)}

    def about(self) -> dict[str, Any]:
        """What is served."""
        config, manifest = self.bundle.config, self.bundle.manifest
        stages = [{"name": stage.name, "model": stage.model["name"], "keep": stage.keep} for stage in config.stages]
        return {"model": self.model, "stages": stages, "items": self.bundle.items.num_items,
                "users": len(self.bundle.users.table), "index": config.index["name"],
                "fingerprint": manifest["fingerprint"], "versions": manifest["versions"]}

    def _encode(self, query: Query, request_id: str) -> tuple[pa.Table, bool]:
        requests = table_of(query, self.bundle, request_id=request_id)
        known = bool(self.bundle.users.rows(requests["user_id"])[0] >= 0)
        return self.bundle.encode(requests), known

    def _scored(self, survivors: Survivors) -> list[Scored]:
        rows, scores = survivors.rows_QK[0], survivors.scores_QK[0]
        real = rows != PADDING
        return [Scored.model_validate({"item_id": item, "score": score})
                for item, score in zip(self.bundle.items.ids_of(rows[real]), scores[real].tolist(), strict=True)]

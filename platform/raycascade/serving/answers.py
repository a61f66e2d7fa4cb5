"""What a gateway answers: recommendations, where an item was lost, and what is known of an item."""

from typing import Literal

from pydantic import BaseModel

Reason = Literal["deadline", "unavailable", "overloaded"]
UserSource = Literal["store", "request", "unknown", "unavailable"]


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
    """The recommendations for one query, best first, with the scores of the last stage that answered.

    A degraded answer has the order of the stages before `degraded_at`, which was left out for `reason`; where that is
    the first stage, it has the most popular items, and their scores are counts of the training log.
    """

    request_id: str
    user_id: int | str
    items: list[Scored]
    model: str  # the bundle's id: the last part of its URI
    version: str  # 16 hexadecimal digits of the bundle's content
    known_user: bool  # whether the user store, or the training log, holds the user
    user_source: UserSource  # where the user's features and history came from; unavailable: the store did not answer
    degraded: bool = False
    degraded_at: str | None = None
    reason: Reason | None = None
    trace: list[StageTrace] | None = None
    timings_ms: dict[str, float] | None = None  # with a trace: "users", "encode" and every stage


class StageFate(BaseModel):
    """What one stage did with an item. `rank` is the item's place (1 = best) among what the stage saw, for stages after
    the loss its place had it been let through; `cut` the score of the last item that the stage kept."""

    stage: str
    rank: int
    score: float
    keep: int
    cut: float | None
    survives: bool


class Explanation(BaseModel):
    """Where in the cascade an item is lost for a query. `lost_at` is null for an item that is recommended, and
    "excluded" for one that the user must not get again."""

    request_id: str
    user_id: int | str
    item_id: int | str
    model: str
    version: str
    known_user: bool
    user_source: UserSource
    lost_at: str | None
    stages: list[StageFate]


class ItemView(BaseModel):
    """An item of the catalogue. `features`: its static values as in the log, where the bundle can give them back;
    `counts`: how often the training log exposed it, and each label."""

    item_id: int | str
    model: str
    version: str
    features: dict[str, int | float | str | list[int | float | str] | None]
    counts: dict[str, float]

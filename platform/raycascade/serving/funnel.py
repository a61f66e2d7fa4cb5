"""One request through the stages of a served model: in time, or as far as it gets."""

import logging
import time
from dataclasses import dataclass, field

from raycascade.errors import DataError, DeadlineExceeded, NotReady, Overloaded, ServingError
from raycascade.serving.answers import Reason
from raycascade.serving.served import ServedModel
from raycascade.serving.stages import OneRequest, Survivors
from raycascade.serving.telemetry import Telemetry

logger = logging.getLogger(__name__)


@dataclass
class Passage:
    """What each stage that answered let through, and the order that stands at the end. A stage that did not answer ends
    the passage: the order of the one before it stands, or, for the first stage, popularity."""

    passed: dict[str, Survivors] = field(default_factory=dict)
    timings_ms: dict[str, float] = field(default_factory=dict)
    final: Survivors | None = None
    degraded_at: str | None = None
    reason: Reason | None = None


async def descend(model: ServedModel, request: OneRequest, *, deadline: float, telemetry: Telemetry) -> Passage:
    """The passage of an encoded request; a ServingError where the first stage does not answer and nothing stands in."""
    passage, came_in = Passage(), model.bundle.items.num_items
    for name, stage in model.stages.items():
        started, ahead = time.monotonic(), request.ahead.get(name)
        try:
            survivors = ahead.survivors if ahead else await stage.run(request, passage.final, deadline=deadline)
        except Exception as error:
            _degrade(passage, name, error, model, request)
            telemetry.degraded(name, str(passage.reason))
            break
        seconds = ahead.seconds if ahead else time.monotonic() - started
        passage.timings_ms[name] = round(seconds * 1000, 3)
        passage.passed[name] = passage.final = survivors
        went_out = int((survivors.rows_QK != 0).sum())
        telemetry.stage(name, seconds, came_in, went_out)
        telemetry.scores(name, survivors.scores_QK)
        came_in = went_out
    return passage


def _degrade(passage: Passage, name: str, error: Exception, model: ServedModel, request: OneRequest) -> None:
    """Notes what left the stage out. What is no fault of load or of a lost replica is logged whole: it is a bug."""
    passage.reason = reason_of(error)
    if not isinstance(error, ServingError | TimeoutError):
        logger.error("stage %s failed", name, exc_info=error)
    passage.degraded_at = name
    if passage.final is not None:
        return
    if not isinstance(error, Overloaded):  # a full queue is the caller's to wait for, not to be made up for
        passage.final = model.popular(request)
    if passage.final is None:
        raise error if isinstance(error, ServingError) else _nothing(name, error)


def reason_of(error: Exception) -> Reason:
    """Why a stage was left out. A DataError is the caller's, and is raised on."""
    if isinstance(error, DataError):
        raise error
    if isinstance(error, Overloaded):
        return "overloaded"
    return "deadline" if isinstance(error, DeadlineExceeded | TimeoutError) else "unavailable"


def _nothing(name: str, error: Exception) -> ServingError:
    if isinstance(error, TimeoutError):
        return DeadlineExceeded(f"{name}: no answer in time, and no popular items to stand in; give the request more "
                                "time")
    return NotReady(f"{name}: the stage does not answer, and no popular items stand in; try again in a few seconds")

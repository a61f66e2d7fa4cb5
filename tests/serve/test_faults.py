"""Replicas and Redis die under light load: no wrong answer and no failed request; what lacks a stage says so."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from ray import serve

from raycascade.bundle import Bundle, load_bundle
from raycascade.flows import serving
from tests.redis_process import RedisProcess, needs_redis
from tests.serve.load import Load, Replies
from tests.served import checked_bundle, patient

pytestmark = pytest.mark.ray
APP = "faults"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(checked_bundle(str(tmp_path_factory.mktemp("faults") / "one")))


@pytest.fixture(scope="module")
def url(ray_cluster: None, bundle: Bundle) -> Iterator[str]:
    """Two replicas of the pre-ranker, one of the others. A request has less time than a replica takes to come back."""
    options = patient(stages={"pre_ranker": {"replicas": 2}}, deadline_ms=2_000)
    yield serving.start(bundle.uri, options, name=APP, route_prefix=f"/{APP}")
    serving.stop(APP)


def processes(stage: str) -> list[int]:
    """Process ids of a stage's replicas."""
    handle = serve.get_deployment_handle(stage, APP)
    return sorted(handle.broadcast("process").results(timeout_s=30.0))


def kill_one(stage: str) -> None:
    os.kill(processes(stage)[0], signal.SIGKILL)


def lacking(stage: str, replies: Replies) -> int:
    """How many answers lack a stage: late, as long as callers wait for its replica, and unavailable from then on."""
    return sum(count for (lacks, _), count in replies.degraded.items() if lacks == stage)


def assert_only(stage: str, replies: Replies) -> None:
    """Nothing failed or was wrong, and answers lack no other stage than this one, but for want of time."""
    assert (replies.failed, replies.wrong) == ([], [])
    assert {reason for lacking, reason in replies.degraded if lacking != stage} <= {"deadline"}


def test_one_of_two_replicas_dies_and_every_request_is_answered(url: str, bundle: Bundle):
    with Load(url, [bundle]) as load:
        load.more(20)
        kill_one("pre_ranker")
        load.more(40)
    assert_only("pre_ranker", load.replies)


def test_the_only_replica_of_a_later_stage_dies_and_answers_say_that_they_lack_it(url: str, bundle: Bundle):
    with Load(url, [bundle]) as load:
        load.more(20)
        kill_one("ranker")
        load.until(lambda replies: lacking("ranker", replies) > 0)
        seen = load.replies.statuses.total() - load.replies.degraded.total()
        load.until(lambda replies: replies.statuses.total() - replies.degraded.total() > seen + 20)  # whole again
    assert_only("ranker", load.replies)


def test_the_first_stage_dies_and_popular_items_stand_in(url: str, bundle: Bundle):
    with Load(url, [bundle]) as load:
        load.more(20)
        kill_one("retriever")
        load.until(lambda replies: lacking("retriever", replies) > 0)
        seen = load.replies.statuses.total() - load.replies.degraded.total()
        load.until(lambda replies: replies.statuses.total() - replies.degraded.total() > seen + 20)
    assert_only("retriever", load.replies)


@needs_redis
def test_redis_dies_and_answers_say_that_they_lack_the_history(url: str, bundle: Bundle, tmp_path: Path):
    server, app = RedisProcess(tmp_path), "redisless"
    users = {"store": "redis", "url": server.url, "timeout_ms": 30_000}
    try:
        options = patient(mode="fused", users=users, port=urlsplit(url).port)
        with Load(serving.start(bundle.uri, options, name=app, route_prefix=f"/{app}"), [bundle]) as load:
            load.more(20)
            assert load.replies.unheard == 0
            server.kill()
            load.until(lambda replies: replies.unheard > 20)
            server.start()
            seen = load.replies.statuses.total() - load.replies.unheard
            load.until(lambda replies: replies.statuses.total() - replies.unheard > seen + 20)  # heard again
        assert (load.replies.failed, load.replies.wrong, dict(load.replies.degraded)) == ([], [], {})
    finally:
        serving.stop(app)
        server.kill()

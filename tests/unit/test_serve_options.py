"""The options of serving: defaults, what a stage takes over, and one line for whatever is wrong."""

import re
from pathlib import Path

import pytest

from raycascade.errors import ConfigError
from raycascade.serving.options import ServeOptions, load_options, parse_options


def test_the_file_in_the_repository_states_the_defaults():
    path = Path(__file__).resolve().parents[2] / "configs" / "serve.yaml"
    assert load_options(str(path)) == ServeOptions()


def test_overrides_change_single_options():
    options = load_options(None, ["mode=fused", "stages.ranker.replicas=3", "users.timeout_ms=20", "port=0"])
    assert (options.mode, options.stage("ranker").replicas, options.users.timeout_ms, options.port) == (
        "fused", 3, 20, 0)
    assert options.stage("retriever").replicas == 1


def test_a_stage_takes_over_what_the_default_says_and_it_does_not():
    options = parse_options({"stages": {
        "default": {"replicas": 2, "cpus": 0.5, "batch": {"max_size": 8, "wait_ms": 3.0}},
        "ranker": {"gpus": 0.25, "batch": {"max_size": 32}}}}, where="test")
    ranker, other = options.stage("ranker"), options.stage("retriever")
    assert (ranker.replicas, ranker.cpus, ranker.gpus, ranker.batch.max_size, ranker.batch.wait_ms) == (
        2, 0.5, 0.25, 32, 3.0)
    assert (other.replicas, other.gpus, other.batch.max_size) == (2, 0.0, 8)


@pytest.mark.parametrize(("tree", "problem"), [
    ({"moed": "fused"}, r"test: moed: unknown key; did you mean 'mode'\?"),
    ({"gateway": {"replica": 2}}, r"gateway\.replica: unknown key; did you mean 'replicas'\?"),
    ({"stages": {"ranker": {"cpu": 1}}}, r"stages\.ranker\.cpu: unknown key; did you mean 'cpus'\?"),
    ({"stages": {"ranker": {"batch": {"size": 1}}}},
     r"stages\.ranker\.batch\.size: unknown key; did you mean 'max_size'\?"),
    ({"stages": {"ranker": {"autoscale": {"min": 3, "max": 2}}}}, r"autoscale: max 2 is less than min 3"),
    ({"mode": "both"}, r"mode: .*'composed' or 'fused'.*got 'both'"),
    ({"deadline_ms": 0}, r"deadline_ms: .*got 0"), ({"limits": {"k": 0}}, r"limits\.k: .*got 0"),
    ({"limits": {"batches": 3}}, r"limits\.batches: unknown key; did you mean 'batch'\?"),
    ({"stages": {"ranker": {"max_queued": 40}}}, "limits.batch: 64, but stages.ranker.max_queued lets only 40 req"),
    ({"limits": {"batch": 300}}, "limits.batch: 300, but stages.default.max_queued lets only 256 requests wait"),
    ({"gateway": {"replicas": 2}}, "gateway.replicas: 2, but users.store embedded keeps users in one replica"),
])
def test_what_is_wrong_is_one_line_that_says_where(tree: dict, problem: str):
    with pytest.raises(ConfigError) as refused:
        parse_options(tree, where="test")
    assert re.search(problem, str(refused.value)), str(refused.value)
    assert "\n" not in str(refused.value)


def test_several_gateways_share_redis():
    options = parse_options({"gateway": {"replicas": 2}, "users": {"store": "redis", "url": "redis://localhost"}},
                            where="test")
    assert options.gateway.replicas == 2


def test_options_of_a_stage_that_the_bundle_lacks_are_refused():
    options = parse_options({"stages": {"rankr": {"replicas": 2}, "default": {}}}, where="test")
    with pytest.raises(ConfigError, match=r"stages\.rankr: the bundle has no such stage; did you mean 'ranker'\?"):
        options.require_stages(("retriever", "ranker"))
    options.require_stages(("rankr",))


def test_more_gateways_than_the_user_store_can_have_are_refused_however_they_come_about():
    with pytest.raises(ConfigError, match=r"gateway\.replicas: 3, but users\.store embedded"):
        ServeOptions().require_gateways(3)
    ServeOptions().require_gateways(1)
    parse_options({"users": {"store": "redis", "url": "redis://localhost"}}, where="test").require_gateways(3)


def test_large_batches_of_queries_need_queues_that_hold_them():
    options = parse_options({"limits": {"batch": 300}, "stages": {"default": {"max_queued": 300}}}, where="test")
    assert (options.limits.batch, options.stage("ranker").max_queued) == (300, 300)

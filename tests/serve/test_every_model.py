"""Every model of the registry as the last of three stages: trained, saved, loaded, scored in batch and served alike.

Which part is which:

- Every model, with one logit and with two tasks and a fusion, in this process: trained by the loop that the workers of
  `train` run (trees by the function that they run), saved and loaded as a bundle; scored in batch by the actor class of
  `score`, which reads and writes Parquet; served by the gateway, the stage servers and the HTTP interface that `serve`
  deploys, every stage with a bundle that it loads itself. Ray Train, Ray Data and Ray Serve are not around these.
- The cascades in REAL (one with several tasks, and every fitted model) with the real verbs: `train` on Ray Train (trees
  by XGBoostTrainer) and `score` on Ray Data. One more test holds them against what the loop trains in this process.
  They are served by Ray Serve, a deployment for each stage, and asked over a socket.

Shards are made once, by `prepare`. `python -m tests.every_model` does all of it with the real verbs for every model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow.parquet as pq
import pytest
import torch
from ray import serve

from raycascade.batch import collate
from raycascade.bundle import Bundle, build_index, load_bundle, save_bundle
from raycascade.config import Config
from raycascade.flows import serving
from raycascade.flows.score import score
from raycascade.flows.train import train
from raycascade.shards import Shards
from raycascade.training.gbdt import fit_stages
from raycascade.training.loop import Place, Run
from tests import three_stages as three
from tests.served import patient
from tests.three_stages import Answer
from tests.tiny_shards import same, trained

pytestmark = pytest.mark.ray

TOLERANCE = 1e-5
SPREAD = 1e-2  # of the scores in an answer, at least: equal scores would prove nothing
REAL = [("mmoe", True), *((name, False) for name in three.FITTED)]


@dataclass(frozen=True)
class World:
    """The shards, and where bundles and results go."""

    folder: Path
    uri: str

    @cached_property
    def shards(self) -> Shards:
        return Shards.open(self.uri)

    def config(self, model: str, *, tasks: bool, run: str = "") -> Config:
        return three.config_of(self.uri, model, tasks=tasks, run=run, space=self.shards.state.space)

    def trained_here(self, config: Config) -> Run:
        """What the workers of `train` do, without workers."""
        run = Run.build(config, self.shards, Place())
        fit_stages(config, self.shards, run.cascade, threads=1)
        trained(config, run=run)
        run.cascade.eval()
        return run

    def saved(self, run: Run) -> str:
        return save_bundle(str(self.folder / f"bundle-{run.config.train.run}"), config=run.config, cascade=run.cascade,
                           items=self.shards.items, encoded_items=self.shards.table("items"),
                           users=self.shards.table("users"), metrics={})

    def requests(self, bundle: Bundle) -> str:
        """The queries as a Parquet file."""
        path = self.folder / f"requests-{bundle.config.train.run}.parquet"
        pq.write_table(three.requests_of(three.queries(bundle)), path)
        return str(path)


@pytest.fixture(scope="module")
def world(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("every_model")
    return World(folder, three.world(folder))


def assert_alike(found: list[Answer], expected: list[Answer]) -> None:
    assert three.greatest_difference(found, expected) <= TOLERANCE


def assert_the_last_stage_decides(bundle: Bundle, expected: list[Answer]) -> None:
    """Scores that differ, and another order than that of the stage before."""
    assert all(len(items) == three.KEEPS[three.LAST] for items, _ in expected)
    assert max(scores[0] - scores[-1] for _, scores in expected) > SPREAD
    ranking = bundle.recommend(bundle.encode(three.requests_of(three.queries(bundle))))
    *_, before, last = ranking.stages
    assert (last.kept()[0] != before.kept(last.keep)[0]).any()


def test_the_registry_has_models_of_every_kind():
    assert {"two_tower", "mlp", "din"} <= set(three.MODELS)
    assert three.FITTED
    assert not set(three.FITTED) >= set(three.MODELS)


# ---------------------------------------------------------------- every model, in this process
@pytest.mark.parametrize(("model", "tasks"), three.CASES)
def test_a_trained_cascade_answers_alike_before_and_after_its_bundle_in_batch_and_served(
    world: World, model: str, tasks: bool
):
    config = world.config(model, tasks=tasks)
    run = world.trained_here(config)
    uri = world.saved(run)
    loaded = load_bundle(uri)
    assert_saved_as_trained(run, loaded)
    unsaved = replace(loaded, cascade=run.cascade, index=build_index(config, run.cascade, world.shards.items))
    asked = three.queries(unsaved)
    expected = three.answers_of(unsaved, three.requests_of(asked))
    assert_the_last_stage_decides(unsaved, expected)
    assert_alike(three.answers_of(loaded, three.requests_of(asked)), expected)
    assert_alike(three.scored_by_actor(uri, world.requests(loaded), world.folder / f"out-{config.train.run}"), expected)
    assert_alike(three.served_in_process(loaded, asked), expected)


def assert_saved_as_trained(run: Run, loaded: Bundle) -> None:
    """Every stage has learned, and comes back bit by bit."""
    cascade, new = run.cascade, Run.build(run.config, run.shards, Place()).cascade
    for name in cascade.names:
        if name in cascade.fitted:
            assert cascade.fitted[name].to_files() == loaded.cascade.fitted[name].to_files()
        else:
            assert same(cascade.stage_state(name), loaded.cascade.stage_state(name))
            assert not same(cascade.stage_state(name), new.stage_state(name))


# ---------------------------------------------------------------- some, with the real verbs
@pytest.fixture(scope="module")
def bundles(world: World) -> dict[str, Bundle]:
    """Trained by the real verb, by model."""
    return {model: load_bundle(train(world.config(model, tasks=tasks, run=f"real-{model}"))["bundle"])
            for model, tasks in REAL}


@pytest.fixture(scope="module")
def urls(bundles: dict[str, Bundle]) -> Iterator[dict[str, str]]:
    """Composed deployments side by side in one Serve, by model."""
    started: dict[str, str] = {}
    port = 0
    for model, _ in REAL:
        started[model] = serving.start(bundles[model].uri, patient(port=port), name=model, route_prefix=f"/{model}")
        port = urlsplit(started[model]).port or 0
    yield started
    serve.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("model", [model for model, _ in REAL])
def test_a_cascade_trained_by_the_real_verb_answers_alike_in_batch(
    world: World, bundles: dict[str, Bundle], model: str
):
    bundle = bundles[model]
    asked = three.queries(bundle)
    expected = three.answers_of(bundle, three.requests_of(asked))
    assert_the_last_stage_decides(bundle, expected)
    out = world.folder / f"out-real-{model}"
    score(bundle.uri, requests=world.requests(bundle), out=str(out))
    assert_alike(three.read_answers(out), expected)


@pytest.mark.slow
@pytest.mark.parametrize("model", [model for model, _ in REAL])
def test_a_cascade_trained_by_the_real_verb_answers_alike_over_http(
    bundles: dict[str, Bundle], urls: dict[str, str], model: str
):
    asked = three.queries(bundles[model])
    assert_alike(three.served_over_http(urls[model], asked),
                 three.answers_of(bundles[model], three.requests_of(asked)))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "tasks"), REAL)
def test_the_real_verb_trains_what_the_loop_trains_in_this_process(
    world: World, bundles: dict[str, Bundle], model: str, tasks: bool
):
    here = world.trained_here(world.config(model, tasks=tasks)).cascade
    batch = collate(world.shards.table("requests/test"), world.shards.items)
    with torch.no_grad():
        far, near = bundles[model].cascade(batch), here(batch)
    for name in here.names:
        torch.testing.assert_close(far[name][batch.mask_QC], near[name][batch.mask_QC], atol=1e-4, rtol=1e-4)

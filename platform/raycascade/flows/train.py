"""train: shards -> bundle, with Ray Train. The loop itself is plain PyTorch (training/loop.py)."""

import os
import sys
import tempfile
import threading
import time
import uuid
from typing import Any

import torch

from raycascade import guard, selfcheck, storage
from raycascade.bundle import Bundle, build_index, remember_latest, save_bundle
from raycascade.cascade import Cascade
from raycascade.config import Config
from raycascade.errors import ConfigError, RaycascadeError
from raycascade.flows._board import Board
from raycascade.flows._boosting import fit_on_ray
from raycascade.indexes import ItemIndex
from raycascade.progress import ProgressLine
from raycascade.shards import Shards
from raycascade.training import checkpoint
from raycascade.training.checkpoint import Progress
from raycascade.training.gbdt import load_fitted
from raycascade.training.loop import Place, Run, Save, fit
from raycascade.variants import is_variant


def train(config: Config) -> dict[str, Any]:
    """Trains and writes a bundle; returns {"bundle", "rows_per_s", "seconds", "loss", "rows"}.

    `train.run` names the run: an unfinished run of that name goes on from its last checkpoint; a finished one is an
    error, because bundles are immutable. ExpectationError, and no bundle, where the guard of a stage's variant fails.
    """
    started = time.monotonic()
    shards = Shards.open(config.paths.shards)
    shards.require_split("train")
    check_funnel(config, shards.items.num_items)
    name = config.train.run or f"run-{uuid.uuid4().hex[:10]}"
    config = config.model_copy(update={"train": config.train.model_copy(update={"run": name})})
    target = storage.join(config.paths.bundles, name)
    if storage.exists(storage.join(target, "manifest.json")):
        raise ConfigError(f"train.run {name!r} is finished: its bundle is {target}; choose another name to train again")
    cascade = Run.build(config, shards, Place()).cascade  # every mistake in the config shows here, before Ray starts
    note = storage.join(_runs_folder(config), name, "begun.json")
    _check_same_run(name, note, _identity(config, shards))
    sys.stderr.write(f"train: run {name}; if it is interrupted, train.run={name} goes on with it\n")
    fitted = fit_on_ray(config, shards, cascade, runs=_runs_folder(config))
    progress = _fit_on_ray(config, cascade, fitted=fitted)
    index, guarded = _guarded(config, cascade.eval(), shards)
    metrics = {"train": _summary(progress), "curves": progress.curves, **guarded}
    save_bundle(target, config=config, cascade=cascade, items=shards.items, encoded_items=shards.table("items"),
                users=shards.table("users"), metrics=metrics, semantic_ids=shards.semantic_ids, index=index)
    selfcheck.record(target)
    remember_latest(config.paths.bundles, target)
    storage.remove_folder(storage.join(_runs_folder(config), name))
    return {"bundle": target, **_summary(progress), "seconds": round(time.monotonic() - started, 2)}


def _guarded(config: Config, cascade: Cascade, shards: Shards) -> tuple[ItemIndex | None, dict[str, Any]]:
    """The index where the guard has needed one, and what the bundle keeps of the guard; ExpectationError where a stage
    would not be served as it was trained."""
    if not any(is_variant(stage) for stage in config.stages):
        return None, {}
    index = build_index(config, cascade, shards.items) if cascade.searches else None
    guarded = guard.measure(Bundle("", {}, config, shards.items, cascade, index), shards)
    guard.require_faithful(guarded, config.guard)
    return index, guard.record(guarded, config.guard)


def check_funnel(config: Config, num_items: int) -> None:
    """ConfigError where the first stage is to keep more than there is."""
    first = config.stages[0]
    if first.keep > num_items:
        raise ConfigError(f"stages: {first.name!r} keeps {first.keep}, but the catalogue has {num_items} items; "
                          "keep fewer")


def _summary(progress: Progress) -> dict[str, Any]:
    losses = [value for _, value in progress.curves.get("loss", [])][-20:]
    return {"rows": progress.rows, "rows_per_s": round(progress.rows / max(progress.seconds, 1e-9), 1),
            "train_seconds": round(progress.seconds, 2), "loss": sum(losses) / max(1, len(losses))}


def _identity(config: Config, shards: Shards) -> dict[str, Any]:
    """What must not change between the start of a run and its continuation: its position would mean something else."""
    tree = config.model_dump(mode="json")
    for stage in tree["stages"]:  # how a stage is served may change: the guard may have refused it
        del stage["precision"], stage["compile"]
    train = {f"train.{name}": tree["train"][name] for name in ("batch_size", "workers", "seed", "order", "negatives")}
    return {"shards": shards.folder, **{name: tree[name] for name in ("stages", "loss", "lists")}, **train}


def _check_same_run(name: str, note: str, identity: dict[str, Any]) -> None:
    """Notes what a new run is made of; ConfigError where an unfinished run of that name was made of something else."""
    if not storage.exists(note):
        storage.write_json(note, identity)
        return
    before = storage.read_json(note)
    changed = [key for key, value in identity.items() if before.get(key) != value]
    if changed:
        raise ConfigError(f"train.run {name!r} was begun with other {' and '.join(changed)}; restore them to go on, or "
                          "choose another name to begin anew")


def _runs_folder(config: Config) -> str:
    return storage.join(config.paths.bundles, "_runs")


def _fit_on_ray(config: Config, cascade: Cascade, *, fitted: str) -> Progress:
    """Runs the loop on Ray Train; leaves the final weights in `cascade`. `fitted`: where the stages of trees are."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    gpu = torch.cuda.is_available() if config.train.gpu is None else config.train.gpu
    cores = max(1, (os.cpu_count() or 1) // config.train.workers)
    board: Any = ray.remote(num_cpus=0)(Board).remote()
    trainer = TorchTrainer(
        _worker, train_loop_config={"config": config.model_dump(mode="json"), "threads": cores, "board": board,
                                    "fitted": fitted},
        scaling_config=ScalingConfig(num_workers=config.train.workers, use_gpu=gpu),
        run_config=RunConfig(name=config.train.run, storage_path=_runs_folder(config),
                             failure_config=FailureConfig(max_failures=2),
                             checkpoint_config=CheckpointConfig(num_to_keep=2)),
    )
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(board, config.train.epochs, stop), daemon=True)
    watcher.start()
    try:
        result = trainer.fit()
        failure: Exception | None = _user_error(board)
    except TrainingFailedError as error:
        failure = _user_error(board) or error
    finally:
        stop.set()
        watcher.join()
        ray.kill(board)
    if failure is not None:
        raise failure from None
    assert result.checkpoint is not None, "the loop always ends with a checkpoint"
    with result.checkpoint.as_directory() as folder:
        return checkpoint.load_weights(folder, cascade)


def _worker(options: dict[str, Any]) -> None:
    """One training worker. What a user has to mend is posted, and no retry tries it again."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    if ray.get(options["board"].read_failure.remote()):
        return
    place = Place(context.get_world_rank(), context.get_world_size(), str(ray.train.torch.get_device()))
    try:
        _train_here(options, place)
    except RaycascadeError as error:
        ray.get(options["board"].fail.remote(type(error).__name__, str(error)))
        if place.world_size > 1:
            raise  # the others wait for this worker's gradients: only the end of the group frees them


def _train_here(options: dict[str, Any], place: Place) -> None:
    """The loop in a worker process, from the last checkpoint if there is one."""
    import ray.train

    torch.set_num_threads(options["threads"])
    config = Config.model_validate(options["config"])
    run = Run.build(config, Shards.open(config.paths.shards), place)
    load_fitted(options["fitted"], run.cascade)
    progress = Progress()
    if held := ray.train.get_checkpoint():
        with held.as_directory() as folder:
            progress = checkpoint.load(folder, run.cascade, run.objective, run.optimisers, best=run.best)

    def report(progress: Progress, steps: int, save: Save | None) -> None:
        if place.rank == 0:
            options["board"].post.remote((progress.epoch, progress.step, steps, progress.rows, progress.seconds))
        if save is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            held = None
            if place.rank == 0:
                save(folder)
                held = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": progress.total_steps}, checkpoint=held)

    fit(run, progress, report)


def _watch(board: Any, epochs: int, stop: threading.Event) -> None:
    """Shows rows per second and the time left until stopped."""
    import ray

    line = ProgressLine("train")
    while not stop.wait(1.0):
        latest = ray.get(board.read.remote())
        if latest is not None:
            epoch, step, steps, rows, seconds = latest
            share = (epoch + step / steps) / epochs if steps else 1.0
            line.show(share, rows, seconds, detail=f"epoch {min(epoch + 1, epochs)}/{epochs}")
    line.close()


def _user_error(board: Any) -> RaycascadeError | None:
    import ray

    import raycascade.errors

    failure = ray.get(board.read_failure.remote())
    return getattr(raycascade.errors, failure[0])(failure[1]) if failure else None

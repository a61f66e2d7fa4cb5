"""Stages of trees, fitted with Ray Train's XGBoostTrainer before the other stages train."""

import os
import tempfile
from pathlib import Path
from typing import Any

from raycascade import storage
from raycascade.cascade import Cascade
from raycascade.config import Config
from raycascade.errors import RaycascadeError
from raycascade.shards import Shards
from raycascade.training.gbdt import fit_stage, load_fitted, save_fitted
from raycascade.training.loop import Place


def fit_on_ray(config: Config, shards: Shards, cascade: Cascade, *, runs: str) -> str:
    """Fits the stages of trees that an earlier attempt of the run has not; all are then in `cascade` and in a folder.

    Returns that folder, for the workers that train the others. `runs` is where Ray keeps what it needs meanwhile.
    """
    folder = storage.join(runs, str(config.train.run), "fitted")
    for name in load_fitted(folder, cascade):
        _fit(config, cascade, name, runs=runs)
        save_fitted(folder, cascade, name)
    return folder


def _fit(config: Config, cascade: Cascade, name: str, *, runs: str) -> None:
    """One stage, by as many workers as train; each reads its share of the shards, XGBoost adds up their histograms."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.xgboost import XGBoostTrainer

    threads = max(1, (os.cpu_count() or 1) // config.train.workers)
    own = f"{config.train.run}.{name}"
    trainer = XGBoostTrainer(
        _worker, train_loop_config={"config": config.model_dump(mode="json"), "stage": name, "threads": threads},
        scaling_config=ScalingConfig(num_workers=config.train.workers),
        run_config=RunConfig(name=own, storage_path=runs, failure_config=FailureConfig(max_failures=2),
                             checkpoint_config=CheckpointConfig(num_to_keep=1)),
    )
    result = trainer.fit()
    if result.return_value:  # what a user has to mend; a retry would not help
        raise _user_error(*result.return_value)
    assert result.checkpoint is not None, "a fitted stage always comes as a checkpoint"
    with result.checkpoint.as_directory() as held:
        cascade.fitted[name].from_files({path.name: path.read_bytes() for path in Path(held, name).iterdir()})
    storage.remove_folder(storage.join(runs, own))


def _worker(options: dict[str, Any]) -> tuple[str, str] | None:
    """One worker of a stage; kind and message of what a user has to mend, if there is such a thing."""
    import ray.train
    import torch

    torch.set_num_threads(options["threads"])
    config, name = Config.model_validate(options["config"]), options["stage"]
    shards, context = Shards.open(config.paths.shards), ray.train.get_context()
    cascade = Cascade(config, shards.state.space)
    place = Place(context.get_world_rank(), context.get_world_size())
    try:
        fit_stage(config, shards, cascade, name, place, threads=options["threads"])
    except RaycascadeError as error:
        if place.world_size > 1:
            raise  # the others wait for this worker's histograms: only the end of the group frees them
        return type(error).__name__, str(error)
    with tempfile.TemporaryDirectory() as folder:
        held = None
        if place.rank == 0:
            save_fitted(folder, cascade, name)
            held = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"stage": name}, checkpoint=held)
    return None


def _user_error(kind: str, message: str) -> RaycascadeError:
    import raycascade.errors

    return getattr(raycascade.errors, kind)(message)

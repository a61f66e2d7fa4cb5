"""semantic-ids: content vectors of prepared items -> frozen codes and tokens. `prepare` takes the same steps."""

import hashlib
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch

from raycascade import storage
from raycascade.config import Config
from raycascade.errors import ConfigError, RaycascadeError, ShardError
from raycascade.features import FeatureState
from raycascade.semantic_ids.artefact import ItemContent, SemanticIds, encoded as codes_of
from raycascade.semantic_ids.columns import with_features, with_tokens
from raycascade.semantic_ids.report import render_page, summary
from raycascade.semantic_ids.rqvae import RQVAE
from raycascade.semantic_ids.tokenizers import Tokenizer
from raycascade.semantic_ids.training import RQVAETraining, trained_model
from raycascade.shards import Shards

CHECKPOINTS = 4  # of a training, the last one included


def semantic_ids(config: Config) -> dict[str, Any]:
    """Learns all semantic ids that the config declares from its shards, which stay as they are.

    Returns {"semantic_ids": {name: {"uri", "sid_version", figures of the report}}, "seconds"}. The folder behind `uri`
    has a report.html; as `semantic_ids.<name>.reuse` of a config, it is what `prepare` takes.
    """
    started = time.monotonic()
    require_declared(config)
    shards = Shards.open(config.paths.shards)
    if "trained_ms" not in shards.manifest:
        raise ShardError(f"{shards.folder}: its manifest does not say which period was trained on; run prepare again")
    from_ms, until_ms = shards.manifest["trained_ms"]
    found = {}
    for name, spec in config.semantic_ids.items():
        content = ItemContent.of(shards.table("items"), spec.content, shards.state.counters)
        work = storage.join(config.paths.bundles, "_runs", f"semantic-ids-{name}-{_key(config, name, content)}")
        ids = learned(config, name, content, period_ms=(from_ms, until_ms), work=work)
        uri = storage.join(config.paths.bundles, "_semantic_ids", f"{name}-{ids.version}")
        write(ids, uri, name=name)
        storage.remove_folder(work)
        found[name] = {"uri": uri, "sid_version": ids.version, **summary(ids.report)}
    return {"semantic_ids": found, "seconds": round(time.monotonic() - started, 2)}


def require_declared(config: Config) -> Config:
    """The config; ConfigError where it declares no semantic ids."""
    if not config.semantic_ids:
        raise ConfigError("semantic_ids: the config declares none; add semantic_ids: {main: {content: X}}, X being a "
                          "vector feature of the items")
    return config


def add_semantic_ids(
    config: Config, state: FeatureState, encoded: pa.Table, *, period_ms: tuple[int, int], work: str, target: str
) -> tuple[FeatureState, pa.Table, dict[str, str]]:
    """Fitted state and encoded items with the tokens of all semantic ids of the config, which are learned, or loaded
    where they are to be reused, and written below `target`; and their versions by name."""
    made: dict[str, SemanticIds] = {}
    for name, spec in config.semantic_ids.items():
        content = ItemContent.of(encoded, spec.content, state.counters)
        if spec.reuse:
            made[name] = reused(config, name, content, until_ms=period_ms[1])
        else:
            made[name] = learned(config, name, content, period_ms=period_ms, work=storage.join(work, f"ids-{name}"))
        write(made[name], storage.join(target, "semantic_ids", name), name=name)
        state = with_features(state, config, name, made[name])
    return state, with_tokens(encoded, state, made), {name: ids.version for name, ids in made.items()}


def write(ids: SemanticIds, uri: str, *, name: str) -> None:
    """The folder of some semantic ids with their report as a page; warnings go to standard error."""
    page = render_page(f"Semantic ids {name}", ids.report, curves=ids.curves)
    storage.write_bytes(storage.join(uri, "report.html"), page.encode())
    ids.save(uri)
    for line in ids.report["warnings"]:
        sys.stderr.write(f"semantic ids {name}: {line}\n")


def reused(config: Config, name: str, content: ItemContent, *, until_ms: int) -> SemanticIds:
    """Frozen semantic ids with the codes of this catalogue. ConfigError where they have seen items of a time after
    `until_ms`, the end of the training log: what is measured later would have been known."""
    ids = SemanticIds.load(storage.absolute(config.semantic_ids[name].reuse))
    if (learned_until := ids.facts["period_ms"][1]) > until_ms:
        seen, end = (str(np.datetime64(moment, "ms"))[:16] + "Z" for moment in (learned_until, until_ms))
        raise ConfigError(f"semantic_ids.{name}.reuse: learned from what was shown until {seen}, but the training log "
                          f"ends at {end}; learn them from a log that ends there, or leave reuse out")
    return replace(ids, item_ids=content.item_ids, codes_NL=codes_of(ids.model, content.vectors_NV))


def learned(
    config: Config, name: str, content: ItemContent, *, period_ms: tuple[int, int], work: str
) -> SemanticIds:
    """Trains the model with Ray Train and freezes it with its tokenizer. `work` is a folder that all workers see; what
    an earlier attempt left there is taken up."""
    spec, (vectors_NV, impressions_N) = config.semantic_ids[name], content.training_rows()
    rqvae = cast(RQVAE.Config, spec.rqvae_config(f"semantic_ids.{name}"))
    tokenizer = cast(Tokenizer.Config, spec.tokenizer_config(f"semantic_ids.{name}"))
    if storage.exists(_failure(work)):
        storage.remove_folder(work)
    flat = pa.array(vectors_NV.reshape(-1))
    storage.write_arrow(_content(work), pa.table({
        "vector": pa.FixedSizeListArray.from_arrays(flat, vectors_NV.shape[1]), "impressions": impressions_N}))
    sys.stderr.write(f"semantic ids {name}: {rqvae.steps} steps over {len(vectors_NV):,} items\n")
    model, curves = _fit_on_ray(rqvae, vectors_NV.shape[1], work, workers=spec.workers, gpu=config.train.gpu)
    return SemanticIds.build(model, tokenizer, content, period_ms=period_ms, curves=curves,
                             threads=os.cpu_count() or 1)


def _key(config: Config, name: str, content: ItemContent) -> str:
    """What must not change between a training and its continuation."""
    spec = config.semantic_ids[name]
    parts = [content.fingerprint(), spec.rqvae_config().model_dump(mode="json"), spec.workers]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _content(work: str) -> str:
    return storage.join(work, "content.arrow")


def _failure(work: str) -> str:
    """Where a worker says what a user has to mend."""
    return storage.join(work, "failure.json")


def _fit_on_ray(
    rqvae: RQVAE.Config, width: int, work: str, *, workers: int, gpu: bool | None
) -> tuple[RQVAE, dict[str, Any]]:
    """The trained model and its curves."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    import raycascade.errors

    threads = max(1, (os.cpu_count() or 1) // workers)
    trainer = TorchTrainer(
        _worker, train_loop_config={"rqvae": rqvae.model_dump(mode="json"), "work": work, "threads": threads},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=torch.cuda.is_available() if gpu is None else gpu),
        run_config=RunConfig(name="rqvae", storage_path=work, failure_config=FailureConfig(max_failures=2),
                             checkpoint_config=CheckpointConfig(num_to_keep=2)),
    )
    try:
        checkpoint = trainer.fit().checkpoint
    except TrainingFailedError:
        if not storage.exists(_failure(work)):
            raise
        checkpoint = None
    if storage.exists(_failure(work)):
        kind, message = storage.read_json(_failure(work))
        raise getattr(raycascade.errors, kind)(message)
    assert checkpoint is not None, "the loop always ends with a checkpoint"
    with checkpoint.as_directory() as folder:
        return trained_model(rqvae, width, folder)


def _worker(options: dict[str, Any]) -> None:
    """One training worker. What a user has to mend is written down, and no retry tries it again."""
    import ray.train

    if storage.exists(_failure(options["work"])):
        return
    try:
        _train_here(options)
    except RaycascadeError as error:
        storage.write_json(_failure(options["work"]), [type(error).__name__, str(error)])
        if ray.train.get_context().get_world_size() > 1:
            raise  # the others wait for this worker's gradients: only the end of the group frees them


def _train_here(options: dict[str, Any]) -> None:
    """The loop in a worker process, from the last checkpoint if there is one."""
    import ray.train
    import ray.train.torch

    torch.set_num_threads(options["threads"])
    config = RQVAE.Config.model_validate(options["rqvae"])
    table = storage.read_arrow(_content(options["work"]))
    vectors = table["vector"].combine_chunks()
    vectors_NV = vectors.flatten().to_numpy().reshape(len(table), vectors.type.list_size)
    training = RQVAETraining(config, vectors_NV, table["impressions"].to_numpy(),
                             device=str(ray.train.torch.get_device()))
    if held := ray.train.get_checkpoint():
        with held.as_directory() as folder:
            training.load(folder)
    every = -(-config.steps // CHECKPOINTS)

    def report(training: RQVAETraining) -> None:
        if training.step_number % every and training.step_number < config.steps:
            return
        with tempfile.TemporaryDirectory() as folder:
            held = None
            if training.rank == 0:
                training.save(folder)
                held = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": training.step_number}, checkpoint=held)

    training.run(after_step=report)

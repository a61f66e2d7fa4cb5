"""The training loop: plain PyTorch, the same on one worker or many, resumable to the exact step."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
import torch.distributed

from raycascade.batch import Batch, collate
from raycascade.cascade import Cascade
from raycascade.config import Config
from raycascade.errors import ConfigError
from raycascade.ragged import Ragged
from raycascade.shards import ShardReader, Shards
from raycascade.training import checkpoint
from raycascade.training.checkpoint import Best, Progress
from raycascade.training.initial_weights import take_initial_weights
from raycascade.training.objective import Objective, finite
from raycascade.training.optimisers import Optimisers
from raycascade.training.penalties import TablePenalties
from raycascade.training.refusals import (
    free_bytes,
    refuse_labels_that_teach_nothing,
    refuse_lists_of_truth_alone,
    refuse_tables_beyond_memory,
    refuse_unknown_labels,
)
from raycascade.training.sampling import Catalogue, with_history_negatives, with_negatives

CURVE_POINTS = 200  # points a curve keeps per epoch, at most
Save = Callable[[str], None]
Report = Callable[[Progress, int, Save | None], None]  # progress, steps of the epoch, how to write a checkpoint


@dataclass(frozen=True)
class Place:
    """Where this worker stands."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class Run:
    """Everything one worker trains with, built the same way on every worker."""

    config: Config
    shards: Shards
    cascade: Cascade
    objective: Objective
    optimisers: Optimisers
    catalogue: Catalogue
    place: Place
    best: Best = field(default_factory=Best)

    @classmethod
    def build(cls, config: Config, shards: Shards, place: Place) -> "Run":
        """Same seed, same initial weights on every worker."""
        if config.train.early_stop and not shards.splits.get("valid"):
            raise ConfigError("train.early_stop: there is no validation split to judge by; set splits.valid_from and "
                              "prepare again, or leave early_stop out")
        refuse_tables_beyond_memory(config, shards.state.space, free=free_bytes(place.device))
        torch.manual_seed(config.train.seed)
        cascade = Cascade(config, shards.state.space)
        take_initial_weights(config, cascade, shards.state)
        cascade = cascade.to(place.device)
        objective = Objective(config, cascade).to(place.device)
        refuse_unknown_labels(objective, shards.state.schema.labels)
        refuse_labels_that_teach_nothing(objective, cascade, shards.state.label_counts)
        refuse_lists_of_truth_alone(config, objective, shards)
        optimisers = Optimisers(cascade, objective, config.train, penalties=TablePenalties.of(cascade))
        return cls(config, shards, cascade, objective, optimisers, Catalogue.of(shards.items), place)

    def reader(self, split: str, *, shuffle: bool = True) -> ShardReader:
        """Batches of this worker's share of a split; the whole of it without shuffling."""
        train, place = self.config.train, self.place
        if not shuffle:
            return ShardReader(self.shards, split, train.batch_size, shuffle=False)
        if train.batch_size % place.world_size:
            raise ConfigError(f"train.batch_size {train.batch_size} must be a multiple of the {place.world_size} "
                              "workers")
        return ShardReader(self.shards, split, train.batch_size // place.world_size, seed=train.seed, rank=place.rank,
                           world_size=place.world_size, in_time=train.order == "time")


def fit(run: Run, progress: Progress, report: Report) -> Progress:
    """Trains from `progress` to the end. Calls `report` once a step, the same number of times on all workers.

    With `train.early_stop` the cascade ends with the weights of its best epoch, else with those of the last step.
    """
    train = run.config.train
    reader = run.reader("train")
    while progress.epoch < train.epochs and not progress.finished:
        train_epoch(run, reader, progress, report)
        _validate(run, progress)
    progress.finished = True
    if train.early_stop:
        run.best.restore(run.cascade)
    report(progress, 0, _saver(run, progress))
    return progress


def train_epoch(run: Run, reader: ShardReader, progress: Progress, report: Report) -> None:
    """One pass over what `reader` reads, from the step where `progress` stands to the start of the next epoch."""
    train = run.config.train
    steps = reader.num_steps(progress.epoch)
    if run.optimisers.penalties.waits_for_counts:
        run.optimisers.penalties.count(dict(run.cascade.models.items()), _logged(run))
    started, before = time.monotonic(), progress.seconds
    for batch, rng in _prefetched(run, reader, progress.epoch, progress.step, rank=run.place.rank):
        scales = lr_scales(run.config, progress.total_steps, progress.epoch + progress.step / steps)
        record = progress.step % max(1, steps // CURVE_POINTS) == 0
        _train_step(run, batch, rng, progress, scales=scales, record=record)
        progress.step += 1
        progress.total_steps += 1
        progress.seconds = before + time.monotonic() - started
        progress.finished = train.max_steps is not None and progress.total_steps >= train.max_steps
        if progress.finished:
            break
        due = progress.total_steps % train.checkpoint_steps == 0
        report(progress, steps, _saver(run, progress) if due else None)
    progress.epoch, progress.step = progress.epoch + 1, 0


def lr_scales(config: Config, step: int, epochs_done: float) -> dict[str, float]:
    """Each stage's factor on the learning rates: a linear warm-up, then a linear way down to `final_lr` at the end of
    its own epochs, and 0 after them: momentum and weight decay would go on without a gradient."""
    warm = min(1.0, (step + 1) / (config.train.warmup_steps + 1))
    fall = 1.0 - config.train.final_lr
    scales = {}
    for stage in config.stages:
        ended = stage.epochs is not None and epochs_done >= stage.epochs
        share = min(1.0, epochs_done / (stage.epochs or config.train.epochs))
        own = (stage.lr or config.train.lr) / config.train.lr
        scales[stage.name] = 0.0 if ended else own * warm * (1.0 - fall * share)
    return scales


def _saver(run: Run, progress: Progress) -> Save:
    return lambda folder: checkpoint.save(folder, run.cascade, run.objective, run.optimisers, progress, best=run.best)


def _logged(run: Run) -> Iterator[Batch]:
    """This worker's share of the training split as it was logged, once."""
    for rows in run.reader("train").batches(0):
        yield collate(rows, run.shards.items, keep=run.cascade.quotas, k=run.config.lists.k).to(run.place.device)


def _prefetched(
    run: Run, reader: ShardReader, epoch: int, start: int, *, rank: int
) -> Iterator[tuple[Batch, np.random.Generator]]:
    """Batches made one ahead in a thread, with the step's own random generator."""
    k, quotas, negatives = run.config.lists.k, run.cascade.quotas, run.config.train.negatives

    positive = run.shards.state.schema.positive if run.config.train.positives_only else ""
    beside_events = "history_negatives" in run.cascade.training_needs

    def make(step: int, rows: pa.Table) -> tuple[Batch, np.random.Generator]:
        rng = np.random.default_rng([run.config.train.seed, epoch, step, rank])
        batch = collate(with_label(rows, positive) if positive else rows, run.shards.items, keep=quotas, k=k)
        if negatives.per_request and negatives.source != "retriever":
            batch = with_negatives(batch, run.catalogue, count=negatives.per_request, source=negatives.source, rng=rng)
        if beside_events:
            batch = with_history_negatives(batch, run.catalogue.items, rng=rng)
        return batch.to(run.place.device), rng

    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for step, rows in enumerate(reader.batches(epoch, start=start), start):
            following = pool.submit(make, step, rows)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()


def with_label(rows: pa.Table, label: str) -> pa.Table:
    """The requests with a candidate that has the label; the first request where none has, so that no batch is empty."""
    lists = Ragged.from_arrow(rows[label])
    owner = np.repeat(np.arange(len(rows)), lists.lengths_Q)
    found = np.bincount(owner[lists.values.to_numpy(zero_copy_only=False) > 0.5], minlength=len(rows)) > 0
    return rows.filter(pa.array(found)) if found.any() else rows.slice(0, 1)


def _train_step(
    run: Run, batch: Batch, rng: np.random.Generator, progress: Progress, *, scales: dict[str, float], record: bool
) -> None:
    torch.manual_seed(int(rng.integers(1 << 62)))
    active = tuple(s.name for s in run.config.stages if s.epochs is None or progress.epoch < s.epochs)
    for name, model in run.cascade.models.items():
        model.train(mode=name in active)  # a stage that has ended keeps its running statistics, too
    run.optimisers.zero()
    on_gpu = run.place.device != "cpu"
    with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu and run.config.train.bf16):
        output = run.objective(run.cascade, batch, run.catalogue, rng, active=active, epoch=progress.epoch)
    if not finite(output):
        parts = {name: float(value) for name, value in output.parts.items()}
        raise ConfigError(f"the loss is not finite at step {progress.total_steps} ({parts}); "
                          "lower train.lr or the temperature")
    output.total.backward()
    run.optimisers.step(lr_scales=scales)
    progress.rows += int(batch.targets.mask_QC.sum()) * run.place.world_size if batch.targets else 0
    if record:
        for name, value in {"loss": output.total.detach(), **output.parts}.items():
            progress.curves.setdefault(name, []).append((progress.total_steps, float(value)))


def _validate(run: Run, progress: Progress) -> None:
    """Measures the validation split, and decides whether to stop early."""
    if not run.shards.splits.get("valid"):
        return
    loss = validation_loss(run)
    progress.curves.setdefault("valid_loss", []).append((progress.total_steps, loss))
    better = progress.best_valid is None or loss < progress.best_valid
    progress.epochs_without_gain = 0 if better else progress.epochs_without_gain + 1
    progress.best_valid = loss if better else progress.best_valid
    patience = run.config.train.early_stop
    if better and patience:
        run.best.keep(run.cascade)
    progress.finished = progress.finished or (patience is not None and progress.epochs_without_gain >= patience)


@torch.no_grad()
def validation_loss(run: Run) -> float:
    """Mean objective over the validation split, the same on every worker: each reads all of it, rank 0's figure counts,
    because statistics of batches differ between workers and all must stop at the same step."""
    run.cascade.eval()
    total, weight = 0.0, 0
    for batch, rng in _prefetched(run, run.reader("valid", shuffle=False), 0, 0, rank=0):
        output = run.objective(run.cascade, batch, run.catalogue, rng)
        total += float(output.total) * batch.num_requests
        weight += batch.num_requests
    mean = torch.tensor(total / max(1, weight), dtype=torch.float64, device=run.place.device)
    if run.place.world_size > 1:
        torch.distributed.broadcast(mean, src=0)
    return float(mean)

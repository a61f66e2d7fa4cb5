"""What a config cannot be trained on, said in one line before any work starts and before any memory is taken."""

from collections.abc import Mapping
from pathlib import Path

import torch

from raycascade.cascade import Cascade
from raycascade.config import Config
from raycascade.errors import ConfigError
from raycascade.fitting import declared_space
from raycascade.ragged import Ragged
from raycascade.schema import FIRST_ROW, FeatureSchema, FeatureSpace, near_miss
from raycascade.semantic_ids.columns import declared_features
from raycascade.shards import Shards
from raycascade.training.objective import Objective

MOMENTS = 2  # of a parameter; of a table without momentum one
LARGE_ROWS, FEW_ROWS = 20_000, 8
CGROUP = "/sys/fs/cgroup"


# ---------------------------------------------------------------- before the log is read
def check_stages(config: Config, schema: FeatureSchema) -> None:
    """ConfigError where a model, a task or a loss of the config does not go with the declared features and labels.

    Nothing is fitted yet: tables have few rows, one value at least. What depends on the values of the log shows when
    training starts.
    """
    space = declared_space(schema, declared_features(config, schema))
    rows = {field.table: min(max(field.num_rows, FIRST_ROW + 1), FEW_ROWS) for field in space.fields if field.table}
    small = resized(space, rows)
    refuse_unknown_labels(Objective(config, Cascade(config, small)), space.labels)


# ---------------------------------------------------------------- labels
def refuse_unknown_labels(objective: Objective, labels: tuple[str, ...]) -> None:
    """ConfigError for a label that a loss names and the log does not have."""
    for term in objective.terms:
        for label in _labels_of(term.loss):
            if label not in labels:
                raise ConfigError(f"stages {list(term.names)}: loss.label: {label!r} is not a label of the "
                                  f"log{near_miss(label, labels)}")


def refuse_labels_that_teach_nothing(
    objective: Objective, cascade: Cascade, counts: Mapping[str, tuple[int, int]]
) -> None:
    """ConfigError for a label of a loss, or of trees, whose training log holds no value, only zeros or only ones.

    `counts`: by label, candidates with an observed value and those of them that are positive. Only ones do for a
    loss over lists whose other candidates come from the catalogue.
    """
    judged = [(term.names, term.tasks or _labels_of(term.loss), hasattr(term.loss, "over_tasks"))
              for term in objective.terms]
    judged += [((name,), cascade.stages[name].tasks or _labels_of(model), True)
               for name, model in cascade.fitted.items()]
    for stages, labels, each in judged:
        for label in labels:
            if label in counts:
                _refuse_label(label, *counts[label], where=f"stages {list(stages)}", needs_zeros=each)


def _labels_of(part: object) -> tuple[str, ...]:
    label = getattr(getattr(part, "config", None), "label", None)
    return (label,) if label else ()


def _refuse_label(label: str, observed: int, positives: int, *, where: str, needs_zeros: bool) -> None:
    if observed == 0:
        raise ConfigError(f"{where}: the label {label!r} is missing for every candidate of the training log; check the "
                          "column it is read from and the dates of `splits`, or choose another label")
    if positives == 0 or (needs_zeros and positives == observed):
        raise ConfigError(f"{where}: the label {label!r} is {int(positives > 0)} for every candidate that has it in "
                          f"the training log ({observed:,}), so there is nothing to tell apart; check the column it is "
                          "read from and the dates of `splits`, or choose another label")


def refuse_lists_of_truth_alone(config: Config, objective: Objective, shards: Shards) -> None:
    """ConfigError for a pointwise loss without a label where no list is longer than `lists.k`: every candidate is among
    the best k, and the loss would teach the constant 1. The first row group of the training split is looked at."""
    judged = [t for t in objective.terms if hasattr(t.loss, "over_tasks") and not (t.tasks or _labels_of(t.loss))]
    groups = shards.groups("train")
    if not (judged and groups) or config.train.negatives.per_request:
        return
    name, group, rows = groups[0]
    longest = int(Ragged.from_arrow(shards.read_group(name, group)["candidates"]).lengths_Q.max(initial=0))
    if longest <= config.lists.k:
        labels = ", ".join(shards.state.schema.labels) or "none"
        raise ConfigError(f"stages {list(judged[0].names)}: the loss learns who is among the best lists.k = "
                          f"{config.lists.k}, but none of the first {rows:,} lists has more than {longest} candidates, "
                          f"so all of them are; name a label of the log ({labels}), as in loss: {{name: bce, label: "
                          "...}, or lower lists.k")


# ---------------------------------------------------------------- memory
def demand(config: Config, space: FeatureSpace) -> dict[str, dict[str, int]]:
    """Bytes of the parameters by stage and embedding table ("" is all but the large tables), allocating next to none.

    A large table is measured by one row: the cascade is built with a few of its rows and with one more.
    """
    large = {field.table: field.num_rows for field in space.fields if field.num_rows > LARGE_ROWS}
    few = dict.fromkeys(large, FEW_ROWS)
    base = _stage_bytes(config, resized(space, few))
    found = {stage: {"": count} for stage, count in base.items()}
    for table, rows in large.items():
        for stage, count in _stage_bytes(config, resized(space, {**few, table: FEW_ROWS + 1})).items():
            found[stage][table] = (count - base[stage]) * (rows - FEW_ROWS)
    return found


def resized(space: FeatureSpace, num_rows: Mapping[str, int]) -> FeatureSpace:
    """The same space with other numbers of rows of some tables."""
    fields = tuple(f.model_copy(update={"num_rows": num_rows[f.table]}) if f.table in num_rows else f
                   for f in space.fields)
    return space.model_copy(update={"fields": fields})


def _stage_bytes(config: Config, space: FeatureSpace) -> dict[str, int]:
    return {name: sum(p.numel() * p.element_size() for p in model.parameters())
            for name, model in Cascade(config, space).models.items()}


def refuse_tables_beyond_memory(config: Config, space: FeatureSpace, *, free: int | None) -> None:
    """ConfigError where the parameters with their optimiser's moments do not fit into `free` bytes (None: unknown)."""
    if free is None or all(field.num_rows <= LARGE_ROWS for field in space.fields):
        return
    found = demand(config, space)
    of_tables = MOMENTS if config.train.table_momentum else MOMENTS - 1
    needed = sum(count * (1 + (of_tables if table else MOMENTS))
                 for parts in found.values() for table, count in parts.items())
    if needed <= free:
        return
    sizes = {(stage, table): count for stage, parts in found.items() for table, count in parts.items() if table}
    stage, table = max(sizes, key=lambda key: sizes[key])
    rows = next(field.num_rows for field in space.fields if field.table == table)
    raise ConfigError(
        f"stage {stage!r}: its embedding table of {table!r} has {rows:,} rows and takes {_size(sizes[stage, table])}; "
        f"with all other parameters and the optimiser's moments training takes {_size(needed)}, but {_size(free)} "
        f"of memory are free; hash {table!r} into fewer rows (buckets or max_values) or raise its min_count and "
        "prepare again, exclude it from the stage, or lower the model's dim")


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def free_bytes(device: str) -> int | None:
    """Memory that this process can still get on a device; None where the system does not say."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    meminfo = _read("/proc/meminfo")
    if device != "cpu" or meminfo is None:
        return None
    limit, current, stat = (_read(f"{CGROUP}/memory.{name}") for name in ("max", "current", "stat"))
    return free_of(meminfo, limit=limit, current=current, stat=stat)


def free_of(meminfo: str, *, limit: str | None, current: str | None, stat: str | None) -> int | None:
    """The lesser of what the machine has left and what a control group of version 2 leaves, where there is one. Files
    held in memory count as free: the system drops them."""
    available = _entry(meminfo, "MemAvailable:")
    free = None if available is None else available * 1024
    if limit is None or current is None or limit.strip() == "max":
        return free
    left = int(limit) - int(current) + (_entry(stat or "", "inactive_file") or 0)
    return max(0, left if free is None else min(free, left))


def _entry(text: str, name: str) -> int | None:
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(name)), None)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None

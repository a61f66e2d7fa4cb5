"""One frozen config per run: YAML, `extends:` one level deep, dotted overrides, defaults only in code."""

import os
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field as Option, ValidationError, field_validator, model_validator

from raycascade import plugins, storage
from raycascade.errors import ConfigError
from raycascade.schema import Frozen, near_miss
from raycascade.semantic_ids_config import SemanticIdsOptions, StageSemanticIds, check_semantic_ids
from raycascade.splits_config import Splits
from raycascade.variants_config import Guard, Precision

PER_TASK = ("task_weights", "task_gammas")  # options of a loss that name tasks of its stage
EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


class Paths(Frozen):
    """Where things are: local paths, s3:// or gs:// URIs."""

    raw: str = ""
    shards: str = "outputs/shards"
    bundles: str = "outputs/bundles"


class Fusion(Frozen):
    """A stage's score from the probabilities p of its tasks, weights w by task: `product`, sum of w ln p, which orders
    like the product of the p^w, or `sum`, sum of w p; one of the two. A task that is left out trains without a say."""

    product: dict[str, float] | None = None
    sum: dict[str, float] | None = None

    @model_validator(mode="after")
    def _one(self) -> "Fusion":
        if (self.product is None) == (self.sum is None) or not any(self.weights.values()):
            raise ConfigError("fusion: expected either product or sum with weights by task, such as "
                              f"{{product: {{click: 1.0}}}}; got product {self.product}, sum {self.sum}")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """w by task."""
        return self.product or self.sum or {}


class Stage(Frozen):
    """One stage: a model that scores, and how many candidates go on. `exclude` hides features from the model;
    `semantic_ids` says what it sees of their tokens (None: nothing);
    `tasks`: feedback labels that the model predicts, one logit each, and `fusion` how they become the stage's score
    (None: the logit of the only task); without tasks there is one logit, the score;
    `loss` trains the stage alone instead of with the others; `prior` adds the score of the stage before, times a
    learned factor, to the model's: the stage then learns what the stage before does not know. `epochs`: trains
    in the first so many epochs only (with a prior, 1: later on the stage before has seen the rows, and its scores
    flatter it); `lr`: in place of train.lr, the rate of its embeddings in proportion. `l2_touched`: penalty of the
    rows of tables that a batch touches (None: the model's own, 0 for most); `l2_embedding`: of whole tables.
    `item_cache`: how the bundle keeps what the model encodes of each item, if that follows from the item alone (None:
    not); `micro_batch`: candidates scored at once when serving (None: all). `init_from`: a stage of a bundle, as
    `<bundle>/<stage>`, whose weights the model starts with. `precision` and `compile`: how the trained stage is served
    (`guard`)."""

    name: str = Option(pattern=r"^[a-z][a-z0-9_]*$")
    keep: int = Option(ge=1)
    model: dict[str, Any]
    tasks: tuple[str, ...] = ()
    fusion: Fusion | None = None
    loss: dict[str, Any] | None = None
    exclude: tuple[str, ...] = ()
    semantic_ids: StageSemanticIds | None = None
    prior: bool = False
    epochs: int | None = Option(default=None, ge=1)
    lr: float | None = Option(default=None, gt=0)
    l2_touched: float | None = Option(default=None, ge=0)
    l2_embedding: float = Option(default=0.0, ge=0)
    item_cache: Literal["float16", "float32"] | None = "float16"
    micro_batch: int | None = Option(default=None, ge=1)
    init_from: str | None = None
    precision: Precision = "fp32"
    compile: bool = False

    @field_validator("init_from")
    @classmethod
    def _of_any_folder(cls, value: str | None) -> str | None:
        return value and storage.absolute(value)  # workers run in other folders

    @field_validator("model")
    @classmethod
    def _without_preset(cls, model: dict[str, Any]) -> dict[str, Any]:
        return plugins.spelled_out("models", model, "model")

    @property
    def num_tasks(self) -> int:
        """Logits of the model."""
        return max(1, len(self.tasks))

    @model_validator(mode="after")
    def _tasks_fit(self) -> "Stage":
        where, tasks, named = f"stage {self.name!r}", list(self.tasks), set(self.tasks)
        if len(named) < len(tasks):
            raise ConfigError(f"{where}: tasks must differ, got {tasks}")
        if len(tasks) > 1 and self.fusion is None:
            weights = ", ".join(f"{task}: 1.0" for task in tasks)
            raise ConfigError(f"{where}: {len(tasks)} tasks make no score by themselves; "
                              f"add fusion: {{product: {{{weights}}}}}, or sum")
        for task in self.fusion.weights if self.fusion else ():
            if task not in named:
                raise ConfigError(f"{where}: fusion: {task!r} is not a task of the stage{near_miss(task, named)}")
        if tasks and self.prior:
            raise ConfigError(f"{where}: prior adds to one logit and cannot go with tasks; leave prior out, or give "
                              "the stage one label by loss: {name: bce, label: ...}")
        if self.l2_touched and self.l2_embedding:
            raise ConfigError(f"{where}: l2_touched {self.l2_touched:g} and l2_embedding {self.l2_embedding:g} "
                              "penalise the same tables; set one of them to 0")
        if self.compile and self.precision == "int8":
            raise ConfigError(f"{where}: int8 products cannot be compiled; leave compile out, or set precision bf16")
        if tasks and not self._fits_itself():
            _refuse_other_losses(self)
        return self

    def _fits_itself(self) -> bool:
        """Whether the model has an objective of its own, such as gbdt, and needs no loss."""
        name = self.model.get("name")
        return name in plugins.names("models") and hasattr(plugins.find("models", name), "to_files")


def _refuse_other_losses(stage: Stage) -> None:
    """Tasks are trained by a loss of the stage's own that can judge each by its label."""
    where = f"stage {stage.name!r}"
    plugin, options = plugins.options("losses", stage.loss, f"{where}: loss") if stage.loss else (None, None)
    if plugin is None or not hasattr(plugin, "over_tasks"):
        raise ConfigError(f"{where}: tasks are trained by a loss of the stage's own, got "
                          f"{stage.loss['name'] if stage.loss else 'none'}; set loss: {{name: bce}}")
    if getattr(options, "label", None):
        raise ConfigError(f"{where}: loss.label and tasks both name labels; leave label out")
    for option in PER_TASK:
        for task in getattr(options, option, {}):
            if task not in stage.tasks:
                raise ConfigError(f"{where}: loss.{option}: {task!r} is not a task of the stage"
                                  f"{near_miss(task, stage.tasks)}")


class Lists(Frozen):
    """The protocol on logged lists: the truth is the best `k` candidates; `quotas` (default: each stage's keep) are the
    widths of the stages on the list."""

    k: int = Option(default=10, ge=1)
    quotas: tuple[int, ...] | None = None


class Negatives(Frozen):
    """Catalogue items added to every training list as candidates that were never logged (reached = 0).

    `retriever` draws them for the later stages from what the first stage retrieves for the request at that moment
    (it must train on the catalogue), half of them from the best that the second stage would keep.
    """

    per_request: int = Option(default=0, ge=0)
    source: Literal["uniform", "popularity", "retriever"] = "popularity"


class Train(Frozen):
    """How to train. `batch_size` is global: requests per step over all workers. `run` names the run and its bundle;
    the same name resumes an unfinished run."""

    epochs: int = Option(default=1, ge=1)
    batch_size: int = Option(default=512, ge=1)
    order: Literal["shuffled", "time"] = "shuffled"  # time: day after day, shuffled within each
    lr: float = Option(default=1e-3, gt=0)
    warmup_steps: int = Option(default=0, ge=0)
    final_lr: float = Option(default=1.0, gt=0, le=1)  # share of lr at the end, reached linearly
    embedding_lr: float | None = Option(default=None, gt=0)  # None: the same as lr
    table_momentum: float = Option(default=0.9, ge=0, lt=1)  # 0: rows take their whole step when they are seen
    weight_decay: float = Option(default=0.0, ge=0)
    clip: float | None = Option(default=10.0, gt=0)  # gradient norm of each stage
    seed: int = 7
    workers: int = Option(default=1, ge=1)
    gpu: bool | None = None  # None: where there is one
    bf16: bool = True  # on GPU only
    negatives: Negatives = Negatives()
    positives_only: bool = False  # leave out requests without the schema's positive label: for losses that need one
    early_stop: int | None = Option(default=None, ge=1)  # epochs without a better validation loss
    checkpoint_steps: int = Option(default=1000, ge=1)
    max_steps: int | None = Option(default=None, ge=1)
    run: str | None = Option(default=None, pattern=r"^[A-Za-z0-9._-]+$")


class Evaluate(Frozen):
    """How to evaluate: requests per batch, the most requests of the split (None: all), days of recency popularity;
    `bootstrap`: draws of requests for the 95% intervals of the slices (0: no intervals; 1,000 are usual)."""

    batch_size: int = Option(default=256, ge=1)
    max_requests: int | None = Option(default=None, ge=1)
    popularity_hours: int = Option(default=72, ge=1)
    bootstrap: int = Option(default=0, ge=0)


class Compare(Frozen):
    """What `compare` compares: objectives by label, each with the seeds train.seed, train.seed + 1 and so on.

    `baseline` is the label every other one is tested against (None: the best of the others); `metric` decides which is
    best (None: joint recall at the last quota). Every run has `cpus_per_run` threads and, where there is a GPU,
    `gpus_per_run` of it."""

    objectives: dict[str, dict[str, Any]] = {}
    seeds: int = Option(default=5, ge=1)
    baseline: str | None = None
    metric: str | None = None
    cpus_per_run: int = Option(default=1, ge=1)
    gpus_per_run: float = Option(default=1.0, gt=0, le=1)


class Config(Frozen):
    """Everything a run needs; saved resolved in the bundle."""

    paths: Paths = Paths()
    dataset: dict[str, Any]
    splits: Splits = Splits()
    semantic_ids: dict[str, SemanticIdsOptions] = {}
    stages: tuple[Stage, ...] = Option(min_length=1)
    loss: dict[str, Any] = {"name": "bce"}
    index: dict[str, Any] = {"name": "exact"}
    lists: Lists = Lists()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    compare: Compare = Compare()
    guard: Guard = Guard()
    expect: dict[str, float] = {}

    @model_validator(mode="after")
    def _possible(self) -> "Config":
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ConfigError(f"stages: names must differ, got {names}")
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if after.keep > before.keep:
                raise ConfigError(f"stages: {after.name!r} keeps {after.keep} but {before.name!r} hands on only "
                                  f"{before.keep}; keep must not grow along the stages")
        if self.lists.quotas is not None and len(self.lists.quotas) != len(self.stages):
            raise ConfigError(f"lists.quotas: {len(self.lists.quotas)} widths for {len(self.stages)} stages; "
                              "give one each")
        if min(self.quotas) < 1 or list(self.quotas) != sorted(self.quotas, reverse=True):
            raise ConfigError(f"lists.quotas: {list(self.quotas)} must be at least 1 and must not grow along the "
                              "stages")
        for position, stage in enumerate(self.stages):
            plugins.options("models", stage.model, f"stages.{position}.model")
            if stage.loss:
                plugins.options("losses", stage.loss, f"stages.{position}.loss")
            for option in PER_TASK:
                if not stage.tasks and stage.loss and stage.loss.get(option):
                    raise ConfigError(f"stages.{position} ({stage.name}): loss.{option} without tasks; list the tasks")
        if self.stages[0].prior:
            raise ConfigError(f"stages.0 ({self.stages[0].name}): prior needs a stage before it; remove it")
        check_semantic_ids(self.semantic_ids, {stage.name: stage.semantic_ids for stage in self.stages})
        for folder, spec in (("datasets", self.dataset), ("losses", self.loss), ("indexes", self.index)):
            plugins.options(folder, spec, {"datasets": "dataset", "losses": "loss", "indexes": "index"}[folder])
        for label, spec in self.compare.objectives.items():
            plugins.options("losses", spec, f"compare.objectives.{label}")
        return self

    @property
    def quotas(self) -> tuple[int, ...]:
        """The widths of the stages on logged lists."""
        return self.lists.quotas or tuple(stage.keep for stage in self.stages)


def load_config(path: str, overrides: "list[str] | tuple[str, ...]" = ()) -> Config:
    """The config in a YAML file with `key.path=value` overrides applied; ConfigError says what is wrong with it."""
    tree = read_tree(path)
    if base := tree.pop("extends", None):
        parent = read_tree(_beside(path, base))
        if "extends" in parent:
            raise ConfigError(f"{path}: extends {base}, which extends another file; one level is allowed")
        tree = _merge(parent, tree)
    for override in overrides:
        tree = with_override(tree, override)
    return parse_config(tree, where=path)


def _beside(path: str, other: str) -> str:
    """Another file, given relative to the folder of the first one."""
    if os.path.isabs(other) or "://" in other:
        return other
    return storage.join(path.rpartition("/")[0], other) if "://" in path else str(Path(path).parent / other)


def parse_config(tree: dict[str, Any], *, where: str) -> Config:
    """A validated config from a plain tree; paths are made absolute."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_problem(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    paths = {name: storage.absolute(uri) if uri else uri for name, uri in config.paths}
    return config.model_copy(update={"paths": Paths(**paths)})


def _problem(error: ValidationError) -> str:
    """The first problem with its path; for an unknown key, the nearest key of the mapping it stands in."""
    path = error.errors()[0]["loc"][:-1]
    model: Any = Config
    for part in path:
        if isinstance(part, str) and part in model.model_fields:
            model = {"paths": Paths, "splits": Splits, "stages": Stage, "lists": Lists, "train": Train,
                     "evaluate": Evaluate, "negatives": Negatives, "compare": Compare,
                     "semantic_ids": SemanticIdsOptions if model is Config else StageSemanticIds,
                     "fusion": Fusion, "guard": Guard}.get(part, model)
    return plugins.first_problem(error, model)


def read_tree(path: str) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError where there is none."""
    try:
        text = storage.read_bytes(path)
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except Exception as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give the path of a YAML config") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of options, got {type(tree).__name__}")
    return tree


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`: mappings merge (a mapping with another `name` replaces), everything else replaces."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("name", old.get("name")) == old.get("name"):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def with_override(tree: dict[str, Any], override: str) -> dict[str, Any]:
    """The tree with one `key.path=value` in it; ConfigError where that cannot be."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r}: expected key.path=value, such as train.epochs=2")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    if isinstance(value, str) and EXPONENT.fullmatch(value):  # YAML reads 1e-3 as a string
        value = float(value)
    return _set(tree, path.split("."), value, override)


def _set(node: Any, path: list[str], value: Any, override: str) -> Any:
    key, rest = path[0], path[1:]
    if isinstance(node, list):
        by_name = [item.get("name") if isinstance(item, dict) else None for item in node]
        index = by_name.index(key) if key in by_name else int(key) if key.isdigit() and int(key) < len(node) else None
        if index is None:
            known = {name for name in by_name if name}
            raise ConfigError(f"override {override!r}: no entry {key!r}{near_miss(key, known)}")
        return [_set(item, rest, value, override) if rest and i == index else value if i == index else item
                for i, item in enumerate(node)]
    if not isinstance(node, dict):
        raise ConfigError(f"override {override!r}: {key!r} is below {node!r}, which is not a mapping")
    return {**node, key: _set(node.get(key, {}), rest, value, override) if rest else value}

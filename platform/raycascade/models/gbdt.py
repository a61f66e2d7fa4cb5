"""Gradient-boosted trees (XGBoost; Chen and Guestrin 2016): a stage that is fitted at once and then frozen.

It has no gradient. Its trees are fitted (training/gbdt.py) before the other stages train; joint losses then see its
scores as they are.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field as Option, model_validator
from torch import Tensor

from raycascade.batch import Batch
from raycascade.errors import ConfigError
from raycascade.models._tree_columns import TreeColumns
from raycascade.plugins import PluginConfig
from raycascade.schema import FeatureSpace, near_miss

if TYPE_CHECKING:  # its import is as long as that of torch, and most processes have no trees
    import xgboost

COLUMNS_FILE = "columns.json"


@dataclass(frozen=True)
class Importance:
    """What each column does in one booster: the mean gain of its splits, and mean |SHAP value| in units of the logit
    over a sample of the rows that it was judged by."""

    gain_F: tuple[float, ...]
    shap_F: tuple[float, ...]


class Gbdt:
    """logits_QCT = margin of booster t over the columns of `TreeColumns`: base + sum over trees of the leaf reached.

    `binary:logistic`: the margin is the logit of the label. `rank:ndcg`: it orders the candidates of a request and is
    no logit. Every task has a booster of its own.
    """

    class Config(PluginConfig):
        """Options of gbdt. `label`: the feedback to predict (None: membership in the best k, for rank:ndcg the deepest
        logged level); `entry_level`: from which logged level on candidates are learned from; `early_stop`: rounds
        without a better figure on the validation split, where there is one; `base_score`: the constant that the trees
        start from, a probability (None: fitted)."""

        objective: Literal["binary:logistic", "rank:ndcg"] = "binary:logistic"
        label: str | None = None
        entry_level: int = Option(default=0, ge=0)
        rounds: int = Option(default=200, ge=1)
        depth: int = Option(default=6, ge=1)
        eta: float = Option(default=0.1, gt=0, le=1)
        subsample: float = Option(default=0.8, gt=0, le=1)
        colsample: float = Option(default=0.8, gt=0, le=1)
        min_child_weight: float = Option(default=5.0, ge=0)
        l2: float = Option(default=1.0, ge=0)
        early_stop: int | None = Option(default=20, ge=1)
        max_categories: int = Option(default=256, ge=0)
        base_score: float | None = Option(default=None, gt=0, lt=1)

        @model_validator(mode="after")
        def _base_of_a_probability(self) -> "Gbdt.Config":
            if self.base_score is not None and self.objective == "rank:ndcg":
                raise ConfigError(f"gbdt: rank:ndcg has no probability to start from, got base_score "
                                  f"{self.base_score}; leave it out")
            return self

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        self.config, self.num_tasks = config, num_tasks
        self.columns = TreeColumns(space, max_categories=config.max_categories)
        if not self.columns.reads_candidates:
            raise ConfigError("gbdt: no feature of the candidates is left that trees can read (ids of more than "
                              f"{config.max_categories} values and vectors are none); exclude fewer, or add count or "
                              "match features")
        if num_tasks > 1 and config.objective == "rank:ndcg":
            raise ConfigError(f"gbdt: rank:ndcg orders by one label, got {num_tasks} tasks; use binary:logistic")
        if num_tasks > 1 and config.label:
            raise ConfigError("gbdt: label and the stage's tasks both name labels; leave label out")
        if config.label and config.label not in space.labels:
            raise ConfigError(f"gbdt: label {config.label!r} is not a label of the log"
                              f"{near_miss(config.label, space.labels)}")
        self.boosters: tuple[xgboost.Booster, ...] = ()
        self.importance: tuple[Importance, ...] = ()
        self._threads = 0

    @property
    def calibrated(self) -> bool:
        """Whether the logits are those of probabilities."""
        return self.config.objective == "binary:logistic"

    def __call__(self, batch: Batch) -> Tensor:
        """Logits [Q, C, T], float32, without a gradient; 0 where masked."""
        return self.forward(batch)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [Q, C, T], float32, without a gradient; 0 where masked."""
        assert self.boosters, "gbdt must be fitted before it scores"
        logits_QCT = torch.zeros(*batch.mask_QC.shape, self.num_tasks, device=batch.mask_QC.device)
        if batch.mask_QC.any():
            rows_RF = self.columns.table(batch)
            margins_RT = np.stack([booster.inplace_predict(rows_RF, predict_type="margin")
                                   for booster in self._with_threads()], 1)
            logits_QCT[batch.mask_QC] = torch.from_numpy(margins_RT).to(logits_QCT)
        return logits_QCT

    def train_outputs(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Logits; the trees have their own objective and no auxiliary loss."""
        return self.forward(batch), {}

    def silence(self) -> None:
        """Nothing: there are no trees before they are fitted, and a stage of trees takes no prior."""

    def explain(self, batch: Batch) -> Mapping[str, Tensor]:
        """There is no attention and no gate; `importance` says what the columns do."""
        return {}

    def install(self, boosters: "tuple[xgboost.Booster, ...]", importance: tuple[Importance, ...]) -> None:
        """Takes fitted boosters, one a task; RuntimeError where they do not fit the columns."""
        if not len(boosters) == len(importance) == self.num_tasks:
            raise RuntimeError(f"{len(boosters)} boosters for {self.num_tasks} tasks")
        for booster in boosters:
            if booster.num_features() != len(self.columns.columns):
                raise RuntimeError(f"a booster over {booster.num_features()} columns for {len(self.columns.columns)}")
        self.boosters, self.importance, self._threads = boosters, importance, 0

    def to_files(self) -> dict[str, bytes]:
        """The fitted stage as file contents by name: XGBoost's own format, and the ordered columns as JSON."""
        assert self.boosters, "gbdt must be fitted before it is saved"
        facts: dict[str, Any] = {
            "objective": self.config.objective, "columns": self._column_list(),
            "importance": [{"gain": one.gain_F, "shap": one.shap_F} for one in self.importance],
        }
        trees = {name: bytes(booster.save_raw("ubj"))
                 for name, booster in zip(self._booster_files(), self.boosters, strict=True)}
        return {**trees, COLUMNS_FILE: json.dumps(facts, indent=1).encode()}

    def from_files(self, files: Mapping[str, bytes]) -> None:
        """The inverse of `to_files`; RuntimeError where the files are not those of these columns and tasks."""
        expected = [*self._booster_files(), COLUMNS_FILE]
        if sorted(files) != sorted(expected):
            raise RuntimeError(f"files {sorted(files)} where {sorted(expected)} were expected")
        facts = json.loads(files[COLUMNS_FILE])
        if facts["columns"] != self._column_list():
            raise RuntimeError(f"{COLUMNS_FILE} lists {_first_difference(facts['columns'], self._column_list())}")
        if facts["objective"] != self.config.objective:
            raise RuntimeError(f"fitted by {facts['objective']}, the config says {self.config.objective}")
        boosters = tuple(_booster(files[name], name) for name in self._booster_files())
        importance = tuple(Importance(tuple(one["gain"]), tuple(one["shap"])) for one in facts["importance"])
        self.install(boosters, importance)

    def _column_list(self) -> list[list[str]]:
        return [[column.name, column.kind] for column in self.columns.columns]

    def _booster_files(self) -> list[str]:
        return ["model.ubj"] if self.num_tasks == 1 else [f"model.{task}.ubj" for task in range(self.num_tasks)]

    def _with_threads(self) -> "tuple[xgboost.Booster, ...]":
        """The boosters, with as many threads as torch has."""
        if self._threads != torch.get_num_threads():
            self._threads = torch.get_num_threads()
            for booster in self.boosters:
                booster.set_param({"nthread": self._threads})
        return self.boosters


def _booster(content: bytes, name: str) -> "xgboost.Booster":
    import xgboost

    booster = xgboost.Booster()
    try:
        booster.load_model(bytearray(content))
    except xgboost.core.XGBoostError as error:
        raise RuntimeError(f"{name} cannot be read: {str(error).splitlines()[-1].strip()}") from None
    return booster


def _first_difference(seen: list[list[str]], expected: list[list[str]]) -> str:
    """Where two lists of columns part."""
    for place, (one, other) in enumerate(zip(seen, expected, strict=False)):
        if one != other:
            return f"{one} as column {place} where the features give {other}"
    return f"{len(seen)} columns where the features give {len(expected)}"

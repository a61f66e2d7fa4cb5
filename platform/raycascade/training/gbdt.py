"""Fitting the stages of trees: plain XGBoost over the columns that their models also score by.

They are fitted before the other stages train and then stand still. Every worker reads its own share of the shards;
where XGBoost knows of other workers (its collective), their histograms are added up.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from raycascade import storage
from raycascade.batch import Batch, Targets, collate
from raycascade.cascade import Cascade
from raycascade.config import Config, Stage
from raycascade.errors import ConfigError
from raycascade.models.gbdt import COLUMNS_FILE, Gbdt, Importance
from raycascade.shards import ShardReader, Shards
from raycascade.training.loop import Place
from raycascade.training.sampling import Catalogue, with_negatives
from raycascade.truth import top_k_membership

if TYPE_CHECKING:  # imported where trees are fitted: see models/gbdt.py
    import xgboost

SHAP_ROWS = 1000  # rows whose SHAP values are averaged
MOST_LEVEL = 31  # of a grade, as XGBoost's exponential gain allows


@dataclass(frozen=True)
class TreeRows:
    """What trees are fitted on: columns, labels (NaN where unobserved) and the request of each row, in order of it."""

    columns_RF: np.ndarray
    labels_RT: np.ndarray
    request_R: np.ndarray

    def known(self, task: int) -> "TreeRows":
        """The rows whose label of a task is observed."""
        chosen_R = ~np.isnan(self.labels_RT[:, task])
        return TreeRows(self.columns_RF[chosen_R], self.labels_RT[chosen_R, task:task + 1], self.request_R[chosen_R])

    def comparable(self) -> "TreeRows":
        """The rows of requests with more than one label value: the others teach an order nothing."""
        if len(self.request_R) == 0:
            return self
        starts = np.flatnonzero(np.diff(self.request_R, prepend=-1))
        lowest, highest = (how.reduceat(self.labels_RT[:, 0], starts) for how in (np.minimum, np.maximum))
        chosen_R = np.repeat(lowest < highest, np.diff(starts, append=len(self.request_R)))
        return TreeRows(self.columns_RF[chosen_R], self.labels_RT[chosen_R], self.request_R[chosen_R])


def fit_stages(config: Config, shards: Shards, cascade: Cascade, *, threads: int | None = None) -> None:
    """Fits every stage of trees of a cascade in this process."""
    for name in cascade.fitted:
        fit_stage(config, shards, cascade, name, Place(), threads=threads)


def fit_stage(
    config: Config, shards: Shards, cascade: Cascade, name: str, place: Place, *, threads: int | None = None
) -> None:
    """Fits one stage of trees on this worker's share of the split train, and stops early by the whole of valid.

    ConfigError where one process sees no rows, or labels of one value only.
    """
    stage, model = cascade.stages[name], cascade.fitted[name]
    assert isinstance(model, Gbdt), f"{name} is not fitted by XGBoost"
    train = read_rows(config, shards, stage, model, place=place)
    valid = None
    if shards.splits.get("valid") and model.config.early_stop:
        valid = read_rows(config, shards, stage, model, split="valid")
    if place.world_size == 1:
        _refuse_what_teaches_nothing(train, stage, model)
    fit_rows(model, train, valid, keep=stage.keep, seed=config.train.seed, threads=threads)


def read_rows(
    config: Config, shards: Shards, stage: Stage, model: Gbdt, *, split: str = "train", place: Place | None = None
) -> TreeRows:
    """The candidates of a worker's share of a split (default: all of it) that the stage learns from."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    num_requests = 0
    for batch in _batches(config, shards, split, place or Place()):
        assert batch.targets is not None, "shards hold logged lists"
        labels_QCT = label_columns(batch.targets, stage, model)
        learnt_QC = batch.mask_QC & (batch.targets.reached_QC >= model.config.entry_level)
        request_QC = (num_requests + torch.arange(batch.num_requests))[:, None].expand(learnt_QC.shape)
        columns_RF = model.columns.table(batch)[learnt_QC[batch.mask_QC].numpy()]
        parts.append((columns_RF, labels_QCT[learnt_QC].float().numpy(), request_QC[learnt_QC].numpy()))
        num_requests += batch.num_requests
    columns, labels, requests = zip(*parts, strict=True)
    return TreeRows(np.concatenate(columns), np.concatenate(labels), np.concatenate(requests))


def _batches(config: Config, shards: Shards, split: str, place: Place) -> Iterator[Batch]:
    """Logged lists with the negatives of the config. The first stage cannot retrieve yet, so where negatives are to
    be retrieved, popular items stand in for them."""
    negatives, catalogue = config.train.negatives, Catalogue.of(shards.items)
    source = "popularity" if negatives.source == "retriever" else negatives.source
    reader = ShardReader(shards, split, max(1, config.train.batch_size // place.world_size), rank=place.rank,
                         world_size=place.world_size, shuffle=False)
    for step, rows in enumerate(reader.batches(0)):
        batch = collate(rows, shards.items, keep=config.quotas, k=config.lists.k)
        if negatives.per_request:
            rng = np.random.default_rng([config.train.seed, 0, step, place.rank])
            batch = with_negatives(batch, catalogue, count=negatives.per_request, source=source, rng=rng)
        yield batch


def label_columns(targets: Targets, stage: Stage, model: Gbdt) -> torch.Tensor:
    """labels_QCT of a stage: of its tasks, or the label of the model's options, else the truth of its objective."""
    names = stage.tasks or ((model.config.label,) if model.config.label else ())
    if names:
        return torch.stack([targets.labels[name] for name in names], -1)
    if model.config.objective == "rank:ndcg":
        return targets.reached_QC.clamp(0, MOST_LEVEL).unsqueeze(-1)
    return top_k_membership(targets.relevance_QC, targets.mask_QC, targets.k).unsqueeze(-1)


def _refuse_what_teaches_nothing(rows: TreeRows, stage: Stage, model: Gbdt) -> None:
    names = stage.tasks or (model.config.label or "the truth",)
    for task, name in enumerate(names):
        known = rows.known(task)
        if model.config.objective == "rank:ndcg":
            known = known.comparable()
        labels_R = known.labels_RT[:, 0]
        if len(labels_R) == 0 or labels_R.min() == labels_R.max():
            alike = f"{labels_R[0]:g} for all {len(labels_R):,} candidates" if len(labels_R) else ""
            seen = alike or "known for no candidate"
            raise ConfigError(f"stage {stage.name!r}: gbdt: {name!r} is {seen} of the training log that it can learn "
                              "from, so there is nothing to tell apart; choose another label, a lower entry_level, or "
                              "check the log")


def fit_rows(
    model: Gbdt, train: TreeRows, valid: TreeRows | None = None, *, keep: int, seed: int, threads: int | None = None
) -> None:
    """Fits a booster for each task and installs them; with `valid`, a booster keeps the rounds up to its best."""
    fitted = [_fit_task(model, train.known(task), None if valid is None else valid.known(task), keep=keep, seed=seed,
                        threads=threads or torch.get_num_threads()) for task in range(model.num_tasks)]
    model.install(tuple(booster for booster, _ in fitted), tuple(importance for _, importance in fitted))


def _fit_task(
    model: Gbdt, train: TreeRows, valid: TreeRows | None, *, keep: int, seed: int, threads: int
) -> "tuple[xgboost.Booster, Importance]":
    import xgboost

    options, ranks = model.config, model.config.objective == "rank:ndcg"
    if ranks:
        train, valid = train.comparable(), valid and valid.comparable()
    data = _matrix(model, train, threads=threads)
    valid = valid if valid is not None and options.early_stop and len(valid.request_R) else None
    evals = [(_matrix(model, valid, threads=threads, reference=data), "valid")] if valid is not None else []
    booster = xgboost.train(
        _parameters(options, keep=keep, seed=seed, threads=threads), data, num_boost_round=options.rounds, evals=evals,
        early_stopping_rounds=options.early_stop if evals else None, verbose_eval=False)
    if evals:
        booster = booster[:booster.best_iteration + 1]
    return booster, _importance(model, booster, valid or train)


def _parameters(options: Gbdt.Config, *, keep: int, seed: int, threads: int) -> dict[str, Any]:
    """XGBoost's words for the options."""
    parameters: dict[str, Any] = {
        "objective": options.objective, "tree_method": "hist", "max_depth": options.depth, "eta": options.eta,
        "subsample": options.subsample, "colsample_bytree": options.colsample, "lambda": options.l2,
        "min_child_weight": options.min_child_weight, "seed": seed, "nthread": threads, "verbosity": 0,
        "eval_metric": "logloss",
    }
    if options.base_score is not None:
        parameters["base_score"] = options.base_score
    if options.objective == "rank:ndcg":
        parameters |= {"lambdarank_pair_method": "topk", "lambdarank_num_pair_per_sample": keep,
                       "eval_metric": f"ndcg@{keep}"}
    return parameters


def _matrix(
    model: Gbdt, rows: TreeRows, *, threads: int, reference: "xgboost.DMatrix | None" = None
) -> "xgboost.QuantileDMatrix":
    import xgboost

    return xgboost.QuantileDMatrix(
        rows.columns_RF, label=rows.labels_RT[:, 0], feature_types=model.columns.kinds, enable_categorical=True,
        qid=rows.request_R if model.config.objective == "rank:ndcg" else None, nthread=threads, ref=reference)


def _importance(model: Gbdt, booster: "xgboost.Booster", rows: TreeRows) -> Importance:
    """Gain of the splits, and mean |SHAP| over rows that lie evenly spaced."""
    import xgboost

    num_rows, num_columns = rows.columns_RF.shape
    gains = booster.get_score(importance_type="gain")
    picked = np.unique(np.linspace(0, num_rows - 1, min(SHAP_ROWS, num_rows)).astype(np.int64))
    sample = xgboost.DMatrix(rows.columns_RF[picked], feature_types=model.columns.kinds, enable_categorical=True)
    shap_F = np.abs(booster.predict(sample, pred_contribs=True)[:, :num_columns]).mean(0)
    return Importance(tuple(_number(gains.get(f"f{column}", 0.0)) for column in range(num_columns)),
                      tuple(float(value) for value in shap_F))


def _number(gain: float | list[float]) -> float:
    return float(gain[0] if isinstance(gain, list) else gain)


# ---------------------------------------------------------------- between the processes of a run
def save_fitted(folder: str, cascade: Cascade, name: str) -> None:
    """Writes a fitted stage; the list of columns comes last, so that an unfinished one does not count."""
    files = cascade.fitted[name].to_files()
    for file, content in sorted(files.items(), key=lambda item: item[0] == COLUMNS_FILE):
        storage.write_bytes(storage.join(folder, name, file), content)


def load_fitted(folder: str, cascade: Cascade) -> list[str]:
    """Loads the stages that were fitted into a folder; returns the names of those that were not."""
    missing = []
    for name, model in cascade.fitted.items():
        place = storage.join(folder, name)
        if not storage.exists(storage.join(place, COLUMNS_FILE)):
            missing.append(name)
            continue
        model.from_files({file: storage.read_bytes(storage.join(place, file)) for file in storage.list_files(place)})
    return missing

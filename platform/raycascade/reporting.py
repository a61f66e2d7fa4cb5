"""What a bundle and its measures look like on the report page."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from raycascade import storage
from raycascade.bundle import Bundle
from raycascade.evaluation import Measured
from raycascade.metrics import BINARY_METRICS
from raycascade.models.gbdt import Gbdt
from raycascade.report import (
    CalibrationBin,
    FeatureImportance,
    PredictionResult,
    Report,
    StageLosses,
    StageResult,
    SurvivalPoint,
    VariantResult,
)


def describe(bundle: Bundle, measured: Measured, *, split: str, moment: str) -> Report:
    """The content of report.html."""
    metrics, baselines = measured.metrics(), measured.baselines()
    training = storage.read_json(storage.join(bundle.uri, "metrics.json"))
    curves = {name: [(int(s), float(v)) for s, v in points] for name, points in training["curves"].items()}
    validation = {name: [(epoch, value) for epoch, (_, value) in enumerate(points, 1)]
                  for name, points in curves.items() if name.startswith("valid")}
    recall = measured.catalogue
    facts = {
        "bundle": bundle.uri.rsplit("/", 1)[-1], "split": split, "evaluated": moment,
        "requests with positives": f"{recall.requests:,}", "held-out positives": f"{recall.positives:,}",
        "requests on logged lists": f"{measured.lists.num_requests:,}", "items": f"{bundle.items.num_items:,}",
        **{f"training {key}": str(value) for key, value in training["train"].items()},
        **{f"version of {name}": version for name, version in bundle.manifest["versions"].items()},
    }
    return Report(
        title=f"{bundle.uri.rsplit('/', 1)[-1]} on {split}",
        summary=_summary(bundle, measured),
        headline=[name for name in _headline(bundle) if name in metrics],
        survival=_survival(bundle, metrics, baselines), stages=_stages(bundle, measured, metrics),
        kept_to_the_end=int(recall.hits.get(f"recall@{bundle.cascade.keeps[-1]}", 0)) if recall.positives else None,
        losses=stage_losses(bundle.cascade.names, bundle.cascade.quotas, metrics),
        predictions=_predictions(measured), slices=measured.slice_figures(),
        calibration=_calibration(bundle, measured), importance=_importance(bundle),
        variants=variant_results(training),
        curves={name: points for name, points in curves.items() if name not in validation}, validation=validation,
        metrics=metrics, baselines=baselines, facts=facts,
        config_yaml=yaml.safe_dump(bundle.config.model_dump(mode="json"), sort_keys=False),
    )


def _summary(bundle: Bundle, measured: Measured) -> str:
    names = " -> ".join(bundle.cascade.names)
    if bundle.cascade.searches:
        return f"{names}: {measured.catalogue.positives:,} held-out positives through the funnel."
    rows = max((seen.num_rows for seen in (*measured.stages.values(), *measured.tasks.values())), default=0)
    return f"{names}: {rows:,} candidates with a label, those that the log shows; there is no catalogue search."


def _headline(bundle: Bundle) -> list[str]:
    if not bundle.cascade.searches:
        return list(BINARY_METRICS)
    joint = f"joint_recall@{bundle.config.lists.k}@{bundle.cascade.quotas[-1]}"
    return [f"recall@{keep}" for keep in dict.fromkeys(bundle.cascade.keeps)] + [joint, "auc"]


def _predictions(measured: Measured) -> list[PredictionResult]:
    """Of every stage's score for the positive label, and of every task; those without a row left out."""
    rows = {name: seen.num_rows for name, seen in {**measured.stages, **measured.tasks}.items()}
    return [PredictionResult(name, rows[name], {metric: value for metric, value in found.items()
                                                if not math.isnan(value)})
            for name, found in measured.predictions().items() if rows[name]]


def _survival(bundle: Bundle, metrics: dict[str, float], baselines: dict[str, dict[str, float]]) -> list[SurvivalPoint]:
    points = []
    for name, keep in zip(bundle.cascade.names, bundle.cascade.keeps, strict=True):
        if (share := metrics.get(f"recall@{keep}/{name}")) is not None:
            figure = f"recall@{keep}"
            beside = {other: values[figure] for other, values in baselines.items() if figure in values}
            points.append(SurvivalPoint(name, keep, share, beside))
    return points


def _stages(bundle: Bundle, measured: Measured, metrics: dict[str, float]) -> list[StageResult]:
    """Each stage at its cut against the stage before it cut to the same number, on the catalogue."""
    names, keeps = bundle.cascade.names, bundle.cascade.keeps
    if not measured.catalogue.positives:
        return []
    rows, arriving = [], float(measured.catalogue.positives)
    for position, (name, keep) in enumerate(zip(names, keeps, strict=True)):
        left = measured.catalogue.hits.get(f"recall@{keep}/{name}")
        before = names[position - 1] if position else None
        rows.append(StageResult(
            name, keep, recall=metrics.get(f"recall@{keep}/{name}"),
            previous=metrics.get(f"recall@{keep}/{before}") if before else None,
            lost=int(arriving - left) if left is not None else None))
        arriving = left if left is not None else arriving
    return rows


def stage_losses(names: Sequence[str], quotas: Sequence[int], metrics: Mapping[str, float]) -> list[StageLosses]:
    """The losses on logged lists (`selection.coordination`) by stage; empty if no list was measured."""
    found, entered = [], 1.0
    for position, (name, quota) in enumerate(zip(names, quotas, strict=True)):
        if f"lost/{name}" not in metrics:
            return []
        wanted_by = {later: metrics[f"lost_wanted/{name}/{later}"] for later in names[position + 1:]}
        lost = metrics[f"lost/{name}"]
        found.append(StageLosses(name, quota, entered, lost, wanted=metrics.get(f"lost_wanted/{name}"),
                                 wanted_by=wanted_by, wasted=metrics.get(f"wasted/{name}")))
        entered -= lost
    return found


def _calibration(bundle: Bundle, measured: Measured) -> dict[str, Sequence[CalibrationBin]]:
    """Of the last stage's score, where it is a logit, and of every task."""
    predictions = {name.replace("/", ": "): task for name, task in measured.tasks.items()}
    last = bundle.cascade.names[-1]
    if last not in measured.unscaled:
        predictions = {f"{last}: {bundle.state.schema.positive}": measured.stages[last], **predictions}
    curves = {label: seen.calibration_curve() for label, seen in predictions.items() if seen.num_rows}
    return {label: [CalibrationBin(float(p), float(o), int(n)) for p, o, n in zip(*curve, strict=True)]
            for label, curve in curves.items()}


def variant_results(training: Mapping[str, Any]) -> list[VariantResult]:
    """What the guard has measured, from a bundle's metrics.json; empty where it had nothing to do."""
    stages = training.get("guard", {}).get("stages", {})
    return [VariantResult(name, one["precision"] + (", compiled" if one["compile"] else ""), one["requests"],
                          one["auc_fp32"], one["auc_change"], one["overlap"], one["non_finite"])
            for name, one in stages.items()]


def _importance(bundle: Bundle) -> dict[str, list[FeatureImportance]]:
    """Of every booster, the columns by their mean |SHAP value|, those that do nothing left out."""
    found: dict[str, list[FeatureImportance]] = {}
    for name, model in bundle.cascade.fitted.items():
        assert isinstance(model, Gbdt), name
        tasks = bundle.cascade.stages[name].tasks
        labels = [f"{name}: {task}" for task in tasks] or [name]
        for label, one in zip(labels, model.importance, strict=True):
            columns = [FeatureImportance(column.name, gain, shap) for column, gain, shap
                       in zip(model.columns.columns, one.gain_F, one.shap_F, strict=True) if gain or shap]
            found[label] = sorted(columns, key=lambda column: (-column.shap, column.feature))
    return found

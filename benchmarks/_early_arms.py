"""The early-stage rankers that are compared, the stages around them, and what each log needs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raycascade.schema import AgeFeature, CountFeature, FeatureSchema

DIM, HIDDEN, STD = 16, (64,), 0.05
TOWERS: dict[str, Any] = {"dim": DIM, "hidden": HIDDEN, "vector_dim": 32, "similarity": "dot", "activation": "relu",
                          "item_bias": True, "embedding_std": STD}
GESR: dict[str, Any] = {"name": "gesr", **TOWERS, "width": 32, "layers": 1, "heads": 2, "key_dim": 16, "value_dim": 16,
                        "history": 50}
PARTS = ("hma", "self", "nro", "ro", "mlpg")
ARMS: dict[str, dict[str, Any]] = {
    "two_tower": {"name": "two_tower", **TOWERS},
    "int_tower": {"name": "int_tower", "dim": DIM, "hidden": (64, 32, 32), "embedding_std": STD},
    "gesr": GESR,
    **{f"gesr without {part}": {**GESR, part: False} for part in PARTS},
    "gesr, towers alone": {**GESR, **dict.fromkeys(PARTS, False)},
}
BASE = "two_tower"
CACHED_BASE = "gesr, towers alone"  # the same score as two_tower, by the items' vectors of the bundle
STAGES = ("retriever", "pre_ranker", "ranker")
KEEPS = (500, 100, 20)
KUAIRAND = yaml.safe_load((Path(__file__).parent.parent / "configs" / "kuairand.yaml").read_text())["stages"][0]
LISTWISE = {"name": "softmax", "label": "long_view", "negatives": "unobserved"}


@dataclass(frozen=True)
class Log:
    """A data set with its splits, its retriever, what no stage sees of it, and the budget of every stage."""

    dataset: dict[str, Any]
    splits: dict[str, Any]
    train: dict[str, Any]
    retriever: dict[str, Any]
    left_out: tuple[str, ...] = ()
    needs_raw: bool = False


LOGS = {
    "simulated": Log(
        dataset={"name": "simulated", "num_items": 4_000, "num_users": 3_000},
        splits={"test_from": "2024-01-08"},
        train={"epochs": 2, "batch_size": 256, "lr": 2e-3, "final_lr": 0.1, "warmup_steps": 20, "positives_only": True,
               "negatives": {"per_request": 24, "source": "uniform"}},
        retriever=ARMS[BASE]),
    "kuairand": Log(  # its retriever is that of configs/kuairand.yaml, and so is what is left out
        dataset={"name": "kuairand"},
        splits={"train_from": "2022-04-26", "test_from": "2022-04-30", "test_until": "2022-05-01",
                "utc_offset_hours": 8},
        train={"epochs": 2, "batch_size": 256, "lr": 2e-3, "final_lr": 0.1, "warmup_steps": 50, "positives_only": True,
               "negatives": {"per_request": 32, "source": "popularity"}},
        retriever=KUAIRAND["model"], left_out=tuple(KUAIRAND["exclude"][1:]), needs_raw=True),
}


def timed_features(schema: FeatureSchema) -> list[str]:
    """Item features that a moment changes (ages, counts). No early stage sees them: what it knows of an item can then
    be kept in the bundle."""
    return [f.name for f in schema.features if isinstance(f, AgeFeature | CountFeature) and f.side == "item"]


def stage_of(arm_or_stage: str, log: Log, schema: FeatureSchema) -> dict[str, Any]:
    """The retriever, the ranker, or an arm as the pre-ranker."""
    if arm_or_stage == "retriever":
        return {"name": "retriever", "keep": KEEPS[0], "exclude": ["pair", *log.left_out], "model": log.retriever,
                "loss": {"name": "softmax", "label": "long_view", "over": "catalogue"}}
    if arm_or_stage == "ranker":
        model = {"name": "din", "dim": DIM, "hidden": (64, 32), "activation": "relu", "embedding_std": STD}
        return {"name": "ranker", "keep": KEEPS[2], "exclude": list(log.left_out), "model": model, "loss": LISTWISE}
    return {"name": "pre_ranker", "keep": KEEPS[1], "exclude": ["pair", *log.left_out, *timed_features(schema)],
            "model": ARMS[arm_or_stage], "loss": LISTWISE}

"""A generated log of single impressions whose clicks follow a known probability, and configs over it."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raycascade.config import Config, parse_config

CONFIG = Path(__file__).parents[1] / "configs" / "ctr_table.yaml"
START_MS, HOUR_MS = 1_704_067_200_000, 3_600_000  # 2024-01-01
NUM_USERS, NUM_ITEMS, NUM_DAYS = 60, 40, 9  # the last two days are the test split of the config


def write_log(folder: Path, *, rows: int, seed: int = 3) -> pa.Table:
    """One row per impression: `click` is drawn from the column `truth`, which no model reads; `like` is known for
    clicked rows only."""
    draw = np.random.default_rng(seed)
    user, item = draw.integers(0, NUM_USERS, rows), draw.integers(0, NUM_ITEMS, rows)
    device, price, category = draw.integers(0, 3, rows), draw.normal(size=rows), np.arange(NUM_ITEMS) % 5
    taste = draw.normal(size=(3, 5))
    logit = -1.0 + draw.normal(size=NUM_USERS)[user] + 0.7 * draw.normal(size=NUM_ITEMS)[item]
    truth = 1 / (1 + np.exp(-(logit + 1.5 * taste[device, category[item]] - 0.5 * price)))
    click = (draw.random(rows) < truth).astype(np.int64)
    like = draw.random(rows) < 0.2 + 0.6 * (category[item] == 2)
    time_ms = START_MS + np.sort(draw.choice(NUM_DAYS * 24 * 60, rows, replace=False)) * 60_000
    table = pa.table({
        "user_id": user + 1000, "item_id": item + 500, "time_ms": time_ms, "click": click,
        "like": pa.array(like.astype(np.int64), mask=click == 0), "category": [f"c{c}" for c in category[item]],
        "device": [("phone", "desk", "tv")[d] for d in device], "price": price, "truth": truth})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "log.parquet")
    return table


def ctr_config(folder: Path, **changes: Any) -> Config:
    """configs/ctr_table.yaml over the log in `folder`/raw, on one CPU; `changes` replaces whole sections."""
    import yaml

    tree = yaml.safe_load(CONFIG.read_text())
    paths = {name: str(folder / name) for name in ("raw", "shards", "bundles")}
    tree["train"]["lr"] = float(tree["train"]["lr"])
    return parse_config({**tree, "paths": paths, **changes}, where="ctr")


def requests_of(table: pa.Table) -> pa.Table:
    """Rows of the log as raw requests, each with its item as the only candidate."""
    rows = np.arange(len(table))
    lists = pa.ListArray.from_arrays(pa.array(np.append(rows, len(table)), pa.int32()),
                                     table["item_id"].combine_chunks())
    brought = table.select(["user_id", "time_ms", "device", "price"])
    return brought.append_column("request_id", pa.array([f"r{row}" for row in rows])).append_column("candidates", lists)


def brute_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The share of pairs of a positive and a negative that are ordered rightly, every pair looked at."""
    above, below = scores[labels > 0.5][:, None], scores[labels < 0.5][None, :]
    return float(((above > below) + 0.5 * (above == below)).mean())


def brute_gauc(scores: np.ndarray, labels: np.ndarray, users: np.ndarray) -> float:
    """The mean of the users' AUCs with their rows as weights, users of one class left out."""
    total, rows = 0.0, 0
    for user in np.unique(users):
        own = users == user
        if 0 < labels[own].mean() < 1:
            total += brute_auc(scores[own], labels[own]) * own.sum()
            rows += own.sum()
    return total / rows

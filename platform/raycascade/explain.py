"""explain: where in the cascade an item is lost for a user."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raycascade.batch import Batch
from raycascade.bundle import Bundle, load_bundle
from raycascade.errors import DataError
from raycascade.schema import FIRST_ROW


def explain(uri: str, *, user: str, item: str) -> dict[str, Any]:
    """{"user", "item", "lost_at", "stages": {stage: {rank, score, keep, cut, survives}}}.

    `rank` is the item's place (1 = best) among what the stage sees, for stages after the loss its place had it been
    let through; `cut` is the score of the last item that the stage kept. `lost_at` is null for an item that is
    recommended, and "excluded" for one that the user must not get again.
    """
    return explain_item(load_bundle(uri), user=user, item=item)


def explain_item(bundle: Bundle, *, user: str, item: str) -> dict[str, Any]:
    """The same for a loaded bundle; DataError for a user or an item that it does not know, ConfigError where no stage
    searches the catalogue."""
    bundle.cascade.require_search()
    row = _item_row(bundle, item)
    ids = pa.array([user])
    if bundle.users.rows(ids)[0] < 0:
        raise DataError(f"user {user!r} is not in the bundle; give a user of the training log")
    requests = bundle.encode(pa.table({"user_id": ids.cast(bundle.users.table["user_key"].type)}))
    lost_at, stages = fates(bundle, requests, row)
    return {"user": user, "item": item, "lost_at": lost_at, "stages": stages}


def fates(bundle: Bundle, request: pa.Table, row: int) -> tuple[str | None, dict[str, dict[str, Any]]]:
    """`lost_at`, and by stage what becomes of an item's row for one encoded request, as in `explain`."""
    batch = bundle.batch(request)
    excluded = bool(batch.exclude) and row in batch.exclude[0]
    stages: dict[str, dict[str, Any]] = {}
    lost_at: str | None = "excluded" if excluded else None
    ranking, alone = bundle.cascade.recommend(batch, bundle.index, bundle.items), _scores_alone(bundle, batch, row)
    for position, outcome in enumerate(ranking.stages):
        kept_rows, kept_mask = outcome.kept()
        if position == 0:
            score, rank = _retrieval(bundle, batch, row)
        else:
            score = alone[outcome.name]
            others = outcome.scores_QC[0][outcome.mask_QC[0] & (outcome.rows_QC[0] != row)]
            rank = 1 + int((others > score).sum())
        survives = bool((kept_rows[0][kept_mask[0]] == row).any())
        cut = outcome.scores_QC[0, :outcome.keep][outcome.mask_QC[0, :outcome.keep]]
        stages[outcome.name] = {"rank": rank, "score": score, "keep": outcome.keep,
                                "cut": float(cut[-1]) if len(cut) else None, "survives": survives}
        lost_at = lost_at or (None if survives else outcome.name)
    return lost_at, stages


def _item_row(bundle: Bundle, item: str) -> int:
    keys = bundle.items.keys
    try:
        row = int(bundle.state.item_ids.lookup(pa.array([item]).cast(keys.type))[0])
    except pa.ArrowInvalid:
        row = 1
    if row < FIRST_ROW:
        raise DataError(f"item {item!r} is not in the catalogue of the bundle ({len(keys)} items, such as {keys[0]})")
    return row


@torch.no_grad()
def _retrieval(bundle: Bundle, batch: Batch, row: int) -> tuple[float, int]:
    """Score and exact place among all items that the user may get."""
    user_1D = bundle.cascade.retriever.embed_users(batch).float().numpy()
    allowed_N = np.setdiff1d(bundle.items.all_rows, batch.exclude[0] if batch.exclude else [])
    above, score = 0, 0.0
    chunks = list(bundle.cascade.embed_catalogue(bundle.items))
    for rows, vectors in chunks:
        if row in rows:
            score = float((vectors[np.searchsorted(rows, row)] * user_1D[0]).sum())
    for rows, vectors in chunks:
        scores_N = (vectors @ user_1D[0])[np.isin(rows, allowed_N) & (rows != row)]
        above += int((scores_N > score).sum())
    return float(bundle.cascade.retriever.to_logits(torch.tensor(score))), above + 1


@torch.no_grad()
def _scores_alone(bundle: Bundle, batch: Batch, row: int) -> dict[str, float]:
    """Every stage's score of the item, as if all stages before had let it through."""
    rows_11 = torch.full((1, 1), row)
    alone = batch.with_candidates(rows_11, torch.ones_like(rows_11, dtype=torch.bool), bundle.items)
    return {name: float(score) for name, score in bundle.cascade(alone).items()}

"""Catalogue items as negatives: shared by a batch (for towers) or added to each request's list."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from raycascade.batch import Batch, Targets
from raycascade.items import ItemTable
from raycascade.schema import FIRST_ROW


@dataclass(frozen=True)
class Catalogue:
    """The items negatives are drawn from, with their popularity: logged positives (or exposures) plus one."""

    items: ItemTable
    cumulative_N: np.ndarray

    @classmethod
    def of(cls, items: ItemTable) -> "Catalogue":
        """Popularity as counted over the training log."""
        state = items.state
        name = state.schema.positive or "exposure"
        counts = state.counters.as_of(items.all_rows, 1 << 60, name).astype(np.float64) + 1.0
        return cls(items, np.cumsum(counts) / counts.sum())

    def probability(self, rows: np.ndarray, source: str) -> np.ndarray:
        """Chance of each item row per draw."""
        if source == "uniform":
            return np.full(rows.shape, 1.0 / self.items.num_items)
        at = np.maximum(rows, FIRST_ROW) - FIRST_ROW
        return self.cumulative_N[at] - np.where(at > 0, self.cumulative_N[at - 1], 0.0)

    def draw(self, shape: tuple[int, ...], source: str, rng: np.random.Generator) -> np.ndarray:
        """Item rows, with replacement."""
        if source == "uniform":
            return rng.integers(FIRST_ROW, FIRST_ROW + self.items.num_items, shape)
        drawn = np.searchsorted(self.cumulative_N, rng.random(shape), side="right")
        return np.minimum(drawn, self.items.num_items - 1) + FIRST_ROW


def shared_list(
    batch: Batch, scores_QC: Tensor, score_items: Callable[[Mapping[str, Tensor]], Tensor], catalogue: Catalogue, *,
    num_sampled: int | None, source: str, rng: np.random.Generator,
) -> tuple[Tensor, Targets]:
    """The batch's lists extended by items shared by all its requests: the whole catalogue (`num_sampled` None), or a
    sample without the doubles. Returns scores [Q, C+S] and targets; a request's own candidates are masked out of S.

    log_q is the log of the chance that the sample holds an item, for the popularity correction; 0 for the catalogue.
    """
    assert batch.targets is not None
    rows_S = catalogue.items.all_rows
    if num_sampled is not None:
        rows_S = np.unique(catalogue.draw((num_sampled,), source, rng))
    fields = catalogue.items.fields(rows_S, int(batch.time_ms_Q.median()))
    device = scores_QC.device
    shared_QS = score_items({name: value.to(device) for name, value in fields.items()})
    candidates_QC = batch.candidates_QC.cpu().numpy()
    at_QC = np.minimum(np.searchsorted(rows_S, candidates_QC), len(rows_S) - 1)
    hit_QC = (rows_S[at_QC] == candidates_QC) & batch.mask_QC.cpu().numpy()
    mask_QS = np.ones((len(candidates_QC), len(rows_S)), bool)
    request_QC = np.broadcast_to(np.arange(len(candidates_QC))[:, None], at_QC.shape)
    mask_QS[request_QC[hit_QC], at_QC[hit_QC]] = False
    log_q = None
    if num_sampled is not None:
        listed_QC, shared_S = (_log_inclusion(catalogue.probability(rows, source), num_sampled)
                               for rows in (candidates_QC, rows_S))
        joined = np.concatenate([listed_QC, np.broadcast_to(shared_S, mask_QS.shape)], axis=1)
        log_q = torch.from_numpy(joined).float().to(device)
    targets = extended(batch.targets, torch.from_numpy(mask_QS).to(device), log_q)
    return torch.cat([scores_QC, shared_QS], dim=1), targets


def _log_inclusion(probability: np.ndarray, draws: int) -> np.ndarray:
    return np.log(-np.expm1(draws * np.log1p(-np.minimum(probability, 1 - 1e-12))))


def extended(targets: Targets, mask_QM: Tensor, log_q: Tensor | None) -> Targets:
    """Targets with unlogged candidates behind the logged ones: reached 0, the least relevance, labels unobserved."""
    zeros, unseen = mask_QM.float() * 0, torch.full(mask_QM.shape, torch.nan, device=mask_QM.device)
    return replace(
        targets,
        relevance_QC=torch.cat([targets.relevance_QC, zeros], 1),
        reached_QC=torch.cat([targets.reached_QC, zeros.to(targets.reached_QC.dtype)], 1),
        mask_QC=torch.cat([targets.mask_QC, mask_QM], 1),
        labels={name: torch.cat([label, unseen], 1) for name, label in targets.labels.items()},
        log_q_QC=log_q,
    )


def with_negatives(batch: Batch, catalogue: Catalogue, *, count: int, source: str, rng: np.random.Generator) -> Batch:
    """The batch with `count` catalogue items behind each request's list; draws that are in the list are masked."""
    assert batch.targets is not None
    candidates_QC, mask_QC = batch.candidates_QC.numpy(), batch.mask_QC.numpy()
    drawn_QM = catalogue.draw((len(candidates_QC), count), source, rng)
    fresh_QM = ~((drawn_QM[:, :, None] == candidates_QC[:, None, :]) & mask_QC[:, None, :]).any(-1)
    rows_QC = torch.from_numpy(np.concatenate([candidates_QC, drawn_QM], 1))
    fresh = torch.from_numpy(fresh_QM)
    log_q = np.log(catalogue.probability(rows_QC.numpy(), source)) + np.log(count)
    widened = batch.with_candidates(rows_QC, torch.cat([batch.mask_QC, fresh], 1), catalogue.items)
    return replace(widened, targets=extended(batch.targets, fresh, torch.from_numpy(log_q).float()))

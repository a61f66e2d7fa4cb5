"""Catalogue items as negatives: shared by a batch (for towers) or added to each request's list."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from raycascade.batch import Batch, Targets
from raycascade.items import ItemTable
from raycascade.losses import SharedNegatives
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


@dataclass(frozen=True)
class SharedItems:
    """Catalogue items scored for every request of a batch. Of each request, its own candidates and what it excludes
    are masked; `log_q_QC` belongs to the logged candidates."""

    rows_S: np.ndarray
    negatives: SharedNegatives
    log_q_QC: Tensor | None


def shared_items(
    batch: Batch, score_items: Callable[[Mapping[str, Tensor]], Tensor], catalogue: Catalogue, *,
    num_sampled: int | None, source: str, rng: np.random.Generator,
) -> SharedItems:
    """The whole catalogue (`num_sampled` None), or a sample without the doubles, as negatives of all requests.

    log_q is the log of the chance that the sample holds an item, for the popularity correction.
    """
    rows_S = catalogue.items.all_rows
    if num_sampled is not None:
        rows_S = np.unique(catalogue.draw((num_sampled,), source, rng))
    device = batch.candidates_QC.device
    fields = catalogue.items.fields(rows_S, int(batch.time_ms_Q.median()))
    scores_QS = score_items({name: value.to(device) for name, value in fields.items()})
    mask_QS = np.ones((batch.num_requests, len(rows_S)), bool)
    candidates_QC, own_QC = batch.candidates_QC.cpu().numpy(), batch.mask_QC.cpu().numpy()
    _forbid(mask_QS, rows_S, np.nonzero(own_QC)[0], candidates_QC[own_QC])
    if batch.exclude:
        owner_E = np.repeat(np.arange(len(batch.exclude)), [len(rows) for rows in batch.exclude])
        _forbid(mask_QS, rows_S, owner_E, np.concatenate(batch.exclude))
    log_q_QC = log_q_S = None
    if num_sampled is not None:
        log_q_QC, log_q_S = (
            torch.from_numpy(_log_inclusion(catalogue.probability(rows, source), num_sampled)).float().to(device)
            for rows in (candidates_QC, rows_S))
    return SharedItems(rows_S, SharedNegatives(scores_QS, torch.from_numpy(mask_QS).to(device), log_q_S), log_q_QC)


def _forbid(mask_QS: np.ndarray, rows_S: np.ndarray, request_E: np.ndarray, rows_E: np.ndarray) -> None:
    """Clears the mask at (request, row) for the rows that are among the sorted `rows_S`."""
    at_E = np.minimum(np.searchsorted(rows_S, rows_E), len(rows_S) - 1)
    hit_E = rows_S[at_E] == rows_E
    mask_QS[request_E[hit_E], at_E[hit_E]] = False


def with_retrieved(
    batch: Batch, scores_QC: Tensor, shared: SharedItems, catalogue: Catalogue, *, count: int, keeps: tuple[int, int],
    rng: np.random.Generator,
) -> tuple[Batch, Tensor]:
    """The batch as the later stages meet it: `count` items that the first stage retrieves now stand behind each list,
    half drawn from its best keeps[0], half from its best keeps[1]; logged candidates that it would not retrieve are
    masked, because the later stages would never see them, and requests that lose every positive are left out.

    Returns the batch and the first stage's scores on the new lists. log_q is the log of the chance of a candidate at
    its place in the first stage's order.
    """
    assert batch.targets is not None
    best, place_QC = _retrieved(scores_QC, shared, keeps[0])
    wide, narrow = best.values.shape[1], min(keeps[1], best.values.shape[1])
    within_QC = batch.mask_QC & (place_QC < wide)
    label_QC = batch.targets.labels.get(catalogue.items.state.schema.positive, torch.ones_like(scores_QC))
    chosen_Q = (within_QC & (label_QC > 0.5)).any(1)
    batch = replace(batch, targets=replace(batch.targets, mask_QC=within_QC, log_q_QC=None)).take(chosen_Q)
    batch, (scores_QC, place_QC) = _compacted(batch, (scores_QC.detach()[chosen_Q], place_QC[chosen_Q]))
    assert batch.targets is not None
    within_QC = batch.targets.mask_QC
    half = count // 2
    drawn = [rng.integers(0, size, (len(scores_QC), n)) for size, n in ((wide, count - half), (narrow, half))]
    places_QM = torch.from_numpy(np.concatenate(drawn, 1)).to(scores_QC.device)
    drawn_QM = best.values[chosen_Q].gather(1, places_QM)
    rows_QM = torch.from_numpy(shared.rows_S).to(scores_QC.device)[best.indices[chosen_Q].gather(1, places_QM)]
    fresh_QM = torch.isfinite(drawn_QM)
    places = torch.cat([place_QC, places_QM], 1)
    log_q = torch.log(count * ((1 - half / count) / wide + (places < narrow) * (half / count) / narrow))
    widened = batch.to("cpu").with_candidates(
        torch.cat([batch.candidates_QC, rows_QM], 1).cpu(), torch.cat([within_QC, fresh_QM], 1).cpu(), catalogue.items
    ).to(scores_QC.device)
    return (replace(widened, targets=extended(batch.targets, fresh_QM, log_q)),
            torch.cat([scores_QC, drawn_QM.masked_fill(~fresh_QM, 0.0)], 1))


def _compacted(batch: Batch, others: tuple[Tensor, ...]) -> tuple[Batch, tuple[Tensor, ...]]:
    """The unmasked candidates moved to the front and the columns behind the longest list cut off, everywhere alike.

    The item fields are left as they are: the caller gathers them anew.
    """
    targets = batch.targets
    assert targets is not None
    width = int(targets.mask_QC.sum(1).max()) if len(targets.mask_QC) else 0
    order_QC = (~targets.mask_QC).int().argsort(dim=1, stable=True)[:, :width]

    def moved(values_QC: Tensor) -> Tensor:
        return values_QC.gather(1, order_QC)

    compact = replace(targets, relevance_QC=moved(targets.relevance_QC), reached_QC=moved(targets.reached_QC),
                      mask_QC=moved(targets.mask_QC), labels={n: moved(label) for n, label in targets.labels.items()})
    batch = replace(batch, candidates_QC=moved(batch.candidates_QC), mask_QC=compact.mask_QC, targets=compact)
    return batch, tuple(moved(other) for other in others)


def _retrieved(scores_QC: Tensor, shared: SharedItems, keep: int) -> tuple[torch.return_types.topk, Tensor]:
    """The best `keep` shared items of each request, and the place of each logged candidate among them."""
    masked_QS = shared.negatives.scores_QS.detach().masked_fill(~shared.negatives.mask_QS, -torch.inf)
    best = masked_QS.topk(min(keep, masked_QS.shape[1]), dim=1)
    return best, torch.searchsorted(-best.values, -scores_QC.detach())


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


def with_history_negatives(batch: Batch, items: ItemTable, *, rng: np.random.Generator) -> Batch:
    """The batch with an item drawn uniformly from the rest of the catalogue beside each event of the histories."""
    own_QL = batch.history_rows_QL.numpy() - FIRST_ROW
    known_QL = own_QL >= 0
    drawn_QL = rng.integers(0, np.maximum(1, items.num_items - known_QL))
    drawn_QL += known_QL & (drawn_QL >= own_QL)  # steps over the event's own item
    return batch.with_history_negatives(drawn_QL % items.num_items + FIRST_ROW, items)


def with_item_shares(batch: Batch, catalogue: Catalogue) -> Batch:
    """The batch with each candidate's share of the positives of the training log."""
    assert batch.targets is not None
    shares_QC = catalogue.probability(batch.candidates_QC.cpu().numpy(), "popularity")
    shares = torch.from_numpy(shares_QC).float().to(batch.candidates_QC.device)
    return replace(batch, targets=replace(batch.targets, item_shares_QC=shares))


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

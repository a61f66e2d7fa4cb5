"""Hard matching: how many events of a history share a value with a candidate, counted exactly.

Two ways that give the same counts: comparing every event with every candidate (a GPU), and sorting the history once a
request and looking candidates up in it (a CPU). Ids are any int64; masks alone say which of them count.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class EventIds(Protocol):
    """The ids of a request's events, and for each of P pairs which of them count."""

    def count(self, ids_QCV: Tensor, known_QCV: Tensor) -> Tensor:
        """Counts [Q, C, P], int64: for each pair the events that equal a known value of the candidate, summed over its
        values."""
        ...


@dataclass(frozen=True)
class ComparedEvents:
    """Ids as they stand [Q, E], masks [Q, P, E]: a candidate costs P x E comparisons."""

    ids_QE: Tensor
    masks_QPE: Tensor

    def count(self, ids_QCV: Tensor, known_QCV: Tensor) -> Tensor:
        """Counts [Q, C, P]."""
        same_QCE = torch.zeros(*ids_QCV.shape[:2], self.ids_QE.shape[1], dtype=torch.int64, device=ids_QCV.device)
        for ids_QC, known_QC in zip(ids_QCV.unbind(-1), known_QCV.unbind(-1), strict=True):
            same_QCE += (ids_QC[:, :, None] == self.ids_QE[:, None]) & known_QC[:, :, None]
        counts = [(same_QCE * mask_QE[:, None]).sum(-1) for mask_QE in self.masks_QPE.unbind(1)]
        return torch.stack(counts, -1)


@dataclass(frozen=True)
class SortedEvents:
    """Ids that count in rising order [Q, P, E], behind them fillers that are no smaller; how many count [Q, P]."""

    ids_QPE: Tensor
    lengths_QP: Tensor

    @classmethod
    def of(cls, ids_QE: Tensor, masks_QPE: Tensor) -> "SortedEvents":
        """Masked ids become the largest int64, and so stand where only `lengths_QP` tells them from real ones."""
        filled_QPE = torch.where(masks_QPE, ids_QE[:, None], torch.iinfo(torch.int64).max)
        return cls(filled_QPE.sort(-1).values, masks_QPE.sum(-1))

    def count(self, ids_QCV: Tensor, known_QCV: Tensor) -> Tensor:
        """Counts [Q, C, P]."""
        num_pairs, last_QP1 = self.ids_QPE.shape[1], self.lengths_QP[:, :, None]
        wanted_QPK = ids_QCV.flatten(1)[:, None].expand(-1, num_pairs, -1).contiguous()
        first = torch.searchsorted(self.ids_QPE, wanted_QPK).minimum(last_QP1)
        behind = torch.searchsorted(self.ids_QPE, wanted_QPK, right=True).minimum(last_QP1)
        counts_QPCV = (behind - first).unflatten(-1, ids_QCV.shape[1:]) * known_QCV[:, None]
        return counts_QPCV.sum(-1).transpose(1, 2)


def event_ids(ids_QE: Tensor, masks_QPE: Tensor) -> EventIds:
    """The form that suits the device: sorted on a CPU, compared elsewhere."""
    if ids_QE.device.type == "cpu":
        return SortedEvents.of(ids_QE, masks_QPE)
    return ComparedEvents(ids_QE, masks_QPE)


def count_rows(counts_QCP: Tensor, *, clip: int) -> Tensor:
    """Rows of a table of P (clip + 1) [Q, C, P]: p (clip + 1) + min(count, clip), as counts take clip + 1 values."""
    pairs_P = torch.arange(counts_QCP.shape[-1], device=counts_QCP.device)
    return pairs_P * (clip + 1) + counts_QCP.clamp(max=clip)

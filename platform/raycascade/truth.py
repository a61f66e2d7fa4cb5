"""The ground truth of a list: who belongs to its best K, in closed form, ties shared evenly.

Losses and metrics read the same truth from here. Padded columns may hold anything, NaN and infinity included.
"""

import torch
from torch import Tensor


def tie_spans(relevance_QC: Tensor, mask_QC: Tensor) -> tuple[Tensor, Tensor]:
    """Per candidate: how many masked candidates are better, and how many are exactly as good (itself included).

    Two int64 tensors [Q, C], 0 on padding. Candidate j holds the ranks above + 1 .. above + tied. O(C log C).
    """
    values_QC = torch.where(mask_QC, _comparable(relevance_QC), torch.inf)
    ascending_QC = values_QC.sort(dim=1).values.contiguous()
    below_QC = torch.searchsorted(ascending_QC, values_QC.contiguous(), right=False)
    up_to_QC = torch.searchsorted(ascending_QC, values_QC.contiguous(), right=True)
    above_QC = mask_QC.sum(dim=1, keepdim=True) - up_to_QC
    return torch.where(mask_QC, above_QC, 0), torch.where(mask_QC, up_to_QC - below_QC, 0)


def _comparable(relevance_QC: Tensor) -> Tensor:
    if not relevance_QC.is_floating_point():
        return relevance_QC.double()  # exact for every level and rank there can be
    return relevance_QC if relevance_QC.dtype == torch.float64 else relevance_QC.float()


def top_k_membership(
    relevance_QC: Tensor, mask_QC: Tensor, k: int, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """t [Q, C]: the share of the candidate's ranks that lie in the best k, clamp((k - above) / tied, 0, 1).

    1 inside, 0 outside and on padding, a fraction where a tie crosses the border. Sums to min(k, N) per request.
    """
    above_QC, tied_QC = tie_spans(relevance_QC, mask_QC)
    share_QC = ((k - above_QC).to(dtype) / tied_QC.clamp(min=1).to(dtype)).clamp(0.0, 1.0)
    return torch.where(mask_QC, share_QC, 0.0)


def label_matrix(relevance_QC: Tensor, mask_QC: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Y [Q, C ranks, C items]: 1 / tied at the ranks that an item holds, else 0; ranks beyond N and padding are 0."""
    above_QC, tied_QC = tie_spans(relevance_QC, mask_QC)
    rank_C = torch.arange(1, mask_QC.shape[1] + 1, device=mask_QC.device)
    held_QCC = (above_QC[:, None, :] < rank_C[:, None]) & (rank_C[:, None] <= (above_QC + tied_QC)[:, None, :])
    return held_QCC.to(dtype) / tied_QC.clamp(min=1).to(dtype)[:, None, :]

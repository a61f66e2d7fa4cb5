"""NeuralSort (Grover, Wang, Zweig and Ermon, ICLR 2019) in few passes over its matrix, with gradients written by hand.

Row k of the matrix is softmax_j( [(N + 1 - 2 k) s_j - A_j] / temperature ) with A_j = sum_l |s_j - s_l|. A is made by
sorting, without a matrix of differences, and the padding enters through vectors. No matrix product is used: on hardware
that rounds the factors of products, NeuralSort loses its order.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

LOG_ZERO = -1e30  # finite, so that 0 times its gradient is 0


def rows(mask_QC: Tensor) -> Tensor:
    """Bool [Q, C]: which ranks there are in a list of N candidates."""
    rank_C = torch.arange(1, mask_QC.shape[1] + 1, device=mask_QC.device)
    return rank_C <= mask_QC.sum(dim=1, keepdim=True)


def spread(scores_QC: Tensor, mask_QC: Tensor) -> Tensor:
    """A [Q, C]: the summed distances of a score to those of its list, 0 on padding. O(C log C)."""
    result_QC = _Spread.apply(scores_QC, mask_QC)
    assert isinstance(result_QC, Tensor)
    return result_QC


def neural_sort(scores_QC: Tensor, mask_QC: Tensor, *, temperature: float) -> Tensor:
    """Row logits [Q, C ranks, C items] of NeuralSort, LOG_ZERO on padding. Scores must be finite there."""
    return _row_logits(scores_QC, spread(scores_QC, mask_QC), mask_QC, temperature)


def neural_row_sums(
    scores_QC: Tensor, mask_QC: Tensor, *, widths: tuple[int, ...], temperature: float
) -> Tensor:
    """[Q, 2 w, C]: for each of w rising widths q the sums of P over the first q ranks and over the others."""
    result = _RowSums.apply(scores_QC, spread(scores_QC, mask_QC), mask_QC, widths, temperature)
    assert isinstance(result, Tensor)
    return result


def _row_logits(scores_QC: Tensor, spread_QC: Tensor, mask_QC: Tensor, temperature: float) -> Tensor:
    base_QC = torch.where(mask_QC, -spread_QC / temperature, LOG_ZERO)
    slope_QC = _factors(mask_QC, temperature, scores_QC.dtype)
    return torch.addcmul(base_QC[:, None, :], slope_QC[:, :, None], scores_QC[:, None, :])


def _factors(mask_QC: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """(N + 1 - 2 rank) / temperature [Q, C ranks]."""
    rank_C = torch.arange(1, mask_QC.shape[1] + 1, device=mask_QC.device)
    return (mask_QC.sum(dim=1, keepdim=True) + 1 - 2 * rank_C).to(dtype) / temperature


class _Spread(torch.autograd.Function):
    """Sums of gaps between neighbours in sorted order; every addend is positive, so nothing cancels."""

    @staticmethod
    def forward(ctx: Any, scores_QC: Tensor, mask_QC: Tensor) -> Tensor:
        """See `spread`."""
        sorted_QC, order_QC = torch.where(mask_QC, scores_QC, LOG_ZERO).sort(dim=1, descending=True)
        ctx.save_for_backward(sorted_QC, order_QC, mask_QC)
        gaps_QC = -sorted_QC.diff(dim=1)
        better_C = torch.arange(1, mask_QC.shape[1], device=mask_QC.device)  # candidates above each gap
        worse_QC = (mask_QC.sum(dim=1, keepdim=True) - better_C).clamp(min=0)
        down_QC, up_QC = torch.zeros_like(sorted_QC), torch.zeros_like(sorted_QC)
        down_QC[:, 1:] = (gaps_QC * better_C).cumsum(dim=1)
        up_QC[:, :-1] = (gaps_QC * worse_QC).flip(1).cumsum(dim=1).flip(1)
        return torch.where(mask_QC, torch.zeros_like(sorted_QC).scatter_(1, order_QC, down_QC.add_(up_QC)), 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """sum_j g_j sign(s_m - s_j) + g_m sum_l sign(s_m - s_l), where the sign of a tie is 0."""
        sorted_QC, order_QC, mask_QC = ctx.saved_tensors
        slope_QC = torch.where(mask_QC, gradients[0], 0.0).gather(1, order_QC)
        keys_QC = -sorted_QC
        above_QC = torch.searchsorted(keys_QC, keys_QC)
        up_to_QC = torch.searchsorted(keys_QC, keys_QC, right=True)
        total_QC = torch.nn.functional.pad(slope_QC.cumsum(dim=1), (1, 0))
        below_QC = (mask_QC.sum(dim=1, keepdim=True) - up_to_QC).to(slope_QC.dtype)
        moved_QC = slope_QC * (below_QC - above_QC) + total_QC[:, -1:]
        moved_QC -= total_QC.gather(1, up_to_QC) + total_QC.gather(1, above_QC)
        return torch.where(mask_QC, torch.zeros_like(moved_QC).scatter_(1, order_QC, moved_QC), 0.0), None


class _RowSums(torch.autograd.Function):
    """Softmax over the rows and sums over blocks of them, one matrix kept."""

    @staticmethod
    def forward(
        ctx: Any, scores_QC: Tensor, spread_QC: Tensor, mask_QC: Tensor, widths: tuple[int, ...], temperature: float
    ) -> Tensor:
        """See `neural_row_sums`."""
        matrix_QCC = _row_logits(scores_QC, spread_QC, mask_QC, temperature).softmax(dim=2)
        matrix_QCC *= rows(mask_QC).to(scores_QC.dtype)[:, :, None]
        ctx.save_for_backward(matrix_QCC, mask_QC)
        ctx.widths, ctx.temperature = widths, temperature
        blocks = [matrix_QCC[:, start:end].sum(dim=1) for start, end in _blocks(widths, matrix_QCC.shape[1])]
        sums = [torch.stack(part).sum(dim=0) for i in range(1, len(blocks)) for part in (blocks[:i], blocks[i:])]
        return torch.stack(sums, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of the softmax: P (g - sum_j g P), where g is the same for all rows of a block."""
        matrix_QCC, mask_QC = ctx.saved_tensors
        blocks = _blocks(ctx.widths, matrix_QCC.shape[1])
        moved_QCC = torch.empty_like(matrix_QCC)
        for i, (start, end) in enumerate(blocks):
            inside = gradients[0][:, 2 * i :: 2].sum(dim=1)  # of the widths that hold the block
            slope_QC = inside + gradients[0][:, 1 : 2 * i : 2].sum(dim=1)  # of those that end before it
            torch.mul(matrix_QCC[:, start:end], slope_QC[:, None, :], out=moved_QCC[:, start:end])
        moved_QCC.addcmul_(matrix_QCC, moved_QCC.sum(dim=2, keepdim=True), value=-1.0)
        spread_gradient_QC = moved_QCC.sum(dim=1) / -ctx.temperature
        moved_QCC *= _factors(mask_QC, ctx.temperature, matrix_QCC.dtype)[:, :, None]
        return moved_QCC.sum(dim=1), torch.where(mask_QC, spread_gradient_QC, 0.0), None, None, None


def _blocks(widths: tuple[int, ...], num_ranks: int) -> list[tuple[int, int]]:
    """Ranges of ranks between the widths: w + 1 of them."""
    return list(pairwise([0, *(min(q, num_ranks) for q in widths), num_ranks]))

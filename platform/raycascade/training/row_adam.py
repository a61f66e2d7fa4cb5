"""Adam for embedding tables: only the rows of the batch are read and written."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

CHUNK_ROWS = 4096  # rows gathered at a time: what is gathered stays in the cache until it is written back


class RowAdam(torch.optim.Optimizer):
    """Lazy Adam without a first moment, over sparse gradients: `torch.optim.SparseAdam` with betas (0, beta), step for
    step, at a fraction of its time and two thirds of its memory.

    Rows of the gradient move as in Adam (Kingma and Ba 2015, algorithm 1), with epsilon added before the correction of
    the second moment; every other row keeps its weights and its moment. The correction counts the table's steps. A
    first moment would only move on while a row is seen: Adam over whole tables goes on moving it, a lazy one stops
    short (decision 7). Gradients must be coalesced.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, beta: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every table that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for table_NK in group["params"]:
                if table_NK.grad is not None:
                    self._update(table_NK, group)

    def _update(self, table_NK: Tensor, group: dict[str, Any]) -> None:
        gradient, state = table_NK.grad, self.state[table_NK]
        assert gradient is not None
        if not state:
            state |= {"step": 0, "exp_avg_sq": torch.zeros_like(table_NK)}
        state["step"] += 1
        correction = (1 - group["beta"] ** state["step"]) ** 0.5
        whole = [_flat(table_NK), _flat(state["exp_avg_sq"])]
        rows_R, values_RK = gradient.indices()[0], _flat(gradient.values())
        for rows, values in zip(rows_R.split(CHUNK_ROWS), values_RK.split(CHUNK_ROWS), strict=True):
            weights, moments = parts = [x.index_select(0, rows) for x in whole]
            steps = torch.full((), state["step"] - 1, dtype=torch.float32, device=rows.device)  # adam adds 1
            adam([weights], [values], [values], [moments], [], [steps], fused=True, amsgrad=False, beta1=0.0,
                 beta2=group["beta"], lr=group["lr"], weight_decay=0.0, eps=group["eps"] / correction, maximize=False)
            for x, part in zip(whole, parts, strict=True):
                x.index_copy_(0, rows, part)


def _flat(x_NK: Tensor) -> Tensor:
    """A table of scalars as a vector, whose rows are cheaper to reach; wider ones as they are."""
    return x_NK.view(-1) if x_NK.shape[1] == 1 else x_NK


def coalesce_gradients(tables: Iterable[Tensor]) -> None:
    """One entry per row in the sparse gradients of `tables`, rows ascending: `coalesce` in half its time.

    Tables that were read at the same rows one after the other (a model's embeddings and its first-order weights) share
    the sorting.
    """
    last: SumsByRow | None = None
    for table in tables:
        if table.grad is None or table.grad.is_coalesced():
            continue
        rows_N = table.grad._indices()[0]
        if last is None or not torch.equal(last.rows_N, rows_N):
            last = SumsByRow(rows_N)
        table.grad = last.of(table.grad)


def coalesced(gradient: Tensor) -> Tensor:
    """The same for one gradient."""
    return gradient if gradient.is_coalesced() else SumsByRow(gradient._indices()[0]).of(gradient)


class SumsByRow:
    """Adds up values that fall on the same row. `touched_R`: the rows that occur, ascending."""

    def __init__(self, rows_N: Tensor) -> None:
        self.rows_N = rows_N
        in_order_N, self._order_N = torch.sort(rows_N)
        self.touched_R, counts_R = torch.unique_consecutive(in_order_N, return_counts=True)
        self._starts_R = counts_R.cumsum(0) - counts_R

    def __call__(self, values_NK: Tensor) -> Tensor:
        """Sums [R, K] of the values [N, K]."""
        if not len(values_NK):
            return values_NK
        return nn.functional.embedding_bag(self._order_N, values_NK, self._starts_R, mode="sum")

    def of(self, gradient: Tensor) -> Tensor:
        """A gradient at these rows, coalesced."""
        return torch.sparse_coo_tensor(self.touched_R[None], self(gradient._values()), gradient.shape,
                                       check_invariants=False, is_coalesced=True)

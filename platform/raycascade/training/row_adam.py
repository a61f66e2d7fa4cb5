"""Adam for embedding tables: only the rows of the batch are read and written."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

CHUNK_ROWS = 4096  # rows gathered at a time: what is gathered stays in the cache until it is written back


class RowAdam(torch.optim.Optimizer):
    """Lazy Adam over sparse gradients: `torch.optim.SparseAdam`, step for step, at a fraction of its time.

    Rows of the gradient move as in Adam (Kingma and Ba 2015, algorithm 1), with epsilon added before the correction of
    the second moment; every other row keeps its weights and its moments. The corrections count the table's steps.
    Gradients must be coalesced. With a first decay rate of 0 there is no first moment, and a table takes two thirds of
    the memory: a row then takes its whole step when it is seen, whereas a lazy first moment stops a row short that is
    not seen again soon (decision 7).
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every table that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for table_NK in group["params"]:
                if table_NK.grad is not None:
                    self._update(table_NK, group)

    def _update(self, table_NK: Tensor, group: dict[str, Any]) -> None:
        gradient, state, (first, second) = table_NK.grad, self.state[table_NK], group["betas"]
        assert gradient is not None
        if not state:
            state |= {"step": 0, "exp_avg_sq": torch.zeros_like(table_NK)}
            state |= {"exp_avg": torch.zeros_like(table_NK)} if first else {}
        state["step"] += 1
        correction = (1 - second ** state["step"]) ** 0.5
        whole = [_flat(table_NK), _flat(state["exp_avg_sq"])] + ([_flat(state["exp_avg"])] if first else [])
        rows_R, values_RK = gradient.indices()[0], _flat(gradient.values())
        for rows, values in zip(rows_R.split(CHUNK_ROWS), values_RK.split(CHUNK_ROWS), strict=True):
            weights, squares, *means = parts = [x.index_select(0, rows) for x in whole]
            steps = torch.full((), state["step"] - 1, dtype=torch.float32, device=rows.device)  # adam adds 1
            adam([weights], [values], means or [values], [squares], [], [steps], fused=True, amsgrad=False,
                 beta1=first, beta2=second, lr=group["lr"], weight_decay=0.0, eps=group["eps"] / correction,
                 maximize=False)
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

"""The embedding tables of a model, joined: a side of a batch takes one lookup, a step one update."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from raycascade.schema import PADDING, Field


class JoinedTables(nn.Embedding):
    """The tables of all vocabularies of `fields`, one behind the other, drawn from N(0, std).

    Row r > 0 of a vocabulary is row `first_rows[vocabulary] + r`; row 0 is the padding of all, zero and never trained.
    Gradients are sparse.
    """

    def __init__(self, fields: Sequence[Field], width: int, *, std: float) -> None:
        sizes = {f.table: f.num_rows for f in fields if f.form in ("id", "ids")}
        super().__init__(1 + sum(n - 1 for n in sizes.values()), width, padding_idx=PADDING, sparse=True)
        self.sizes = sizes
        self.first_rows = dict(zip(sizes, accumulate((n - 1 for n in sizes.values()), initial=0), strict=False))
        self._offsets: dict[tuple[torch.device, tuple[str, ...]], Tensor] = {}
        self._lookups: _Lookups | None = None
        with torch.no_grad():
            self.weight.normal_(0.0, std) if std else self.weight.zero_()
            self.weight[PADDING].zero_()

    def of(self, vocabulary: str) -> Tensor:
        """Rows 1, 2, ... of one vocabulary [num_rows - 1, width]: a view of the weight."""
        first = self.first_rows[vocabulary]
        return self.weight[first + 1:first + self.sizes[vocabulary]]

    def single_rows(self, values: Mapping[str, Tensor], fields: Sequence[Field]) -> Tensor:
        """Rows of id fields [..., m]."""
        rows = torch.stack([values[f.name] for f in fields], -1)
        key = (rows.device, tuple(f.table for f in fields))
        if key not in self._offsets:
            self._offsets[key] = torch.tensor([self.first_rows[name] for name in key[1]], device=rows.device)
        return torch.where(rows == PADDING, rows, rows + self._offsets[key])

    def listed_rows(self, values: Mapping[str, Tensor], fields: Sequence[Field]) -> Tensor:
        """Rows of ids fields, the places of one field behind those of the other [..., S]."""
        slots = [(values[f.name], self.first_rows[f.table]) for f in fields]
        return torch.cat([torch.where(slot == PADDING, slot, slot + first) for slot, first in slots], -1)

    def forward(self, input: Tensor) -> Tensor:
        """Vectors of joined rows [..., width]."""
        if not (self.sparse and torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(input)
        if self._lookups is None or not self._lookups.open_for(self.weight):
            self._lookups = _Lookups(self.weight)
        return _Lookup.apply(self._lookups.anchor, self.weight.detach(), input, self._lookups)  # type: ignore[return-value]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lookups": None, "_offsets": {}}


class _Lookups:
    """The lookups of one forward pass. Their gradients are collected and leave as one sparse tensor: autograd itself
    would add them up two by two, which takes longer than all lookups.

    Every lookup hangs on `anchor`, a scalar without meaning, so that `_Collect` is called once, after all of them.
    """

    def __init__(self, weight_NK: Tensor) -> None:
        self.found: list[tuple[Tensor, Tensor]] = []
        self.done, self.weight_NK = False, weight_NK
        self.anchor: Tensor = _Collect.apply(weight_NK, self)  # type: ignore[assignment]


    def open_for(self, weight_NK: Tensor) -> bool:
        """Whether a lookup may still join: no way back yet, and the same weight, where and as wide as it was."""
        alike = (self.anchor.dtype, self.anchor.device) == (weight_NK.dtype, weight_NK.device)
        return not self.done and self.weight_NK is weight_NK and alike


class _Collect(torch.autograd.Function):
    """The gradient of a table from what its lookups have left."""

    @staticmethod
    def forward(ctx: Any, weight_NK: Tensor, lookups: _Lookups) -> Tensor:
        """The anchor."""
        ctx.lookups, ctx.size = lookups, weight_NK.shape
        return weight_NK.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """One entry for each place that is not padding."""
        rows, values = zip(*ctx.lookups.found, strict=True)
        ctx.lookups.found, ctx.lookups.done = [], True
        return torch.sparse_coo_tensor(torch.cat(rows)[None], torch.cat(values), ctx.size,
                                       check_invariants=False), None


class _Lookup(torch.autograd.Function):
    """W[rows]; its gradient waits in `lookups`, without what belongs to padding."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, weight_NK: Tensor, rows: Tensor, lookups: _Lookups) -> Tensor:
        """[...] -> [..., K]."""
        ctx.save_for_backward(rows)
        ctx.lookups = lookups
        return torch.embedding(weight_NK, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        """Nothing but a zero for the anchor."""
        rows_R, values_RK = ctx.saved_tensors[0].flatten(), gradients[0].flatten(0, -2)
        valid_R = rows_R != PADDING
        if not valid_R.all():
            rows_R, values_RK = rows_R[valid_R], values_RK[valid_R]
        ctx.lookups.found.append((rows_R, values_RK))
        return gradients[0].new_zeros(()), None, None, None

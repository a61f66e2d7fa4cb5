"""First-order terms: one weight per value of a field and per number, apart from every embedding."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.models._inputs import embedding_table
from raycascade.models._layers import masked_mean
from raycascade.schema import PADDING, FeatureSpace, Field


class FirstOrder(nn.Module):
    """w_0 + sum over fields of their weights, all zero at first.

    id: w[row]; ids: the mean of w over the values there are, or their sum where the field says so; dense: w x;
    vector: w . x; a column of the history: the mean over the valid events. Fields that share a vocabulary share its
    weights. All vocabularies lie in one table, one behind the other, so that a side takes one lookup; row 0 of the
    table is the padding of all.
    """

    _anchor: Tensor

    def __init__(self, space: FeatureSpace, num_tasks: int) -> None:
        super().__init__()
        history = tuple(f for f in space.of("item") if f.name in space.history_fields)
        self.sides = {"request": space.of("request"), "candidate": space.of("item", "pair"),
                      "event": (*history, *space.of("event"))}
        sizes = {f.table: f.num_rows for f in space.fields if f.form in ("id", "ids")}
        self.first_rows = dict(zip(sizes, accumulate((n - 1 for n in sizes.values()), initial=0), strict=False))
        self.bias = nn.Parameter(torch.zeros(num_tasks))
        self.values = embedding_table(1 + sum(n - 1 for n in sizes.values()), num_tasks, std=0.0)
        self.numbers = nn.ModuleDict()
        for side, fields in self.sides.items():
            if width := sum(f.width for f in fields if f.form in ("dense", "vector")):
                self.numbers[side] = nn.Linear(width, num_tasks, bias=False)
            offsets = [self.first_rows[f.table] for f in fields if f.form in ("id", "ids")]
            self.register_buffer(f"_offsets_{side}", torch.tensor(offsets, dtype=torch.long), persistent=False)
        self.register_buffer("_anchor", torch.zeros(num_tasks), persistent=False)  # follows the module's device, dtype
        self.silence()

    def silence(self) -> None:
        """Zeroes every weight; w_0 stays."""
        for module in (self.values, *self.numbers.values()):
            nn.init.zeros_(module.weight)  # type: ignore[arg-type]

    def of_request(self, batch: Batch) -> Tensor:
        """w_0 and the weights of the request's fields and of its history [Q, T]."""
        own_QT = self._of_side("request", batch.user, (batch.num_requests,))
        events_QLT = self._of_side("event", batch.history, batch.history_mask_QL.shape)
        return self.bias + own_QT + masked_mean(events_QLT, batch.history_mask_QL)

    def forward(self, request_QT: Tensor, batch: Batch) -> Tensor:
        """The whole term [Q, C, T], given `of_request`."""
        return request_QT[:, None] + self._of_side("candidate", batch.item, batch.mask_QC.shape)

    def _of_side(self, side: str, values: Mapping[str, Tensor], leading: Sequence[int]) -> Tensor:
        fields = self.sides[side]
        total = self._anchor.expand(*leading, -1)
        listed = [f for f in fields if f.form in ("id", "ids")]
        if listed:
            total = total + self._of_values(values, listed, self.get_buffer(f"_offsets_{side}"))
        if side in self.numbers:
            numbers = [values[f.name].to(total.dtype) for f in fields if f.form in ("dense", "vector")]
            columns = [x if x.ndim > len(leading) else x.unsqueeze(-1) for x in numbers]
            total = total + self.numbers[side](torch.cat(columns, -1))
        return total

    def _of_values(self, values: Mapping[str, Tensor], fields: Sequence[Field], offsets: Tensor) -> Tensor:
        """Weights of id and ids fields, added up [..., T]."""
        slots = [values[f.name] if f.form == "ids" else values[f.name].unsqueeze(-1) for f in fields]
        rows = torch.cat(slots, -1)
        widths = torch.tensor([slot.shape[-1] for slot in slots], device=rows.device)
        offsets = offsets.repeat_interleave(widths, output_size=rows.shape[-1])
        weights = self.values(torch.where(rows == PADDING, PADDING, rows + offsets))
        if all(f.form == "id" for f in fields):
            return weights.sum(-2)
        shares = torch.cat([_shares(f, slot, weights.dtype) for f, slot in zip(fields, slots, strict=True)], -1)
        return (shares.unsqueeze(-2) @ weights).squeeze(-2)


def _shares(field: Field, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """What the weight of each place counts for."""
    if field.form == "id":
        return torch.ones_like(rows, dtype=dtype)
    valid = (rows != PADDING).to(dtype)
    return valid if field.pool == "sum" else valid / valid.sum(-1, keepdim=True).clamp(min=1.0)


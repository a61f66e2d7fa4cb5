"""First-order terms: one weight per value of a field and per number, apart from every embedding."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.models._layers import masked_mean
from raycascade.models._tables import JoinedTables
from raycascade.schema import PADDING, FeatureSpace, Field


class FirstOrder(nn.Module):
    """w_0 + sum over fields of their weights, all zero at first.

    id: w[row]; ids: the mean of w over the values there are, or their sum where the field says so; dense: w x;
    vector: w . x; a column of the history: the mean over the valid events. Fields that share a vocabulary share its
    weights.
    """

    _anchor: Tensor

    def __init__(self, space: FeatureSpace, num_tasks: int) -> None:
        super().__init__()
        history = tuple(f for f in space.of("item") if f.name in space.history_fields)
        self.sides = {"request": space.of("request"), "candidate": space.of("item", "pair"),
                      "event": (*history, *space.of("event"))}
        self.bias = nn.Parameter(torch.zeros(num_tasks))
        self.values = JoinedTables(space.fields, num_tasks, std=0.0)
        self.numbers = nn.ModuleDict()
        for side, fields in self.sides.items():
            if width := sum(f.width for f in fields if f.form in ("dense", "vector")):
                self.numbers[side] = nn.Linear(width, num_tasks, bias=False)
        self.register_buffer("_anchor", torch.zeros(num_tasks), persistent=False)  # follows the module's device, dtype
        self.silence()

    def silence(self) -> None:
        """Zeroes every weight; w_0 stays."""
        for module in (self.values, *self.numbers.values()):
            nn.init.zeros_(module.weight)  # type: ignore[arg-type]

    def of_request(self, batch: Batch) -> Tensor:
        """w_0 and the weights of the request's fields and of its history [Q, T]."""
        own_QT = self.bias + self._of_side("request", batch.user, (batch.num_requests,))
        if not self.sides["event"]:
            return own_QT
        events_QLT = self._of_side("event", batch.history, batch.history_mask_QL.shape)
        return own_QT + masked_mean(events_QLT, batch.history_mask_QL)

    def forward(self, request_QT: Tensor, batch: Batch) -> Tensor:
        """The whole term [Q, C, T], given `of_request`."""
        return request_QT[:, None] + self._of_side("candidate", batch.item, batch.mask_QC.shape)

    def _of_side(self, side: str, values: Mapping[str, Tensor], leading: Sequence[int]) -> Tensor:
        fields = self.sides[side]
        total = self._anchor.expand(*leading, -1)
        if single := [f for f in fields if f.form == "id"]:
            total = total + self.values(self.values.single_rows(values, single)).sum(-2)
        if listed := [f for f in fields if f.form == "ids"]:
            total = total + self._of_lists(values, listed)
        if side in self.numbers:
            numbers = [values[f.name].to(total.dtype) for f in fields if f.form in ("dense", "vector")]
            columns = [x if x.ndim > len(leading) else x.unsqueeze(-1) for x in numbers]
            total = total + self.numbers[side](torch.cat(columns, -1))
        return total

    def _of_lists(self, values: Mapping[str, Tensor], fields: Sequence[Field]) -> Tensor:
        """Weights of ids fields, pooled and added up [..., T]."""
        weights = self.values(self.values.listed_rows(values, fields))
        shares = torch.cat([_shares(f, values[f.name], weights.dtype) for f in fields], -1)
        return (shares.unsqueeze(-2) @ weights).squeeze(-2)


class NoFirstOrder(nn.Module):
    """Adds 0, in a model that is built without an output: weights per value say something about logits only."""

    def silence(self) -> None:
        """It is."""

    def of_request(self, batch: Batch) -> Tensor:
        """[Q, 1]."""
        return torch.zeros(batch.num_requests, 1, device=batch.mask_QC.device)

    def forward(self, request_Q1: Tensor, batch: Batch) -> Tensor:
        """[Q, 1, 1]."""
        return request_Q1[:, None]


def first_order_of(space: FeatureSpace, num_tasks: int) -> FirstOrder | NoFirstOrder:
    """The first-order term of so many tasks."""
    return FirstOrder(space, num_tasks) if num_tasks else NoFirstOrder()


def _shares(field: Field, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """What the weight of each place counts for."""
    valid = (rows != PADDING).to(dtype)
    return valid if field.pool == "sum" else valid / valid.sum(-1, keepdim=True).clamp(min=1.0)


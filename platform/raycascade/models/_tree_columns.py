"""From batch to the columns of a tree model: one table for training, scoring and serving.

Trees compare one number with a threshold, or send sets of categories left and right. What has no order and too many
values (an id) would be learnt by heart, so it takes part only through what is known of it: the counts, rates and
matches among the dense fields, and whether the history holds it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from raycascade.batch import Batch
from raycascade.models._layers import masked_mean
from raycascade.schema import FIRST_ROW, PADDING, FeatureSpace, Field


@dataclass(frozen=True)
class Column:
    """A column of the table: "q" is a number, "c" a category (the words of XGBoost's feature types)."""

    name: str
    kind: Literal["q", "c"]


class TreeColumns:
    """The columns of a space, in an order that the space alone decides, and their values for a batch.

    - dense: as it is; id of at most `max_categories` values: a category, NaN where unknown; other ids: nothing;
    - ids: `<name>.count`, how many values there are;
    - with a history `history.length`, and for every id or ids field f that its events carry `history.<f>.matches`, the
      events that share a value with the candidate, `history.<f>.since`, the events after the last of them, and
      `history.<f>.last.<e>`, what that one carries as its event field e (its action, its age); NaN without a match;
    - vector: `history.<f>.cosine` with the mean of the history's vectors where events carry it, NaN without one.
    """

    def __init__(self, space: FeatureSpace, *, max_categories: int) -> None:
        self.max_categories = max_categories
        self.request_fields, self.candidate_fields = space.of("request"), space.of("item", "pair")
        carried = [field for field in space.of("item") if field.name in space.history_fields]
        self.matched_fields = tuple(field for field in carried if field.form in ("id", "ids"))
        self.vector_fields = tuple(field for field in carried if field.form == "vector")
        self.event_fields = tuple(f for f in space.of("event") if f.form != "ids" and self._own(f) is not None)
        self.with_history = space.history_len > 0
        own = [self._own(field) for field in (*self.request_fields, *self.candidate_fields)]
        self.columns = tuple(column for column in (*own, *self._of_history()) if column is not None)

    @property
    def reads_candidates(self) -> bool:
        """Whether any column can tell two candidates of a request apart."""
        fields = [self._own(field) for field in self.candidate_fields]
        return any(fields) or (self.with_history and bool(self.matched_fields or self.vector_fields))

    @property
    def kinds(self) -> list[str]:
        """XGBoost's feature types."""
        return [column.kind for column in self.columns]

    def _own(self, field: Field) -> Column | None:
        """The column that a field is by itself, if it is one."""
        if field.form == "dense":
            return Column(field.name, "q")
        if field.form == "ids":
            return Column(f"{field.name}.count", "q")
        small = field.form == "id" and field.num_rows - FIRST_ROW <= self.max_categories
        return Column(field.name, "c") if small else None

    def _of_history(self) -> list[Column]:
        if not self.with_history:
            return []
        columns = [Column("history.length", "q")]
        for field in self.matched_fields:
            columns += [Column(f"history.{field.name}.matches", "q"), Column(f"history.{field.name}.since", "q")]
            columns += [Column(f"history.{field.name}.last.{event.name}", "c" if event.form == "id" else "q")
                        for event in self.event_fields]
        return columns + [Column(f"history.{field.name}.cosine", "q") for field in self.vector_fields]

    def table(self, batch: Batch) -> np.ndarray:
        """rows_RF, float32: a row for each candidate that is there, request by request, NaN where nothing is known."""
        found = self._fields(batch.user, self.request_fields, per_request=True)
        found |= self._fields(batch.item, self.candidate_fields, per_request=False)
        if self.with_history:
            found["history.length"] = batch.history_mask_QL.sum(1, keepdim=True)
            for field in self.matched_fields:
                found |= self._matches(batch, field)
            for field in self.vector_fields:
                found[f"history.{field.name}.cosine"] = _cosine_with_history(batch, field)
        shape = batch.mask_QC.shape
        picked = [found[column.name].expand(shape)[batch.mask_QC].float() for column in self.columns]
        return torch.stack(picked, 1).cpu().numpy()

    def _fields(self, values: Mapping[str, Tensor], fields: Sequence[Field], *, per_request: bool) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for field in fields:
            if column := self._own(field):
                own = _value(values[field.name], field)
                found[column.name] = own[:, None] if per_request else own
        return found

    def _matches(self, batch: Batch, field: Field) -> dict[str, Tensor]:
        """Columns [Q, C] of the events that share a value of a field with the candidate."""
        name = f"history.{field.name}"
        same_QCL = _same_values(batch.item[field.name], batch.history[field.name]) & batch.history_mask_QL[:, None]
        found = {f"{name}.matches": same_QCL.sum(-1)}
        matched_QC = same_QCL.any(-1)
        # A column of its own at the end stands for "no event"; it also serves histories of no length.
        after_QL = functional.pad(_events_after(batch.history_mask_QL).float(), (0, 1), value=torch.inf)
        after_QCL = torch.where(functional.pad(same_QCL, (0, 1), value=True), after_QL[:, None], torch.inf)
        since_QC, last_QC = after_QCL.min(-1)
        found[f"{name}.since"] = torch.where(matched_QC, since_QC, torch.nan)
        for event in self.event_fields:
            values_QL = functional.pad(_value(batch.history[event.name], event).float(), (0, 1), value=torch.nan)
            found[f"{name}.last.{event.name}"] = torch.where(matched_QC, values_QL.gather(1, last_QC), torch.nan)
        return found


def _value(values: Tensor, field: Field) -> Tensor:
    """A number for each value of a field: itself, the place in the vocabulary, or how many values there are."""
    if field.form == "dense":
        return values.float()
    if field.form == "ids":
        return (values != PADDING).sum(-1).float()
    return torch.where(values >= FIRST_ROW, values - FIRST_ROW, torch.nan).float()


def _same_values(candidates: Tensor, events: Tensor) -> Tensor:
    """[Q, C, L] whether a candidate [Q, C] or [Q, C, V] and an event [Q, L] or [Q, L, V] share a known value."""
    candidates = candidates if candidates.ndim == 3 else candidates[:, :, None]
    events = events if events.ndim == 3 else events[:, :, None]
    same_QCL = torch.zeros(*candidates.shape[:2], events.shape[1], dtype=torch.bool, device=candidates.device)
    for values_QC in candidates.unbind(2):
        equal_QCLV = values_QC[:, :, None, None] == events[:, None]
        same_QCL |= equal_QCLV.any(-1) & (values_QC >= FIRST_ROW)[:, :, None]
    return same_QCL


def _events_after(mask_QL: Tensor) -> Tensor:
    """How many valid events stand behind each place [Q, L]."""
    return mask_QL.sum(1, keepdim=True) - mask_QL.cumsum(1)


def _cosine_with_history(batch: Batch, field: Field) -> Tensor:
    """[Q, C] cosine of the candidates' vectors with the mean vector of the history; NaN where either is zero."""
    mean_Q1D = masked_mean(batch.history[field.name].float(), batch.history_mask_QL)[:, None]
    vectors_QCD = batch.item[field.name].float()
    norms_QC = vectors_QCD.norm(dim=-1) * mean_Q1D.norm(dim=-1)
    return torch.where(norms_QC > 0, (vectors_QCD * mean_Q1D).sum(-1) / norms_QC, torch.nan)

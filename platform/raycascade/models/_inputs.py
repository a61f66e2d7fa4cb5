"""From batch to vectors: the embedding tables and projections of a `FeatureSpace`.

One table per vocabulary: fields that name the same `Field.table` share it, on whichever side they stand. Ids stay int64
up to the lookup. A side of a batch takes one lookup for all its id fields, whatever their number.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.errors import ConfigError
from raycascade.models._layers import linear, masked_mean
from raycascade.models._tables import JoinedTables
from raycascade.plugins import PluginConfig
from raycascade.schema import PADDING, FeatureSpace, Field

DenseMode = Literal["raw", "field"]


class InputOptions(PluginConfig):
    """Options of every model that embeds: `dim` is the width of an embedding. `dense: raw` gives a model the number,
    `field` a vector x v + c as wide as an embedding."""

    dim: int = Option(default=16, ge=1)
    dense: DenseMode = "raw"
    embedding_std: float = Option(default=0.05, gt=0)


class FieldInputs(nn.Module):
    """Vectors of the fields of a space, and their usual groupings.

    id: E[row]; ids: the mean (or sum, `Field.pool`) of E over the values there are, else zero; vector: W x + b; dense:
    x itself (width 1) or x v + c. Embeddings have width `dim` and start from N(0, embedding_std), v from
    N(0, dense_std) where it is given. ConfigError without a candidate field.
    """

    _anchor: Tensor

    def __init__(
        self, options: InputOptions, space: FeatureSpace, *, model: str, dense_std: float | None = None
    ) -> None:
        super().__init__()
        self.dim, self.dense = options.dim, options.dense
        self.request_fields = space.of("request")
        self.item_fields = space.of("item")
        self.candidate_fields = space.of("item", "pair")
        self.event_fields = space.of("event")
        self.history_fields = tuple(f for f in self.item_fields if f.name in space.history_fields)
        if not self.candidate_fields:
            raise ConfigError(f"{model}: no feature of the candidates is left; exclude fewer features from the stage")
        looked_up = any(f.table for f in space.fields)
        self.tables = JoinedTables(space.fields, options.dim, std=options.embedding_std) if looked_up else None
        self.projections = nn.ModuleDict(
            {_key(f.name): linear(f.width, options.dim, wide=True) for f in space.fields if f.form == "vector"})
        names = [f.name for f in space.fields if f.form == "dense"] if options.dense == "field" else []
        self._dense_row = {name: row for row, name in enumerate(names)}
        shape = (2, len(names), options.dim)  # slopes v, offsets c
        stds = torch.tensor([dense_std or options.embedding_std, options.embedding_std])
        self.dense_vectors = nn.Parameter(torch.randn(shape) * stds[:, None, None]) if names else None
        self.register_buffer("_anchor", torch.zeros(0), persistent=False)  # follows the module's device and dtype

    # ---- any fields
    def width(self, fields: Sequence[Field]) -> int:
        """Width of `matrix` for these fields."""
        return sum(1 if f.form == "dense" and self.dense == "raw" else self.dim for f in fields)

    def matrix(self, values: Mapping[str, Tensor], fields: Sequence[Field], leading: Sequence[int]) -> Tensor:
        """The fields' vectors side by side [*leading, width]; `leading` matters where there is no field."""
        if not fields:
            return self._anchor.new_zeros(*leading, 0)
        forms = {f.form: [g for g in fields if g.form == f.form] for f in fields}
        blocks = {form: self._block(values, listed) for form, listed in forms.items()}
        if len(blocks) == 1:
            return next(iter(blocks.values()))
        used, pieces = dict.fromkeys(blocks, 0), []
        for form, run in groupby(fields, key=lambda f: f.form):  # fields stay in the order of the schema
            start = used[form]
            used[form] += self.width(list(run))
            pieces.append(blocks[form][..., start:used[form]])
        return torch.cat(pieces, -1)

    def _block(self, values: Mapping[str, Tensor], fields: Sequence[Field]) -> Tensor:
        """Vectors of fields of one form side by side [..., width]."""
        if fields[0].form == "dense":
            return self._of_numbers(torch.stack([values[f.name].to(self._anchor.dtype) for f in fields], -1), fields)
        if fields[0].form == "vector":
            return torch.cat([self.projections[_key(f.name)](values[f.name].to(self._anchor.dtype)) for f in fields],
                             -1)
        assert self.tables is not None
        if fields[0].form == "id":
            return self.tables(self.tables.single_rows(values, fields)).flatten(-2)
        slots = [values[f.name] for f in fields]
        vectors = self.tables(self.tables.listed_rows(values, fields)).split([slot.shape[-1] for slot in slots], -2)
        pooled = []
        for field, slot, each in zip(fields, slots, vectors, strict=True):  # padding is zero: the sum needs no mask
            count = 1 if field.pool == "sum" else (slot != PADDING).sum(-1, keepdim=True).clamp(min=1)
            pooled.append(each.sum(-2) / count)
        return torch.cat(pooled, -1)

    def _of_numbers(self, x: Tensor, fields: Sequence[Field]) -> Tensor:
        """Numbers [..., m] as they are, or x v + c of each [..., m k]."""
        if self.dense_vectors is None:
            return x
        slopes_MK, offsets_MK = self.dense_vectors[:, [self._dense_row[f.name] for f in fields]]
        return torch.addcmul(offsets_MK, x.unsqueeze(-1), slopes_MK).flatten(-2)

    # ---- the usual groupings
    def request_matrix(self, batch: Batch, *, history: bool) -> Tensor:
        """User and context fields [Q, d_u], with the mean of the history's columns behind them if `history`."""
        own_QD = self.matrix(batch.user, self.request_fields, (batch.num_requests,))
        if not history or not (self.history_fields or self.event_fields):
            return own_QD
        return torch.cat([own_QD, self.mean_history(batch)], -1)

    def request_width(self, *, history: bool) -> int:
        """Width of `request_matrix`."""
        return self.width(self.request_fields) + (self.history_width + self.event_width if history else 0)

    def candidate_matrix(self, batch: Batch) -> Tensor:
        """Item and pair fields of the candidates [Q, C, d_c]."""
        return self.matrix(batch.item, self.candidate_fields, batch.mask_QC.shape)

    @property
    def candidate_width(self) -> int:
        """Width of `candidate_matrix`."""
        return self.width(self.candidate_fields)

    def history_matrix(self, batch: Batch) -> Tensor:
        """The events' item fields [Q, L, d_h]; arbitrary where masked."""
        return self.matrix(batch.history, self.history_fields, batch.history_mask_QL.shape)

    @property
    def history_width(self) -> int:
        """Width of `history_matrix`."""
        return self.width(self.history_fields)

    def event_matrix(self, batch: Batch) -> Tensor:
        """What events carry besides item fields (action, age) [Q, L, d_g]; arbitrary where masked."""
        return self.matrix(batch.history, self.event_fields, batch.history_mask_QL.shape)

    @property
    def event_width(self) -> int:
        """Width of `event_matrix`."""
        return self.width(self.event_fields)

    def mean_history(self, batch: Batch) -> Tensor:
        """Mean over the valid events of all their fields [Q, d_h + d_g]; zero for an empty history."""
        events = (*self.history_fields, *self.event_fields)
        return masked_mean(self.matrix(batch.history, events, batch.history_mask_QL.shape), batch.history_mask_QL)

    def as_event(self, candidates_QCD: Tensor) -> Tensor:
        """The columns of `candidate_matrix` that an event of the history has too, in its order [Q, C, d_h]."""
        widths = [self.width([f]) for f in self.candidate_fields]
        columns = dict(zip((f.name for f in self.candidate_fields), candidates_QCD.split(widths, -1), strict=True))
        return torch.cat([columns[f.name] for f in self.history_fields], -1)


def _key(name: str) -> str:
    """A module's name for a feature's: without dots, and never the name of an attribute ("type", "items")."""
    return f"of:{name.replace('.', '/')}"

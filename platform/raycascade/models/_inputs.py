"""From batch to vectors: the embedding tables and projections of a `FeatureSpace`.

One table per vocabulary: fields that name the same `Field.table` share it, on whichever side they stand. Row 0 of every
table is zero and never trained. Ids stay int64 up to the lookup.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.errors import ConfigError
from raycascade.models._layers import linear, masked_mean
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
    x itself (width 1) or x v + c. Embeddings have width `dim` and start from N(0, embedding_std). ConfigError without a
    candidate field.
    """

    _anchor: Tensor

    def __init__(self, options: InputOptions, space: FeatureSpace, *, model: str) -> None:
        super().__init__()
        self.dim, self.dense = options.dim, options.dense
        self.request_fields = space.of("request")
        self.item_fields = space.of("item")
        self.candidate_fields = space.of("item", "pair")
        self.event_fields = space.of("event")
        self.history_fields = tuple(f for f in self.item_fields if f.name in space.history_fields)
        if not self.candidate_fields:
            raise ConfigError(f"{model}: no feature of the candidates is left; exclude fewer features from the stage")
        self.tables = _tables(space.fields, options)
        self.projections = nn.ModuleDict(
            {_key(f.name): linear(f.width, options.dim) for f in space.fields if f.form == "vector"})
        names = [f.name for f in space.fields if f.form == "dense"] if options.dense == "field" else []
        self._dense_row = {name: row for row, name in enumerate(names)}
        shape = (2, len(names), options.dim)  # slopes v, offsets c
        self.dense_vectors = nn.Parameter(torch.randn(shape) * options.embedding_std) if names else None
        self.register_buffer("_anchor", torch.zeros(0), persistent=False)  # follows the module's device and dtype

    # ---- any fields
    def width(self, fields: Sequence[Field]) -> int:
        """Width of `matrix` for these fields."""
        return sum(1 if f.form == "dense" and self.dense == "raw" else self.dim for f in fields)

    def vectors(self, values: Mapping[str, Tensor], fields: Sequence[Field]) -> list[Tensor]:
        """One [..., width] per field, in the order given; all values share their leading shape. One lookup a table."""
        found: dict[str, Tensor] = {}
        for table in dict.fromkeys(f.table for f in fields if f.form in ("id", "ids")):
            found |= self._embedded(values, [f for f in fields if f.table == table])
        for field in fields:
            if field.form == "dense":
                found[field.name] = self._dense(values[field.name].to(self._anchor.dtype), field)
            elif field.form == "vector":
                found[field.name] = self.projections[_key(field.name)](values[field.name].to(self._anchor.dtype))
        return [found[f.name] for f in fields]

    def matrix(self, values: Mapping[str, Tensor], fields: Sequence[Field], leading: Sequence[int]) -> Tensor:
        """The vectors side by side [*leading, width]; `leading` matters where there is no field."""
        if not fields:
            return self._anchor.new_zeros(*leading, 0)
        return torch.cat(self.vectors(values, fields), -1)

    def stack(self, values: Mapping[str, Tensor], fields: Sequence[Field]) -> Tensor:
        """The vectors one below the other [..., m, dim], for models that compare fields; needs `dense: field`."""
        return torch.stack(self.vectors(values, fields), -2)

    def _embedded(self, values: Mapping[str, Tensor], sharing: Sequence[Field]) -> dict[str, Tensor]:
        """Vectors of fields that share one table."""
        slots = [values[f.name] if f.form == "ids" else values[f.name].unsqueeze(-1) for f in sharing]
        rows = slots[0] if len(slots) == 1 else torch.cat(slots, -1)
        embedded = self.tables[_key(sharing[0].table)](rows).split([s.shape[-1] for s in slots], -2)
        found: dict[str, Tensor] = {}
        for field, slot, vectors in zip(sharing, slots, embedded, strict=True):
            if field.form == "id":
                found[field.name] = vectors.squeeze(-2)
            else:  # the padding row is zero, so the sum needs no mask
                total = vectors.sum(-2)
                count = 1 if field.pool == "sum" else (slot != PADDING).sum(-1, keepdim=True).clamp(min=1)
                found[field.name] = total / count
        return found

    def _dense(self, x: Tensor, field: Field) -> Tensor:
        if self.dense_vectors is None:
            return x.unsqueeze(-1)
        slope, offset = self.dense_vectors[:, self._dense_row[field.name]]
        return torch.addcmul(offset, x.unsqueeze(-1), slope)

    # ---- the usual groupings
    def request_matrix(self, batch: Batch, *, history: bool) -> Tensor:
        """User and context fields [Q, d_u], with the mean of the history's columns behind them if `history`."""
        own_QD = self.matrix(batch.user, self.request_fields, (batch.num_requests,))
        return torch.cat([own_QD, self.mean_history(batch)], -1) if history else own_QD

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


def _tables(fields: Sequence[Field], options: InputOptions) -> nn.ModuleDict:
    tables = nn.ModuleDict()
    for field in fields:
        if field.form in ("id", "ids") and _key(field.table) not in tables:
            tables[_key(field.table)] = embedding_table(field.num_rows, options.dim, std=options.embedding_std)
    return tables


def embedding_table(num_rows: int, dim: int, *, std: float) -> nn.Embedding:
    """A table with sparse gradients, drawn from N(0, std); row 0 is zero and stays so."""
    table = nn.Embedding(num_rows, dim, padding_idx=PADDING, sparse=True)
    with torch.no_grad():
        table.weight.normal_(0.0, std) if std else table.weight.zero_()
        table.weight[PADDING].zero_()
    return table


def _key(name: str) -> str:
    """A module's name for a feature's: without dots, and never the name of an attribute ("type", "items")."""
    return f"of:{name.replace('.', '/')}"

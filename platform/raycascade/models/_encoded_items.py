"""Candidates whose share of a score is a function of the item alone: computed once a catalogue, kept, and gathered."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raycascade.batch import Batch
from raycascade.item_cache import ItemCache
from raycascade.items import ItemTable
from raycascade.models._model import TorchModel
from raycascade.schema import FIRST_ROW

ITEM_CHUNK = 16_384  # items encoded at once


class ItemEncodingModel(TorchModel):
    """A model that scores candidates from what it has encoded of their items; there is no other path.

    What is encoded may come from the batch's item fields (training, items that are new) or from a cache.
    """

    @abstractmethod
    def encode_items(
        self, item: Mapping[str, Tensor], leading: Sequence[int], mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Tensors [*leading, ...] by name from item-side fields of that leading shape; `mask` [*leading] says which
        entries are real, for statistics of a batch. Numbers may be rounded to float16 in between, ids must not."""

    @abstractmethod
    def score_encoded(self, state: Any, encoded: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Logits [Q, C, T] from the request's state and encoded items [Q, C, ...]; of the batch it reads the
        candidates' rows and mask alone."""

    def score_candidates(self, state: Any, batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        return self.score_encoded(state, self.encode_items(batch.item, batch.mask_QC.shape, batch.mask_QC), batch)


@torch.no_grad()
def encode_catalogue(
    model: ItemEncodingModel, items: ItemTable, names: tuple[str, ...], *, chunk: int = ITEM_CHUNK
) -> Iterator[dict[str, Tensor]]:
    """What the model encodes of every item, in pieces of [N + 2, ...] by item row, from the item fields `names`, which
    must not change with time, and the exact ids of their values. The model must be in evaluation mode."""
    assert not model.training, "a cache holds what the model says when it serves"
    for start in range(0, len(items.all_rows) + FIRST_ROW, chunk):
        rows = np.arange(start, min(start + chunk, len(items.all_rows) + FIRST_ROW))
        yield model.encode_items(items.fields(rows, 0, names=items.with_keys(names)), rows.shape)


def score_from_cache(
    model: ItemEncodingModel, state: Any, batch: Batch, cache: ItemCache, items: ItemTable, names: tuple[str, ...]
) -> Tensor:
    """Logits [Q, C, T] of a batch's candidates, whose item side is not read: their items come from the cache, and those
    that it does not hold are encoded from their fields `names`."""
    like = next(model.parameters())
    encoded, missing_QC = cache.gather(batch.candidates_QC, batch.mask_QC, like=like)
    if missing_QC.any():
        rows_M = batch.candidates_QC[missing_QC.cpu()]
        gathered = items.fields(rows_M, 0, names=items.with_keys(names))
        fields = {name: values.to(like.device) for name, values in gathered.items()}
        fresh = model.encode_items(fields, rows_M.shape)
        for name, values in encoded.items():
            values[missing_QC] = fresh[name].to(values.dtype)
    return model.score_encoded(state, encoded, batch)

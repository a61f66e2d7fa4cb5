"""Candidates whose share of a score is a function of the item alone: computed once a catalogue, kept, and gathered."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raycascade.batch import Batch
from raycascade.items import ItemTable
from raycascade.models._model import TorchModel

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
def encode_catalogue(model: ItemEncodingModel, items: ItemTable, *, chunk: int = ITEM_CHUNK) -> dict[str, np.ndarray]:
    """What the model encodes of every item, arrays [N + 2, ...] by item row: float16, and int64 for ids.

    Fields that change with time are those of the end of the training log. The model must be in evaluation mode.
    """
    assert not model.training, "a cache holds what the model says when it serves"
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, len(items.all_rows) + 2, chunk):
        rows = np.arange(start, min(start + chunk, len(items.all_rows) + 2))
        encoded = model.encode_items(items.fields(rows, items.state.as_of_ms), rows.shape)
        parts.append({name: _kept(values) for name, values in encoded.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def gather_items(cache: Mapping[str, np.ndarray], rows_QC: Tensor, *, like: Tensor) -> dict[str, Tensor]:
    """Encoded items [Q, C, ...] of item rows, numbers in the type of `like`, everything on its device."""
    rows = rows_QC.cpu().numpy()
    picked = {name: torch.from_numpy(np.take(values, rows, axis=0)) for name, values in cache.items()}
    return {name: values.to(like.device, like.dtype if values.is_floating_point() else None)
            for name, values in picked.items()}


def _kept(values: Tensor) -> np.ndarray:
    return values.cpu().half().numpy() if values.is_floating_point() else values.cpu().numpy()

"""Plug-ins that score candidates. Each file is one model: `model: {name: din, hidden: [64, 32]}`.

Every torch model is split: `encode_request` does all that depends on the request alone (once per request), and
`score_candidates` the rest. `forward` is their composition and there is no other code path.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from raycascade.batch import Batch


class StageModel(Protocol):
    """Scores every candidate of every request."""

    def __call__(self, batch: Batch) -> Tensor:
        """Logits [Q, C, T], float32. Masked candidates get arbitrary finite logits."""
        ...

    def train_outputs(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Logits, and auxiliary losses by name (most models have none)."""
        ...

    def silence(self) -> None:
        """Makes a new model's logits equal, where it can: a stage with a prior starts as the stage before it."""
        ...

    def explain(self, batch: Batch) -> Mapping[str, Tensor]:
        """Attention weights and gates, for tests and debugging."""
        ...


class FittedModel(StageModel, Protocol):
    """A model without gradients: fitted at once before the others train, and frozen while they do."""

    def to_files(self) -> dict[str, bytes]:
        """Everything fitted, as file contents by name; no pickle."""
        ...

    def from_files(self, files: Mapping[str, bytes]) -> None:
        """The inverse of `to_files`; RuntimeError where the files do not fit the model."""
        ...


class TowerModel(StageModel, Protocol):
    """A model whose score is a product of a user and an item vector, so that items can be indexed."""

    def embed_users(self, batch: Batch) -> Tensor:
        """users_QD; ordering items by users_QD @ items_ND.T orders them by the model's score."""
        ...

    def embed_items(self, item: Mapping[str, Tensor]) -> Tensor:
        """items_ND from item-side fields [N, ...] (`ItemTable.fields`)."""
        ...

    def to_logits(self, products: Tensor) -> Tensor:
        """The scores that belong to products of user and item vectors: a rising function, the same for all items."""
        ...

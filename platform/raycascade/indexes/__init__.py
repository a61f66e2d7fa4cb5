"""Plug-ins that find the nearest items of a user vector. Each file is one index: `index: {name: ivf}`."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Candidates:
    """The k best items of each user, best first. Where there are fewer than k, `rows_QK` is 0 and scores -inf."""

    rows_QK: np.ndarray  # item rows, int64
    scores_QK: np.ndarray  # inner products, float32


class ItemIndex(Protocol):
    """Inner-product search over item vectors."""

    def build(self, rows_N: np.ndarray, vectors_ND: np.ndarray) -> None:
        """Replaces the content."""
        ...

    def search(self, users_QD: np.ndarray, k: int) -> Candidates:
        """The k items of the largest inner product with each user vector."""
        ...

    def save(self, uri: str) -> None:
        """Writes the index into a folder (storage URI)."""
        ...

    def load(self, uri: str) -> None:
        """The inverse of `save`."""
        ...

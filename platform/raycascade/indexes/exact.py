"""Exact search: every item is compared. The reference for the others, and fast enough up to about a million items."""

from typing import Any

import faiss
import numpy as np

from raycascade.indexes._faiss import FaissIndex, exact_scores
from raycascade.plugins import PluginConfig

MARGIN = 16  # items taken beyond the k-th, so that rounding in single precision cannot cost the k-th its place


class Exact(FaissIndex):
    """The true top k; a user's answer is bitwise the same in any batch of users."""

    name = "exact"

    class Config(PluginConfig):
        """Nothing to choose."""

    def _make(self, num_items: int, dim: int) -> Any:
        return faiss.IndexFlatIP(dim)

    def _nearest(self, users_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        _, positions_QK = self._faiss_search(users_QD, min(k + MARGIN, self._index.ntotal))
        vectors_ND = faiss.rev_swig_ptr(self._index.get_xb(), self._index.ntotal * self._index.d)
        return exact_scores(vectors_ND.reshape(-1, self._index.d), users_QD, positions_QK), positions_QK

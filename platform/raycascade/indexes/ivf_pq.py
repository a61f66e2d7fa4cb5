"""Inverted lists of compressed vectors: the smallest index in memory, for catalogues of many million items."""

from typing import Any

import faiss
import numpy as np
from pydantic import Field as Option

from raycascade.errors import ConfigError
from raycascade.indexes._faiss import FaissIndex, exact_scores, inverted_lists, probes
from raycascade.plugins import PluginConfig

CODEBOOK = 256  # one byte per sub-vector; with fewer items there is nothing to train it on


class IvfPq(FaissIndex):
    """Product-quantised residuals in inverted lists (Jegou et al., TPAMI 2011), re-ranked with the full vectors.

    The full vectors lie beside the index; after loading from a local disk they are memory-mapped and only the re-ranked
    ones are read. With fewer than 256 items the vectors are searched uncompressed.
    """

    name = "ivf_pq"

    class Config(PluginConfig):
        """Lists to make and to visit, bytes per item, and how many times k items are re-ranked exactly."""

        num_lists: int | None = Option(default=None, ge=1)  # None: about 4 sqrt(N)
        num_probes: int | None = Option(default=None, ge=1)  # None: an eighth of the lists, at least 8
        code_bytes: int | None = Option(default=None, ge=1)  # None: half the width of the vectors
        refine: int = Option(default=4, ge=0)  # 0: no re-ranking, no full vectors kept, scores are approximate

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config

    def _make(self, num_items: int, dim: int) -> Any:
        code_bytes = self._code_bytes(dim)
        if num_items < CODEBOOK:
            return faiss.IndexFlatIP(dim)
        num_lists = inverted_lists(num_items, self.config.num_lists)
        quantizer = faiss.IndexFlatIP(dim)
        index = faiss.IndexIVFPQ(quantizer, dim, num_lists, code_bytes, 8, faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1  # few items: no reason to warn
        return index

    def _tune(self, index: Any) -> None:
        if hasattr(index, "nlist"):
            index.nprobe = probes(index.nlist, self.config.num_probes)

    def _keeps_vectors(self) -> bool:
        return self.config.refine > 0

    def _nearest(self, users_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self._vectors_ND is None:
            return self._faiss_search(users_QD, k)
        _, positions_QK = self._faiss_search(users_QD, min(k * self.config.refine, self._index.ntotal))
        return exact_scores(self._vectors_ND, users_QD, positions_QK), positions_QK

    def _code_bytes(self, dim: int) -> int:
        divisors = [number for number in range(1, dim + 1) if dim % number == 0]
        asked = self.config.code_bytes
        if asked is None:
            return max(number for number in divisors if number <= max(1, dim // 2))
        if asked not in divisors:
            raise ConfigError(f"index.code_bytes: {asked} does not divide the {dim} numbers of a vector; "
                              f"take one of {', '.join(map(str, divisors))}")
        return asked

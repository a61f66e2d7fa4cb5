"""A navigable graph over the items: fast single searches at high recall, slower to build, CPU only."""

from typing import Any

import faiss
import numpy as np
from pydantic import Field as Option

from raycascade.indexes._faiss import FaissIndex
from raycascade.plugins import PluginConfig


class Hnsw(FaissIndex):
    """Hierarchical navigable small worlds (Malkov and Yashunin, arXiv:1603.09320) with the inner product."""

    name = "hnsw"
    has_gpu_form = False

    class Config(PluginConfig):
        """The graph's width and how far its building and its searches look around."""

        links: int = Option(default=32, ge=2)
        ef_construction: int = Option(default=200, ge=1)
        ef_search: int = Option(default=128, ge=1)  # a search for more than that many items looks that far
        deterministic: bool = True  # links are found on one thread; false: on all, and no two builds are the same

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config

    def _make(self, num_items: int, dim: int) -> Any:
        index = faiss.IndexHNSWFlat(dim, self.config.links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = self.config.ef_construction
        return index

    def _tune(self, index: Any) -> None:
        index.hnsw.efSearch = self.config.ef_search

    def _fill(self, index: Any, vectors_ND: np.ndarray) -> Any:
        threads = faiss.omp_get_max_threads()
        try:
            if self.config.deterministic:
                faiss.omp_set_num_threads(1)
            return super()._fill(index, vectors_ND)
        finally:
            faiss.omp_set_num_threads(threads)

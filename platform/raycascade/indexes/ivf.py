"""Inverted lists: k-means cells over the items; a search visits the cells nearest to the user."""

from typing import Any

import faiss
from pydantic import Field as Option

from raycascade.indexes._faiss import FaissIndex, inverted_lists, probes
from raycascade.plugins import PluginConfig


class Ivf(FaissIndex):
    """Full vectors in inverted lists (Sivic and Zisserman, Video Google, ICCV 2003; FAISS IndexIVFFlat).

    The automatic options suit vectors that cluster, as trained ones do; vectors without structure need more probes.
    """

    name = "ivf"

    class Config(PluginConfig):
        """Lists to make and lists to visit; more visits: higher recall, slower."""

        num_lists: int | None = Option(default=None, ge=1)  # None: about 4 sqrt(N)
        num_probes: int | None = Option(default=None, ge=1)  # None: an eighth of the lists, at least 8

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config

    def _make(self, num_items: int, dim: int) -> Any:
        num_lists = inverted_lists(num_items, self.config.num_lists)
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, num_lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 1  # few items are no reason to warn
        return index

    def _tune(self, index: Any) -> None:
        index.nprobe = probes(index.nlist, self.config.num_probes)

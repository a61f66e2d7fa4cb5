"""The candidates of logged requests: which of them a training list takes, and in what order."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raycascade.keys import Vocabulary, fold, to_keys
from raycascade.ragged import Ragged, parallel_lists
from raycascade.schema import FIRST_ROW


@dataclass(frozen=True)
class Lists:
    """All candidates of some requests one after the other, and the request that each belongs to."""

    owner_C: np.ndarray
    items: pa.Array
    reached_C: np.ndarray
    rank_C: np.ndarray
    exposed_C: np.ndarray
    num_requests: int

    @classmethod
    def of(cls, table: pa.Table, *, where: str) -> "Lists":
        """The candidates of a table of the log."""
        lists = Ragged.from_arrow(table["candidates"])
        reached, rank, exposed = (
            parallel_lists(table, name, lists, "candidates", where=where).values.to_numpy(zero_copy_only=False)
            for name in ("reached", "rank", "exposed"))
        owner_C = np.repeat(np.arange(len(table)), lists.lengths_Q)
        return cls(owner_C, lists.values, reached, rank, exposed.astype(bool), len(table))

    def without(self, left_out_C: np.ndarray) -> "Lists":
        """Without some candidates."""
        return self._taken(np.flatnonzero(~left_out_C))

    def unknown(self, catalogue: Vocabulary) -> np.ndarray:
        """Which candidates the catalogue does not have."""
        return catalogue.lookup(self.items) < FIRST_ROW

    def sampled(self, request_ids: "pa.Array | pa.ChunkedArray", per_level: int | None) -> "Lists":
        """All that was shown and at most so many others of each level, in an order that tells nothing: both by a hash
        of request and item, so that every run takes the same."""
        drawn_C = fold([to_keys(request_ids)[self.owner_C], to_keys(self.items)])
        kept_C = np.ones(len(drawn_C), bool)
        if per_level is not None:
            order = np.lexsort((drawn_C, self.exposed_C, self.reached_C, self.owner_C))
            group = np.stack([part[order] for part in (self.owner_C, self.reached_C, self.exposed_C)])
            begins = np.ones(len(order), bool)
            begins[1:] = (group[:, 1:] != group[:, :-1]).any(axis=0)
            places = np.arange(len(order))
            kept_C[order] = places - np.maximum.accumulate(np.where(begins, places, 0)) < per_level
            kept_C |= self.exposed_C
        at = np.flatnonzero(kept_C)
        return self._taken(at[np.lexsort((drawn_C[at], self.owner_C[at]))])

    def relevance(self, labels: Mapping[str, pa.Array], gains: Mapping[str, float]) -> np.ndarray:
        """The level reached, then the rank within it, plus what feedback adds."""
        relevance_C = self.reached_C + np.where(self.rank_C > 0, 1.0 / (1.0 + np.maximum(self.rank_C, 1)), 0.0)
        for name, gain in gains.items():
            relevance_C = relevance_C + gain * labels[name].fill_null(0).to_numpy(zero_copy_only=False)
        return relevance_C.astype(np.float32)

    def column(self, values: "pa.Array | np.ndarray") -> pa.Array:
        """A list column of one value for each candidate."""
        lengths_Q = np.bincount(self.owner_C, minlength=self.num_requests)
        return Ragged(values if isinstance(values, pa.Array) else pa.array(values), lengths_Q).to_arrow()

    def _taken(self, at: np.ndarray) -> "Lists":
        return Lists(self.owner_C[at], self.items.take(pa.array(at)), self.reached_C[at], self.rank_C[at],
                     self.exposed_C[at], self.num_requests)

"""Plug-ins that turn a raw log into the canonical form. Each file is one dataset: `dataset: {name: kuairand}`.

Raw canonical tables, all with the log's own ids (integers or strings), nothing encoded:

items: `item_id`, one column per item feature; vectors as lists of floats. One row per catalogue item.

form "requests": `request_id`, `user_id`, `time_ms`, user and context features, `history` (item ids, oldest first),
optional `history_time_ms` and one `history_<name>` list per feature of side event, `candidates` (item ids), and lists
parallel to it: optional `reached` (0 = sampled, then one level per stage survived), `rank` (1-based within the level,
0 = unknown), `exposed` (bool, default true: counts as an exposure), one list per label; optional `relevance` (graded)
and `exclude` (item ids that must not be recommended).

form "impressions": one row per shown item: `user_id`, `time_ms`, `item_id`, optional `request_id`, user and context
features, one column per label and per event feature. `_impressions.py` groups them into requests, with the user's
earlier impressions as the history.
"""

from collections.abc import Iterator
from typing import Literal, Protocol

import pyarrow as pa

from raycascade.schema import FeatureSchema


class Dataset(Protocol):
    """What `prepare` needs of a raw log. The constructor takes the plug-in's options and `raw`, the folder."""

    form: Literal["requests", "impressions"]

    def schema(self) -> FeatureSchema:
        """Features and labels."""
        ...

    def items(self) -> pa.Table:
        """The raw items table."""
        ...

    def slices(self) -> list[str]:
        """Names of independent pieces of the log; each is read by one task, so about 100 MB each."""
        ...

    def read(self, piece: str) -> Iterator[pa.Table]:
        """The rows of one piece in tables of bounded size (at most about 64 MB).

        A dataset may have an attribute `notes`, a Counter: what it found and settled so far, by message. `prepare`
        adds up the notes of all its tasks, prints them and keeps them in the manifest.
        """
        ...


class ImpressionLog(Dataset, Protocol):
    """A dataset of form "impressions" also says how its rows become requests."""

    exclude_seen: bool  # a request must not recommend what its user was shown before
    duplicates: Literal["refuse", "drop"]  # rows that are equal in every column
    gap_minutes: float | None  # so long a silence starts a new request where rows have no id; None: all have one

"""Labels of shown items by the events that followed them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field as Option, model_validator

from raycascade.datasets import _traffic_files as files
from raycascade.datasets._traffic_credit import SHOWN, credited
from raycascade.datasets._traffic_files import TrafficFile
from raycascade.errors import ConfigError
from raycascade.ragged import Ragged
from raycascade.schema import Frozen

LIGHT = ["request_id", "user_id", "time_ms", "candidates", "exposed"]


class EventLabel(Frozen):
    """A label that is 1 for a shown item of which an event says so: its `feature` is one of `values`, or a number above
    `above`, or, with neither, just there; without a `feature` any event counts. 0 for other shown items, null for what
    was not shown."""

    feature: str = ""
    values: tuple[str | int | float | bool, ...] = ()
    above: float | None = Option(default=None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_way(self) -> "EventLabel":
        if self.values and self.above is not None:
            raise ConfigError("values and above exclude each other; keep one of them")
        if (self.values or self.above is not None) and not self.feature:
            raise ConfigError("values and above say nothing without the event's feature; name it")
        return self

    def says(self, features: Mapping[str, object]) -> bool:
        """Whether an event with these features makes the label 1."""
        value = features.get(self.feature)
        if self.above is not None:
            return isinstance(value, int | float) and value > self.above
        if self.values:
            return _text(value) in {_text(one) for one in self.values}
        return value is not None if self.feature else True


def _text(value: object) -> str:
    """Values compare as text: what was sent as 1 or as "1" is the same."""
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Feedback:
    """By label, the shown items of some files that have it: for each file, row and item (as text)."""

    positives: Mapping[str, Mapping[str, set[tuple[int, str]]]]

    @classmethod
    def of(
        cls, raw: str, own: list[TrafficFile], requests: list[TrafficFile], events: list[TrafficFile],
        labels: Mapping[str, EventLabel], window_ms: int,
    ) -> "Feedback":
        """Reads the events that may belong to requests of the files `own`, and the other requests that they may belong
        to instead."""
        first_ms, last_ms = min(file.first_ms for file in own), max(file.last_ms for file in own)
        shown = [_shown(raw, file) for file in own]
        users = pc.unique(pa.chunked_array([part["user_id"].combine_chunks() for part in shown], pa.string()))
        mine = {file.path for file in own}
        others = [_shown(raw, file) for file in requests
                  if file.path not in mine and file.overlaps(first_ms, last_ms + window_ms)]
        others = [part.filter(pc.is_in(part["user_id"], users)) for part in others]
        happened = [_of_users(files.read(raw, file.path), users) for file in events
                    if file.overlaps(first_ms - window_ms, last_ms + window_ms)]
        happened = pa.concat_tables(happened) if happened else files.EVENTS.empty_table()
        row_E = credited(pa.concat_tables([part.select(SHOWN) for part in (*shown, *others)]), happened, window_ms)
        ends = np.cumsum([len(part) for part in shown])
        return cls({name: _positives(own, shown, ends, row_E[says_E])
                    for name, says_E in _said(happened["features"], labels).items()})

    def label(self, name: str, file: str, rows: np.ndarray, items: pa.Array, exposed: np.ndarray) -> pa.Array:
        """0, 1 or null for candidates, given the row of the file and the item of each."""
        held = self.positives[name].get(file, set())
        text = items.cast(pa.string()).to_pylist() if held else []
        values = np.zeros(len(rows), np.int8)
        for place in np.flatnonzero(exposed) if held else ():
            values[place] = (int(rows[place]), text[place]) in held
        return pa.array(values, mask=~exposed)


def _shown(raw: str, file: TrafficFile) -> pa.Table:
    """One row per shown item of a file, ids as text, and the request's row in the file."""
    table = files.read(raw, file.path, LIGHT)
    candidates = Ragged.from_arrow(table["candidates"])
    at = np.flatnonzero(Ragged.from_arrow(table["exposed"]).values.to_numpy(zero_copy_only=False))
    row = np.repeat(np.arange(len(table)), candidates.lengths_Q)[at]
    heads = table.select(["request_id", "user_id", "time_ms"]).take(pa.array(row))
    return pa.table({"request_id": heads["request_id"], "user_id": heads["user_id"].cast(pa.string()),
                     "item_id": candidates.values.take(pa.array(at)).cast(pa.string()), "time_ms": heads["time_ms"],
                     "row": row})


def _of_users(events: pa.Table, users: pa.Array) -> pa.Table:
    return events.filter(pc.is_in(events["user_id"], users))


def _said(column: pa.ChunkedArray, labels: Mapping[str, EventLabel]) -> dict[str, np.ndarray]:
    """For each label which events say it; equal features are looked at once."""
    encoded = column.combine_chunks().dictionary_encode()
    distinct = [json.loads(text) for text in encoded.dictionary.to_pylist()]
    codes = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return {name: np.array([label.says(features) for features in distinct], bool)[codes]
            for name, label in labels.items()}


def _positives(
    own: list[TrafficFile], shown: list[pa.Table], ends: np.ndarray, row_E: np.ndarray
) -> dict[str, set[tuple[int, str]]]:
    """By file, (row, item) of the shown items among rows of all of them together; those of other files are left out."""
    mine = np.unique(row_E[(row_E >= 0) & (row_E < ends[-1])])
    found: dict[str, set[tuple[int, str]]] = {}
    for file, part, end in zip(own, shown, ends, strict=True):
        taken = part.take(pa.array(mine[(mine >= end - len(part)) & (mine < end)] - (end - len(part))))
        found[file.path] = set(zip(taken["row"].to_pylist(), taken["item_id"].to_pylist(), strict=True))
    return found

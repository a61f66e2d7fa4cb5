"""Served requests of the tiny world as records of the traffic log, without a gateway; and files of a log by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raycascade.bundle import Bundle
from raycascade.datasets import _traffic_files as files
from raycascade.datasets._traffic_files import EVENTS
from raycascade.serving.stages import Survivors
from raycascade.serving.traffic_rows import TrafficRecord


def served(bundle: Bundle, raw: pa.Table, *, time_ms: int, request_id: str = "") -> TrafficRecord:
    """What the gateway knows after one request, given as one raw canonical row without a moment."""
    raw = raw.append_column("time_ms", pa.array([time_ms], pa.int64())) if "time_ms" not in raw.column_names else raw
    encoded = bundle.encode(raw)
    survivors = {}
    for stage in bundle.recommend(encoded).stages:
        rows_QK, mask_QK = stage.kept()
        rows_QK = np.where(mask_QK, rows_QK, 0).astype(np.int32)
        survivors[stage.name] = Survivors(rows_QK, stage.scores_QC[:, :rows_QK.shape[1]])
    last = survivors[bundle.cascade.names[-1]].rows_QK[0]
    return TrafficRecord(
        request_id=request_id or f"r-{raw['user_id'][0].as_py()}-{time_ms}", user_id=raw["user_id"][0].as_py(),
        time_ms=time_ms, served_at_ms=time_ms + 5, bundle=bundle, encoded=encoded, raw=raw, survivors=survivors,
        shown_rows=last[last > 1], user_source="store")


def write_requests(folder: Path, rows: Sequence[dict[str, Any]], *, number: int = 0, **more: pa.Array) -> str:
    """A file of hand-made requests: dicts with id, user, ms and levels (deepest first: shown, then ranker, ...)."""
    columns: dict[str, list[Any]] = {name: [] for name in ("candidates", "reached", "rank", "exposed")}
    for row in rows:
        placed = [(item, len(row["levels"]) - depth, place, depth == 0)
                  for depth, level in enumerate(row["levels"]) for place, item in enumerate(level, start=1)]
        for name, values in zip(columns, zip(*placed, strict=True), strict=True):
            columns[name].append(list(values))
    kinds = {"candidates": pa.list_(pa.int64()), "reached": pa.list_(pa.int8()), "rank": pa.list_(pa.int16()),
             "exposed": pa.list_(pa.bool_())}
    table = pa.table({
        "request_id": [row["id"] for row in rows], "user_id": pa.array([row["user"] for row in rows], pa.int64()),
        "time_ms": pa.array([row["ms"] for row in rows], pa.int64()),
        **{name: pa.array(values, kinds[name]) for name, values in columns.items()},
        "served_degraded": [row.get("degraded", False) for row in rows], **more})
    return files.write(str(folder), "requests", table, writer="hand", number=number)


def write_events(folder: Path, rows: Sequence[tuple[Any, ...]], *, number: int = 0) -> str:
    """A file of hand-made events: (user, item, ms, request id or None, features as JSON)."""
    table = pa.Table.from_pylist([
        {"event_id": f"e{number}-{place}", "user_id": str(user), "item_id": str(item), "time_ms": ms,
         "request_id": named, "features": features, "served_at_ms": ms}
        for place, (user, item, ms, named, features) in enumerate(rows)], EVENTS)
    return files.write(str(folder), "events", table, writer="hand", number=number)

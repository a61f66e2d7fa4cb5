"""Parts that RecFlow's tests share: opening a log, and a log of one request by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raycascade import plugins
from tests import recflow_world as world

DAY = "2024-01-13"


def dataset(raw: Path, **options: Any) -> Any:
    plugin, config = plugins.options("datasets", {"name": "recflow", **options}, "dataset")
    return plugin(config, raw=str(raw))


def rows_of(raw: Path, **options: Any) -> pa.Table:
    log = dataset(raw, **options)
    return pa.concat_tables([table for piece in log.slices() for table in log.read(piece)])


def by_id(table: pa.Table) -> dict[int, dict[str, Any]]:
    return {row["request_id"]: row for row in table.to_pylist()}


def one_request(root: Path, stages: dict[str, list[int]], ranks: dict[int, int], *, history: tuple[int, ...] = ()
                ) -> None:
    """Request 17 of user 3 on the first day at 09:41:07 (a Saturday)."""
    time_ms = world.midnight_ms(DAY) + (9 * 60 + 41) * 60_000 + 7_000
    rows = []
    for video in sorted({video for videos in stages.values() for video in videos}):
        row = dict.fromkeys(world.COLUMNS, 0) | {"request_id": 17, "request_timestamp": time_ms, "user_id": 3, "age": 1}
        row |= {"video_id": video, "author_id": video + 50, "category_level_one": 1, "upload_timestamp": 1_700_000_000,
                "duration": 9_000, **{stage: int(video in videos) for stage, videos in stages.items()}}
        rows.append(row | {"rank_index": ranks.get(video, 0)})
    world.write_feather(root / f"all_stage/{DAY}.feather", pa.Table.from_pylist(rows))
    arrays = {stage: np.array([[v, v + 50, 9_000, 0, 0, 1_700_000_000, 1, 0] for v in videos], np.int64).reshape(-1, 8)
              for stage, videos in stages.items()}
    world.write_pickle(root / f"request_id_dict/{DAY}.pkl", {17: arrays})
    past = np.zeros((50, 10), np.int64)
    past[:, 3] = 2
    for place, video in enumerate(history):
        past[50 - len(history) + place] = [video, video + 50, 0, 1, 0, 1_700_000_000, 9_000, time_ms - 99 + place, 1, 5]
    world.write_pickle(root / f"seq_effective_50_dict/{DAY}.pkl", {17: past})


BY_HAND = {"rank_pos": [5, 9, 2], "rank_neg": [7, 5], "prerank_neg": [0]}
RANKS = {5: 3, 9: 1, 2: 20}

"""Clocks of items in the data set `table`: the source is a time like any other, in the log's unit."""

from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv

from raycascade import plugins
from raycascade.fitting import FitPart


def test_an_items_clock_is_read_from_a_column_in_the_unit_of_the_log(tmp_path: Path):
    rows = pa.table({"user_id": [1, 1], "item_id": [5, 6], "time_ms": [1_704_070_000, 1_704_070_001],
                     "request_id": ["a", "a"], "uploaded": [1_704_067_200 + 61 * 60, None], "click": [1, 0]})
    pacsv.write_csv(rows, tmp_path / "log.csv")
    features = [{"kind": "clock", "name": "upload_minute", "part": "minute", "side": "item", "source": "uploaded"},
                {"kind": "clock", "name": "upload_hour", "part": "hour", "side": "item", "source": "uploaded"}]
    plugin, options = plugins.options("datasets", {"name": "table", "log": "*.csv", "time_unit": "s",
                                                   "features": features, "labels": {"click": "click"}}, "dataset")
    log = plugin(options, raw=str(tmp_path))
    items = log.items()
    assert items["uploaded"].to_pylist() == [1_704_067_200_000 + 61 * 60_000, None]
    state = FitPart(log.schema()).finish(items, as_of_ms=0)
    encoded = state.encode_items(items, where="items")
    assert encoded["upload_minute"].to_pylist() == [2 + 1, 1]
    assert encoded["upload_hour"].to_pylist() == [2 + 1, 1]

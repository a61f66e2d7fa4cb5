"""The files of a traffic log: their names and columns, writing and reading. This file owns the format.

    <uri>/requests/<day>/<first ms>-<last ms>-<writer>-<number>.parquet
    <uri>/events/<day>/...

The name says which moments (`time_ms`) a file covers, so that what belongs together is found without opening files. A
file appears whole or not at all, and never changes.

requests: a served request a row, raw and canonical (see `datasets/__init__.py`): `request_id`, `user_id`, `time_ms`,
`candidates` with `reached`, `rank`, `exposed` and `served_score`, `history` and its columns, `exclude`, user and
context features; and how it was served: `served_at_ms`, `served_version`, `served_stages`, `served_degraded`,
`served_user`. Ids have the types of the training log. Of a cascade of S stages, `reached` is the place (1 .. S) of the
deepest stage that let the item through, and S + 1 for what was shown. events: EVENTS, ids as text.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raycascade import storage
from raycascade.errors import DataError

Kind = Literal["requests", "events"]
FORMAT, FORMAT_VERSION = b"raycascade.traffic", b"1"  # in the metadata of every file
LATEST_MS = 253_370_764_800_000  # the year 9999; a later moment counts as that when the day's folder is named
EVENTS = pa.schema({
    "event_id": pa.string(), "user_id": pa.string(), "item_id": pa.string(), "time_ms": pa.int64(),
    "request_id": pa.string(),  # of the answer that showed the item, where the sender knows it
    "features": pa.string(),  # a JSON object
    "served_at_ms": pa.int64(),
})


@dataclass(frozen=True)
class TrafficFile:
    """One file, relative to the log's folder; `first_ms` .. `last_ms` are the earliest and the latest of its rows."""

    path: str
    first_ms: int
    last_ms: int
    num_bytes: int

    def overlaps(self, first_ms: int, last_ms: int) -> bool:
        """Whether a row of the file can lie in a period."""
        return self.first_ms <= last_ms and self.last_ms >= first_ms


def write(uri: str, kind: Kind, rows: pa.Table, *, writer: str, number: int) -> str:
    """Publishes rows as one file and returns its path below `uri`. `writer` and `number` make the name unique."""
    bounds = pc.min_max(rows["time_ms"]).as_py()
    day = datetime.fromtimestamp(min(bounds["min"], LATEST_MS) / 1000, UTC).date().isoformat()
    path = f"{kind}/{day}/{bounds['min']:015d}-{bounds['max']:015d}-{writer}-{number:06d}.parquet"
    sink = pa.BufferOutputStream()
    metadata = {**(rows.schema.metadata or {}), FORMAT: FORMAT_VERSION}
    pq.write_table(rows.replace_schema_metadata(metadata), sink, compression="zstd")
    storage.write_bytes(storage.join(uri, path), sink.getvalue().to_pybytes())
    return path


def find(uri: str, kind: Kind) -> list[TrafficFile]:
    """All files of one kind in order of time; DataError for a Parquet file that has no such name."""
    filesystem, root = storage.resolve(uri)
    selector = pafs.FileSelector(storage.join(root, kind), recursive=True, allow_not_found=True)
    found = [info for info in filesystem.get_file_info(selector)
             if info.type == pafs.FileType.File and info.path.endswith(".parquet")]
    files = [_described(info.path[len(root.rstrip("/")) + 1:], info.size, uri) for info in found]
    return sorted(files, key=lambda file: (file.first_ms, file.path))


def _described(path: str, num_bytes: int, uri: str) -> TrafficFile:
    first, _, rest = path.rpartition("/")[2].partition("-")
    last = rest.partition("-")[0]
    if not (first.isdecimal() and last.isdecimal()):
        raise DataError(f"{uri}: {path} is not a file of a traffic log, whose names begin with two moments; take it "
                        "out of the folder")
    return TrafficFile(path, int(first), int(last), num_bytes)


def schema_of(uri: str, file: str) -> pa.Schema:
    """The columns of a file; DataError as `read`."""
    with _opened(uri, file) as source:
        return source.schema_arrow


def read(uri: str, file: str, columns: "list[str] | None" = None) -> pa.Table:
    """A file, or those of some columns that it has. DataError in one line if it is damaged or of another format."""
    with _opened(uri, file) as source:
        names = source.schema_arrow.names
        return source.read(columns=names if columns is None else [name for name in columns if name in names])


@contextmanager
def _opened(uri: str, file: str) -> Iterator[pq.ParquetFile]:
    filesystem, path = storage.resolve(storage.join(uri, file))
    try:
        with pq.ParquetFile(path, filesystem=filesystem) as source:
            version = (source.schema_arrow.metadata or {}).get(FORMAT, b"none")
            if version != FORMAT_VERSION:
                raise DataError(f"{file}: is of format {version.decode(errors='replace')!r}, this version reads "
                                f"{FORMAT_VERSION.decode()!r}; take it out of the folder")
            yield source
    except FileNotFoundError:
        raise DataError(f"{file}: no such file; check paths.raw") from None
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{file}: cannot be read as Parquet ({reason}); mend the file or take it out of the "
                        "folder") from None

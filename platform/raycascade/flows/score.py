"""score: recommendations for every request of a Parquet table, with Ray Data actors that hold the bundle."""

import hashlib
import json
import math
import time
import uuid
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

import raycascade.errors
from raycascade import storage
from raycascade.bundle import Bundle, load_bundle
from raycascade.errors import DataError, RaycascadeError
from raycascade.flows._cluster import num_cores
from raycascade.keys import to_keys
from raycascade.progress import ProgressLine
from raycascade.serving.requests import checked, needed

MANIFEST = "_manifest.json"  # the leading underscore hides it from readers of Parquet folders
BATCH_ROWS = 256  # requests scored at once
PIECE_ROWS = (256, 32_768)  # fewest and most requests of one task


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one row group: what one task scores and writes into one file."""

    number: int
    file: str  # relative to the requests, or "" where they are one file
    group: int
    start: int  # within the row group
    rows: int
    position: int  # of the first row within the file


def score(uri: str, *, requests: str, out: str) -> dict[str, Any]:
    """Writes one result row per request into the folder `out`; returns {"out", "rows", "seconds"}.

    Requests need `user_id`, and `candidates` (lists of item ids) where the first stage does not search; without
    `request_id` they are named by file and row. Results appear at once when all are there: `request_id, user_id, items
    (best first), scores (the last stage's)`. The same bundle and requests again are recognised as done; an `out` that
    holds anything else is a DataError.
    """
    started = time.monotonic()
    bundle = load_bundle(uri, served=())
    requests, out = storage.absolute(requests), storage.absolute(out)
    files = request_files(requests)
    source = {"bundle": digest(bundle.manifest["files"]),
              "requests": digest({file: storage.sha256(_at(requests, file)) for file in files})}
    if (finished := finished_before(out, source)) is not None:
        return {"out": out, "rows": finished, "seconds": round(time.monotonic() - started, 2)}
    counts = check(bundle, requests, files)
    total = sum(map(sum, counts.values()))
    if total == 0:
        raise DataError(f"{requests}: no rows; give at least one request")
    parent, _, name = out.rstrip("/").rpartition("/")
    work = storage.join(parent, f".{name}.{uuid.uuid4().hex[:12]}")
    try:
        rows = _run(bundle.uri, requests, work, pieces(counts, num_actors=_num_actors(total)))
        assert rows == total, f"{rows} results for {total} requests"
        publish(work, out, {"rows": rows, **source, "model": bundle.uri.rsplit("/", 1)[-1]})
    finally:
        storage.remove_folder(work)
    return {"out": out, "rows": rows, "seconds": round(time.monotonic() - started, 2)}


# ---------------------------------------------------------------- input
def request_files(uri: str) -> list[str]:
    """Parquet files below a folder, relative to it; [""] for one file. Hidden files and folders do not count."""
    filesystem, path = storage.resolve(uri)
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.NotFound:
        raise DataError(f"{uri}: no such file or folder; give a Parquet file or a folder of them")
    if kind == pafs.FileType.File:
        return [""]
    found = [file for file in storage.list_files(uri)
             if file.endswith(".parquet") and not any(part.startswith((".", "_")) for part in file.split("/"))]
    if not found:
        raise DataError(f"{uri}: no .parquet files in this folder; give a Parquet file or a folder of them")
    return found


def check(bundle: Bundle, uri: str, files: list[str]) -> dict[str, list[int]]:
    """Rows of every row group by file, after the door: readable, the right columns, request ids that are unique."""
    counts: dict[str, list[int]] = {}
    first: dict[str, str] = {}
    keys: list[np.ndarray] = []
    for file in files:
        where = _at(uri, file)
        with open_parquet(where) as parquet:
            schema = parquet.schema_arrow
            checked(schema.empty_table(), bundle, where=where)
            if not bundle.cascade.searches and "candidates" not in schema.names:
                stage = bundle.cascade.names[0]
                raise DataError(f"{where}: column 'candidates' is missing; stage {stage!r} searches no catalogue, so "
                                "give every request the list of items to rank")
            kinds = {name: str(schema.field(name).type) for name in needed(schema.names, bundle)}
            first = first or kinds
            if kinds != first:
                raise DataError(f"{where}: columns {kinds} differ from {first} of {_at(uri, files[0])}; "
                                "give files of one schema")
            counts[file] = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            keys += _request_keys(parquet, bundle, where=where)
    _require_unique(keys, uri, files)
    return counts


def open_parquet(uri: str) -> pq.ParquetFile:
    """A Parquet file; DataError if it is not one."""
    filesystem, path = storage.resolve(uri)
    try:
        return pq.ParquetFile(filesystem.open_input_file(path))
    except (pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{uri}: cannot be read as Parquet ({reason}); give Parquet files") from None


def _request_keys(parquet: pq.ParquetFile, bundle: Bundle, *, where: str) -> list[np.ndarray]:
    """The keys of the request ids, if there are any; no user id or request id may be null or of a wrong type."""
    keys, position = [], 0
    names = [name for name in ("user_id", "request_id") if name in parquet.schema_arrow.names]
    for batch in parquet.iter_batches(columns=names):
        table = checked(pa.Table.from_batches([batch]), bundle, where=_from_row(where, position))
        if "request_id" in names:
            column = table["request_id"]
            if column.null_count:
                raise DataError(f"{where}: request_id is null in {column.null_count} rows; fill it or leave it out")
            keys.append(to_keys(column))
        position += len(table)
    return keys


def _from_row(where: str, position: int) -> str:
    """Rows in a message count from where the table was read."""
    return f"{where} (from row {position})" if position else where


def _require_unique(keys: list[np.ndarray], uri: str, files: list[str]) -> None:
    """DataError naming a request id that is there twice."""
    if not keys:
        return
    values, counts = np.unique(np.concatenate(keys), return_counts=True)
    if len(values) == counts.sum():
        return
    twice = values[counts > 1][0]
    for file in files:
        with open_parquet(_at(uri, file)) as parquet:
            for batch in parquet.iter_batches(columns=["request_id"]):
                found = np.flatnonzero(to_keys(batch.column(0)) == twice)
                if len(found):
                    raise DataError(f"{_at(uri, file)}: request_id {batch.column(0)[int(found[0])]} is there "
                                    f"{counts[counts > 1][0]} times ({(counts > 1).sum()} such ids); "
                                    "request ids must be unique")


def pieces(counts: dict[str, list[int]], *, num_actors: int) -> list[Piece]:
    """The row groups cut so that every actor has several tasks."""
    total = sum(map(sum, counts.values()))
    size = min(max(math.ceil(total / (4 * num_actors)), PIECE_ROWS[0]), PIECE_ROWS[1])
    found: list[Piece] = []
    for file, groups in counts.items():
        position = 0
        for group, rows in enumerate(groups):
            for start in range(0, rows, size):
                found.append(Piece(len(found), file, group, start, min(size, rows - start), position + start))
            position += rows
    return found


# ---------------------------------------------------------------- scoring
def _num_actors(total: int) -> int:
    """One per core, with a logical CPU to spare, and no more than there is work for."""
    import ray

    free = int(ray.available_resources().get("CPU", 1)) - 1
    return max(1, min(num_cores(), free, math.ceil(total / PIECE_ROWS[0])))


def _run(uri: str, requests: str, work: str, todo: list[Piece]) -> int:
    """Scores every piece; returns the number of result rows."""
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    size = _num_actors(sum(piece.rows for piece in todo))
    dataset = ray.data.from_items([asdict(piece) for piece in todo], override_num_blocks=len(todo)).map_batches(
        Scorer, fn_constructor_args=(uri, requests, work), batch_size=1, num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=size))
    total, done, started = sum(piece.rows for piece in todo), 0, time.monotonic()
    line = ProgressLine("score")
    for row in dataset.iter_rows():
        if row["error"]:
            raise getattr(raycascade.errors, row["error"])(row["message"])
        done += int(row["rows"])
        line.show(done / total, done, time.monotonic() - started)
    line.close()
    return done


class Scorer:
    """An actor: loads the bundle once, then scores one piece per call and writes its file."""

    def __init__(self, uri: str, requests: str, work: str) -> None:
        self._bundle = load_bundle(uri)
        self._requests = requests
        self._work = work

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """The number of rows written, or the error of a user as its type and its one line."""
        piece = Piece(**{name: column.tolist()[0] for name, column in batch.items()})
        try:
            return {"rows": [self._score(piece)], "error": [""], "message": [""]}
        except RaycascadeError as error:
            return {"rows": [0], "error": [type(error).__name__], "message": [str(error)]}

    def _score(self, piece: Piece) -> int:
        where = _at(self._requests, piece.file)
        with open_parquet(where) as parquet:
            table = parquet.read_row_group(piece.group, columns=needed(parquet.schema_arrow.names, self._bundle))
        table = checked(table.slice(piece.start, piece.rows), self._bundle, where=_from_row(where, piece.position))
        if "request_id" not in table.column_names:
            name = piece.file or where.rsplit("/", 1)[-1]
            ids = [f"{name}:{row}" for row in range(piece.position, piece.position + piece.rows)]
            table = table.append_column("request_id", pa.array(ids, pa.string()))
        parts = [results(self._bundle, table.slice(start, BATCH_ROWS)) for start in range(0, piece.rows, BATCH_ROWS)]
        filesystem, path = storage.resolve(storage.join(self._work, f"part-{piece.number:06d}.parquet"))
        storage.make_folder(self._work)
        pq.write_table(pa.concat_tables(parts), path, filesystem=filesystem, compression="zstd")
        return piece.rows


def results(bundle: Bundle, requests: pa.Table) -> pa.Table:
    """One row per raw request: request_id, user_id, items (raw ids, best first) and the last stage's scores."""
    final = bundle.recommend(bundle.encode(requests)).final
    rows_QK, mask_QK = final.kept()
    offsets = pa.array(np.concatenate([[0], np.cumsum(mask_QK.sum(1))]), pa.int32())
    items = pa.array(bundle.items.ids_of(rows_QK[mask_QK]), bundle.items.keys.type)
    scores = pa.array(final.scores_QC[:, :final.keep][mask_QK].astype(np.float32))
    return pa.table({
        "request_id": requests["request_id"], "user_id": requests["user_id"],
        "items": pa.ListArray.from_arrays(offsets, items), "scores": pa.ListArray.from_arrays(offsets, scores),
    })


# ---------------------------------------------------------------- output
def finished_before(out: str, source: dict[str, str]) -> int | None:
    """Rows of finished results of the same source; None if there is nothing; DataError for anything else."""
    held = storage.list_files(out)
    filesystem, path = storage.resolve(out)
    if not held and filesystem.get_file_info(path).type != pafs.FileType.File:
        return None
    if MANIFEST not in held:
        raise DataError(f"{out}: holds files that are not results of score; give a new folder as --out")
    found = storage.read_json(storage.join(out, MANIFEST))
    if {name: found.get(name) for name in source} != source:
        other = "other requests" if found.get("bundle") == source["bundle"] else "another bundle"
        raise DataError(f"{out}: holds the results of {other}; give a new folder as --out")
    return found["rows"]


def publish(work: str, out: str, manifest: dict[str, Any]) -> None:
    """Moves finished parts into `out`, at once on a local disk; elsewhere the manifest comes last."""
    filesystem, path = storage.resolve(work)
    parts = storage.list_files(work)
    manifest = {**manifest, "files": parts}
    if isinstance(filesystem, pafs.LocalFileSystem):
        storage.write_json(storage.join(work, MANIFEST), manifest)
        filesystem.move(path, storage.resolve(out)[1])
        return
    for part in parts:
        storage.copy_file(storage.join(work, part), storage.join(out, part))
    storage.write_json(storage.join(out, MANIFEST), manifest)


def digest(content: Any) -> str:
    """SHA-256 of a JSON object."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _at(uri: str, file: str) -> str:
    return storage.join(uri, file) if file else uri

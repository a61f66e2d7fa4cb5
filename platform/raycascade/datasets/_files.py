"""Parquet and CSV files of a raw log: found by a pattern, cut into pieces, read in tables of bounded size."""

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from raycascade import storage
from raycascade.errors import ConfigError, DataError

SUFFIXES = (".parquet", ".csv", ".csv.gz")
PIECE_BYTES = 96 << 20  # of Parquet row groups in one piece
TABLE_BYTES = 48 << 20
BATCH_ROWS = 65_536
NULLS = ["", "NULL", "null", "\\N"]


def stem_of(file: str) -> str:
    """The name without its suffix; DataError if the suffix is none that can be read."""
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if file.endswith(suffix):
            return file[:-len(suffix)]
    raise DataError(f"{file}: not a format that can be read; give files that end in {', '.join(SUFFIXES)}")


def matching(raw: str, pattern: str) -> list[str]:
    """Files below the folder `raw` that a pattern names, relative to it, sorted; empty if there are none.

    `*` and `?` stay within one part of a path; a leading `**/` stands for any folders. DataError if one file is there
    in two formats, since it would be read twice.
    """
    if not raw:
        raise ConfigError("paths.raw: is empty; set it to the folder that holds the log")
    found = [file for file in storage.list_files(raw) if _matches(file, pattern)]
    stems: dict[str, str] = {}
    for file in found:
        other = stems.setdefault(stem_of(file), file)
        if other != file:
            raise DataError(f"{raw}: {other} and {file} are one file in two formats; keep one of them")
    return found


def required(raw: str, pattern: str) -> list[str]:
    """`matching`, but DataError if no file matches."""
    found = matching(raw, pattern)
    if not found:
        there = storage.list_files(raw)
        more = " ..." if len(there) > 5 else ""
        seen = f"the folder holds {', '.join(there[:5])}{more}" if there else "it is empty or absent"
        raise DataError(f"{raw}: no file matches {pattern!r}; {seen}; check paths.raw and the pattern")
    return found


def _matches(file: str, pattern: str) -> bool:
    parts, wanted = file.split("/"), pattern.split("/")
    if wanted[0] == "**":
        wanted = wanted[1:]
        parts = parts[-len(wanted):]
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def pieces(raw: str, files: list[str]) -> list[str]:
    """Names of independent pieces: 'log.parquet#3-7' for row groups of about 96 MB, a whole file for CSV."""
    names: list[str] = []
    for file in files:
        if not file.endswith(".parquet"):
            names.append(file)
            continue
        with _readable(file), _parquet(raw, file) as source:
            groups = [source.metadata.row_group(i) for i in range(source.metadata.num_row_groups)]
        start, size = 0, 0
        for position, group in enumerate(groups):
            if position > start and size + group.total_byte_size > PIECE_BYTES:
                names.append(f"{file}#{start}-{position}")
                start, size = position, 0
            size += group.total_byte_size
        if sum(group.num_rows for group in groups):
            names.append(f"{file}#{start}-{len(groups)}")
    if not names:
        raise DataError(f"{raw}: {', '.join(files[:3])}: no file has any rows; check the log")
    return names


def file_of(piece: str) -> str:
    """The file a piece belongs to."""
    return piece.rpartition("#")[0] if ".parquet#" in piece else piece


def column_names(raw: str, file: str) -> list[str]:
    """The columns of a file, without reading its rows."""
    return schema_of(raw, file).names


def schema_of(raw: str, file: str) -> pa.Schema:
    """Columns and types of a file; those of CSV are guessed from the first 8 MB."""
    with _readable(file):
        if file.endswith(".parquet"):
            with _parquet(raw, file) as source:
                return source.schema_arrow
        with _csv(raw, file, None, {}) as reader:
            return reader.schema


def read(
    raw: str, piece: str, *, columns: list[str], types: "dict[str, pa.DataType] | None" = None
) -> Iterator[pa.Table]:
    """Some columns of a piece in tables of at most about 48 MB; `types` fixes how columns of a CSV file are read.

    DataError in one line if the file is damaged, is not what its suffix says or holds values of another type.
    """
    file = file_of(piece)
    with _readable(file):
        if not file.endswith(".parquet"):
            with _csv(raw, file, columns, types or {}) as reader:
                for batch in reader:
                    yield from _bounded(pa.Table.from_batches([batch]))
            return
        with _parquet(raw, file) as source:
            start, _, stop = piece.rpartition("#")[2].partition("-")
            groups = list(range(int(start), int(stop))) if piece != file else list(range(source.num_row_groups))
            for batch in source.iter_batches(_batch_rows(source.metadata), row_groups=groups, columns=columns):
                yield from _bounded(pa.Table.from_batches([batch]))


def read_all(
    raw: str, files: list[str], *, columns: list[str], types: "dict[str, pa.DataType] | None" = None
) -> pa.Table:
    """Some columns of small files as one table; DataError if the files disagree or have no rows."""
    tables = [table for file in files for table in read(raw, file, columns=columns, types=types)]
    if not tables:
        raise DataError(f"{files[0]}: has no rows; replace the file")
    with _readable(files[0]):
        return pa.concat_tables(tables, promote_options="default").combine_chunks()


def _batch_rows(metadata: pq.FileMetaData) -> int:
    size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    return max(256, min(BATCH_ROWS, TABLE_BYTES // 3 * max(metadata.num_rows, 1) // max(size, 1)))


def _bounded(table: pa.Table) -> Iterator[pa.Table]:
    step = max(1, len(table) * TABLE_BYTES // max(table.nbytes, 1))
    for start in range(0, len(table), step):
        yield table.slice(start, step)


def _parquet(raw: str, file: str) -> pq.ParquetFile:
    filesystem, path = storage.resolve(storage.join(raw, file))
    return pq.ParquetFile(path, filesystem=filesystem)


@contextmanager
def _csv(raw: str, file: str, columns: list[str] | None, types: dict[str, pa.DataType]
         ) -> Iterator[pacsv.CSVStreamingReader]:
    """Types that are not given are guessed from the first 8 MB."""
    filesystem, path = storage.resolve(storage.join(raw, file))
    convert = pacsv.ConvertOptions(column_types=types, include_columns=columns, null_values=NULLS,
                                   strings_can_be_null=True)
    compression = "gzip" if file.endswith(".gz") else None
    with filesystem.open_input_stream(path, compression=compression) as stream:
        reader = pacsv.open_csv(stream, read_options=pacsv.ReadOptions(block_size=8 << 20), convert_options=convert)
        with reader:
            yield reader


@contextmanager
def _readable(file: str) -> Iterator[None]:
    """Arrow's errors about a file as one line that names it."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{file}: no such file; check paths.raw") from None
    except (pa.ArrowException, OSError) as error:
        kind = "Parquet" if file.endswith(".parquet") else "CSV"
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{file}: cannot be read as {kind} ({reason}); mend the file or take it out of the folder "
                        "") from None

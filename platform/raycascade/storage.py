"""Files by URI (a path, s3://, gs://): read, write, list, hash, and publish one file atomically."""

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from raycascade.errors import DataError


def resolve(uri: "str | os.PathLike[str]") -> tuple[pafs.FileSystem, str]:
    """File system and path of a URI; a plain path is made absolute, because workers run in other folders."""
    text = os.fspath(uri)
    if "://" in text:
        return pafs.FileSystem.from_uri(text)
    return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text))


def absolute(uri: str) -> str:
    """The same place, good in any working directory."""
    return uri if "://" in uri else resolve(uri)[1]


def join(uri: str, *parts: str) -> str:
    """A URI below another one."""
    return "/".join([uri.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    """Whether there is a file or a folder."""
    filesystem, path = resolve(uri)
    return filesystem.get_file_info(path).type != pafs.FileType.NotFound


def list_files(uri: str) -> list[str]:
    """Paths of all files below a folder, relative to it, sorted; empty if it does not exist."""
    filesystem, path = resolve(uri)
    selector = pafs.FileSelector(path, recursive=True, allow_not_found=True)
    files = [info.path for info in filesystem.get_file_info(selector) if info.type == pafs.FileType.File]
    return sorted(file[len(path.rstrip("/")) + 1:] for file in files)


def make_folder(uri: str) -> None:
    """A folder and its parents (nothing to do on an object store)."""
    filesystem, path = resolve(uri)
    filesystem.create_dir(path, recursive=True)


def remove_folder(uri: str) -> None:
    """A folder with all below it; nothing happens if it is not there."""
    filesystem, path = resolve(uri)
    if filesystem.get_file_info(path).type == pafs.FileType.Directory:
        filesystem.delete_dir(path)


def read_bytes(uri: str) -> bytes:
    """A whole file; DataError if it is not there."""
    filesystem, path = resolve(uri)
    try:
        with filesystem.open_input_stream(path) as stream:
            return stream.read()
    except FileNotFoundError:
        raise DataError(f"{uri}: no such file; check the path") from None


def write_bytes(uri: str, content: bytes) -> None:
    """A whole file, its folder included; replaced atomically on a local disk, one PUT on an object store."""
    filesystem, path = resolve(uri)
    filesystem.create_dir(os.path.dirname(path), recursive=True)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        with filesystem.open_output_stream(path) as stream:
            stream.write(content)
        return
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(uri: str) -> Any:
    """The object in a JSON file."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, content: Any) -> None:
    """A JSON file, human-readable, published atomically."""
    write_bytes(uri, (json.dumps(content, indent=1, sort_keys=False) + "\n").encode())


def read_arrow(uri: str) -> pa.Table:
    """A table in an Arrow IPC file, memory-mapped on a local disk."""
    filesystem, path = resolve(uri)
    local = isinstance(filesystem, pafs.LocalFileSystem)
    source = pa.memory_map(path) if local else filesystem.open_input_file(path)
    return pa.ipc.open_file(source).read_all()


def write_arrow(uri: str, table: pa.Table) -> None:
    """A table as an uncompressed Arrow IPC file, so that it can be memory-mapped."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    write_bytes(uri, sink.getvalue().to_pybytes())


def sha256(uri: str) -> str:
    """Hexadecimal digest of a file's content, read in pieces."""
    filesystem, path = resolve(uri)
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path) as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def copy_file(source: str, target: str) -> None:
    """One file, in pieces, between any two file systems."""
    source_fs, source_path = resolve(source)
    target_fs, target_path = resolve(target)
    target_fs.create_dir(str(Path(target_path).parent), recursive=True)
    pafs.copy_files(source_path, target_path, source_filesystem=source_fs, destination_filesystem=target_fs)

"""What a model has encoded of every item, kept as one NumPy file per tensor, written in pieces and memory-mapped.

    <folder>/<tensor>.npy [N + 2, ...] by item row     <folder>/cache.json (written last): of which files it was made

This file owns the format.
"""

import io
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow.fs as pafs
import torch
from torch import Tensor

from raycascade import storage
from raycascade.errors import BundleError

ABOUT = "cache.json"
Precision = Literal["float16", "float32"]


@dataclass
class ItemCache:
    """Encoded items by item row, `arrays` [N + 2, ...]; `left_out` are rows that it does not hold.

    `asked` and `missing` count the items that were looked up in this process, and those of them that it does not hold:
    a row that is left out, or that is not in the catalogue it was made of.
    """

    arrays: Mapping[str, np.ndarray]
    left_out: frozenset[int] = frozenset()
    asked: int = 0
    missing: int = 0
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def num_rows(self) -> int:
        """N + 2, padding and unknown included."""
        return min(len(values) for values in self.arrays.values())

    def gather(self, rows_QC: Tensor, mask_QC: Tensor, *, like: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Encoded items [Q, C, ...], numbers in the type of `like`, everything on its device; and which real ones are
        missing [Q, C], in whose place stands padding."""
        rows = rows_QC.cpu().numpy()
        absent = rows >= self.num_rows
        if self.left_out:
            absent |= np.isin(rows, list(self.left_out))
        missing = absent & mask_QC.cpu().numpy()
        with self._lock:
            self.asked += int(mask_QC.sum())
            self.missing += int(missing.sum())
        held = np.where(absent, 0, rows)
        picked = {name: torch.from_numpy(np.take(values, held, axis=0)) for name, values in self.arrays.items()}
        encoded = {name: values.to(like.device, like.dtype if values.is_floating_point() else None)
                   for name, values in picked.items()}
        return encoded, torch.from_numpy(missing).to(like.device)


def write_item_cache(
    folder: str, chunks: Iterator[Mapping[str, Tensor]], *, num_rows: int, precision: Precision,
    made_of: Mapping[str, str],
) -> None:
    """Writes the encoded items of consecutive rows, which are `num_rows` together, piece by piece.

    Rows with a number that the precision cannot hold are left out. `made_of`: digests by name of whatever the encoding
    follows from; who reads must bring the same.
    """
    left_out: list[int] = []
    row = 0
    with ExitStack() as opened:
        streams: dict[str, Any] = {}
        for chunk in chunks:
            arrays = {name: _rounded(values, precision) for name, values in chunk.items()}
            if not streams:
                streams = {name: opened.enter_context(_open(storage.join(folder, f"{name}.npy"), values, num_rows))
                           for name, values in arrays.items()}
            assert arrays.keys() == streams.keys(), (set(arrays), set(streams))
            left_out += [row + place for place in _not_finite(arrays)]
            for name, values in arrays.items():
                streams[name].write(np.ascontiguousarray(values).tobytes())
            row += len(next(iter(arrays.values())))
    assert row == num_rows, f"{row} rows of {num_rows}"
    storage.write_json(storage.join(folder, ABOUT), {"rows": num_rows, "precision": precision,
                                                     "tensors": sorted(streams), "left_out": left_out,
                                                     "made_of": dict(made_of)})


def read_item_cache(folder: str, *, made_of: Mapping[str, str]) -> ItemCache:
    """The inverse of `write_item_cache`, memory-mapped on a local disk; BundleError where it was made of other files
    or is damaged."""
    where = storage.join(folder, ABOUT)
    try:
        about = json.loads(storage.read_bytes(where))
        before, names, left_out = about["made_of"], about["tensors"], frozenset(about["left_out"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise BundleError(f"{where}: damaged; restore the bundle or train again") from None
    differs = sorted(name for name in before.keys() | made_of.keys() if before.get(name) != made_of.get(name))
    if differs:
        raise BundleError(f"{folder}: these encoded items belong to another bundle, whose {differs[0]} differs from "
                          "this one's; take them from the bundle they were written with, or train again")
    arrays = {name: _read_npy(storage.join(folder, f"{name}.npy")) for name in names}
    wrong = [name for name, values in arrays.items() if len(values) != about["rows"]]
    if wrong:
        raise BundleError(f"{folder}/{wrong[0]}.npy: {len(arrays[wrong[0]])} rows, expected {about['rows']}; restore "
                          "the bundle or train again")
    return ItemCache(arrays, left_out)


def _rounded(values: Tensor, precision: Precision) -> np.ndarray:
    """Numbers in the precision; ids as they are."""
    values = values.detach().cpu()
    return (values.to(getattr(torch, precision)) if values.is_floating_point() else values).numpy()


def _not_finite(arrays: Mapping[str, np.ndarray]) -> list[int]:
    """Places of items with a number that is infinite or none."""
    numbers = [values for values in arrays.values() if values.dtype.kind == "f"]
    if not numbers:
        return []
    good = np.logical_and.reduce([np.isfinite(values).reshape(len(values), -1).all(1) for values in numbers])
    return np.flatnonzero(~good).tolist()


def _open(uri: str, values: np.ndarray, num_rows: int) -> Any:
    """A stream for the rows of a NumPy file whose header is written."""
    filesystem, path = storage.resolve(uri)
    storage.make_folder(uri.rpartition("/")[0])
    stream = filesystem.open_output_stream(path)
    header = io.BytesIO()
    about = np.lib.format.header_data_from_array_1_0(values[:0])
    np.lib.format.write_array_header_1_0(header, {**about, "shape": (num_rows, *values.shape[1:])})
    stream.write(header.getvalue())
    return stream


def _read_npy(uri: str) -> np.ndarray:
    filesystem, path = storage.resolve(uri)
    if isinstance(filesystem, pafs.LocalFileSystem):
        return np.load(path, mmap_mode="r", allow_pickle=False)
    return np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False)

"""What the indexes share: an inner-product FAISS index beside the item rows, on disk as one folder.

`index.json` (written last) names the plug-in, its options and the sha256 of the other files: `index.faiss`, `rows.npy`
and, where answers are re-ranked exactly, `vectors.npy`. On a local disk they are memory-mapped, so that the processes
of one machine share them. Where the installed FAISS sees a GPU, building and searching happen there.
"""

import io
import math
from typing import Any, ClassVar

import faiss
import numpy as np
import pyarrow.fs as pafs

from raycascade import storage
from raycascade.errors import BundleError, DataError
from raycascade.indexes import Candidates
from raycascade.plugins import PluginConfig

FORMAT_VERSION = 1
TRAINING_POINTS_PER_LIST = 39  # below that FAISS calls a k-means cell badly trained
GPU_MAX_K = 2048  # also the most lists a GPU probes
GPU_SCRATCH_BYTES = 256 << 20  # the default takes 18% of the card from the models beside it
RESCORE_NUMBERS = 1 << 23  # vector entries gathered at a time


class FaissIndex:
    """The `ItemIndex` protocol; an index says how its FAISS object is made and tuned, and may refine the answer.

    Building is deterministic: the same rows, vectors and options give the same answers. Options that act on a search
    (`num_probes`, `ef_search`, `refine`) are those of the loading object, the others are those of the build.
    """

    name: ClassVar[str]
    has_gpu_form: ClassVar[bool] = True

    def __init__(self, config: PluginConfig) -> None:
        self._options = config.model_dump(mode="json")
        self._index: Any = None  # the CPU index: what is saved
        self._on_gpu: Any = None
        self._gpu_resources: Any = None
        self._rows_N = np.empty(0, np.int64)
        self._vectors_ND: np.ndarray | None = None  # for exact re-ranking

    def build(self, rows_N: np.ndarray, vectors_ND: np.ndarray) -> None:
        """Replaces the content by vectors (float32) of item rows; DataError for no or non-finite vectors."""
        assert vectors_ND.ndim == 2, vectors_ND.shape
        assert rows_N.shape == vectors_ND.shape[:1], (rows_N.shape, vectors_ND.shape)
        if len(rows_N) == 0:
            raise DataError("index: no items to build from; give it at least one item vector")
        vectors_ND = np.ascontiguousarray(vectors_ND, dtype=np.float32)
        if bad := int((~np.isfinite(vectors_ND).all(axis=1)).sum()):
            raise DataError(f"index: {bad} of {len(rows_N)} item vectors are not finite; train with a smaller lr")
        self._rows_N = np.array(rows_N, dtype=np.int64)
        self._vectors_ND = np.array(vectors_ND) if self._keeps_vectors() else None
        index = self._make(*vectors_ND.shape)
        self._tune(index)
        self._index = self._fill(index, vectors_ND)
        self._move_to_gpu()

    def search(self, users_QD: np.ndarray, k: int) -> Candidates:
        """The k items of the largest inner product with each user vector; equal scores in order of their row."""
        assert self._index is not None, "build or load the index before the search"
        assert k >= 1, k
        assert users_QD.shape == (len(users_QD), self._index.d), (users_QD.shape, self._index.d)
        users_QD = np.ascontiguousarray(users_QD, dtype=np.float32)
        scores_QK, positions_QK = self._nearest(users_QD, min(k, len(self._rows_N)))
        found_QK = positions_QK >= 0
        rows_QK = np.where(found_QK, self._rows_N[np.maximum(positions_QK, 0)], 0)
        scores_QK = np.where(found_QK, scores_QK, np.float32(-np.inf))
        order_QK = np.lexsort((rows_QK, -scores_QK), axis=1)[:, :k]
        rows_QK, scores_QK = (np.take_along_axis(x, order_QK, axis=1) for x in (rows_QK, scores_QK))
        missing = ((0, 0), (0, k - rows_QK.shape[1]))
        return Candidates(np.pad(rows_QK, missing), np.pad(scores_QK, missing, constant_values=-np.inf))

    def save(self, uri: str) -> None:
        """Writes the folder; an index in it is replaced."""
        assert self._index is not None, "build or load the index before saving it"
        files = {"index.faiss": faiss.serialize_index(self._index).tobytes(), "rows.npy": _npy(self._rows_N)}
        if self._vectors_ND is not None:
            files["vectors.npy"] = _npy(self._vectors_ND)
        for file, content in files.items():
            storage.write_bytes(storage.join(uri, file), content)
        storage.write_json(storage.join(uri, "index.json"), {
            "format": FORMAT_VERSION, "name": self.name, "items": len(self._rows_N), "dim": self._index.d,
            "options": self._options, "sha256": {file: storage.sha256(storage.join(uri, file)) for file in files},
        })

    def load(self, uri: str) -> None:
        """Replaces the content by a saved one; BundleError says which file is missing, damaged or of another kind."""
        about = self._read_about(uri)
        for file, digest in about["sha256"].items():
            path = storage.join(uri, file)
            if not storage.exists(path) or storage.sha256(path) != digest:
                raise BundleError(f"{path}: missing or damaged (its sha256 is not the one in index.json); "
                                  "build the index again")
        keeps_vectors = self._keeps_vectors()
        if keeps_vectors and "vectors.npy" not in about["sha256"]:
            raise BundleError(f"{uri}: built without the vectors that refine needs; build it again or set refine: 0")
        index = _read_index(storage.join(uri, "index.faiss"))
        self._tune(index)
        self._index, self._rows_N = index, _read_npy(storage.join(uri, "rows.npy"))
        self._vectors_ND = _read_npy(storage.join(uri, "vectors.npy")) if keeps_vectors else None
        self._move_to_gpu()

    def _make(self, num_items: int, dim: int) -> Any:
        """An empty FAISS index for so many items."""
        raise AssertionError(f"{type(self).__name__} must say how its index is made")

    def _tune(self, index: Any) -> None:
        """Sets the options of a search on an index that was made or read."""

    def _keeps_vectors(self) -> bool:
        """Whether the vectors themselves are kept for exact re-ranking."""
        return False

    def _nearest(self, users_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions (-1: none) of at least the k best items."""
        return self._faiss_search(users_QD, k)

    def _fill(self, index: Any, vectors_ND: np.ndarray) -> Any:
        """The trained CPU index with the vectors in it."""
        on_gpu = self._gpu_copy(index)
        target = index if on_gpu is None else on_gpu
        target.train(vectors_ND)
        target.add(vectors_ND)
        if on_gpu is None:
            return index
        index = faiss.index_gpu_to_cpu(on_gpu)
        self._tune(index)
        return index

    def _faiss_search(self, users_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        index = self._on_gpu if self._on_gpu is not None and k <= GPU_MAX_K else self._index
        return index.search(users_QD, k)

    def _move_to_gpu(self) -> None:
        self._on_gpu = self._gpu_copy(self._index)

    def _gpu_copy(self, index: Any) -> Any:
        """The index on the first GPU, or None where FAISS sees none or has no GPU form of it."""
        num_gpus = getattr(faiss, "get_num_gpus", int)()  # faiss-cpu may lack it
        if not self.has_gpu_form or num_gpus == 0 or getattr(index, "nprobe", 1) > GPU_MAX_K:
            return None
        if self._gpu_resources is None:
            self._gpu_resources = faiss.StandardGpuResources()
            self._gpu_resources.setTempMemory(GPU_SCRATCH_BYTES)
        return faiss.index_cpu_to_gpu(self._gpu_resources, 0, index)

    def _read_about(self, uri: str) -> dict[str, Any]:
        path = storage.join(uri, "index.json")
        try:
            about = storage.read_json(path)
            seen = about["format"], about["name"], set(about["sha256"]) >= {"index.faiss", "rows.npy"}
        except (DataError, ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{path}: missing or damaged ({' '.join(str(error).split())}); "
                              "build the index again") from None
        if seen != (FORMAT_VERSION, self.name, True):
            raise BundleError(f"{path}: expected an index {self.name!r} of format {FORMAT_VERSION}, found "
                              f"{seen[1]!r} of format {seen[0]!r}; build the index again")
        return about


def exact_scores(vectors_ND: np.ndarray, users_QD: np.ndarray, positions_QK: np.ndarray) -> np.ndarray:
    """Inner products (float32, summed in double precision) of users with the items at positions; below 0: -inf.

    A user's scores do not depend on which other users are asked about at the same time.
    """
    scores_QK = np.empty(positions_QK.shape, np.float32)
    step = max(1, RESCORE_NUMBERS // max(1, positions_QK.shape[1] * vectors_ND.shape[1]))
    for start in range(0, len(users_QD), step):
        part = slice(start, start + step)
        items_QKD = vectors_ND[np.maximum(positions_QK[part], 0)].astype(np.float64)
        scores_QK[part] = (items_QKD @ users_QD[part, :, None].astype(np.float64))[:, :, 0]
    return np.where(positions_QK >= 0, scores_QK, np.float32(-np.inf))


def inverted_lists(num_items: int, num_lists: int | None) -> int:
    """How many lists to make: as asked, but no more than items; None: about 4 sqrt(N), each with points to train on."""
    if num_lists is not None:
        return min(num_lists, num_items)
    return max(1, min(round(4 * math.sqrt(num_items)), num_items // TRAINING_POINTS_PER_LIST))


def probes(num_lists: int, num_probes: int | None) -> int:
    """How many lists a search visits: as asked; None: an eighth of them and at least 8."""
    return min(num_lists, max(8, num_lists // 8) if num_probes is None else num_probes)


def _read_index(uri: str) -> Any:
    filesystem, path = storage.resolve(uri)
    try:
        if isinstance(filesystem, pafs.LocalFileSystem):
            return faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)
        return faiss.deserialize_index(np.frombuffer(storage.read_bytes(uri), np.uint8))
    except RuntimeError as error:
        raise BundleError(f"{uri}: not an index that this FAISS ({faiss.__version__}) reads "
                          f"({' '.join(str(error).split())[:160]}); build the index again") from None


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _read_npy(uri: str) -> np.ndarray:
    filesystem, path = storage.resolve(uri)
    if isinstance(filesystem, pafs.LocalFileSystem):
        return np.load(path, mmap_mode="r", allow_pickle=False)
    return np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False)

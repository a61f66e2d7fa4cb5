"""RecFlow's files: which there are, their columns by record batches, their dictionaries by batches, all checked."""

import datetime as dt
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raycascade import storage
from raycascade.datasets._recflow_pickle import read_pairs
from raycascade.errors import ConfigError, DataError

ALL_STAGE, REALSHOW, LISTS = "all_stage", "realshow", "request_id_dict"
HISTORIES, PAST_LISTS = "seq_effective_50_dict", "ubm_seq_request_id_dict"
FOLDERS = (ALL_STAGE, REALSHOW, HISTORIES, LISTS, PAST_LISTS)
LEARNING = {"learning/realshow": REALSHOW, "learning/seq_effective_50": HISTORIES}  # the smaller edition
SUFFIX = {ALL_STAGE: "feather", REALSHOW: "feather", HISTORIES: "pkl", LISTS: "pkl", PAST_LISTS: "pkl"}
PERIODS = {1: (dt.date(2024, 1, 13), dt.date(2024, 2, 4)), 2: (dt.date(2024, 2, 5), dt.date(2024, 2, 18))}
COLUMNS = ("request_id", "request_timestamp", "user_id", "device_id", "age", "gender", "province", "video_id",
           "author_id", "category_level_one", "category_level_two", "upload_type", "upload_timestamp", "duration",
           "realshow", "rerank_pos", "rerank_neg", "rank_pos", "rank_neg", "coarse_neg", "prerank_neg", "rank_index",
           "rerank_index", "playing_time", "effective_view", "long_view", "like", "follow", "forward", "comment")
STAGES = ("realshow", "rerank_pos", "rerank_neg", "rank_pos", "rank_neg", "coarse_neg", "prerank_neg")
LIST_WIDTH, HISTORY_WIDTH = 8, 10  # columns of the arrays in the two dictionaries
COUNTED = ("user_id", "device_id", "age", "gender", "province", "video_id", "author_id", "category_level_one",
           "category_level_two", "upload_type")
ALIASES = {"video_id": "photo_id"}  # other names in id_cnt.pkl
TEST_SETS = {"retrieval": "recall", "coarse_rank": "prerank", "rank": "rank"}  # readme's name: the code's
NO_DATA = "the repository ships placeholders, download the data itself"

Columns = dict[str, np.ndarray]
Lists = list[tuple[int, dict[str, np.ndarray]]]


class RecflowFiles:
    """The files below a root. `notes` counts what was found and settled, by message."""

    def __init__(self, raw: str, notes: Counter[str]) -> None:
        self.raw, self.notes = raw, notes

    # ---- which files
    @cached_property
    def folders(self) -> dict[str, str]:
        """Folder of each kind that is there, relative to the root; DataError if there is none."""
        if not self.raw:
            raise ConfigError("paths.raw: is empty; set it to the folder that holds RecFlow")
        there = {file.rpartition("/")[0] for file in self._there}
        found = {name: name for name in FOLDERS if name in there}
        found |= {name: folder for folder, name in LEARNING.items() if folder in there and name not in found}
        if not found:
            tops = sorted({file.partition("/")[0] for file in self._there})
            raise DataError(f"{self.raw}: not a RecFlow root: expected all_stage/, request_id_dict/, "
                            f"seq_effective_50_dict/ ... below it; found {', '.join(tops[:8]) or 'nothing'}")
        return found

    @cached_property
    def _there(self) -> list[str]:
        return storage.list_files(self.raw)

    def file(self, kind: str, day: str) -> str:
        """A day's file of a kind, relative to the root."""
        return f"{self.folders[kind]}/{day}.{SUFFIX[kind]}"

    def days(
        self, kinds: tuple[str, ...], *, first: dt.date | None, last: dt.date | None,
        missing: Literal["refuse", "skip"],
    ) -> tuple[list[str], list[str]]:
        """The days from `first` to `last` (None: the first and the last there are) that have files of all `kinds`, and
        the files that others lack; DataError that names these unless `missing` is skip."""
        absent = [kind for kind in kinds if kind not in self.folders]
        if absent:
            raise DataError(f"{self.raw}: the folder {absent[0]}/ is missing; found "
                            f"{', '.join(self.folders.values())}. The smaller edition has no stage candidates: use "
                            "protocol: full")
        there = set(self._there)
        known = sorted({day for kind in kinds for day in self._days_of(kind)})
        if not known:
            raise DataError(f"{self.raw}: no day's file in {', '.join(self.folders[kind] for kind in kinds)}; expected "
                            "names such as 2024-01-13.feather")
        begin, end = first or dt.date.fromisoformat(known[0]), last or dt.date.fromisoformat(known[-1])
        wanted = [str(begin + dt.timedelta(days=n)) for n in range((end - begin).days + 1)]
        lacking = [(day, kind) for day in wanted for kind in kinds if self.file(kind, day) not in there]
        if lacking and missing == "refuse":
            named = ", ".join(self.file(kind, day) for day, kind in lacking)
            raise DataError(f"{self.raw}: missing {named}; download them (some copies lack "
                            "all_stage/2024-01-13.feather, see issue 8 of RecFlow), choose other days, or set "
                            "missing_days: skip")
        without = {day for day, _ in lacking}
        days = [day for day in wanted if day not in without]
        if not days:
            raise DataError(f"{self.raw}: no day from {begin} to {end} has all its files; choose other days")
        for day in days:
            for kind in kinds:
                self.check_content(self.file(kind, day))
        return days, [self.file(kind, day) for day, kind in lacking]

    def _days_of(self, kind: str) -> list[str]:
        prefix, suffix = f"{self.folders[kind]}/", f".{SUFFIX[kind]}"
        names = [f[len(prefix):-len(suffix)] for f in self._there if f.startswith(prefix) and f.endswith(suffix)]
        return [name for name in names if _is_date(name)]

    def check_content(self, file: str) -> None:
        """DataError for an empty file."""
        filesystem, path = storage.resolve(storage.join(self.raw, file))
        if filesystem.get_file_info(path).size == 0:
            raise DataError(f"{self.raw}/{file} is empty: {NO_DATA}")

    def test_set(self, stage: str) -> str:
        """The file of RecFlow's own test set of a stage (retrieval, coarse_rank, rank): the readme's name, or else the
        one that its code opens. DataError if neither is there."""
        names = [f"others/{name}_test.feather" for name in (stage, TEST_SETS[stage])]
        found = next((name for name in names if name in self._there), None)
        if found is None:
            raise DataError(f"{self.raw}: neither {names[0]} nor {names[1]} is there; download it")
        return found

    # ---- feather
    def read_tables(self, file: str) -> Iterator[pa.Table]:
        """All columns of a Feather file under their names without spaces, one record batch at a time."""
        where = f"{self.raw}/{file}"
        self._check_feather(file, where)
        filesystem, path = storage.resolve(where)
        with filesystem.open_input_file(path) as source, pa.ipc.open_file(source) as reader:
            for number in range(reader.num_record_batches):
                table = pa.Table.from_batches([reader.get_batch(number)])
                yield table.rename_columns([name.strip() for name in table.column_names])

    def read_columns(self, file: str, names: tuple[str, ...]) -> Iterator[Columns]:
        """Some columns of a Feather file as int64, one record batch at a time."""
        where = f"{self.raw}/{file}"
        self._check_feather(file, where)
        filesystem, path = storage.resolve(where)
        try:
            with filesystem.open_input_file(path) as source:
                with pa.ipc.open_file(source) as whole:
                    places = self._places(whole.schema.names, names, where)
                options = pa.ipc.IpcReadOptions(included_fields=sorted(places.values()))
                with pa.ipc.open_file(source, options=options) as reader:
                    row = 0
                    for number in range(reader.num_record_batches):
                        batch = reader.get_batch(number)
                        stripped = {name.strip(): batch.column(i) for i, name in enumerate(batch.schema.names)}
                        columns = {name: _whole(stripped[name], name, row, where) for name in names}
                        self._check_ids(columns, where)
                        row += len(batch)
                        yield columns
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{where}: cannot be read as Feather ({' '.join(str(error).split())[:150]}); download it "
                            "again") from None

    def num_rows(self, file: str) -> int:
        """About how many rows a Feather file has, from its first record batch."""
        first = next(RecflowFiles(self.raw, Counter()).read_columns(file, ("request_id",)), None)
        if first is None:
            return 0
        filesystem, path = storage.resolve(f"{self.raw}/{file}")
        with filesystem.open_input_file(path) as source, pa.ipc.open_file(source) as reader:
            return reader.num_record_batches * len(first["request_id"])

    def _check_feather(self, file: str, where: str) -> None:
        self.check_content(file)
        filesystem, path = storage.resolve(where)
        with filesystem.open_input_stream(path) as stream:
            magic = stream.read(6)
        if magic[:4] == b"FEA1":
            raise DataError(f"{where}: is Feather version 1, which is not read in pieces; rewrite it as version 2: "
                            "pyarrow.feather.write_feather(pyarrow.feather.read_table(file), file)")
        if magic != b"ARROW1":
            raise DataError(f"{where}: is no Feather file (it begins with {magic!r}); download it again")
        if not pa.Codec.is_available("lz4"):
            raise DataError(f"{where}: this pyarrow has no LZ4; install a pyarrow built with lz4")

    def _places(self, found: list[str], names: tuple[str, ...], where: str) -> dict[str, int]:
        stripped = [name.strip() for name in found]
        twice = sorted({name for name in stripped if stripped.count(name) > 1})
        if twice:
            raise DataError(f"{where}: two columns are called {twice[0]!r} but for spaces; rename one")
        absent = [name for name in names if name not in stripped]
        if absent:
            raise DataError(f"{where}: missing column(s) {', '.join(absent)}; found {', '.join(stripped)}")
        for name in sorted(set(stripped) - set(COLUMNS)):
            self.notes[f"files with the unknown column {name!r}, which is not read"] += 1
        return {name: stripped.index(name) for name in names}

    # ---- dictionaries
    def read_histories(self, file: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Request ids [R] and their histories [R, 50, 10], some requests at a time."""
        where = f"{self.raw}/{file}"
        self.check_content(file)
        for pairs in read_pairs(where):
            ids = [_request_id(key, where) for key, _ in pairs]
            arrays = [_checked(value, HISTORY_WIDTH, f"seq_effective_50_dict: request {request}", "[50, 10]", where)
                      for request, (_, value) in zip(ids, pairs, strict=True)]
            rows = max(len(array) for array in arrays)
            histories = np.zeros((len(arrays), rows, HISTORY_WIDTH), np.int64)
            for padded, array in zip(histories, arrays, strict=True):
                padded[rows - len(array):] = array
            yield np.array(ids, np.int64), histories

    def read_lists(self, file: str) -> Iterator[Lists]:
        """(request id, stage -> array [n, 8]) of some requests at a time; stages without rows are left out."""
        where = f"{self.raw}/{file}"
        self.check_content(file)
        for pairs in read_pairs(where):
            batch: Lists = []
            for key, value in pairs:
                request = _request_id(key, where)
                if not isinstance(value, dict):
                    raise DataError(f"{where}: request_id_dict: request {request}: expected a dictionary of stages, "
                                    f"got {type(value).__name__}; download the file again")
                stages = {}
                for stage, rows in value.items():
                    if stage not in STAGES:
                        self.notes[f"requests with the unknown stage key {stage!r}, which is not read"] += 1
                    elif rows.size if isinstance(rows, np.ndarray) else rows != ():
                        what = f"request_id_dict: request {request}, stage {stage}"
                        stages[stage] = _checked(rows, LIST_WIDTH, what, "[n, 8]", where)
                batch.append((request, stages))
            yield batch

    # ---- ids
    @cached_property
    def id_counts(self) -> dict[str, int]:
        """How many ids each field has, from others/id_cnt.pkl; empty where the file is not there."""
        file = "others/id_cnt.pkl"
        if file not in self._there:
            return {}
        self.check_content(file)
        where = f"{self.raw}/{file}"
        raw = {str(key).strip(): value for pairs in read_pairs(where) for key, value in pairs}
        counts = {name: raw.get(name, raw.get(ALIASES.get(name, ""))) for name in COUNTED}
        for name, count in counts.items():
            if count is not None and not isinstance(count, int):
                raise DataError(f"{where}: {name} must be a number, got {count!r}; download the file again")
        return {name: cast(int, count) for name, count in counts.items() if count is not None}

    def check_ids(self, name: str, values: np.ndarray, where: str) -> None:
        """DataError for an id that is not below its field's count."""
        count = self.id_counts.get(name)
        if count is not None and len(values) and (highest := int(values.max())) >= count:
            raise DataError(f"{where}: {name} {highest} >= id_cnt {count}; the file and others/id_cnt.pkl do not "
                            "belong together: download both again")

    def _check_ids(self, columns: Columns, where: str) -> None:
        for name in COUNTED:
            if name in columns:
                self.check_ids(name, columns[name], where)


def _is_date(name: str) -> bool:
    try:
        return len(name) == 10 and bool(dt.date.fromisoformat(name))
    except ValueError:
        return False


def _request_id(key: object, where: str) -> int:
    if not isinstance(key, int):
        raise DataError(f"{where}: the key {key!r} is not a request id; download the file again")
    return key


def _checked(value: object, width: int, what: str, shape: str, where: str) -> np.ndarray:
    """An int64 array [n, width]."""
    if isinstance(value, np.ndarray) and value.ndim == 2 and value.shape[1] == width and value.dtype == np.int64:
        return value
    seen = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
    raise DataError(f"{where}: {what}: expected int64 {shape}, got {seen}; download the file again")


def _whole(column: pa.Array, name: str, row: int, where: str) -> np.ndarray:
    """A column as int64; floats if all of them are whole numbers."""
    if column.null_count:
        bad = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise DataError(f"{where}: column {name} is null in row {row + bad}; download the file again")
    if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        return column.cast(pa.int64()).to_numpy(zero_copy_only=False)
    if not pa.types.is_floating(column.type):
        raise DataError(f"{where}: column {name} must hold integers, got {column.type}; download the file again")
    values = pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False)
    bad = np.flatnonzero(~np.isfinite(values) | (values != np.floor(values)) | (np.abs(values) >= 2.0**63))
    if len(bad):
        raise DataError(f"{where}: column {name} must hold integers, got {values[bad[0]]} in row {row + bad[0]}; "
                        "download the file again")
    return values.astype(np.int64)

"""Ways to damage the log of recflow_world.py, one for each thing that the loader must refuse or settle."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather

from tests.recflow_world import write_feather, write_pickle

Lists = dict[Any, Any]


class Hostile:
    """What a naive reader would run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def change_rows(root: Path, day: str, change: Callable[[pa.Table], pa.Table]) -> None:
    path = root / f"all_stage/{day}.feather"
    table = pyarrow.feather.read_table(str(path), memory_map=False)
    write_feather(path, change(table))


def change_pickle(root: Path, folder: str, day: str, change: Callable[[dict[Any, Any]], None]) -> None:
    path = root / folder / f"{day}.pkl"
    content = pickle.loads(path.read_bytes())
    change(content)
    write_pickle(path, content)


def replaced(table: pa.Table, name: str, values: np.ndarray | pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values))


def _without_first_rank(table: pa.Table) -> pa.Table:
    flag, rank = table["rank_pos"].to_numpy().copy(), table["rank_index"].to_numpy().copy()
    row = int(np.flatnonzero((flag == 1) & (table["request_id"].to_numpy() == table["request_id"][0].as_py()))[0])
    flag[row] = rank[row] = 0
    return replaced(replaced(table, "rank_pos", flag), "rank_index", rank)


def _with_repeated_rows(table: pa.Table) -> pa.Table:
    """Rows without a rank again; a copy that comes first has lost its flags and ranks, a last one has another rank."""
    chosen = np.flatnonzero(table["rank_pos"].to_numpy() == 1)[:20]
    before, behind = table.take(pa.array(chosen[:10])), table.take(pa.array(chosen[10:]))
    for name in ("rank_pos", "realshow", "rank_index"):
        before = replaced(before, name, np.zeros(len(before), np.int64))
    behind = replaced(behind, "rank_index", np.full(len(behind), 19))
    return pa.concat_tables([before, table, behind])


def _with_other_users(table: pa.Table) -> pa.Table:
    age = table["age"].to_numpy().copy()
    _, first = np.unique(table["request_id"].to_numpy(), return_index=True)
    age[first] = 7 - age[first]
    return replaced(table, "age", age)


def _rewritten(lists: Lists, stage: str, values: Any) -> None:
    next(iter(lists.values()))[stage] = values


def _write_hostile(root: Path, day: str) -> None:
    path = root / "request_id_dict" / f"{day}.pkl"
    path.write_bytes(pickle.dumps({0: {"rank_pos": Hostile(root / "marker")}}))


def _drop_first(content: Lists) -> None:
    for key in list(content)[:7]:
        del content[key]


def spoil(root: Path, days: list[str], kind: str) -> None:
    """Damages the last day's files (a middle day's for missing_day)."""
    day, middle = days[-1], days[len(days) // 2]
    rows: dict[str, Callable[[pa.Table], pa.Table]] = {
        "missing_column": lambda t: t.drop_columns(["rank_index", "like"]),
        "extra_column": lambda t: t.append_column("watched", t["like"]),
        "clashing_columns": lambda t: t.append_column("like ", t["like"]),
        "float_column": lambda t: replaced(t, "duration", t["duration"].to_numpy().astype(np.float64)),
        "fractional_column": lambda t: replaced(t, "age", t["age"].to_numpy() + 0.5 * (np.arange(len(t)) == 3)),
        "missing_rank": _without_first_rank, "duplicate_rows": _with_repeated_rows, "user_conflict": _with_other_users,
        "other_day": lambda t: replaced(t, "request_timestamp", t["request_timestamp"].to_numpy() + 3_600_000 * 40),
    }
    lists: dict[str, Callable[[Lists], None]] = {
        "wrong_width": lambda c: _rewritten(c, "rank_pos", np.zeros((3, 7))),
        "object_array": lambda c: _rewritten(c, "rank_pos", np.array([[None] * 8])),
        "extra_stage": lambda c: _rewritten(c, "recall_neg", np.zeros((2, 8), np.int64)),
        "unknown_request": lambda c: c.update({987_654: next(iter(c.values()))}),
        "no_dictionary": lambda c: c.update({next(iter(c)): np.zeros((2, 8), np.int64)}),
        "text_key": lambda c: c.update({"first": {}}),
    }
    if kind in rows:
        change_rows(root, day, rows[kind])
    elif kind in lists:
        change_pickle(root, "request_id_dict", day, lists[kind])
    elif kind == "missing_history":
        change_pickle(root, "seq_effective_50_dict", day, _drop_first)
    elif kind == "narrow_history":
        change_pickle(root, "seq_effective_50_dict", day, lambda c: c.update({next(iter(c)): np.zeros((50, 9), int)}))
    elif kind == "id_over_count":
        path = root / "others/id_cnt.pkl"
        write_pickle(path, {**pickle.loads(path.read_bytes()), "video_id": 1_000})
    elif kind == "missing_day":
        (root / "request_id_dict" / f"{middle}.pkl").unlink()
        (root / "all_stage" / f"{middle}.feather").unlink()
    else:
        {"empty_file": lambda: (root / f"all_stage/{day}.feather").write_bytes(b""),
         "empty_pickle": lambda: (root / f"request_id_dict/{day}.pkl").write_bytes(b""),
         "feather_1": lambda: (root / f"all_stage/{day}.feather").write_bytes(b"FEA1" + b"\0" * 60),
         "cut_pickle": lambda: (root / f"request_id_dict/{day}.pkl").write_bytes(
             (root / f"request_id_dict/{day}.pkl").read_bytes()[:-40]),
         "hostile_pickle": lambda: _write_hostile(root, day)}[kind]()

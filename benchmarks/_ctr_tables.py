"""Click tables of two public logs: one row per shown item, with features that were known before it was shown.

A table is written once as shards, and read by both sides of a comparison: `publish_table` for ours, `export` for
others, which get the encoded values our models see.
"""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from raycascade import storage
from raycascade.batch import Batch, collate
from raycascade.fitting import FitPart
from raycascade.schema import FeatureSchema, Field
from raycascade.shards import Shards, publish, write_part

SPLITS = ("train", "valid", "test")
HISTORY = 20  # events
SMOOTHING = 10.0  # pseudo-observations of a share
CHINA_MS, DAY_MS = 8 * 3_600_000, 86_400_000
USER_IDS = ("user_active_degree", "fans_user_num_range", "register_days_range", "onehot_feat1", "onehot_feat2")
ITEM_IDS = ("author_id", "video_type", "upload_type", "music_type", "tag")


@dataclass(frozen=True)
class ClickTable:
    """Requests of one candidate each, by split in order of time, and the catalogue. `groups` are what GAUC averages
    over; the first label is the one that is measured."""

    name: str
    schema: FeatureSchema
    requests: dict[str, pa.Table]
    items: pa.Table
    groups: dict[str, np.ndarray]


@dataclass(frozen=True)
class Past:
    """What was known of a key strictly before a row's moment: how often it was seen, and the smoothed share of hits."""

    counts: np.ndarray
    shares: np.ndarray


def past_of(keys: np.ndarray, moments: np.ndarray, hits: np.ndarray, *, prior: float) -> Past:
    """Rows of the same key and moment do not see one another; a key without a past has the share `prior`."""
    order = np.lexsort((moments, keys))
    keys, moments, hits = keys[order], moments[order], hits[order].astype(np.float64)
    new_key = np.concatenate(([True], keys[1:] != keys[:-1]))
    new_moment = new_key | np.concatenate(([True], moments[1:] != moments[:-1]))
    first_of_key = np.maximum.accumulate(np.where(new_key, np.arange(len(keys)), 0))
    first_of_moment = np.maximum.accumulate(np.where(new_moment, np.arange(len(keys)), 0))
    before = np.concatenate(([0.0], hits.cumsum()))
    seen = first_of_moment - first_of_key
    found = before[first_of_moment] - before[first_of_key]
    counts, shares = np.empty(len(keys)), np.empty(len(keys))
    counts[order], shares[order] = seen, (found + SMOOTHING * prior) / (seen + SMOOTHING)
    return Past(counts, shares)


def histories(
    users: np.ndarray, moments: np.ndarray, events: pd.DataFrame, *, length: int = HISTORY
) -> list[np.ndarray]:
    """Per row the last `length` items of its user's events (columns user, moment, item) strictly before its moment."""
    events = events.sort_values(["user", "moment"], kind="stable")
    by_user = {user: (group["moment"].to_numpy(), group["item"].to_numpy()) for user, group in events.groupby("user")}
    nothing = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    found = []
    for user, moment in zip(users, moments, strict=True):
        times, items = by_user.get(user, nothing)
        end = int(np.searchsorted(times, moment, side="left"))
        found.append(items[max(0, end - length):end])
    return found


# ---------------------------------------------------------------- KuaiRand
def kuairand(raw: str) -> ClickTable:
    """Long views: exposures before 29 April 2022 to train on, the 29th to validate, the 30th to test.

    Shares and counts are as of midnight (China), the initial history included; a history is the user's long views.
    """
    folder = Path(raw)
    parts = [pd.read_parquet(path) for path in sorted(folder.glob("log_standard*.parquet"))]
    log = pd.concat(parts).drop_duplicates().sort_values("time_ms", kind="stable").reset_index(drop=True)
    users = pd.read_csv(folder / "user_features_pure.csv.gz").set_index("user_id")
    videos = pd.read_csv(folder / "video_features_basic_pure.csv.gz")
    videos["tag"] = videos["tag"].astype("string").str.split(",").str[0]
    earlier = _initial_events(folder)
    day = (log["time_ms"] + CHINA_MS).to_numpy() // DAY_MS
    last = int(day.max())
    split = np.where(day < last - 1, "train", np.where(day < last, "valid", "test"))
    label = log["long_view"].to_numpy(np.int8)
    prior = float(label[split == "train"].mean())
    columns = _long_view_shares(log, earlier, videos, day, prior)
    seen = pd.DataFrame({"user": log["user_id"], "item": log["video_id"], "hit": label, "moment": log["time_ms"]})
    events = pd.concat([earlier, seen]).query("hit > 0")
    profile = users.reindex(log["user_id"])
    columns |= {name: profile[name].astype("string").to_numpy(object) for name in USER_IDS}
    columns |= {"tab": log["tab"].to_numpy(np.int64), "hour": (log["time_ms"].to_numpy() + CHINA_MS) // 3_600_000 % 24}
    labels = {"long_view": label, "click": log["is_click"].to_numpy(np.int8)}
    items = pa.table({"item_id": videos["video_id"].to_numpy(),
                      **{name: pa.array(videos[name].astype("string"), pa.string()) for name in ITEM_IDS},
                      "duration": pa.array(videos["video_duration"], pa.float64(), from_pandas=True)})
    rows = _Rows(log["user_id"].to_numpy(), log["video_id"].to_numpy(), log["time_ms"].to_numpy(),
                 histories(log["user_id"].to_numpy(), log["time_ms"].to_numpy(), events), columns, labels, split)
    ids = {**dict.fromkeys(USER_IDS, "user"), "tab": "context", "hour": "context", **dict.fromkeys(ITEM_IDS, "item")}
    dense = [{"kind": "dense", "name": "duration", "side": "item", "normalise": "log"}]
    schema = _schema(ids, [n for n in columns if n.endswith(("_share", "_count"))], dense, tuple(labels),
                     ("item_id", "author_id"))
    return rows.table("kuairand", schema, items)


def _initial_events(folder: Path) -> pd.DataFrame:
    """The initial history as events of user, item, hit (a long view) and moment, which is negative."""
    users, items, hits, moments = [], [], [], []
    for path in sorted(folder.glob("user_sequences_to_*.parquet")):
        table = pd.read_parquet(path)
        for user, watched, long in zip(table["user_id"], table["watch_seq"], table["long_watch_seq"], strict=True):
            watched, seen_long = np.asarray(watched, np.int64), set(np.asarray(long, np.int64).tolist())
            users.append(np.full(len(watched), user))
            items.append(watched)
            hits.append(np.array([item in seen_long for item in watched.tolist()], np.int8))
            moments.append(np.arange(-len(watched), 0))
    empty = [np.zeros(0, np.int64)]
    return pd.DataFrame({name: np.concatenate(values or empty) for name, values in
                         (("user", users), ("item", items), ("hit", hits), ("moment", moments))})


def _long_view_shares(
    log: pd.DataFrame, earlier: pd.DataFrame, videos: pd.DataFrame, day: np.ndarray, prior: float
) -> dict[str, np.ndarray]:
    """Counts and shares of the user, the video and its author before the day."""
    author_of = videos.set_index("video_id")["author_id"]
    hits = np.concatenate([earlier["hit"], log["long_view"].to_numpy(np.int8)])
    moments = np.concatenate([np.full(len(earlier), -1), day])
    item = np.concatenate([earlier["item"], log["video_id"]])
    keys = {"user": np.concatenate([earlier["user"], log["user_id"]]), "item": item,
            "author": author_of.reindex(item).fillna(-1).to_numpy(np.int64)}
    columns = {}
    for name, values in keys.items():
        past = past_of(values, moments, hits, prior=prior)
        columns[f"{name}_share"], columns[f"{name}_count"] = past.shares[len(earlier):], past.counts[len(earlier):]
    del columns["author_count"]
    return columns


# ---------------------------------------------------------------- MovieTweetings
def movietweetings(raw: str) -> ClickTable:
    """Ratings of 8 and more: the first 80% of the time-ordered ratings to train on, 10% to validate, 10% to test.

    Shares and counts are of strictly earlier ratings; a history is the movies that the user rated 8 or more.
    """
    folder = Path(raw)
    with gzip.open(folder / "ratings.dat.gz", "rt", encoding="utf-8") as file:
        fields = np.array([line.rstrip("\n").split("::") for line in file], np.int64)
    fields = fields[np.argsort(fields[:, 3], kind="stable")]
    user, movie, rating, second = fields.T
    cut = np.arange(len(fields)) / len(fields)
    split = np.where(cut < 0.8, "train", np.where(cut < 0.9, "valid", "test"))
    liked = (rating >= 8).astype(np.int8)
    prior = float(liked[split == "train"].mean())
    columns: dict[str, np.ndarray] = {}
    for name, key in (("user", user), ("item", movie)):
        past = past_of(key, second, liked, prior=prior)
        columns[f"{name}_share"], columns[f"{name}_count"] = past.shares, past.counts
    columns["hour"] = second // 3600 % 24
    events = pd.DataFrame({"user": user, "moment": second, "item": movie, "hit": liked}).query("hit > 0")
    rows = _Rows(user, movie, second * 1000, histories(user, second, events), columns,
                 {"liked": liked, "loved": (rating >= 9).astype(np.int8)}, split)
    ids = {"hour": "context", "genre": "item", "second_genre": "item", "year": "item"}
    schema = _schema(ids, [n for n in columns if n.endswith(("_share", "_count"))], [], ("liked", "loved"),
                     ("item_id", "genre"))
    return rows.table("movietweetings", schema, _movies(folder))


def _movies(folder: Path) -> pa.Table:
    with gzip.open(folder / "movies.dat.gz", "rt", encoding="utf-8") as file:
        lines = [line.rstrip("\n").split("::") for line in file]
    genres = [[*line[2].split("|"), "", ""] if len(line) > 2 else ["", ""] for line in lines]
    years = [line[1].rsplit("(", 1)[-1].rstrip(") ") for line in lines]
    return pa.table({"item_id": np.array([int(line[0]) for line in lines]),
                     "genre": [found[0] or None for found in genres],
                     "second_genre": [found[1] or None for found in genres], "year": years})


# ---------------------------------------------------------------- from columns to requests
def _schema(
    ids: dict[str, str], shares: list[str], more: list[dict[str, str]], labels: tuple[str, ...],
    history: tuple[str, ...],
) -> FeatureSchema:
    """`ids`: side by name; values seen once in training are unknown, so that "unknown" is learned. `shares` are
    counted for the row's moment and stand on the side of the context."""
    features = [{"kind": "id", "name": name, "side": side, "min_count": 2}
                for name, side in {"user_id": "user", "item_id": "item", **ids}.items()]
    features += [{"kind": "dense", "name": name, "side": "context",
                  "normalise": "log" if name.endswith("_count") else "standard"} for name in shares]
    features += [*more, {"kind": "history", "max_len": HISTORY, "fields": history}]
    return FeatureSchema.model_validate({"features": features, "labels": labels, "positive": labels[0]})


@dataclass(frozen=True)
class _Rows:
    users: np.ndarray
    items: np.ndarray
    time_ms: np.ndarray
    histories: list[np.ndarray]
    columns: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    split: np.ndarray

    def table(self, name: str, schema: FeatureSchema, items: pa.Table) -> ClickTable:
        """Rows whose item the catalogue knows, as requests."""
        known = np.isin(self.items, items["item_id"].to_numpy())
        chosen = {split: np.flatnonzero(known & (self.split == split)) for split in SPLITS}
        return ClickTable(name, schema, {split: self._requests(rows) for split, rows in chosen.items()}, items,
                          {split: self.users[rows] for split, rows in chosen.items()})

    def _requests(self, rows: np.ndarray) -> pa.Table:
        ends = np.arange(len(rows) + 1, dtype=np.int32)
        past = [self.histories[row] for row in rows]
        lengths = np.concatenate(([0], np.cumsum([len(events) for events in past]))).astype(np.int32)
        events = np.concatenate([*past, np.zeros(0, np.int64)]).astype(np.int64)
        columns = {name: pa.array(values[rows], from_pandas=True) for name, values in self.columns.items()}
        lists = {"candidates": self.items, **self.labels}
        return pa.table({
            "request_id": np.arange(len(rows)), "user_id": self.users[rows], "time_ms": self.time_ms[rows], **columns,
            **{name: pa.ListArray.from_arrays(ends, pa.array(values[rows])) for name, values in lists.items()},
            "history": pa.ListArray.from_arrays(lengths, pa.array(events)),
        })


# ---------------------------------------------------------------- for both sides
def publish_table(root: str, table: ClickTable) -> Shards:
    """The table as shards; the features are fitted on the training rows alone."""
    part = FitPart(table.schema)
    part.add_requests(table.requests["train"], where=table.name)
    part.add_items(table.items, where=table.name)
    state = part.finish(table.items, as_of_ms=int(table.requests["train"]["time_ms"].to_numpy().max()) + 1)
    folder = storage.join(root, "v-1")
    state.save(storage.join(folder, "features"))
    encoded = {f"requests/{split}": state.encode_requests(rows, where=split) for split, rows in table.requests.items()}
    encoded["items"] = state.encode_items(table.items, where="items")
    for prefix, rows in encoded.items():
        write_part(storage.join(folder, prefix, "part-00000.parquet"), iter([rows]))
    counts = {split: len(rows) for split, rows in table.requests.items()}
    publish(root, "v-1", {"requests": counts, "fingerprint": table.schema.fingerprint()})
    return Shards.open(root)


def describe(shards: Shards) -> list[dict[str, object]]:
    """The fields of the table as plain values: name, kind (id, dense, history), side (user, item), rows and, of a
    column of the history, the field whose vocabulary it shares."""
    space = shards.state.space
    sides = {"request": "user", "item": "item"}
    fields: list[dict[str, object]] = [_described(f, sides[f.side]) for f in space.fields]
    fields += [{"name": f"hist_{name}", "kind": "history", "side": "user", "rows": space[name].num_rows, "of": name}
               for name in space.history_fields]
    return fields


def _described(field: Field, side: str) -> dict[str, object]:
    return {"name": field.name, "kind": field.form, "side": side, "rows": field.num_rows}


def export(shards: Shards) -> dict[str, np.ndarray]:
    """The encoded values of every split by "<split>/<field>", labels by "<split>/label:<name>", and the catalogue's
    rows of the history's fields by "items/<field>"."""
    arrays: dict[str, np.ndarray] = {}
    seen = {field.name for field in shards.state.space.fields}  # not the keys beside them
    for split in SPLITS:
        rows = pa.concat_tables([shards.read_group(name, group) for name, group, _ in shards.groups(split)])
        arrays |= {f"{split}/{name}": values for name, values in _columns(collate(rows, shards.items), seen).items()}
    items = shards.items
    fields = items.fields(items.all_rows, 0, names=shards.state.space.history_fields)
    return arrays | {f"items/{name}": values.numpy() for name, values in fields.items()}


def _columns(batch: Batch, seen: set[str]) -> dict[str, np.ndarray]:
    assert batch.targets is not None
    columns = {name: values.numpy() for name, values in batch.user.items()}
    columns |= {name: values[:, 0].numpy() for name, values in batch.item.items() if name in seen}
    columns |= {f"label:{name}": values[:, 0].numpy() for name, values in batch.targets.labels.items()}
    wide = max(0, HISTORY - batch.history_mask_QL.shape[1])
    for name, values in batch.history.items():
        if name not in seen:
            continue
        masked = np.where(batch.history_mask_QL.numpy(), values.numpy(), 0)
        columns[f"hist_{name}"] = np.pad(masked, ((0, 0), (0, wide)))
    return columns

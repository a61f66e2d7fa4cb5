"""KuaiRand (Gao et al., CIKM 2022): exposures of a short-video app with twelve kinds of feedback, official file layout.

Files below paths.raw, as `.csv`, `.csv.gz` or (the same columns) `.parquet`, of the Pure, 1K or 27K edition:
`log_standard*` (several are one log; later ones may be added at any time), `log_random*` (with `use_random`),
`user_features*` and `video_features_basic*`. `video_features_statistic*` averages over the whole month, the future
included, and is never read. `user_sequences_to_YYYYMMDD*`, an optional initial history that is no official file, holds
each user's last exposures up to that day.

Requests are a user's days in China (UTC+8), because the log has no request ids.

Times of the initial history are not in its file. They are estimated: the user's `history_len` exposures spread evenly
from `sequences_from` to `last_time_ms`, the listed ones being the last. Their order is the true one, and all lie before
the log begins; hours, ages and daily counts of that time are approximate. Their `long_view` is "the video is in
`long_watch_seq`", which is ambiguous where a user was shown a video twice. Feedback that the file does not tell is
null.
"""

import datetime as dt
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field as Option

from raycascade.datasets import _columns, _files
from raycascade.datasets._impressions import made_request_ids
from raycascade.errors import ConfigError, DataError
from raycascade.keys import fold, to_keys
from raycascade.plugins import PluginConfig
from raycascade.schema import (
    AgeFeature,
    ClockFeature,
    CountFeature,
    DenseFeature,
    Feature,
    FeatureSchema,
    HistoryFeature,
    IdFeature,
    IdsFeature,
    MatchFeature,
)

UTC_OFFSET_HOURS = 8.0
MISSING = -124
LABELS = {"click": "is_click", "like": "is_like", "follow": "is_follow", "comment": "is_comment",
          "forward": "is_forward", "hate": "is_hate", "long_view": "long_view"}
LOG_COLUMNS = ["user_id", "video_id", "time_ms", "tab", *LABELS.values()]
USER_IDS = ["user_active_degree", "is_live_streamer", "is_video_author", *(f"onehot_feat{i}" for i in range(18))]
USER_NUMBERS = ["follow_user_num", "fans_user_num", "friend_user_num", "register_days"]  # their *_range say no more
VIDEO_COLUMNS = ["video_id", "author_id", "video_type", "upload_dt", "upload_type", "video_duration", "music_id",
                 "music_type", "tag"]
TEXT = {"user_active_degree", "video_type", "upload_type", "tag"}
SEQUENCE_COLUMNS = ["user_id", "history_len", "last_time_ms", "watch_seq", "long_watch_seq", "like_seq"]
FIRST_DAY = re.compile(r"log_[a-z]+_(\d+)_(\d+)_to_")


class KuairandDataset:
    """A log of exposures: user and video features, seven labels of which `long_view` is the truth."""

    class Config(PluginConfig):
        """Options of `dataset: {name: kuairand}`."""

        history_len: int = Option(default=50, ge=1)
        request_by: Literal["day", "gap"] = "day"  # gap: a new request after 30 minutes without an exposure
        use_sequences: bool = True  # read the initial history, if it is there
        sequences_from: dt.date = dt.date(2022, 4, 9)  # when the initial history is taken to begin
        use_random: bool = False  # also read log_random*: videos shown at random instead of recommended

    def __init__(self, config: Config, *, raw: str):
        self.config = config
        self.raw = raw
        self.form: Literal["impressions"] = "impressions"
        self.exclude_seen = True
        self.duplicates: Literal["drop"] = "drop"  # the published log repeats about 3% of its rows
        self.history_len = config.history_len
        self.gap_minutes = 30.0 if config.request_by == "gap" else None

    def schema(self) -> FeatureSchema:
        """Users by id, activity and anonymised traits; videos by author, tags, music, length, age and past counts."""
        users = [IdFeature(name="user_id", side="user"), *(IdFeature(name=name, side="user") for name in USER_IDS)]
        numbers = [DenseFeature(name=name, side="user", normalise="log") for name in USER_NUMBERS]
        context = [IdFeature(name="tab", side="context"),
                   ClockFeature(name="hour", part="hour", utc_offset_hours=UTC_OFFSET_HOURS),
                   ClockFeature(name="weekday", part="weekday", utc_offset_hours=UTC_OFFSET_HOURS)]
        static = [IdFeature(name=n, side="item") for n in
                  ("item_id", "author_id", "video_type", "upload_type", "music_id", "music_type")]
        events = [HistoryFeature(max_len=self.config.history_len, fields=("item_id", "author_id", "tag")),
                  IdFeature(name="watched", side="event"), AgeFeature(name="age", side="event")]
        features: list[Feature] = [
            *users, *numbers, *context, *static, IdsFeature(name="tag", side="item", max_len=4),
            DenseFeature(name="video_duration", side="item", normalise="log"),
            AgeFeature(name="upload_age", side="item", source="upload_ms"), *_counts(), *_matches(), *events,
        ]
        return FeatureSchema(features=tuple(features), labels=tuple(LABELS), positive="long_view",
                             utc_offset_hours=UTC_OFFSET_HOURS)

    def items(self) -> pa.Table:
        """The videos of `video_features_basic*`, by id."""
        table, where = self._catalogue("video_features_basic*", VIDEO_COLUMNS, "video_id")
        columns = {"item_id": table["video_id"]}
        for name in ("author_id", "video_type", "upload_type", "music_id", "music_type"):
            columns[name] = _ids(table[name], name, where)
        nothing = pc.equal(columns["music_id"], 0)
        columns["music_id"] = pc.if_else(nothing, pa.scalar(None, pa.int64()), columns["music_id"])
        columns["tag"] = _tags(table["tag"], where)
        columns["video_duration"] = _numbers(table["video_duration"], "video_duration", where)
        columns["upload_ms"] = _columns.milliseconds(table["upload_dt"].combine_chunks(), "upload_dt", "iso",
                                                     utc_offset_hours=UTC_OFFSET_HOURS, where=where)
        return pa.table(columns)

    def slices(self) -> list[str]:
        """The log's files, Parquet by ranges of row groups, and the initial history."""
        logs = _files.required(self.raw, "log_standard*")
        sequences = _files.matching(self.raw, "user_sequences_to_*.parquet") if self.config.use_sequences else []
        for sequence in sequences:
            last = _last_day(sequence)
            for log in logs:
                first = FIRST_DAY.search(log)
                if first and dt.date(last.year, int(first[1]), int(first[2])) <= last:
                    raise ConfigError(f"dataset.use_sequences: {log} begins before {sequence} ends, so its exposures "
                                      "would count twice; set use_sequences: false")
        if self.config.use_random:
            logs = logs + _files.required(self.raw, "log_random*")
        return _files.pieces(self.raw, logs + sequences)

    def read(self, piece: str) -> Iterator[pa.Table]:
        """Impressions with the users' features; `request_id` is null where `gap_minutes` decides.

        `row_key` tells rows apart that differ only in columns that are not kept, so that no row is dropped as a
        duplicate unless all its columns are equal.
        """
        file = _files.file_of(piece)
        sequence = file.startswith("user_sequences_to_")
        names = _files.column_names(self.raw, file)
        _columns.require(names, {name: name for name in (SEQUENCE_COLUMNS if sequence else LOG_COLUMNS)}, where=file)
        if sequence:
            tables = _files.read(self.raw, piece, columns=SEQUENCE_COLUMNS)
            parts = (self._from_sequences(table.slice(start, 4096), file) for table in tables
                     for start in range(0, len(table), 4096))
        else:
            types = dict.fromkeys(LOG_COLUMNS, pa.int64())
            parts = (self._from_log(table, file) for table in _files.read(self.raw, piece, columns=names, types=types))
        for part in parts:
            yield self._with_users(part)

    def _from_log(self, table: pa.Table, where: str) -> pa.Table:
        raw = {name: table[name].combine_chunks() for name in table.column_names}
        columns = {new: _columns.without_nulls(_columns.ids(raw[old], old, where=where), old, where=where)
                   for new, old in (("user_id", "user_id"), ("item_id", "video_id"))}
        time_ms = _columns.milliseconds(raw["time_ms"], "time_ms", "ms", utc_offset_hours=UTC_OFFSET_HOURS, where=where)
        time_ms = _columns.without_nulls(time_ms, "time_ms", where=where)
        made = pa.nulls(len(table), pa.string()) if self.gap_minutes else made_request_ids(
            "day", columns["user_id"], time_ms, columns["item_id"], utc_offset_hours=UTC_OFFSET_HOURS)
        columns |= {"request_id": made, "time_ms": time_ms}
        columns["tab"] = _columns.ids(raw["tab"], "tab", where=where).cast(pa.int64())
        columns |= {label: _columns.label(raw[name], label, name, where=where) for label, name in LABELS.items()}
        columns["watched"] = columns["long_view"].cast(pa.int64())
        rest = [to_keys(_columns.ids(raw[name], name, where=where)) for name in sorted(raw) if name not in LOG_COLUMNS]
        keys = fold(rest) if rest else np.zeros(len(table), np.uint64)
        return pa.table(columns | {"row_key": pa.array(keys.view(np.int64))})

    def _from_sequences(self, table: pa.Table, where: str) -> pa.Table:
        raw = {name: table[name].combine_chunks() for name in SEQUENCE_COLUMNS}
        user_Q = _columns.without_nulls(raw["user_id"].cast(pa.int64()), "user_id", where=where)
        last_Q = _columns.without_nulls(raw["last_time_ms"].cast(pa.int64()), "last_time_ms", where=where).to_numpy()
        watched = _columns.lists(raw["watch_seq"], "watch_seq", ",", where=where)
        row_R = np.repeat(np.arange(len(table)), watched.lengths_Q)
        position_R = np.arange(len(row_R)) - np.repeat(watched.offsets_Q1[:-1], watched.lengths_Q)
        time_ms = self._estimated_ms(raw["history_len"], last_Q, watched.lengths_Q, row_R, position_R, where)
        video = _columns.without_nulls(_columns.ids(watched.values, "watch_seq", where=where), "watch_seq", where=where)
        user = user_Q.take(pa.array(row_R))
        feedback = {label: _contained(raw[column], row_R, video, where)
                    for label, column in (("long_view", "long_watch_seq"), ("like", "like_seq"))}
        unknown = pa.nulls(len(row_R), pa.int8())
        return pa.table({
            "user_id": user, "item_id": video,
            "request_id": made_request_ids("day", user, time_ms, video, utc_offset_hours=UTC_OFFSET_HOURS),
            "time_ms": time_ms,
            "tab": pa.nulls(len(row_R), pa.int64()), **{label: feedback.get(label, unknown) for label in LABELS},
            "watched": feedback["long_view"].cast(pa.int64()), "row_key": pa.array(np.zeros(len(row_R), np.int64)),
        })

    def _estimated_ms(
        self, history_len: pa.Array, last_Q: np.ndarray, lengths_Q: np.ndarray, row_R: np.ndarray,
        position_R: np.ndarray, where: str,
    ) -> pa.Array:
        """When each event of the initial history probably happened, rising within a user by at least a millisecond."""
        total_Q = _columns.without_nulls(history_len.cast(pa.int64()), "history_len", where=where).to_numpy()
        total_Q = np.maximum(total_Q, lengths_Q)
        first = dt.datetime.combine(self.config.sequences_from, dt.time(), dt.UTC)
        begin_ms = int(first.timestamp() * 1000 - UTC_OFFSET_HOURS * 3_600_000)
        end_Q = np.minimum(last_Q, _midnight_after_ms(_last_day(where)) - 1)
        back_R = lengths_Q[row_R] - 1 - position_R
        step_Q = np.maximum(end_Q - begin_ms, total_Q) / np.maximum(total_Q, 1)
        return pa.array((end_Q[row_R] - np.ceil(back_R * step_Q[row_R])).astype(np.int64))

    def _with_users(self, impressions: pa.Table) -> pa.Table:
        keys, features = self._users
        wanted = impressions["user_id"].to_numpy()
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        found = features.take(pa.array(at, mask=keys[at] != wanted))  # a user without features has nulls
        for name in found.column_names:
            impressions = impressions.append_column(name, found[name])
        return impressions

    @cached_property
    def _users(self) -> tuple[np.ndarray, pa.Table]:
        """User ids in ascending order, and their features in the same order."""
        table, where = self._catalogue("user_features*", ["user_id", *USER_IDS, *USER_NUMBERS], "user_id")
        columns = {name: _ids(table[name], name, where) for name in USER_IDS}
        columns |= {name: _numbers(table[name], name, where) for name in USER_NUMBERS}
        return table["user_id"].to_numpy(), pa.table(columns)

    def _catalogue(self, pattern: str, columns: list[str], key: str) -> tuple[pa.Table, str]:
        """The rows of all files of a pattern, one per value of `key`, by it; and the files' names."""
        files = _files.required(self.raw, pattern)
        for file in files:
            _columns.require(_files.column_names(self.raw, file), {name: name for name in columns}, where=file)
        types = {name: pa.string() if name in TEXT or name == "upload_dt" else pa.float64() for name in columns}
        table = _files.read_all(self.raw, files, columns=columns, types=types | {key: pa.int64()})
        where = ", ".join(files)
        keys = _columns.without_nulls(table[key].combine_chunks(), key, where=where)
        counts = pc.value_counts(keys).flatten()
        if len(counts[0]) < len(table):
            twice = counts[0][int(np.argmax(counts[1].to_numpy()))]
            raise DataError(f"{where}: {key} {twice} has {pc.max(counts[1])} rows; keep one row each")
        return table.sort_by(key).combine_chunks(), where


def _counts() -> list[Feature]:
    """Exposures, long views and their rate over a day, three days, a week and the whole past."""
    features: list[Feature] = []
    for ending, hours in (("24h", 24), ("72h", 72), ("168h", 168), ("all", None)):
        features.append(CountFeature(name=f"exposures_{ending}", window_hours=hours, relative=True))
        features.append(CountFeature(name=f"long_views_{ending}", label="long_view", window_hours=hours, relative=True))
        features.append(CountFeature(name=f"long_view_rate_{ending}", label="long_view", window_hours=hours, rate=True))
    return features


def _matches() -> list[Feature]:
    """How often the user was shown, and watched, videos of the candidate's author and tags."""
    features: list[Feature] = []
    for field in ("author_id", "tag"):
        features.append(MatchFeature(name=f"same_{field}", field=field))
        features.append(MatchFeature(name=f"same_{field}_watched", field=field, action="watched"))
        features.append(MatchFeature(name=f"same_{field}_rate", field=field, action="watched", rate=True))
    return features


def _contained(lists: pa.Array, row_R: np.ndarray, video: pa.Array, where: str) -> pa.Array:
    """Whether each event's video is in the list of its row, as int8."""
    inside = _columns.lists(lists, "sequence", ",", where=where)
    owners = np.repeat(np.arange(len(inside.lengths_Q)), inside.lengths_Q)
    values = to_keys(inside.values)
    found = np.isin(fold([row_R, to_keys(video)]), fold([owners, values]))
    return pa.array(found.astype(np.int8))


def _last_day(file: str) -> dt.date:
    day = file.removeprefix("user_sequences_to_").removesuffix(".parquet")
    try:
        return dt.datetime.strptime(day, "%Y%m%d").date()
    except ValueError:
        raise DataError(f"{file}: the name must end in the last day, such as user_sequences_to_20220424; rename it "
                        "") from None


def _midnight_after_ms(day: dt.date) -> int:
    """The midnight in China that ends a day."""
    zone = dt.timezone(dt.timedelta(hours=UTC_OFFSET_HOURS))
    return int(dt.datetime.combine(day + dt.timedelta(days=1), dt.time(), zone).timestamp() * 1000)


def _ids(column: pa.ChunkedArray, name: str, where: str) -> pa.Array:
    """Ids with null for the log's marks of a missing value."""
    array = _columns.ids(column.combine_chunks(), name, where=where)
    if name in TEXT:
        array = array.cast(pa.string())
        return pc.if_else(pc.equal(array, str(MISSING)), pa.scalar(None, pa.string()), array)
    array = array.cast(pa.int64())
    return pc.if_else(pc.equal(array, MISSING), pa.scalar(None, pa.int64()), array)


def _numbers(column: pa.ChunkedArray, name: str, where: str) -> pa.Array:
    array = _columns.numbers(column.combine_chunks(), name, where=where)
    return pc.if_else(pc.equal(array, float(MISSING)), pa.scalar(None, pa.float64()), array)


def _tags(column: pa.ChunkedArray, where: str) -> pa.Array:
    """Comma-separated tags as lists of integers; none is an empty list."""
    text = _ids(column, "tag", where)
    split = _columns.lists(pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text), "tag", ",", where=where)
    try:
        return split.with_values(pc.cast(split.values, pa.int64())).to_arrow()
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: column 'tag' must hold comma-separated integers ({error}); check the file") from None

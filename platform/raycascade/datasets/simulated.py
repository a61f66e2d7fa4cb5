"""A simulated short-video log with the candidates of every stage of production, for demos, tests and load tests.

The world is fixed from first principles (see `_world.py`): a true utility that is non-linear in the taste, depends on
the history target by target, on category x hour, on author and quality; a production cascade that sees it ever more
sharply (`_world_funnel.py`); position bias; new items every day. The order of a candidate list is random.

Days run from Monday 2024-01-01 (UTC). With the default eight days, test on the last one and validate on the one
before: `splits: {valid_from: 2024-01-07, test_from: 2024-01-08}`.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.random import Generator

from raycascade.datasets import _world as w
from raycascade.datasets._world_funnel import Logged, from_categories, react, serve
from raycascade.errors import DataError
from raycascade.schema import (
    AgeFeature,
    ClockFeature,
    CountFeature,
    CrossFeature,
    DenseFeature,
    FeatureSchema,
    HistoryFeature,
    IdFeature,
    IdsFeature,
    MatchFeature,
    VectorFeature,
)

GENDERS = ("female", "male", "other")
LABELS = ("click", "long_view", "like")
RECFLOW_KINDS = ("id", "ids", "clock", "age", "history")
TABLE_ROWS = 8_192  # requests per table
PIECE_REQUESTS = 20_000  # what a piece holds, about
MIN_PIECES = 4
REQUEST_ID_SHIFT = 24  # request id = user id * 2^24 + the user's running number
WARM_UP_DAYS, WARM_UP_EVENTS = 5, 20  # histories before the first day: at most so old, at most so many
RHYTHM_H = 1.0 + 0.8 * np.cos(2 * np.pi * (np.arange(24) - 20) / 24)  # most requests come at 20:00

Columns = dict[str, np.ndarray]


class Simulated:
    """One block of users over all days per piece, so that a user's history never crosses a piece.

    Every block of users has its own random streams: pieces may be read in any order, by any number of processes.
    """

    form: Literal["requests", "impressions"] = "requests"

    class Config(w.WorldConfig):
        """All options describe the world."""

    def __init__(self, config: Config, *, raw: str = "") -> None:
        self.config = config

    def schema(self) -> FeatureSchema:
        """Every kind of feature there is, or those of `features`."""
        return _schema(self.config)

    def items(self) -> pa.Table:
        """The catalogue in order of birth; `upload_ms` is the moment of birth."""
        world = w.catalogue(self.config)
        tagged_NV = world.tags_NV >= 0
        names = pa.array([f"tag_{tag:02d}" for tag in range(w.NUM_TAGS)])
        content = pa.FixedSizeListArray.from_arrays(pa.array(world.content_NE.reshape(-1)), self.config.content_dim)
        return pa.table({
            "item_id": np.arange(self.config.num_items),
            "category": world.category_N,
            "author": world.author_N,
            "tags": _lists(tagged_NV.sum(1), names.take(pa.array(world.tags_NV[tagged_NV]))),
            "duration": world.duration_s_N,
            "upload_ms": world.birth_ms_N,
            "content": content,
        })

    def slices(self) -> list[str]:
        """Blocks of users, named `users-<first>-<last>`."""
        per_user = self.config.requests_per_user_day * self.config.num_days
        wanted = min(PIECE_REQUESTS / per_user, self.config.num_users / MIN_PIECES)
        size = w.BLOCK_USERS * max(1, round(wanted / w.BLOCK_USERS))
        starts = range(0, self.config.num_users, size)
        return [f"users-{start}-{min(start + size, self.config.num_users) - 1}" for start in starts]

    def read(self, piece: str) -> Iterator[pa.Table]:
        """The requests of a block of users, block by block of 256 users, day by day."""
        if piece not in self.slices():
            raise DataError(f"simulated: there is no piece {piece!r}; pieces are {self.slices()[0]} and so on")
        first, last = (int(number) for number in piece.split("-")[1:])
        blocks = range(first // w.BLOCK_USERS, last // w.BLOCK_USERS + 1)
        waiting: list[Columns] = []
        for block in blocks:
            for columns in _simulate(self.config, block):
                waiting.append(columns)
                if sum(len(part["time_ms"]) for part in waiting) >= TABLE_ROWS:
                    yield _to_table(self.config, waiting)
                    waiting = []
        if waiting:
            yield _to_table(self.config, waiting)

    def true_utility(self, requests: pa.Table) -> np.ndarray:
        """What the users of a table of this log truly thought of each candidate, float [Q, C]; for diagnostics."""
        user_id_Q = requests["user_id"].to_numpy()
        time_ms_Q = requests["time_ms"].to_numpy()
        day_Q = (time_ms_Q - w.START_MS) // w.DAY_MS
        taste_QD, loyalty_QD = (np.empty((len(user_id_Q), self.config.dim), np.float32) for _ in range(2))
        for block in np.unique(user_id_Q // w.BLOCK_USERS):
            block_users = w.users(self.config, int(block))
            mine = np.flatnonzero(user_id_Q // w.BLOCK_USERS == block)
            for day in np.unique(day_Q[mine]):
                now = mine[day_Q[mine] == day]
                taste_QD[now] = block_users.taste_on(day, self.config.drift)[user_id_Q[now] % w.BLOCK_USERS]
            loyalty_QD[mine] = block_users.loyalty_UD[user_id_Q[mine] % w.BLOCK_USERS]
        past = [_right_aligned(requests[name], self.config.history_len, fill) for name, fill in (
            ("history", -1), ("history_time_ms", 0), ("history_action", 0))]
        situation = w.Situation(taste_QD, loyalty_QD, time_ms_Q, *past)
        candidates_QC = requests["candidates"].combine_chunks().flatten().to_numpy().reshape(len(user_id_Q), -1)
        return w.utility(w.catalogue(self.config), situation, candidates_QC)


def _schema(config: w.WorldConfig) -> FeatureSchema:
    every = FeatureSchema(
        features=(
            IdFeature(name="user_id", side="user"),
            IdFeature(name="age_group", side="user"),
            IdFeature(name="gender", side="user"),
            IdFeature(name="region", side="user"),
            DenseFeature(name="activity", side="user"),
            ClockFeature(name="hour", part="hour"),
            ClockFeature(name="weekday", part="weekday"),
            IdFeature(name="item_id", side="item"),
            IdFeature(name="category", side="item"),
            IdFeature(name="author", side="item"),
            IdsFeature(name="tags", side="item", max_len=w.MAX_TAGS),
            DenseFeature(name="duration", side="item", normalise="log"),
            VectorFeature(name="content", side="item", dim=config.content_dim),
            AgeFeature(name="item_age", side="item", source="upload_ms"),
            CountFeature(name="exposures", label="exposure"),
            CountFeature(name="exposures_24h", label="exposure", window_hours=24),
            CountFeature(name="long_views_24h", label="long_view", window_hours=24),
            CountFeature(name="long_view_rate", label="long_view", rate=True),
            MatchFeature(name="category_matches", field="category"),
            MatchFeature(name="author_matches", field="author"),
            MatchFeature(name="category_long_views", field="category", action="action", values=("3",)),
            MatchFeature(name="category_click_rate", field="category", action="action", values=("2", "3"), rate=True),
            CrossFeature(name="gender_x_category", parts=("gender", "category"), buckets=4_096),
            CrossFeature(name="region_x_category", parts=("region", "category"), buckets=8_192),
            HistoryFeature(max_len=config.history_len),
            IdFeature(name="action", side="event"),
            AgeFeature(name="event_age", side="event"),
        ),
        labels=LABELS,
        positive="long_view",
    )
    if config.features == "every":
        return every
    return every.model_copy(update={"features": tuple(f for f in every.features if f.kind in RECFLOW_KINDS)})


# ---------------------------------------------------------------- the log of a block of users
def _simulate(config: w.WorldConfig, block: int) -> Iterator[Columns]:
    """Day by day; within a day all users' first requests, then their second ones: a step has one request per user."""
    world, block_users = w.catalogue(config), w.users(config, block)
    history, history_time_ms, action = _warm_up(config, world, block)
    running_U = np.zeros(w.BLOCK_USERS, np.int64)
    exists_U = block_users.ids_U < config.num_users
    for day in range(config.num_days):
        rng = w.stream(config, "days", block, day)
        taste_UD = block_users.taste_on(day, config.drift)
        count_U = rng.poisson(block_users.rate_U)
        time_ms_UR = _moments(rng, day, count_U)
        for step in range(time_ms_UR.shape[1]):
            # Users beyond num_users are simulated too, unlogged, so that the size of the world changes nobody's log.
            at_Q = np.flatnonzero(count_U > step)
            situation = w.Situation(taste_UD[at_Q], block_users.loyalty_UD[at_Q], time_ms_UR[at_Q, step],
                                    history[at_Q], history_time_ms[at_Q], action[at_Q])
            logged = serve(config, world, rng, situation)
            yield _columns(config, block_users, at_Q, running_U[at_Q], situation, logged, exists_U[at_Q])
            time_ms_QS = np.broadcast_to(situation.time_ms_Q[:, None], logged.shown_QS.shape)
            history[at_Q] = _push(situation.history_QL, logged.shown_QS)
            history_time_ms[at_Q] = _push(situation.history_time_ms_QL, time_ms_QS)
            action[at_Q] = _push(situation.action_QL, logged.action_QS)
            running_U[at_Q] += 1


def _push(old_QL: np.ndarray, new_QS: np.ndarray) -> np.ndarray:
    """The newest events on the right; the oldest fall off."""
    return np.concatenate([old_QL[:, new_QS.shape[1]:], new_QS], axis=1)


def _moments(rng: Generator, day: int, count_U: np.ndarray) -> np.ndarray:
    """Times of each user's requests of a day [U, R], strictly growing along a row, following the daily rhythm."""
    most = int(count_U.max(initial=0))
    share_H = np.concatenate([[0.0], np.cumsum(RHYTHM_H) / RHYTHM_H.sum()])
    hours_UR = np.interp(rng.random((len(count_U), most)), share_H, np.arange(25))
    hours_UR[np.arange(most) >= count_U[:, None]] = 24.0  # sorted behind the real ones, never read
    latest_ms = w.DAY_MS - most - 1
    sorted_UR = np.minimum(np.sort((hours_UR * w.HOUR_MS).astype(np.int64), axis=1), latest_ms)
    return w.START_MS + day * w.DAY_MS + sorted_UR + np.arange(most)


def _warm_up(config: w.WorldConfig, world: w.Catalogue, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right-aligned histories [U, L] of the days before the log: items, times, actions. Some users have none."""
    rng, block_users = w.stream(config, "warm_up", block), w.users(config, block)
    shape = (w.BLOCK_USERS, config.history_len)
    history, history_time_ms, action = np.full(shape, -1), np.zeros(shape, np.int64), np.zeros(shape, np.int8)
    events = min(WARM_UP_EVENTS, config.history_len)
    started_ms_U1 = w.START_MS - rng.integers(0, WARM_UP_DAYS * w.DAY_MS, (w.BLOCK_USERS, 1)) - 1
    time_ms_UL = np.sort(rng.integers(started_ms_U1, w.START_MS, (w.BLOCK_USERS, events)), axis=1)
    affinity_UG = np.exp(3.0 * block_users.taste_UD @ world.centroid_GD.T)
    items_UL = from_categories(world, rng, affinity_UG, started_ms_U1[:, 0], (w.BLOCK_USERS, events))
    nothing = (history, history_time_ms, action)
    bare = w.Situation(block_users.taste_UD, block_users.loyalty_UD, started_ms_U1[:, 0], *nothing)
    feedback = react(rng, w.utility(world, bare, items_UL) + 1.0, world.duration_s_N[items_UL])
    kept_UL = np.arange(events) >= events - rng.integers(0, events + 1, (w.BLOCK_USERS, 1))
    action_UL = w.SHOWN + feedback["click"] + feedback["long_view"].astype(np.int64)
    history[:, -events:] = np.where(kept_UL, items_UL, -1)
    history_time_ms[:, -events:] = np.where(kept_UL, time_ms_UL, 0)
    action[:, -events:] = np.where(kept_UL, action_UL, 0)
    return history, history_time_ms, action


# ---------------------------------------------------------------- Arrow
def _columns(
    config: w.WorldConfig, block_users: w.Users, at_Q: np.ndarray, number_Q: np.ndarray, situation: w.Situation,
    logged: Logged, kept_Q: np.ndarray,
) -> Columns:
    """One step as arrays with a row per request."""
    columns = {
        "user_id": block_users.ids_U[at_Q],
        "time_ms": situation.time_ms_Q,
        "number": number_Q,
        "age_group": block_users.age_group_U[at_Q],
        "gender": block_users.gender_U[at_Q],
        "region": block_users.region_U[at_Q],
        "activity": block_users.activity_U[at_Q],
        "history": situation.history_QL,
        "history_time_ms": situation.history_time_ms_QL,
        "history_action": situation.action_QL,
        "candidates": logged.items_QC,
        "reached": logged.reached_QC.astype(np.int8),
        "rank": logged.rank_QC.astype(np.int16),
        "exposed": logged.exposed_QC,
        **logged.labels,
    }
    if config.relevance == "recflow":
        graded_QC = np.where(logged.chosen_QC > 0, 30 - logged.chosen_QC, 5 + logged.reached_QC)
        columns |= {"rank": logged.chosen_QC.astype(np.int16), "relevance": graded_QC.astype(np.float32)}
    return columns if kept_Q.all() else {name: values[kept_Q] for name, values in columns.items()}


def _to_table(config: w.WorldConfig, parts: list[Columns]) -> pa.Table:
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    exposed, past = columns["exposed"].reshape(-1), columns["history"] >= 0
    num_requests = len(columns["user_id"])
    width_Q = np.full(num_requests, config.levels * config.per_level)
    table = {
        "request_id": (columns["user_id"] << REQUEST_ID_SHIFT) + columns["number"],
        "user_id": columns["user_id"],
        "time_ms": columns["time_ms"],
        "age_group": pa.array(columns["age_group"], mask=columns["age_group"] < 0),
        "gender": pa.array(GENDERS).take(pa.array(columns["gender"])),
        "region": columns["region"],
        "activity": pa.array(columns["activity"], mask=np.isnan(columns["activity"])),
    }
    for name in ("history", "history_time_ms", "history_action"):
        table[name] = _lists(past.sum(1), pa.array(columns[name][past]))
    for name in ("candidates", "reached", "rank", "relevance", "exposed"):
        if name not in columns:
            continue
        table[name] = _lists(width_Q, pa.array(columns[name].reshape(-1)))
    for name in LABELS:
        table[name] = _lists(width_Q, pa.array(columns[name].reshape(-1).astype(np.int8), mask=~exposed))
    return pa.table(table)


def _lists(lengths_Q: np.ndarray, values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths_Q)]), pa.int32()), values)


def _right_aligned(column: pa.ChunkedArray, width: int, fill: int) -> np.ndarray:
    """Lists as an array [Q, width] with the newest value last."""
    lists = column.combine_chunks()
    lengths_Q = np.diff(lists.offsets.to_numpy())
    aligned = np.full((len(lists), width), fill, np.int64)
    aligned[np.arange(width) >= width - lengths_Q[:, None]] = lists.flatten().to_numpy()
    return aligned

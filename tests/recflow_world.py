"""A small log in RecFlow's official file layout, made from nothing: every file, every container, every edge case.

A hidden affinity of users to categories and authors decides, with noise that falls from stage to stage, what survives.
`EDGES` names requests of the first day that stand for a case of their own.
"""

import datetime as dt
import pickle
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.feather
from numpy.random import Generator

NUM_USERS, NUM_VIDEOS, NUM_AUTHORS, NUM_CATEGORIES = 200, 2_000, 150, 40
NUM = {"age": 8, "gender": 3, "province": 10, "category_level_one": 10, "category_level_two": NUM_CATEGORIES,
       "upload_type": 6, "author_id": NUM_AUTHORS, "user_id": NUM_USERS, "device_id": NUM_USERS}
DAY_MS, CHINA = 86_400_000, dt.timezone(dt.timedelta(hours=8))
PERIOD_2 = "2024-02-05"
STAGES = ("realshow", "rerank_pos", "rerank_neg", "rank_pos", "rank_neg", "coarse_neg", "prerank_neg")
LABELS = ("effective_view", "long_view", "like", "follow", "forward", "comment")
COLUMNS = ("request_id", "request_timestamp", "user_id", "device_id", "age", "gender", "province", "video_id",
           "author_id", "category_level_one", "category_level_two", "upload_type", "upload_timestamp", "duration",
           *STAGES, "rank_index", "rerank_index", "playing_time", *LABELS)
EDGES = {"missing_stage": 1, "no_rows": 2, "short_rank_pos": 3, "empty_history": 4, "full_history": 5, "nine_shown": 6,
         "two_groups": 7, "rank_20": 8, "wide_coarse": 9, "one_day_user": 10, "numpy_key": 11}
CASES = {request: case for case, request in EDGES.items()}
ONE_DAY_USER = NUM_USERS - 1
FUNNEL = {"prerank": (110, 80, 1.2), "coarse": (80, 50, 0.9)}  # in, out, noise
RANK_NOISE, RERANK_NOISE = 0.6, 0.4
WIDE, NARROW = 40, 12


@dataclass
class World:
    """Users, videos and what users like."""

    rng: Generator
    signal: float
    users: dict[str, np.ndarray] = field(init=False)
    videos: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        rng = self.rng
        self.users = {"user_id": np.arange(NUM_USERS), "device_id": rng.permutation(NUM_USERS),
                      **{name: rng.integers(0, NUM[name], NUM_USERS) for name in ("age", "gender", "province")}}
        two = rng.integers(0, NUM_CATEGORIES, NUM_VIDEOS)
        self.videos = {"video_id": np.arange(NUM_VIDEOS), "author_id": rng.integers(0, NUM_AUTHORS, NUM_VIDEOS),
                       "category_level_one": two // 4, "category_level_two": two,
                       "upload_type": rng.integers(0, NUM["upload_type"], NUM_VIDEOS),
                       "upload_timestamp": rng.integers(1_700_000_000, 1_705_000_000, NUM_VIDEOS),
                       "duration": rng.integers(5_000, 90_000, NUM_VIDEOS)}
        for name in ("author_id", "category_level_one", "category_level_two", "upload_type"):
            self.videos[name][0] = 0
        self.taste = rng.normal(0, 1, (NUM["gender"], NUM_CATEGORIES)) + rng.normal(0, 1, NUM_CATEGORIES)
        self.quality = rng.normal(0, 0.5, NUM_AUTHORS)

    def score(self, user: int, videos: np.ndarray, noise: float) -> np.ndarray:
        affinity = self.taste[self.users["gender"][user], self.videos["category_level_two"][videos]]
        affinity = affinity + self.quality[self.videos["author_id"][videos]]
        return self.signal * affinity + self.rng.normal(0, noise, len(videos))


@dataclass
class Request:
    """One request: its stages with videos in stored order, ranks and feedback by video."""

    id: int
    user: int
    time_ms: int
    stages: dict[str, list[int]]
    ranks: dict[str, dict[int, int]]
    feedback: dict[int, dict[str, int]]
    history: list[tuple[int, ...]]


def _request(world: World, id: int, user: int, time_ms: int, history: list, *, wide: bool, case: str) -> Request:
    rng = world.rng
    size = WIDE if wide else NARROW
    pool = rng.choice(NUM_VIDEOS, 110 + (100 if wide else 0), replace=False)
    stages: dict[str, list[int]] = {}
    alive = pool
    for name, (entering, leaving, noise) in FUNNEL.items():
        order = np.argsort(-world.score(user, alive, noise))
        kept = leaving + (len(alive) - entering) // 2
        cut = alive[order[kept:]]
        num = min(len(cut), WIDE if case == "wide_coarse" and name == "coarse" else size)
        stages[f"{name}_neg"] = rng.choice(cut, num, replace=False).tolist()
        if num < size or (case == "wide_coarse" and name == "coarse" and num < WIDE):
            stages[f"{name}_neg"] += rng.choice(np.setdiff1d(np.arange(NUM_VIDEOS), pool), (
                WIDE if case == "wide_coarse" else size) - num, replace=False).tolist()
        alive = alive[order[:kept]]
    ranked = alive[np.argsort(-world.score(user, alive, RANK_NOISE))]
    places = np.sort(rng.choice(20, 10, replace=False))
    if case == "rank_20":
        places[-1] = 19
    best = rng.permutation(places)[:7 if case == "short_rank_pos" else 10]
    worse = 20 + rng.choice(len(ranked) - 20, NARROW, replace=False)
    stages["rank_pos"], stages["rank_neg"] = ranked[best].tolist(), ranked[worse].tolist()
    rank_index = {int(ranked[place]): int(place) + 1 for place in (*best, *worse)}
    final = ranked[:40]
    final = final[np.argsort(-world.score(user, final, RERANK_NOISE))]
    others = 10 + rng.choice(len(final) - 10, NARROW, replace=False)
    stages["rerank_pos"], stages["rerank_neg"] = final[rng.permutation(10)].tolist(), final[others].tolist()
    rerank_index = {int(final[place]): int(place) + 1 for place in (*range(10), *others)}
    num_shown = 9 if case == "nine_shown" else int(rng.integers(4, 9))
    stages["realshow"] = final[rng.permutation(11)[:num_shown]].tolist()  # the eleventh is not of the first ten
    if case == "two_groups":
        stages["coarse_neg"][0] = stages["rank_neg"][0]
    if case == "missing_stage":
        del stages["coarse_neg"]
    if case == "no_rows":
        stages["rank_neg"] = []
        rank_index = {video: rank for video, rank in rank_index.items() if video in stages["rank_pos"]}
    feedback = {video: _feedback(world, user, video) for video in stages["realshow"]}
    return Request(id, user, time_ms, stages, {"rank_index": rank_index, "rerank_index": rerank_index}, feedback,
                   list(history))


def _feedback(world: World, user: int, video: int) -> dict[str, int]:
    rng = world.rng
    share = float(1 / (1 + np.exp(-world.score(user, np.array([video]), 0.5)[0]))) * 1.6
    rare = {name: int(rng.random() < 0.05) for name in ("like", "follow", "forward", "comment")}
    return {"effective_view": int(share >= 0.3), "long_view": int(share >= 1.0), **rare,
            "playing_time": int(share * world.videos["duration"][video])}


def _simulate(world: World, days: list[str], requests_per_day: int, *, edge_cases: bool) -> dict[str, list[Request]]:
    """Requests by day in order of time; a day before the first one, under the name "", fills histories."""
    histories: dict[int, list[tuple[int, ...]]] = {user: [] for user in range(NUM_USERS)}
    found: dict[str, list[Request]] = {}
    first = midnight_ms(days[0])
    for number, day in enumerate(["", *days]):
        start = midnight_ms(day) if day else first - DAY_MS
        times = start + np.sort(world.rng.choice(DAY_MS // 1000 - 2, requests_per_day, replace=False) + 1) * 1000
        ids = np.arange(requests_per_day) + (number - 1 if number else len(days)) * requests_per_day
        users = world.rng.integers(0, ONE_DAY_USER, requests_per_day)
        if number == 1:
            users[0] = 0
        found[day] = []
        for place in range(requests_per_day):
            case = CASES.get(place, "") if edge_cases and number == 1 else ""
            user, time_ms = ONE_DAY_USER if case == "one_day_user" else int(users[place]), int(times[place])
            history = [] if case == "empty_history" else histories[user][-50:]
            if case == "full_history":
                past = [request.id for request in found[""]]
                history = [_event(world, int(world.rng.integers(NUM_VIDEOS)), first - 60_000 + n, 5_000,
                                  past[n % len(past)]) for n in range(50)]
            request = _request(world, int(ids[place]), user, time_ms, history, wide=day >= PERIOD_2, case=case)
            found[day].append(request)
            seen = [video for video, told in request.feedback.items() if told["effective_view"]]
            histories[user] += [_event(world, video, time_ms + 1 + n, request.feedback[video]["playing_time"],
                                       request.id) for n, video in enumerate(seen)]
    return found


def _event(world: World, video: int, time_ms: int, playing_time: int, request: int) -> tuple[int, ...]:
    v = {name: int(values[video]) for name, values in world.videos.items()}
    return (video, v["author_id"], v["category_level_two"], v["category_level_one"], v["upload_type"],
            v["upload_timestamp"], v["duration"], time_ms, playing_time, request)


def midnight_ms(day: str) -> int:
    return int(dt.datetime.fromisoformat(day).replace(tzinfo=CHINA).timestamp() * 1000)


# ---------------------------------------------------------------- containers
def stage_table(world: World, requests: list[Request]) -> pa.Table:
    """The union of a day's stages, rows of a request not together."""
    rows = []
    for request in requests:
        user = [int(world.users[name][request.user]) for name in ("user_id", "device_id", "age", "gender", "province")]
        for video in sorted({video for videos in request.stages.values() for video in videos}):
            flags = [int(video in request.stages.get(stage, [])) for stage in STAGES]
            told = request.feedback.get(video, {})
            ranks = [request.ranks[name].get(video, 0) for name in ("rank_index", "rerank_index")]
            rows.append([request.id, request.time_ms, *user,
                         *(int(world.videos[name][video]) for name in COLUMNS[7:14]), *flags, *ranks,
                         told.get("playing_time", 0), *(told.get(name, 0) for name in LABELS)])
    columns = world.rng.permutation(np.array(rows, np.int64)).T
    return pa.table(dict(zip(COLUMNS, columns, strict=True)))


def lists_of(world: World, request: Request) -> dict[str, np.ndarray]:
    names = ("video_id", "author_id", "duration", "category_level_two", "upload_type", "upload_timestamp",
             "category_level_one")
    arrays = {}
    for stage, videos in request.stages.items():
        rows = [[*(int(world.videos[name][v]) for name in names), request.feedback.get(v, {}).get("effective_view", 0)]
                for v in videos]
        arrays[stage] = np.array(rows, np.int64).reshape(-1, 8)
    return arrays


def history_of(request: Request) -> np.ndarray:
    """Left-padded: valid rows at the end; padding is 0 except for category_level_one."""
    array = np.zeros((50, 10), np.int64)
    array[:, 3] = 2
    if request.history:
        array[50 - len(request.history):] = request.history
    return array


def defaultdict_tuple() -> defaultdict:
    return defaultdict(tuple)


def defaultdict_str() -> defaultdict:
    return defaultdict(str)


def write_pickle(path: Path, content: dict, *, style: str = "plain", protocol: int = 3) -> None:
    factory = {"defaultdict_tuple": defaultdict_tuple, "defaultdict_str": defaultdict_str}.get(style)
    if factory:
        content = defaultdict(factory, {key: defaultdict(tuple, value) if isinstance(value, dict) else value
                                        for key, value in content.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def write_feather(path: Path, table: pa.Table, *, space: bool = False, rows: int = 65_536) -> None:
    if space:
        table = table.rename_columns([f" {n}" if n == "category_level_two" else n for n in table.column_names])
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.feather.write_feather(table, str(path), compression="lz4", chunksize=rows)


def write_recflow(
    root: Path, days: list[str], requests_per_day: int, seed: int, *, space_in_column: bool = True,
    id_cnt_style: Literal["video_id", "photo_id"] = "video_id",
    pickle_style: Literal["plain", "defaultdict_tuple", "defaultdict_str"] = "plain", protocol: int = 3,
    test_names: Literal["readme", "code"] = "readme", edge_cases: bool = True, signal: float = 1.0, broken: str = "",
) -> World:
    """Writes every file below `root`; the same seed gives the same content. `broken`: see recflow_broken.py."""
    assert not edge_cases or requests_per_day > max(CASES), "the first day holds a request per case"
    world = World(np.random.default_rng(seed), signal)
    found = _simulate(world, days, requests_per_day, edge_cases=edge_cases)
    lists = {request.id: lists_of(world, request) for requests in found.values() for request in requests}
    shown: list[pa.Table] = []
    for day in days:
        requests, table = found[day], stage_table(world, found[day])
        shown.append(table.filter(pa.array(table["realshow"].to_numpy() == 1)))
        write_feather(root / f"all_stage/{day}.feather", table, space=space_in_column)
        write_feather(root / f"realshow/{day}.feather", shown[-1], space=space_in_column)
        keys = {r.id: np.int64(r.id) if edge_cases and CASES.get(r.id) == "numpy_key" else r.id for r in requests}
        for folder, content in (
            ("request_id_dict", {keys[r.id]: lists[r.id] for r in requests}),
            ("seq_effective_50_dict", {keys[r.id]: history_of(r) for r in requests}),
            ("ubm_seq_request_id_dict", {event[9]: lists[event[9]] for r in requests for event in r.history}),
        ):
            write_pickle(root / folder / f"{day}.pkl", content, style=pickle_style, protocol=protocol)
        videos = pa.concat_tables(shown).select(COLUMNS[7:14])
        write_feather(root / f"others/realshow_video_info_daily/{day}.feather", _distinct(videos))
    write_feather(root / "others/realshow_video_info.feather", _distinct(pa.concat_tables(shown).select(COLUMNS[7:14])))
    last = stage_table(world, found[days[-1]])
    readme = ("retrieval_test", "coarse_rank_test", "rank_test")
    for name in readme if test_names == "readme" else ("recall_test", "prerank_test", "rank_test"):
        write_feather(root / f"others/{name}.feather", last, space=space_in_column)
    counts: dict[str, Any] = {**NUM, id_cnt_style: NUM_VIDEOS, "request_id": requests_per_day * (len(days) + 1)}
    if space_in_column:
        counts[" category_level_two"] = counts.pop("category_level_two")
    write_pickle(root / "others/id_cnt.pkl", counts, protocol=protocol)
    if broken:
        from tests.recflow_broken import spoil

        spoil(root, days, broken)
    return world


def _distinct(videos: pa.Table) -> pa.Table:
    _, first = np.unique(videos["video_id"].to_numpy(), return_index=True)
    return videos.take(pa.array(first))

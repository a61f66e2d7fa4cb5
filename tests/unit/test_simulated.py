import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from raycascade.datasets import _world as w
from raycascade.datasets._world_funnel import EXAMINATION_DECAY, draw_pool, react
from raycascade.datasets.simulated import Simulated
from raycascade.errors import ConfigError, DataError
from raycascade.schema import CrossFeature, FeatureSchema

SMALL = {"num_users": 600, "num_items": 1_000, "num_days": 4}


def dataset(**options: object) -> Simulated:
    return Simulated(Simulated.Config.model_validate({**SMALL, **options}))


def whole(log: Simulated) -> pa.Table:
    return pa.concat_tables([table for piece in log.slices() for table in log.read(piece)]).combine_chunks()


@pytest.fixture(scope="module")
def log() -> Simulated:
    return dataset()


@pytest.fixture(scope="module")
def requests(log: Simulated) -> pa.Table:
    return whole(log)


@pytest.fixture(scope="module")
def lists_of(requests: pa.Table) -> Callable[[str], np.ndarray]:
    """A parallel list column as an array [Q, C]; null becomes NaN."""
    def read(name: str) -> np.ndarray:
        flat = requests[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(requests), -1)
    return read


@pytest.fixture(scope="module")
def utility_QC(log: Simulated, requests: pa.Table) -> np.ndarray:
    return log.true_utility(requests)


def joint_recall(scores_QC: np.ndarray, top_QC: np.ndarray, keep: int) -> float:
    kept = np.argsort(-scores_QC, axis=1)[:, :keep]
    return float(np.take_along_axis(top_QC, kept, 1).sum() / top_QC.sum())


def test_deeper_levels_have_a_higher_mean_true_utility(utility_QC, lists_of):
    reached_QC = lists_of("reached")
    means = [utility_QC[reached_QC == level].mean() for level in range(4)]
    assert all(deeper > shallower + 0.1 for shallower, deeper in pairwise(means)), means


def test_better_ranks_of_the_top_level_have_a_higher_mean_true_utility(utility_QC, lists_of):
    top_QC, rank_QC = lists_of("reached") == 3, lists_of("rank")
    assert utility_QC[top_QC & (rank_QC <= 3)].mean() > utility_QC[top_QC & (rank_QC > 7)].mean() + 0.5


def test_ranking_by_the_true_utility_finds_far_more_of_the_top_level_than_chance_does(utility_QC, lists_of):
    top_QC = lists_of("reached") == 3
    assert joint_recall(utility_QC, top_QC, 10) > 0.7
    chance = np.random.default_rng(0).random(top_QC.shape)
    assert joint_recall(chance, top_QC, 10) == pytest.approx(0.25, abs=0.02)
    as_stored = np.broadcast_to(-np.arange(top_QC.shape[1]), top_QC.shape)
    assert joint_recall(as_stored, top_QC, 10) == pytest.approx(0.25, abs=0.02), "the order of a list tells its levels"


def test_the_same_seed_gives_the_same_log_and_another_seed_another_one():
    small = {"num_users": 100, "num_days": 1}
    first, again, other = (dataset(**small, seed=seed) for seed in (1, 1, 2))
    w._catalogue.cache_clear()
    table, items = whole(first), first.items()
    w._catalogue.cache_clear()
    assert table.equals(whole(again))
    assert items.equals(again.items())
    assert not table.equals(whole(other))
    assert not items.equals(other.items())


def test_a_piece_read_alone_or_in_another_order_has_the_same_rows(log, requests):
    pieces = log.slices()
    assert len(pieces) == 3
    backwards = {piece: pa.concat_tables(list(dataset().read(piece))) for piece in reversed(pieces)}
    assert pa.concat_tables([backwards[piece] for piece in pieces]).combine_chunks().equals(requests)


def test_more_users_leave_the_log_of_the_others_unchanged(requests):
    fewer = whole(dataset(num_users=100))
    mine = requests.filter(pc.less(requests["user_id"], 100)).combine_chunks()
    assert fewer.equals(mine)


def test_pieces_hold_all_users_once_and_request_ids_are_unique(log, requests):
    for piece in log.slices():
        first, last = (int(number) for number in piece.split("-")[1:])
        users = np.unique(np.concatenate([table["user_id"].to_numpy() for table in log.read(piece)]))
        assert first <= users.min()
        assert users.max() <= last
    assert len(requests) == len(np.unique(requests["request_id"].to_numpy()))
    assert requests["user_id"].to_numpy().max() < SMALL["num_users"]


def test_a_piece_that_does_not_exist_is_refused(log):
    with pytest.raises(DataError, match="no piece 'users-7-9'"):
        next(log.read("users-7-9"))


@pytest.mark.parametrize("levels", [4, 5])
def test_every_list_holds_ten_distinct_items_per_level_with_ranks_one_to_ten(levels):
    table = whole(dataset(num_users=200, num_days=2, levels=levels))
    shape = (len(table), levels * 10)
    flat = {name: table[name].combine_chunks().flatten() for name in ("candidates", "reached", "rank", "exposed")}
    items, reached, rank, exposed = (x.to_numpy(zero_copy_only=False).reshape(shape) for x in flat.values())
    for row in range(len(table)):
        assert len(set(items[row])) == levels * 10
        for level in range(levels):
            assert sorted(rank[row, reached[row] == level]) == list(range(1, 11))
    assert ((reached == levels - 1) & (rank <= 6) == exposed).all()


def test_labels_are_known_exactly_where_an_item_was_exposed(requests, lists_of):
    exposed_QC = lists_of("exposed")
    click, long_view, like = (lists_of(name) for name in ("click", "long_view", "like"))
    for label_QC in (click, long_view, like):
        assert (np.isnan(label_QC) == ~exposed_QC).all()
        assert set(np.unique(label_QC[exposed_QC])) == {0.0, 1.0}
    assert (like <= long_view)[exposed_QC].all()
    assert (long_view <= click)[exposed_QC].all()
    assert 0.05 < long_view[exposed_QC].mean() < 0.5


def test_positive_feedback_follows_the_true_utility(utility_QC, lists_of):
    shown_QC, liked_QC = lists_of("exposed"), lists_of("long_view") == 1
    assert utility_QC[liked_QC].mean() > utility_QC[shown_QC & ~liked_QC].mean() + 0.3


def test_clicks_fall_with_the_position_at_equal_utility():
    utility_QS = np.full((40_000, 4), 2.4)  # the click offset: a chance of one half once looked at
    click_S = react(np.random.default_rng(1), utility_QS, np.ones((40_000, 4)))["click"].mean(0)
    assert click_S == pytest.approx(0.5 / (1 + EXAMINATION_DECAY * np.arange(4)), abs=0.01)


def test_new_items_appear_every_day_and_nothing_is_logged_before_its_birth(log, requests, lists_of):
    upload_ms = log.items()["upload_ms"].to_numpy()
    birth_day = (upload_ms - w.START_MS) // w.DAY_MS
    assert [(birth_day == day).sum() for day in range(4)] == [75, 75, 75, 75]
    assert (upload_ms < w.START_MS).sum() == 700
    assert (upload_ms[lists_of("candidates")] <= requests["time_ms"].to_numpy()[:, None]).all()
    seen, seen_ms = (requests[name].combine_chunks().flatten().to_numpy() for name in ("history", "history_time_ms"))
    assert (upload_ms[seen] <= seen_ms).all()
    last = requests["time_ms"].to_numpy() >= w.START_MS + 3 * w.DAY_MS
    assert (birth_day[lists_of("candidates")[last]] == 3).mean() > 0.01


def test_histories_hold_earlier_events_only_oldest_first(requests):
    history_time, time_ms = requests["history_time_ms"].combine_chunks(), requests["time_ms"].to_numpy()
    ends = history_time.offsets.to_numpy()
    flat, row = history_time.flatten().to_numpy(), np.repeat(np.arange(len(requests)), np.diff(ends))
    assert (flat < time_ms[row]).all()
    assert (np.diff(flat)[row[1:] == row[:-1]] >= 0).all()
    assert np.diff(ends).max() == 50
    assert np.diff(ends).min() < 20
    actions = requests["history_action"].combine_chunks().flatten().to_numpy()
    assert set(np.unique(actions)) == {1, 2, 3}


def test_what_a_request_shows_is_the_end_of_the_users_next_history(requests):
    rows = sorted((r for r in requests.to_pylist() if r["user_id"] < 40), key=lambda r: (r["user_id"], r["time_ms"]))
    checked = 0
    for earlier, later in pairwise(rows):
        if earlier["user_id"] != later["user_id"]:
            continue
        slots = zip(earlier["rank"], earlier["candidates"], earlier["exposed"], earlier["click"], earlier["long_view"],
                    strict=True)
        shown = sorted(slot for slot in slots if slot[2])
        assert later["history"][-6:] == [item for _, item, *_ in shown]
        assert later["history_action"][-6:] == [1 + click + view for *_, click, view in shown]
        assert later["history_time_ms"][-6:] == [earlier["time_ms"]] * 6
        checked += 1
    assert checked > 100


def test_exposures_are_concentrated_as_zipf_says(log, lists_of):
    world = w.catalogue(log.config)
    by_weight = np.sort(world.popularity_N)[::-1]
    assert by_weight[:10] * np.arange(1, 11) == pytest.approx(np.full(10, by_weight[0]))
    exposures = np.sort(np.bincount(lists_of("candidates")[lists_of("exposed")], minlength=1_000))[::-1]
    assert exposures[:100].sum() > 0.5 * exposures.sum()
    ranks = np.arange(10, 300)
    slope = np.polyfit(np.log(ranks), np.log(np.maximum(exposures[ranks], 1)), 1)[0]
    assert -2.5 < slope < -0.5


def test_true_interest_counts_events_that_resemble_the_target_more(log):
    world = w.catalogue(log.config)
    nearness = world.latent_ND @ world.latent_ND[0]
    alike, opposite = int(np.argsort(-nearness)[1]), int(np.argmin(nearness))
    one = np.ones((1, 1), np.int64)
    taste_QD = np.zeros((1, log.config.dim), np.float32)

    def interest_in_item_0(event: int, action: int, age_hours: int) -> float:
        now_Q = np.array([w.START_MS])
        then_QL = (now_Q - age_hours * w.HOUR_MS)[:, None]
        situation = w.Situation(taste_QD, taste_QD, now_Q, one * event, then_QL, one * action)
        return float(w.interest(world, situation, np.zeros((1, 1), np.int64))[0, 0])

    by_hand = np.log1p(max(nearness[alike], 0) ** 2)
    assert interest_in_item_0(alike, w.LONG_VIEWED, 0) == pytest.approx(by_hand, rel=1e-5)
    assert interest_in_item_0(alike, w.LONG_VIEWED, 72) == pytest.approx(np.log1p(np.expm1(by_hand) / 2), rel=1e-5)
    assert interest_in_item_0(alike, w.LONG_VIEWED, 0) > interest_in_item_0(alike, w.CLICKED, 0) > 0
    assert interest_in_item_0(alike, w.SHOWN, 0) < 0
    assert interest_in_item_0(opposite, w.LONG_VIEWED, 0) == 0


def test_pools_hold_living_items_and_their_uniform_third_has_no_duplicates(log):
    world, users = w.catalogue(log.config), w.users(log.config, 0)
    nothing = np.full((256, 50), -1)
    times = w.START_MS + np.arange(256) * w.HOUR_MS // 4
    situation = w.Situation(users.taste_UD, users.loyalty_UD, times, nothing, nothing * 0, nothing * 0)
    pool_QP = draw_pool(log.config, world, np.random.default_rng(3), situation)
    assert pool_QP.shape == (256, 360)
    assert pool_QP.min() >= 0
    assert (world.birth_ms_N[pool_QP] <= times[:, None]).all()
    assert all(len(set(row[:120])) == 120 for row in pool_QP)


def test_the_schema_uses_every_kind_of_feature_and_every_column_is_there(log, requests):
    schema = log.schema()
    assert FeatureSchema.model_validate(schema.model_dump()) == schema
    kinds = {"id", "ids", "dense", "vector", "cross", "history", "clock", "age", "count", "match"}
    assert {feature.kind for feature in schema.features} == kinds
    derived = {"clock", "count", "match", "cross", "age"}
    declared = [f for f in schema.features if f.kind not in derived and not isinstance(f, CrossFeature)]
    prefix = {"event": "history_", "item": "", "user": "", "context": ""}
    present = set(requests.column_names) | set(log.items().column_names)
    assert {prefix[f.side] + f.name for f in declared} <= present
    assert {*schema.labels, "reached", "rank", "exposed"} <= set(requests.column_names)


def test_some_profiles_are_unknown_and_no_number_is_nan(requests):
    for name, most in (("age_group", 0.15), ("activity", 0.12)):
        assert 0 < requests[name].null_count / len(requests) < most
    assert np.isfinite(requests["activity"].drop_null().to_numpy()).all()


def test_tastes_drift_slowly(log):
    users = w.users(log.config, 0)
    today, tomorrow, later = (users.taste_on(day, 0.04) for day in (0, 1, 30))
    assert ((today * tomorrow).sum(1) > 0.99).all()
    assert (today * later).sum(1).mean() < 0.8


@pytest.mark.parametrize(("options", "message"), [
    ({"pool": 90}, "raise pool or lower funnel"),
    ({"num_items": 150}, "raise num_items or lower pool"),
    ({"shown": 11}, "shown 11 exceeds per_level 10"),
])
def test_a_world_that_cannot_fill_its_lists_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        dataset(**options)


PEAK = """
import resource, sys
from raycascade.datasets import simulated
simulated.TABLE_ROWS = 512
days = int(sys.argv[1])
log = simulated.Simulated(simulated.Simulated.Config(num_users=256, num_days=days, pool=150, funnel=(40, 20, 20)))
rows, largest = 0, 0
for piece in log.slices():
    for table in log.read(piece):
        rows, largest = rows + len(table), max(largest, len(table))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(rows, largest, peak)
"""


def test_the_peak_memory_does_not_grow_with_the_number_of_requests():
    def measure(days: int) -> list[int]:
        out = subprocess.run([sys.executable, "-c", PEAK, str(days)], capture_output=True, text=True, check=True,
                             env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"})
        return [int(number) for number in out.stdout.split()]

    (few, largest_few, low), (many, largest_many, high) = measure(3), measure(30)
    assert many > 8 * few
    assert max(largest_few, largest_many) < 512 + 256
    assert high - low < 8e6 < 0.6 * 1_300 * many, "the log takes about 1,300 bytes per request"

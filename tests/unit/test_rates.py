"""Token buckets, against a clock that stands still until a test moves it."""

import pytest
from hypothesis import given, settings, strategies as st

from raycascade.serving.rates import Rates

GAPS = st.lists(st.floats(0, 3), min_size=1, max_size=60)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_burst_passes_at_once_and_the_next_request_waits_for_one_token():
    rates = Rates(Clock())
    assert [rates.take("shop", per_second=4, burst=3) for _ in range(4)] == [0.0, 0.0, 0.0, 0.25]


def test_who_waits_as_long_as_told_gets_in_and_not_before():
    clock = Clock()
    rates = Rates(clock)
    rates.take("shop", per_second=0.5, burst=1)
    clock.now_s += 1.5
    assert rates.take("shop", per_second=0.5, burst=1) == pytest.approx(0.5)
    clock.now_s += 0.5
    assert rates.take("shop", per_second=0.5, burst=1) == 0.0


def test_a_bucket_holds_no_more_than_its_burst_however_long_nobody_asks():
    clock = Clock()
    rates = Rates(clock)
    rates.take("shop", per_second=10, burst=2)
    clock.now_s += 1e6
    assert [rates.take("shop", per_second=10, burst=2) > 0 for _ in range(3)] == [False, False, True]


def test_one_key_does_not_take_from_another():
    rates = Rates(Clock())
    assert rates.take("a", per_second=1) == 0.0
    assert rates.take("a", per_second=1) > 0
    assert rates.take("b", per_second=1) == 0.0


def test_without_a_burst_a_seconds_worth_passes_at_once_and_at_least_one_request():
    rates = Rates(Clock())
    assert [rates.take("a", per_second=3) > 0 for _ in range(4)] == [False, False, False, True]
    assert [rates.take("b", per_second=0.1) > 0 for _ in range(2)] == [False, True]


def test_zero_is_no_limit():
    rates = Rates(Clock())
    assert {rates.take("", per_second=0) for _ in range(1000)} == {0.0}
    rates.owe("", 1000)
    assert rates.take("", per_second=0) == 0.0


def test_a_batch_weighs_as_much_as_its_queries_one_by_one():
    clock = Clock()
    rates = Rates(clock)
    assert rates.take("shop", per_second=10, burst=10) == 0.0
    rates.owe("shop", 29)  # 30 queries: 10 were there, 20 are owed
    assert rates.take("shop", per_second=10, burst=10) == pytest.approx(2.1)
    clock.now_s += 2.2
    assert rates.take("shop", per_second=10, burst=10) == 0.0


def test_a_rate_that_changes_in_the_file_holds_from_the_next_request_on():
    rates = Rates(Clock())
    assert [rates.take("a", per_second=1) > 0 for _ in range(2)] == [False, True]
    assert [rates.take("a", per_second=2) > 0 for _ in range(3)] == [False, False, True]


@settings(max_examples=200, derandomize=True, deadline=None)
@given(gaps_s=GAPS, per_second=st.floats(0.1, 20), burst=st.integers(1, 10))
def test_in_any_time_no_more_pass_than_the_burst_and_what_the_rate_allows(
    gaps_s: list[float], per_second: float, burst: int
):
    clock = Clock()
    rates, passed_s = Rates(clock), []
    for gap_s in gaps_s:
        clock.now_s += gap_s
        if rates.take("a", per_second=per_second, burst=burst) == 0.0:
            passed_s.append(clock.now_s)
    for first, begin_s in enumerate(passed_s):
        for last, end_s in enumerate(passed_s[first:], start=first):
            assert last - first + 1 <= burst + per_second * (end_s - begin_s) + 1e-6

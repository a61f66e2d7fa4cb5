"""Intervals by drawing requests anew, against rows that are written out as often as they were drawn."""

import math

import numpy as np
import pytest

from raycascade.bootstrap import WeightedAuc, WeightedMean, interval
from raycascade.metrics import grouped_auc


def rows(count: int = 300, *, requests: int = 40, seed: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits with ties, labels that they predict a little, and requests of different lengths."""
    rng = np.random.default_rng(seed)
    logits_R = rng.normal(size=count).round(1)
    labels_R = rng.random(count) < 1 / (1 + np.exp(-logits_R))
    return logits_R, labels_R, rng.integers(0, requests, count) * 1000 + 7


def test_a_weighted_auc_is_the_auc_of_rows_written_out_as_often():
    logits_R, labels_R, _ = rows()
    auc, rng = WeightedAuc(logits_R, labels_R), np.random.default_rng(1)
    for _ in range(20):
        weights_R = rng.integers(0, 4, len(logits_R))
        out = np.repeat(np.arange(len(logits_R)), weights_R)
        expected, _ = grouped_auc(logits_R[out], labels_R[out], np.zeros(len(out), np.int8))
        assert auc(weights_R) == pytest.approx(expected, abs=1e-12)


def test_an_auc_without_both_classes_is_not_defined():
    assert math.isnan(WeightedAuc(np.ones(3), np.ones(3, bool))(np.ones(3)))
    assert math.isnan(WeightedAuc(np.zeros(0), np.zeros(0, bool))(np.zeros(0)))
    assert math.isnan(WeightedAuc(np.arange(3.0), np.array([True, False, False]))(np.array([0, 1, 1])))


def test_the_interval_is_the_quantiles_over_samples_of_requests_written_out():
    logits_R, labels_R, requests_R = rows()
    keys, rng, found = np.unique(requests_R), np.random.default_rng(9), []
    for _ in range(200):
        drawn = rng.integers(0, len(keys), len(keys))
        out = np.concatenate([np.flatnonzero(requests_R == keys[q]) for q in drawn])
        found.append(grouped_auc(logits_R[out], labels_R[out], np.zeros(len(out), np.int8))[0])
    expected = np.quantile(found, [0.025, 0.975])
    assert interval(WeightedAuc(logits_R, labels_R), requests_R, draws=200, seed=9) == pytest.approx(expected, abs=1e-9)


def test_an_interval_depends_neither_on_the_order_of_the_rows_nor_on_chance():
    logits_R, labels_R, requests_R = rows()
    order = np.random.default_rng(5).permutation(len(logits_R))
    first = interval(WeightedAuc(logits_R, labels_R), requests_R, draws=100)
    again = interval(WeightedAuc(logits_R[order], labels_R[order]), requests_R[order], draws=100)
    assert first == pytest.approx(again, abs=1e-12)
    assert interval(WeightedAuc(logits_R, labels_R), requests_R, draws=100, seed=2) != first


def test_rows_of_one_request_are_no_evidence_of_their_own():
    """The mean of 400 requests of a normal value has a standard error of 1/20, however often each value stands there;
    the normal interval is 1.96 of them to both sides."""
    values_Q = np.random.default_rng(8).normal(size=400)
    values_Q = (values_Q - values_Q.mean()) / values_Q.std()
    requests_R = np.repeat(np.arange(400), 7)
    low, high = interval(WeightedMean(values_Q[requests_R]), requests_R)
    assert (low, high) == pytest.approx((-0.098, 0.098), abs=0.012)
    low, high = interval(WeightedMean(values_Q[requests_R]), np.arange(len(requests_R)))
    assert high - low < 0.6 * 0.196


def test_draws_in_which_nothing_is_defined_are_left_out():
    logits_R, labels_R, requests_R = np.array([0.1, 0.9]), np.array([False, True]), np.array([4, 5])
    assert interval(WeightedAuc(logits_R, labels_R), requests_R, draws=50) == (1.0, 1.0)
    assert all(map(math.isnan, interval(WeightedAuc(logits_R, ~labels_R & labels_R), requests_R, draws=50)))
    assert all(map(math.isnan, interval(WeightedMean(np.zeros(0)), np.zeros(0))))

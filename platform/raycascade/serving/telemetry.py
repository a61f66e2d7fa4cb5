"""What a gateway counts: latencies, candidates, degradations, scores, swaps. No Ray here: a `Sink` gets the totals.

Counting is a few additions under a lock; a thread hands the totals to the sink every few seconds. Histograms are kept
here, bucket by bucket: exact sums, bounds of any sign, and no work per observation in whatever exports them.

Every label has few values: those of the registry below and the names of the stages. A value beyond the first
MOST_VALUES of a label is counted as "other".
"""

import logging
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa

from raycascade.features import FeatureState
from raycascade.serving.encoded import missing_share

logger = logging.getLogger(__name__)

EVERY_S = 5.0  # Ray forgets a gauge that is not set again within 20 seconds
MOST_VALUES = 32  # of one label
MOST_HELD = 64  # arrays of scores of each stage, and encoded requests, between two publications: the latest
OTHER = "other"
OUTCOMES = ("ok", "degraded", "invalid", "unauthorised", "limited", "overloaded", "late", "not_ready", "failed")
REASONS = ("deadline", "unavailable", "overloaded")
SECONDS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.04, 0.06, 0.1, 0.2, 0.5, 1.0, 2.5, 10.0)
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
# The same for every stage, replica and version, so that they add up and can be compared. Logits of most models lie
# within a few units of 0, sums of probabilities within one.
_HALF = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0, 50.0)
SCORES = (*(-bound for bound in reversed(_HALF)), 0.0, *_HALF)


@dataclass(frozen=True)
class Metric:
    """One metric. `values`: what a label is known to be, beside "stage"; such series begin at 0, so that the first
    event is an increase."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    values: tuple[str, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """The names under which a sink gets it."""
        return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count")) if self.bounds else (self.name,)


METRICS = {metric.name: metric for metric in (
    Metric("raycascade_requests_total", "counter", "Requests by outcome.", ("outcome",), values=OUTCOMES),
    Metric("raycascade_request_seconds", "histogram", "From the arrival of a request to its answer.", bounds=SECONDS),
    Metric("raycascade_stage_seconds", "histogram", "From the call of a stage to its survivors, seen by the gateway.",
           ("stage",), SECONDS),
    Metric("raycascade_candidates_in_total", "counter", "Candidates that came into a stage.", ("stage",)),
    Metric("raycascade_candidates_out_total", "counter", "Candidates that a stage let through.", ("stage",)),
    Metric("raycascade_degradations_total", "counter", "Answers without a stage.", ("stage", "reason"), values=REASONS),
    Metric("raycascade_empty_answers_total", "counter", "Answers without any item."),
    Metric("raycascade_unknown_users_total", "counter", "Requests for users that nothing is known of."),
    Metric("raycascade_user_store_total", "counter", "Where users' features and histories came from.", ("outcome",),
           values=("store", "request", "unknown", "unavailable")),
    Metric("raycascade_missing_features", "histogram",
           "Share of a request's features that are missing or unknown; under load, of a sample.", bounds=SHARES),
    Metric("raycascade_stage_score", "histogram", "Scores of survivors; under load, of a sample.",
           ("stage",), SCORES),
    Metric("raycascade_overloads_total", "counter", "Requests that a full queue refused, by the queue's owner.",
           ("where",), values=("gateway",)),
    Metric("raycascade_swaps_total", "counter", "Attempts to serve another bundle.", ("outcome",),
           values=("swapped", "refused")),
    Metric("raycascade_model_info", "gauge", "1 for the version that is served.", ("version",)),
    Metric("raycascade_traffic_rows_total", "counter", "Rows for the traffic log: requests and events.",
           ("kind", "outcome"), values=("written", "dropped", "lost")),
)}


class Sink(Protocol):
    """Whatever exports the totals."""

    def set(self, series: str, labels: Mapping[str, str], total: float) -> None:
        """The total of a series, or the value of a gauge, as of now; called again every few seconds."""
        ...


class _Buckets:
    """One histogram."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def add_all(self, counts: np.ndarray, total: float) -> None:
        self.counts = [old + new for old, new in zip(self.counts, counts.tolist(), strict=True)]
        self.sum += total


class Telemetry:
    """Counts what the gateway reports; safe from any thread. Without a sink nobody is told, and `totals` says it all.

    Arguments named `outcome`, `reason`, `stage` become label values; seconds are seconds.
    """

    def __init__(self, sink: Sink | None = None, *, stages: Sequence[str] = (), every_s: float = EVERY_S) -> None:
        self._sink = sink
        self._lock = threading.Lock()
        self._values: dict[tuple[str, str], set[str]] = {}  # (name, label) -> what it has been
        self._counters: dict[tuple[str, ...], float] = {}  # (name, label values)
        self._histograms: dict[tuple[str, ...], _Buckets] = {}
        self._scores: dict[str, deque[np.ndarray]] = {}
        self._encoded: deque[tuple[pa.Table, FeatureState]] = deque(maxlen=MOST_HELD)
        self._version, self._replaced = "", set[str]()
        self._begin_at_zero(tuple(stages))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(every_s,), name="raycascade-telemetry", daemon=True)
        if sink is not None:
            self._thread.start()

    # ---- what the gateway reports
    def request(self, outcome: str, seconds: float) -> None:
        """A request is answered: "ok", "degraded", or refused for one of the other OUTCOMES."""
        with self._lock:
            self._count("raycascade_requests_total", outcome)
            self._observe("raycascade_request_seconds", value=seconds)

    def stage(self, name: str, seconds: float, came_in: int, went_out: int) -> None:
        """A stage let some of its candidates through."""
        with self._lock:
            self._observe("raycascade_stage_seconds", name, value=seconds)
            self._count("raycascade_candidates_in_total", name, amount=came_in)
            self._count("raycascade_candidates_out_total", name, amount=went_out)

    def degraded(self, stage: str, reason: str) -> None:
        """A request is answered without a stage."""
        with self._lock:
            self._count("raycascade_degradations_total", stage, reason)

    def empty(self) -> None:
        """An answer has no items."""
        with self._lock:
            self._count("raycascade_empty_answers_total")

    def unknown_user(self) -> None:
        """Neither the store nor the training log knows the user."""
        with self._lock:
            self._count("raycascade_unknown_users_total")

    def user_store(self, outcome: str) -> None:
        """Where a user's features came from, or that the store was "unavailable"."""
        with self._lock:
            self._count("raycascade_user_store_total", outcome)

    def missing_features(self, share: float) -> None:
        """The share, 0 to 1, of a request's features that are missing or unknown."""
        with self._lock:
            self._observe("raycascade_missing_features", value=share)

    def encoded(self, requests: pa.Table, state: FeatureState) -> None:
        """The same by the encoded requests themselves, which are looked at when the totals are published."""
        self._encoded.append((requests, state))

    def scores(self, stage: str, scores: np.ndarray) -> None:
        """Scores of survivors, of any shape; what is not finite is left out. The array must not change any more."""
        held = self._scores.get(stage)
        if held is None:
            with self._lock:
                _, known = self._known("raycascade_stage_score", (stage,))
                held = self._scores.setdefault(known, deque(maxlen=MOST_HELD))
        held.append(scores)

    def overloaded(self, where: str) -> None:
        """A full queue refused a request: the "gateway" or a stage."""
        with self._lock:
            self._count("raycascade_overloads_total", where)

    def swap(self, outcome: str) -> None:
        """Another bundle is "swapped" in, or "refused"."""
        with self._lock:
            self._count("raycascade_swaps_total", outcome)

    def model(self, version: str) -> None:
        """The version that is served from now on."""
        with self._lock:
            self._replaced = {*self._replaced, self._version} - {"", version}
            self._version = version

    def traffic(self, kind: str, outcome: str, rows: int) -> None:
        """Rows of the traffic log ("requests", "events") are "written", "dropped" for a full queue, or "lost"."""
        with self._lock:
            self._count("raycascade_traffic_rows_total", kind, outcome, amount=rows)

    # ---- what is known
    def totals(self) -> dict[tuple[str, ...], float]:
        """(series, label values in the metric's order, a bucket's bound last) -> total."""
        return {(series, *labels.values()): total for series, labels, total in self._published()}

    def publish(self) -> None:
        """Hands all totals to the sink now."""
        assert self._sink is not None, "there is a sink"
        replaced = frozenset(self._replaced)
        for series, labels, total in self._published():
            self._sink.set(series, labels, total)
        with self._lock:
            self._replaced -= replaced  # said to be over once; then nothing is said of them any more

    def close(self) -> None:
        """Publishes for the last time and ends the thread."""
        if self._thread.is_alive():
            self._ended.set()
            self._thread.join()

    # ---- inside
    def _count(self, name: str, *values: str, amount: float = 1) -> None:
        key = (name, *values)
        if key not in self._counters:
            key = self._known(name, values)
            self._counters.setdefault(key, 0.0)
        self._counters[key] += amount

    def _observe(self, name: str, *values: str, value: float) -> None:
        buckets = self._histograms.get((name, *values))
        if buckets is None:
            buckets = self._histograms.setdefault(self._known(name, values), _Buckets(METRICS[name].bounds))
        buckets.add(value)

    def _known(self, name: str, values: tuple[str, ...]) -> tuple[str, ...]:
        labels = METRICS[name].labels
        return (name, *(self._bounded(name, label, value) for label, value in zip(labels, values, strict=True)))

    def _bounded(self, name: str, label: str, value: str) -> str:
        seen = self._values.setdefault((name, label), set())
        if value in seen or len(seen) < MOST_VALUES:
            seen.add(value)
            return value
        return OTHER

    def _begin_at_zero(self, stages: tuple[str, ...]) -> None:
        for metric in METRICS.values():
            known = {"stage": stages, "kind": ("requests", "events"),
                     "where": (*metric.values, *stages)} | ({"version": ()} if metric.kind == "gauge" else {})
            for values in product(*(known.get(label, metric.values) for label in metric.labels)):
                key = self._known(metric.name, values)
                if metric.bounds:
                    self._histograms[key] = _Buckets(metric.bounds)
                else:
                    self._counters[key] = 0.0

    def _published(self) -> Iterator[tuple[str, dict[str, str], float]]:
        self._take_held()
        with self._lock:
            counters = dict(self._counters)
            histograms = {key: (buckets.counts[:], buckets.sum) for key, buckets in self._histograms.items()}
            versions = dict.fromkeys(sorted(self._replaced), 0.0) | ({self._version: 1.0} if self._version else {})
        for (name, *values), total in counters.items():
            yield name, dict(zip(METRICS[name].labels, values, strict=True)), total
        for (name, *values), (counts, total) in histograms.items():
            metric, labels = METRICS[name], dict(zip(METRICS[name].labels, values, strict=True))
            bucket, sums, number = metric.series
            *below, every = accumulate(counts)
            for bound, count in zip((*map(_bound_text, metric.bounds), "+Inf"), (*below, every), strict=True):
                yield bucket, {**labels, "le": bound}, count
            yield sums, labels, total
            yield number, labels, every
        for version, value in versions.items():
            yield "raycascade_model_info", {"version": version}, value

    def _take_held(self) -> None:
        """Looks at what was only put by; the lock is held for the sums alone."""
        with self._lock:
            encoded = [self._encoded.popleft() for _ in range(len(self._encoded))]
            scores = {stage: [held.popleft() for _ in range(len(held))] for stage, held in self._scores.items()}
        shares = np.concatenate([missing_share(*one) for one in encoded]) if encoded else np.zeros(0)
        with self._lock:
            for share in shares.tolist():
                self._observe("raycascade_missing_features", value=share)
        for stage, arrays in scores.items():
            values = np.concatenate([array.reshape(-1) for array in arrays]) if arrays else np.zeros(0)
            values = values[np.isfinite(values)]
            found = np.bincount(np.searchsorted(SCORES, values, side="left"), minlength=len(SCORES) + 1)
            with self._lock:
                key = self._known("raycascade_stage_score", (stage,))
                self._histograms.setdefault(key, _Buckets(SCORES)).add_all(found, float(values.sum(dtype=np.float64)))

    def _run(self, every_s: float) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(every_s)
            try:
                self.publish()
            except Exception:  # an exporter that fails must neither end this thread nor touch a request
                logger.exception("metrics could not be published; trying again in %g s", every_s)


class NoTelemetry(Telemetry):
    """Counts for nobody: no sink and no thread."""

    def __init__(self) -> None:
        super().__init__()


def _bound_text(bound: float) -> str:
    """As Prometheus writes it."""
    return repr(float(bound))

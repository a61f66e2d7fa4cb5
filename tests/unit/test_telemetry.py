"""Metrics: what is counted, what a sink gets, what it costs; and dashboards that ask only for what there is."""

import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from raycascade.bundle import load_bundle
from raycascade.serving.encoded import missing_share
from raycascade.serving.telemetry import (
    METRICS,
    MOST_HELD,
    MOST_VALUES,
    OTHER,
    SCORES,
    SECONDS,
    NoTelemetry,
    Telemetry,
)

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "grafana"
STAGES = ("retriever", "ranker")
RAY = "ray_"  # what Ray puts in front of every name


class Recorder:
    def __init__(self) -> None:
        self.series: dict[tuple[str, ...], float] = {}
        self.published = threading.Event()

    def set(self, series: str, labels: Mapping[str, str], total: float) -> None:
        self.series[(series, *labels.values())] = total
        self.published.set()


# ---------------------------------------------------------------- counting
def test_every_call_is_counted_where_it_belongs():
    counted = Telemetry(stages=STAGES)
    counted.request("ok", 0.02)
    counted.request("degraded", 0.3)
    counted.stage("retriever", 0.004, 1000, 500)
    counted.stage("retriever", 0.006, 1000, 300)
    counted.degraded("ranker", "deadline")
    counted.empty()
    counted.unknown_user()
    counted.user_store("unavailable")
    counted.overloaded("gateway")
    counted.swap("refused")
    counted.model("abc")
    counted.traffic("events", "written", 7)
    totals = counted.totals()
    assert {key: total for key, total in totals.items() if total and "bucket" not in key[0]} == {
        ("raycascade_requests_total", "ok"): 1, ("raycascade_requests_total", "degraded"): 1,
        ("raycascade_request_seconds_sum",): pytest.approx(0.32), ("raycascade_request_seconds_count",): 2,
        ("raycascade_stage_seconds_sum", "retriever"): pytest.approx(0.01),
        ("raycascade_stage_seconds_count", "retriever"): 2,
        ("raycascade_candidates_in_total", "retriever"): 2000, ("raycascade_candidates_out_total", "retriever"): 800,
        ("raycascade_degradations_total", "ranker", "deadline"): 1, ("raycascade_empty_answers_total",): 1,
        ("raycascade_unknown_users_total",): 1, ("raycascade_user_store_total", "unavailable"): 1,
        ("raycascade_overloads_total", "gateway"): 1, ("raycascade_swaps_total", "refused"): 1,
        ("raycascade_model_info", "abc"): 1, ("raycascade_traffic_rows_total", "events", "written"): 7,
    }


def test_buckets_hold_what_is_not_above_their_bound():
    counted = Telemetry(stages=STAGES)
    for seconds in (0.001, 0.00101, 0.2, 11.0):
        counted.stage("ranker", seconds, 1, 1)
    totals = counted.totals()
    buckets = [totals["raycascade_stage_seconds_bucket", "ranker", repr(bound)] for bound in SECONDS]
    assert buckets == [sum(seconds <= bound for seconds in (0.001, 0.00101, 0.2, 11.0)) for bound in SECONDS]
    assert totals["raycascade_stage_seconds_bucket", "ranker", "+Inf"] == 4


def test_scores_of_any_sign_fall_into_buckets_and_padding_is_left_out():
    counted = Telemetry(stages=STAGES)
    scores = np.array([[-70.0, -0.1, 0.0, 2.2, 60.0, -np.inf, np.nan]], np.float32)
    counted.scores("ranker", scores)
    counted.scores("ranker", scores[:, 3:4])
    totals = counted.totals()
    real = [-70.0, -0.1, 0.0, 2.2, 60.0, 2.2]
    buckets = [totals["raycascade_stage_score_bucket", "ranker", repr(bound)] for bound in SCORES]
    assert buckets == [sum(np.float32(score) <= bound for score in real) for bound in SCORES]
    assert totals["raycascade_stage_score_count", "ranker"] == len(real)
    assert totals["raycascade_stage_score_sum", "ranker"] == pytest.approx(sum(real), rel=1e-5)


def test_between_two_publications_the_latest_scores_are_a_sample():
    counted = Telemetry(stages=STAGES)
    for value in range(MOST_HELD + 10):
        counted.scores("ranker", np.array([float(value)]))
    assert counted.totals()["raycascade_stage_score_count", "ranker"] == MOST_HELD
    assert counted.totals()["raycascade_stage_score_sum", "ranker"] == sum(range(10, MOST_HELD + 10))


def test_what_is_known_beforehand_begins_at_zero_so_that_the_first_event_is_an_increase():
    totals = Telemetry(stages=STAGES).totals()
    assert set(totals.values()) == {0}
    assert ("raycascade_degradations_total", "ranker", "deadline") in totals
    assert ("raycascade_stage_seconds_bucket", "ranker", "0.001") in totals
    assert ("raycascade_requests_total", "failed") in totals


def test_a_label_has_few_values_whatever_is_reported():
    counted = Telemetry(stages=STAGES)
    for number in range(1000):
        counted.request(f"outcome {number}", 0.1)
        counted.stage(f"stage {number}", 0.1, 1, 1)
        counted.scores(f"stage {number}", np.ones(1))
    totals = counted.totals()
    outcomes = {key[1] for key in totals if key[0] == "raycascade_requests_total"}
    assert len(outcomes) == MOST_VALUES + 1
    assert totals["raycascade_requests_total", OTHER] > 900
    assert len({key[1] for key in totals if key[0] == "raycascade_stage_seconds_count"}) <= MOST_VALUES + 1
    assert sum(total for key, total in totals.items() if key[0] == "raycascade_requests_total") == 1000


def test_threads_lose_no_count():
    counted = NoTelemetry()

    def work() -> None:
        for _ in range(2000):
            counted.request("ok", 0.001)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted.totals()["raycascade_requests_total", "ok"] == 8000
    assert counted.totals()["raycascade_request_seconds_bucket", "0.001"] == 8000


# ---------------------------------------------------------------- publishing
def test_a_thread_hands_the_totals_to_the_sink_and_the_end_is_not_lost():
    sink = Recorder()
    counted = Telemetry(sink, stages=STAGES, every_s=0.01)
    assert sink.published.wait(30)
    counted.request("ok", 0.1)
    counted.close()
    assert sink.series == counted.totals()
    assert sink.series["raycascade_requests_total", "ok"] == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "raycascade-telemetry"]


def test_a_sink_that_fails_does_not_end_the_thread(caplog: pytest.LogCaptureFixture):
    class Flaky(Recorder):
        failed = False

        def set(self, series: str, labels: Mapping[str, str], total: float) -> None:
            if not self.failed:
                self.failed = True
                raise ConnectionError("gone")
            super().set(series, labels, total)

    sink = Flaky()
    counted = Telemetry(sink, every_s=0.01)
    assert sink.published.wait(30)
    counted.close()
    assert "metrics could not be published" in caplog.text


def test_a_version_that_is_replaced_is_said_to_be_so_once():
    sink = Recorder()
    counted = Telemetry(sink, every_s=3600)
    counted.model("one")
    counted.publish()
    counted.model("two")
    counted.publish()
    assert (sink.series["raycascade_model_info", "one"], sink.series["raycascade_model_info", "two"]) == (0, 1)
    sink.series.clear()
    counted.publish()
    assert [key for key in sink.series if key[0] == "raycascade_model_info"] == [("raycascade_model_info", "two")]
    counted.close()


def test_a_request_of_three_stages_costs_little():
    """A generous bound for a busy machine; the figure is in docs/serving.md."""
    counted = Telemetry(stages=("a", "b", "c"))
    scores = np.zeros((1, 500), np.float32)

    def one() -> None:
        counted.user_store("store")
        counted.missing_features(0.1)
        for stage in ("a", "b", "c"):
            counted.stage(stage, 0.004, 500, 100)
            counted.scores(stage, scores)
        counted.request("ok", 0.012)

    def seconds() -> float:
        started = time.perf_counter()
        for _ in range(300):
            one()
        return (time.perf_counter() - started) / 300

    seconds()
    assert min(seconds() for _ in range(10)) < 100e-6


# ---------------------------------------------------------------- features
def test_the_share_of_missing_features_is_that_counted_by_hand(tiny_bundle: str):
    bundle = load_bundle(tiny_bundle)
    # Of city, income, device and history: user 100 has no income, and of user 7 nobody knows more than is sent.
    encoded = bundle.encode(pa.table({
        "user_id": [100, 101, 7, 101], "city": [None, None, "city 1", "nowhere"],
        "device": [None, "desk", None, None]}))
    by_hand = [1 / 4, 0 / 4, 3 / 4, 1 / 4]
    assert missing_share(encoded, bundle.state).tolist() == by_hand
    counted = Telemetry()
    counted.encoded(encoded, bundle.state)
    assert counted.totals()["raycascade_missing_features_sum",] == pytest.approx(sum(by_hand))
    assert counted.totals()["raycascade_missing_features_count",] == 4


# ---------------------------------------------------------------- dashboards
WORDS = {"sum", "rate", "by", "histogram_quantile", "max", "min", "increase", "label_values", "count", "offset", "on",
         "group_left", "le"}


def metrics_in(query: str) -> set[str]:
    """The metric names of a PromQL expression: words that are neither functions, labels, durations nor numbers."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"", " ", query)
    bare = re.sub(r"\b(by|on|without|ignoring)\s*\([^)]*\)", " ", bare)
    bare = re.sub(r"(label_values\([^,]+),[^)]*\)", r"\1)", bare)
    names = set(re.findall(r"[A-Za-z_:][\w:]*", re.sub(r"\b\d[\w.]*", " ", bare)))
    return names - WORDS


def exported() -> set[str]:
    return {RAY + series for metric in METRICS.values() for series in metric.series}


def queries() -> Iterator[tuple[str, str]]:
    for panel in board()["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    for variable in board()["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]
    for annotation in board()["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]
    for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def board() -> dict[str, Any]:
    return json.loads((FOLDER / "serving.json").read_text())


def test_metric_names_are_found_in_a_query():
    query = 'sum by (le, s) (rate(a_bucket{x="y", z=~"b|c"}[5m])) / on (q) group_left max(other:total offset 1d) > 2e3'
    assert metrics_in(query) == {"a_bucket", "other:total"}


@pytest.mark.parametrize(("title", "query"), list(queries()), ids=lambda value: value[:30])
def test_every_query_asks_for_metrics_that_there_are_with_labels_that_they_have(title: str, query: str):
    names = metrics_in(query)
    assert names, title
    assert names <= exported()
    labels = {RAY + series: {*metric.labels, "application"} | ({"le"} if series.endswith("_bucket") else set())
              for metric in METRICS.values() for series in metric.series}
    allowed = set.union(*(labels[name] for name in names))
    for name, inside in re.findall(r"(\w+)\{([^}]*)\}", query):
        assert set(re.findall(r"(\w+)\s*(?:=|!)", inside)) <= labels[name], name
    for inside in re.findall(r"\bby\s*\(([^)]*)\)", query):
        assert {label.strip() for label in inside.split(",")} <= allowed, inside


def test_every_metric_is_on_the_dashboard():
    shown = {name for _, query in queries() for name in metrics_in(query)}
    for metric in METRICS.values():
        assert shown & {RAY + series for series in metric.series}, metric.name


def test_the_dashboard_is_one_that_grafana_takes():
    dashboard = board()
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= set(dashboard)
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,40}", dashboard["uid"])
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["type"] in ("timeseries", "stat", "heatmap")
            assert panel["title"]
            assert panel["description"]
            assert [target["refId"] for target in panel["targets"]] == list("ABCDEF"[:len(panel["targets"])])
    names = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard))) - {"__rate_interval"}
    assert used <= names


def test_names_are_those_of_prometheus():
    for metric in METRICS.values():
        assert re.fullmatch(r"raycascade_[a-z_]+", metric.name)
        assert metric.help.endswith(".")
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert (metric.kind == "histogram") == bool(metric.bounds)
        assert list(metric.bounds) == sorted(set(metric.bounds))


def test_the_scrape_example_names_the_file_of_alerts():
    scrape = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    assert [name for name in scrape["rule_files"] if not (FOLDER / name).exists()] == []

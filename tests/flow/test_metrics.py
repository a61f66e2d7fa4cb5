"""Metrics where Prometheus reads them: the endpoint of a Ray node, under the names that the dashboard asks for."""

import re
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from raycascade.serving.telemetry import METRICS, SECONDS

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STAGE, TAKEN_S = "measured", (0.012, 0.02, 0.02)
WAIT_S = 90.0  # a node exports every ten seconds; a busy machine takes longer


def samples(text: str) -> dict[tuple[str, ...], float]:
    """(name, label=value, ...) of our own labels -> value."""
    own = {label for metric in METRICS.values() for label in metric.labels} | {"le"}
    found = {}
    for name, labels, value in re.findall(r"^(ray_raycascade_\w+)\{([^}]*)\} (\S+)$", text, flags=re.M):
        pairs = [(key, seen) for key, seen in re.findall(r'(\w+)="([^"]*)"', labels) if key in own]
        found[(name, *(f"{key}={seen}" for key, seen in sorted(pairs)))] = float(value)
    return found


def scrape_until(condition: Callable[[dict[tuple[str, ...], float]], bool]) -> tuple[str, dict[tuple[str, ...], float]]:
    import ray

    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline, text = time.monotonic() + WAIT_S, ""
    while time.monotonic() < deadline:
        with urllib.request.urlopen(url, timeout=10) as reply:
            text = reply.read().decode()
        if condition(samples(text)):
            return text, samples(text)
        time.sleep(0.5)
    raise TimeoutError(f"never so: {sorted(samples(text))[:20]}")


def replica_class() -> Any:
    """An actor that reports as a gateway would; made inside a function, so that it travels by value."""
    import ray

    @ray.remote(num_cpus=0.1)
    class Replica:
        def __init__(self) -> None:
            from raycascade.flows._metrics import RayMetrics
            from raycascade.serving.telemetry import Telemetry

            self.telemetry = Telemetry(RayMetrics(), stages=(STAGE,), every_s=0.5)

        def work(self) -> None:
            self.telemetry.model("abc")
            for seconds in TAKEN_S:
                self.telemetry.request("failed", seconds)
                self.telemetry.stage(STAGE, seconds, 40, 10)
            self.telemetry.degraded(STAGE, "deadline")

    return Replica


def test_every_series_is_exported_and_counts_what_a_replica_reported(ray_cluster: None):
    """By labels that no other replica of the cluster has: its totals are of the node."""
    replica = replica_class().remote()
    failed, stage = ("ray_raycascade_requests_total", "outcome=failed"), f"stage={STAGE}"
    _, before = scrape_until(lambda seen: failed in seen)
    assert before[failed] < 1e-300  # a counter that is there before the first event, so that this one is an increase
    replica.work.remote()
    text, seen = scrape_until(lambda seen: seen.get(failed) == 3 and
                              seen.get(("ray_raycascade_stage_seconds_count", stage)) == 3)
    assert seen["ray_raycascade_degradations_total", "reason=deadline", stage] == 1
    assert seen["ray_raycascade_candidates_in_total", stage] == 120
    assert seen["ray_raycascade_model_info", "version=abc"] == 1
    assert seen["ray_raycascade_stage_seconds_sum", stage] == pytest.approx(sum(TAKEN_S))
    buckets = [seen["ray_raycascade_stage_seconds_bucket", f"le={bound}", stage] for bound in SECONDS]
    assert buckets == [sum(seconds <= bound for seconds in TAKEN_S) for bound in SECONDS]
    names = {key[0] for key in seen}
    assert names == {f"ray_{series}" for metric in METRICS.values() for series in metric.series}
    kinds = dict(re.findall(r"^# TYPE (ray_raycascade_\w+) (\w+)$", text, flags=re.M))
    assert kinds["ray_raycascade_requests_total"] == "counter"
    del replica

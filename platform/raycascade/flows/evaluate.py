"""evaluate: a bundle on a split -> metrics beside their baselines, and report.html."""

import datetime as dt
from dataclasses import dataclass
from typing import Any

from raycascade import storage
from raycascade.bundle import Bundle, load_bundle
from raycascade.errors import BundleError, ExpectationError
from raycascade.evaluation import Evaluator, Measured
from raycascade.flows._cluster import gather, num_cores
from raycascade.report import render_report
from raycascade.reporting import describe
from raycascade.shards import Shards
from raycascade.slices import by_name
from raycascade.trial import limited


def evaluate(uri: str, *, split: str = "test") -> dict[str, Any]:
    """Measures a bundle on the shards it was trained from; returns {"metrics", "baselines", "slices", "report"}.

    `slices`: figures on all rows, on those of items that training never saw (cold), and on those of the tail.
    ExpectationError (after the report is written) where a figure is below the config's `expect`.
    """
    bundle = load_bundle(uri, served=())
    shards = Shards.open(bundle.config.paths.shards)
    if shards.manifest["fingerprint"] != bundle.manifest["fingerprint"]:
        raise BundleError(f"{uri}: made for schema {bundle.manifest['fingerprint']}, but the shards at "
                          f"{bundle.config.paths.shards} have {shards.manifest['fingerprint']}; train again on them")
    check_same_features(bundle, shards)
    shards.require_split(split)
    groups = limited(shards.groups(split), bundle.config.evaluate.max_requests)
    shares = [groups[i::num_cores()] for i in range(num_cores())]
    measure = Measure(bundle.uri, shards.folder)
    parts = gather(lambda share: measure(share), [share for share in shares if share])
    total = parts[0]
    for part in parts[1:]:
        total.merge(part)
    metrics, baselines = total.metrics(), total.baselines()
    moment = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    report = storage.join(bundle.uri, "report.html")
    page = render_report(describe(bundle, total, split=split, moment=moment))
    storage.write_bytes(report, page.encode())
    slices = by_name(total.slice_figures())
    figures = {"metrics": metrics, "baselines": baselines, "slices": slices}
    storage.write_json(storage.join(bundle.uri, f"evaluation.{split}.json"), figures)
    sliced = {f"{kind}/{name}": value for kind, values in slices.items() for name, value in values.items()
              if not isinstance(value, str)}
    check_expectations(bundle, {**metrics, **sliced})
    return {**figures, "report": report}


@dataclass(frozen=True)
class Measure:
    """Measures some row groups in one task."""

    uri: str
    folder: str

    def __call__(self, groups: list[tuple[str, int, int]]) -> Measured:
        """What was measured; mergeable."""
        bundle = load_bundle(self.uri)
        shards = Shards(self.folder, {"files": {}})
        evaluator = Evaluator(bundle)
        size = bundle.config.evaluate.batch_size
        for name, group, rows in groups:
            table = shards.read_group(name, group)
            for start in range(0, rows, size):
                evaluator.update(table.slice(start, size))
        return evaluator.measured


def check_same_features(bundle: Bundle, shards: Shards) -> None:
    """BundleError where the shards were prepared anew since the training: their rows would mean other values."""
    theirs = {name: facts["sha256"] for name, facts in shards.manifest["files"].items() if name.startswith("features/")}
    differs = [name for name, digest in theirs.items() if bundle.manifest["files"].get(name) != digest]
    differs += [f"semantic_ids/{name}" for name, version in shards.manifest.get("semantic_ids", {}).items()
                if bundle.manifest.get("semantic_ids", {}).get(name) != version]
    if differs:
        raise BundleError(f"{bundle.uri}: {differs[0]} is not the one of the shards at {bundle.config.paths.shards}, "
                          "which were prepared anew; train again on them")


def check_expectations(bundle: Bundle, metrics: dict[str, float]) -> None:
    """ExpectationError naming the figures that are below what the config expects."""
    missed = [f"{name} {metrics.get(name, float('nan')):.4f} < {least}" for name, least in bundle.config.expect.items()
              if not metrics.get(name, float("-inf")) >= least]
    if missed:
        raise ExpectationError(f"{bundle.uri}: below the config's expectations: {'; '.join(missed)}; see report.html")



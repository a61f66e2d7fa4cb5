"""A bundle's own sample requests and the recorded answers: whatever serves the bundle must give them again.

    selfcheck/requests.parquet   raw requests: users of the log, an unknown one, one who brings a history
    selfcheck/encoded.parquet    the same as the bundle encodes them
    selfcheck/answers.json       what every stage let through, as item rows and scores, and the raw ids of the answer

`record` writes them when a bundle is made; bundles made before that have none, and are not checked. This file owns
the format.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raycascade import storage
from raycascade.bundle import Bundle, add_to_manifest, load_bundle
from raycascade.errors import BundleError
from raycascade.schema import PADDING

FOLDER = "selfcheck"
FORMAT_VERSION = 1
KNOWN_USERS, HISTORY, EXCLUDED = 4, 5, 3
TOLERANCE = 1e-4  # of a score, and of its size where that is above 1
ROUNDED_TOLERANCE = 2e-2  # where a stage computes in less than 32 bits: other processors round differently


@dataclass(frozen=True)
class SelfCheck:
    """The recorded requests and, for each stage, the item rows (0 = none) and scores that it let through."""

    uri: str
    requests: pa.Table
    encoded: pa.Table
    rows: Mapping[str, np.ndarray]
    scores: Mapping[str, np.ndarray]
    tolerance: float

    def require_encoding(self, encoded: pa.Table) -> None:
        """BundleError where the requests are not encoded as they were."""
        if encoded.column_names != self.encoded.column_names:
            raise self._failed("encoding", f"columns {encoded.column_names}, recorded {self.encoded.column_names}")
        for name in encoded.column_names:
            if not _same(encoded[name], self.encoded[name]):
                raise self._failed("encoding", f"column {name!r} is not as recorded")

    def require(self, stage: str, rows_QK: np.ndarray, scores_QK: np.ndarray, *, first: int = 0) -> None:
        """BundleError where a stage lets other items through, or with other scores, for the recorded requests from
        `first` on. Items whose scores are equal within the tolerance may change places."""
        for request, found in enumerate(zip(rows_QK, scores_QK, strict=True), start=first):
            recorded = self.rows[stage][request], self.scores[stage][request]
            if problem := _difference(_real(*found), _real(*recorded), self.tolerance):
                raise self._failed(f"stage {stage!r}, request {request}", problem)

    def _failed(self, where: str, problem: str) -> BundleError:
        return BundleError(f"{self.uri}: the self-check failed at {where}: {problem}; the bundle does not answer here "
                           "as where it was made: compare the versions in its manifest.json, or train again")


def record(uri: str) -> None:
    """Adds the self-check to a finished bundle; nothing happens for one that cannot search its catalogue."""
    bundle = load_bundle(uri)
    if not bundle.cascade.searches or not len(bundle.users.table):
        return
    requests = _requests(bundle)
    encoded = bundle.encode(requests)
    stages: list[dict[str, Any]] = []
    final: list[list[object]] = []
    for outcome in bundle.recommend(encoded).stages:
        rows_QK, mask_QK = outcome.kept()
        scores_QK = outcome.scores_QC[:, :outcome.keep]
        both = [(rows[mask], scores[mask]) for rows, scores, mask in zip(rows_QK, scores_QK, mask_QK, strict=True)]
        stages.append({"name": outcome.name, "rows": [rows.tolist() for rows, _ in both],
                       "scores": [scores.astype(np.float64).tolist() for _, scores in both]})
        final = [bundle.items.ids_of(rows) for rows, _ in both]
    rounded = any(stage.precision != "fp32" for stage in bundle.config.stages)
    files = {f"{FOLDER}/requests.parquet": requests, f"{FOLDER}/encoded.parquet": encoded}
    for file, table in files.items():
        storage.make_folder(storage.join(uri, FOLDER))
        filesystem, path = storage.resolve(storage.join(uri, file))
        pq.write_table(table, path, filesystem=filesystem)
    answers = f"{FOLDER}/answers.json"
    storage.write_json(storage.join(uri, answers), {
        "format": FORMAT_VERSION, "tolerance": ROUNDED_TOLERANCE if rounded else TOLERANCE, "stages": stages,
        "items": final})
    add_to_manifest(uri, [*files, answers])


def read(bundle: Bundle) -> SelfCheck | None:
    """The bundle's self-check, None where it has none; BundleError for one of another format."""
    if f"{FOLDER}/answers.json" not in bundle.manifest["files"]:
        return None
    answers = storage.read_json(storage.join(bundle.uri, FOLDER, "answers.json"))
    if answers["format"] != FORMAT_VERSION:
        raise BundleError(f"{bundle.uri}/{FOLDER}: format {answers['format']}, this version reads {FORMAT_VERSION}; "
                          "train again or use the other version")
    stages = answers["stages"]
    return SelfCheck(bundle.uri, requests=_table(bundle, "requests"), encoded=_table(bundle, "encoded"),
                     rows={one["name"]: _padded(one["rows"], PADDING, np.int32) for one in stages},
                     scores={one["name"]: _padded(one["scores"], -np.inf, np.float32) for one in stages},
                     tolerance=answers["tolerance"])


def _table(bundle: Bundle, name: str) -> pa.Table:
    filesystem, path = storage.resolve(storage.join(bundle.uri, FOLDER, f"{name}.parquet"))
    return pq.read_table(path, filesystem=filesystem)


def require_whole(bundle: Bundle) -> bool:
    """Whether there was a self-check to pass, through the bundle's whole cascade in this process; BundleError where it
    fails."""
    check = read(bundle)
    if check is None:
        return False
    check.require_encoding(encoded := bundle.encode(check.requests))
    for outcome in bundle.recommend(encoded).stages:
        rows_QK, mask_QK = outcome.kept()
        check.require(outcome.name, np.where(mask_QK, rows_QK, PADDING), outcome.scores_QC[:, :outcome.keep])
    return True


def _requests(bundle: Bundle) -> pa.Table:
    """Raw requests of users spread over the users table, of nobody, and of somebody who brings what they saw."""
    keys = bundle.users.table["user_key"].combine_chunks()
    places = np.unique(np.linspace(0, len(keys) - 1, KNOWN_USERS).astype(np.int64))
    nobody, count = _nobody(keys), len(places) + 2
    items = bundle.items.keys
    some = items.take(pa.array(np.unique(np.linspace(0, len(items) - 1, HISTORY).astype(np.int64)))).to_pylist()
    columns = {
        "request_id": pa.array([f"selfcheck-{number}" for number in range(count)]),
        "user_id": pa.concat_arrays([keys.take(pa.array(places)), pa.array([nobody, nobody], keys.type)]),
        "exclude": pa.array([[] for _ in range(count - 1)] + [some[:EXCLUDED]], pa.list_(items.type)),
    }
    if bundle.state.schema.history:
        columns["history"] = pa.array([None] * (count - 1) + [some], pa.list_(items.type))
    return pa.table(columns)


def _nobody(keys: pa.Array) -> int | str:
    """A user that is not in the log."""
    known = set(keys.to_pylist())
    if pa.types.is_integer(keys.type):
        return next(user for user in range(len(known) + 1) if user not in known)
    return next(user for user in (f"nobody-{number}" for number in range(len(known) + 1)) if user not in known)


def _same(found: pa.ChunkedArray, recorded: pa.ChunkedArray) -> bool:
    found, recorded = (pa.chunked_array([column.combine_chunks()]) for column in (found, recorded))
    if found.equals(recorded):
        return True
    if not pa.types.is_floating(found.type) or found.type != recorded.type:
        return False
    return np.allclose(found.to_numpy(), recorded.to_numpy(), rtol=1e-6, atol=1e-6, equal_nan=True)


def _real(rows_K: np.ndarray, scores_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows_K[rows_K != PADDING], scores_K[rows_K != PADDING].astype(np.float64)


def _difference(
    found: tuple[np.ndarray, np.ndarray], recorded: tuple[np.ndarray, np.ndarray], tolerance: float
) -> str:
    """What differs between two lists of rows and scores, best first; empty where nothing does within the tolerance."""
    if len(found[0]) != len(recorded[0]):
        return f"{len(found[0])} items, recorded {len(recorded[0])}"
    allowed_K = tolerance * np.maximum(1.0, np.abs(recorded[1]))
    apart_K = ~(np.abs(found[1] - recorded[1]) <= allowed_K)  # also where a score is NaN
    if apart_K.any():
        place = int(np.argmax(apart_K))
        return f"score {found[1][place]:.6g} at place {place + 1}, recorded {recorded[1][place]:.6g}"
    before = dict(zip(recorded[0].tolist(), recorded[1].tolist(), strict=True))
    cut = recorded[1][-1] if len(recorded[1]) else 0.0
    for place, (row, score) in enumerate(zip(*(part.tolist() for part in found), strict=True)):
        if abs(score - before.get(row, cut)) > allowed_K[place]:
            return f"item row {row} at place {place + 1}, where {int(recorded[0][place])} was recorded"
    return ""


def _padded(lists: list[list[float]], filler: float, kind: type) -> np.ndarray:
    width = max((len(one) for one in lists), default=0)
    return np.array([[*one, *[filler] * (width - len(one))] for one in lists], kind)

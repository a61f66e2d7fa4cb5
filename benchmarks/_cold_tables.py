"""Two logs whose items have a content vector and keep arriving: one simulated, one public. Encoded features are fitted
on the training rows alone, and so are the content vectors of MovieTweetings (weights of terms, axes)."""

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from _ctr_tables import SPLITS, movietweetings

from raycascade import storage
from raycascade.datasets.simulated import LABELS, Simulated
from raycascade.features import FeatureState
from raycascade.fitting import FitPart
from raycascade.keys import fold, to_keys
from raycascade.ragged import Ragged
from raycascade.schema import FeatureSchema
from raycascade.shards import Shards, publish, write_part

CONTENT = "content"  # the vector feature
DAY_MS = 86_400_000
FIRST_MS = 1_704_067_200_000  # 2024-01-01, where the simulated log begins
GRAMS, TERM_BUCKETS, WIDTH, GENRE_WEIGHT = (3, 4, 5), 2048, 64, 2.0


@dataclass(frozen=True)
class ContentTable:
    """Raw requests by split and raw items. `known`: features that tell what an item is, or how it was received, in
    place of which `inputs: ids` leaves nothing but the id under test."""

    name: str
    schema: FeatureSchema
    requests: dict[str, pa.Table]
    items: pa.Table
    known: tuple[str, ...]

    @property
    def end_ms(self) -> int:
        """The end of the training log."""
        return int(self.requests["train"]["time_ms"].to_numpy().max()) + 1

    def fitted(self) -> FeatureState:
        part = FitPart(self.schema)
        part.add_requests(self.requests["train"], where=self.name)
        part.add_items(self.items, where=self.name)
        return part.finish(self.items, as_of_ms=self.end_ms)


# ---------------------------------------------------------------- simulated
def simulated(raw: str, *, users: int = 4_000, items: int = 6_000) -> ContentTable:
    """Shown candidates alone, six a request: five days to train on, one to validate, two to test. A third of the items
    is born during the eight days; what a user thinks of an item depends on the latent vector behind its content."""
    del raw
    dataset = Simulated(Simulated.Config(num_users=users, num_items=items, history_len=20))
    tables = [shown(table) for piece in dataset.slices() for table in dataset.read(piece)]
    log = pa.concat_tables(tables)
    day = (log["time_ms"].to_numpy() - FIRST_MS) // DAY_MS
    order = np.argsort(log["time_ms"].to_numpy(), kind="stable")
    split = np.where(day < 5, "train", np.where(day < 6, "valid", "test"))
    requests = {name: log.take(pa.array(order[split[order] == name])) for name in SPLITS}
    known = ("category", "author", "tags", "exposures", "exposures_24h", "long_views_24h", "long_view_rate", "pair")
    schema = with_history_of(dataset.schema(), "category", "author", "tags", CONTENT)
    return ContentTable("simulated", schema, requests, dataset.items(), known)


def shown(table: pa.Table) -> pa.Table:
    """The same requests with the candidates that were shown."""
    exposed = Ragged.from_arrow(table["exposed"])
    chosen = exposed.values.to_numpy(zero_copy_only=False)
    owner = np.repeat(np.arange(len(table)), exposed.lengths_Q)[chosen]
    lengths_Q = np.bincount(owner, minlength=len(table))
    for name in ("candidates", "reached", "rank", "exposed", *LABELS):
        values = Ragged.from_arrow(table[name]).values.filter(pa.array(chosen))
        table = table.set_column(table.column_names.index(name), name, Ragged(values, lengths_Q).to_arrow())
    return table


def with_history_of(schema: FeatureSchema, *fields: str) -> FeatureSchema:
    """The schema with other item fields on the events of the history."""
    tree: dict[str, Any] = schema.model_dump()
    for feature in tree["features"]:
        if feature["kind"] == "history":
            feature["fields"] = fields
    return FeatureSchema.model_validate(tree)


# ---------------------------------------------------------------- MovieTweetings
def movies_with_content(raw: str) -> ContentTable:
    """Ratings of 8 and more, split 80 / 10 / 10 by time as in `peer_quality.py`. Content: character n-grams of the
    title and the genres, hashed, weighted by inverse frequency, reduced to 64 numbers by a truncated SVD."""
    table = movietweetings(raw)
    ids = table.items["item_id"].to_numpy()
    trained = np.isin(ids, pc.unique(Ragged.from_arrow(table.requests["train"]["candidates"]).values).to_numpy())
    content_NV = reduced(term_counts(titles_of(Path(raw), ids)), trained)
    column = pa.FixedSizeListArray.from_arrays(pa.array(content_NV.reshape(-1)), WIDTH)
    tree: dict[str, Any] = table.schema.model_dump()
    vector = {"kind": "vector", "name": CONTENT, "side": "item", "dim": WIDTH}
    schema = FeatureSchema.model_validate({**tree, "features": [*tree["features"], vector]})
    return ContentTable("movietweetings", with_history_of(schema, "genre", CONTENT), table.requests,
                        table.items.append_column(CONTENT, column),
                        ("genre", "second_genre", "year", "item_share", "item_count"))


def titles_of(folder: Path, ids: np.ndarray) -> list[tuple[str, list[str]]]:
    """(title without its year, genres) of the movies, in the order of the ids."""
    with gzip.open(folder / "movies.dat.gz", "rt", encoding="utf-8") as file:
        lines = [line.rstrip("\n").split("::") for line in file]
    found = {int(line[0]): (line[1].rsplit("(", 1)[0].strip().lower(),
                            line[2].split("|") if len(line) > 2 and line[2] else []) for line in lines}
    return [found[int(item)] for item in ids]


def term_counts(movies: list[tuple[str, list[str]]]) -> np.ndarray:
    """Hashed counts [N, TERM_BUCKETS] of the title's n-grams and of the genres."""
    counts = np.zeros((len(movies), TERM_BUCKETS), np.float32)
    for row, (title, genres) in enumerate(movies):
        padded = f" {title} "
        grams = [padded[i:i + n] for n in GRAMS for i in range(max(0, len(padded) - n + 1))]
        terms = [*grams, *(f"genre:{genre}" for genre in genres)]
        if not terms:
            continue
        buckets = (fold([to_keys(pa.array(terms))]) % np.uint64(TERM_BUCKETS)).astype(np.int64)
        weights = np.concatenate([np.full(len(grams), len(grams)**-0.5 if grams else 0.0),
                                  np.full(len(genres), GENRE_WEIGHT)])
        np.add.at(counts[row], buckets, weights.astype(np.float32))
    return counts


def reduced(counts_NB: np.ndarray, trained_N: np.ndarray) -> np.ndarray:
    """Projected to the WIDTH main axes of the training items, after the weights of their inverse frequencies."""
    seen_B = (counts_NB[trained_N] > 0).sum(0)
    weighted_NB = np.sqrt(counts_NB) * np.log((1 + trained_N.sum()) / (1 + seen_B)).astype(np.float32)
    weighted_NB /= np.maximum(np.linalg.norm(weighted_NB, axis=1, keepdims=True), 1e-12)
    learned = weighted_NB[trained_N]
    _, axes = np.linalg.eigh((learned.T @ learned).astype(np.float64))
    return (weighted_NB @ axes[:, ::-1][:, :WIDTH].astype(np.float32)).astype(np.float32)


READERS: dict[str, Callable[[str], ContentTable]] = {"simulated": simulated, "movietweetings": movies_with_content}


# ---------------------------------------------------------------- shards
def publish_encoded(root: str, state: FeatureState, encoded: dict[str, pa.Table]) -> Shards:
    """Encoded tables ("items" and "requests/<split>") as shards."""
    folder = storage.join(root, "v-1")
    state.save(storage.join(folder, "features"))
    for prefix, rows in encoded.items():
        write_part(storage.join(folder, prefix, "part-00000.parquet"), iter([rows]))
    counts = {name.removeprefix("requests/"): len(rows) for name, rows in encoded.items() if name != "items"}
    publish(root, "v-1", {"requests": counts, "fingerprint": state.schema.fingerprint()})
    return Shards.open(root)

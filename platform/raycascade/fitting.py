"""Fitting the feature state in one pass: every piece of the log gives a `FitPart`, parts merge, the merger is frozen.

Parts are small (distinct values, sums, a sample) whatever the size of the piece, and merging is exact and does not
depend on the order, so that any number of workers gives the same state.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raycascade import storage
from raycascade.counters import HOUR_MS, Counters
from raycascade.errors import DataError
from raycascade.features import DenseStats, FeatureState, dense_column, signed_log
from raycascade.keys import Vocabulary, fold, to_keys
from raycascade.ragged import Ragged, id_lists, parallel_lists
from raycascade.schema import (
    FIRST_ROW,
    AgeFeature,
    ClockFeature,
    DenseFeature,
    FeatureSchema,
    FeatureSpace,
    IdFeature,
    IdsFeature,
)

SAMPLE_SIZE = 10_000  # values kept per quantile feature
NUM_EDGES = 257
UNIT_BITS = 1126  # the finest bit of the smallest float64, read as a fraction of 53 bits


@dataclass
class FitPart:
    """What one piece of the log says about the features. `values`: per vocabulary a table (value, count)."""

    schema: FeatureSchema
    values: dict[str, pa.Table] = field(default_factory=dict)
    moments: dict[str, list[int]] = field(default_factory=dict)  # count, exact_sum of values and squares, missing
    samples: dict[str, np.ndarray] = field(default_factory=dict)  # [hash, value] rows, smallest hashes
    events: pa.Table | None = None  # item_id, bucket, one count per counter name
    labels: dict[str, list[int]] = field(default_factory=dict)  # candidates with the label observed, with it positive

    @property
    def counter_names(self) -> tuple[str, ...]:
        """"exposure" and the labels."""
        return ("exposure", *self.schema.labels)

    # ---- reading
    def add_requests(self, table: pa.Table, *, where: str) -> None:
        """Adds raw canonical requests."""
        order = to_keys(table["request_id"])
        self._add_side(table, ("user", "context"), order, where=where)
        candidates = Ragged.from_arrow(table["candidates"])
        request = np.repeat(np.arange(len(table)), candidates.lengths_Q)
        columns = {"item_id": candidates.values, "time_ms": table["time_ms"].to_numpy()[request]}
        for name in ("exposed", *self.schema.labels):
            if name in table.column_names:
                columns[name] = parallel_lists(table, name, candidates, "candidates", where=where).values
        self._add_labels(pa.table(columns))
        self._add_exposures(pa.table(columns), where=where)
        if "history" in table.column_names:
            self._add_history(table, order, where=where)

    def _add_history(self, table: pa.Table, order: np.ndarray, *, where: str) -> None:
        history = Ragged.from_arrow(table["history"])
        if self._counts_items:
            self._add_values(self._item_vocabulary, history.values, where=f"{where}: history")
        events = {f.name: parallel_lists(table, f"history_{f.name}", history, "history", where=where).values
                  for f in self.schema.side("event") if f"history_{f.name}" in table.column_names}
        if events:
            rows, columns, _ = history.positions(int(history.lengths_Q.max(initial=0)))
            self._add_side(pa.table(events), ("event",), fold([order[rows], columns]).view(np.int64), where=where)

    def add_impressions(self, table: pa.Table, *, where: str) -> None:
        """Adds raw impressions, one row per shown item."""
        order = fold([to_keys(table["user_id"]), table["time_ms"].to_numpy(), to_keys(table["item_id"])]).view(np.int64)
        self._add_side(table, ("user", "context", "event"), order, where=where)
        self._add_labels(table)
        self._add_exposures(table, where=where)

    def add_items(self, table: pa.Table, *, where: str) -> None:
        """Adds the raw items table; the vocabulary of `item_id` itself comes from what was logged."""
        self._add_side(table, ("item",), to_keys(table["item_id"]), where=where, skip=("item_id",))

    @property
    def _counts_items(self) -> bool:
        return any(f.name == "item_id" for f in self.schema.features)

    @property
    def _item_vocabulary(self) -> str:
        feature = next(f for f in self.schema.features if f.name == "item_id")
        return (feature.vocabulary if isinstance(feature, IdFeature) else "") or "item_id"

    def _add_side(
        self, table: pa.Table, sides: tuple[str, ...], order: np.ndarray, *, where: str, skip: tuple[str, ...] = ()
    ) -> None:
        for feature in self.schema.side(*sides):
            if feature.name not in table.column_names or feature.name in skip:
                continue
            if isinstance(feature, IdsFeature):
                lists = id_lists(table[feature.name].combine_chunks(), feature.name, where=where)
                self._add_values(feature.vocabulary or feature.name, lists.values, where=f"{where}: {feature.name}")
            elif isinstance(feature, IdFeature) and not feature.buckets:
                column = table[feature.name]
                self._add_values(feature.vocabulary or feature.name, column, where=f"{where}: {feature.name}")
            elif isinstance(feature, DenseFeature):
                self._add_dense(feature, dense_column(table, feature.name, where=where), order)

    def _add_values(self, vocabulary: str, column: "pa.Array | pa.ChunkedArray", *, where: str) -> None:
        counted = pc.value_counts(column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column)
        values = counted.field(0)
        if pa.types.is_floating(values.type):
            raise DataError(f"{where}: ids must be integers or strings, got {values.type}; cast the column")
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        wide = pa.int64() if pa.types.is_integer(values.type) or pa.types.is_boolean(values.type) else pa.string()
        try:
            values = values.cast(wide)
        except pa.ArrowInvalid:
            raise DataError(f"{where}: ids must lie below 2^63; cast the column to text") from None
        table = pa.table({"value": values, "count": counted.field(1)}).filter(pc.field("value").is_valid())
        self._keep(vocabulary, table)

    def _keep(self, vocabulary: str, table: pa.Table) -> None:
        """Adds up counts. A vocabulary that will be hashed whatever follows keeps only as many values as show that."""
        table = _summed([self.values[vocabulary], table]) if vocabulary in self.values else table
        features = (feature for feature in self.schema.features if isinstance(feature, IdFeature))
        feature = next(f for f in features if (f.vocabulary or f.name) == vocabulary)  # all that share it agree
        hashed = feature.min_count == 1 and len(table) > feature.max_values
        self.values[vocabulary] = table.slice(0, feature.max_values + 1) if hashed else table

    def _add_dense(self, feature: DenseFeature, values: np.ndarray, order: np.ndarray) -> None:
        missing = np.isnan(values)
        known = values[~missing]
        scaled = signed_log(known) if feature.normalise == "log" else known
        squares = np.square(np.clip(scaled, -1e150, 1e150))
        self._add_moments(feature.name, [len(known), exact_sum(scaled), exact_sum(squares), int(missing.sum())])
        if feature.normalise == "quantile":
            drawn = np.stack([fold([order[~missing]]).astype(np.float64), known], axis=1)
            self._add_sample(feature.name, drawn)

    def _add_moments(self, name: str, moments: list[int]) -> None:
        self.moments[name] = [old + new for old, new in zip(self.moments.get(name, [0] * 4), moments, strict=True)]

    def _add_sample(self, name: str, drawn: np.ndarray) -> None:
        pool = np.concatenate([self.samples[name], drawn]) if name in self.samples else drawn
        self.samples[name] = pool[np.lexsort((pool[:, 1], pool[:, 0]))][:SAMPLE_SIZE]

    def _add_labels(self, candidates: pa.Table) -> None:
        for name in self.schema.labels:
            if name in candidates.column_names:
                values = candidates[name].cast(pa.float64())
                positives = int(pc.sum(pc.greater(values, 0.5)).as_py() or 0)
                self._add_label(name, [len(values) - values.null_count, positives])

    def _add_label(self, name: str, counts: list[int]) -> None:
        self.labels[name] = [old + new for old, new in zip(self.labels.get(name, [0, 0]), counts, strict=True)]

    def _add_exposures(self, table: pa.Table, *, where: str) -> None:
        if self._counts_items:
            self._add_values(self._item_vocabulary, table["item_id"], where=f"{where}: item_id")
        if "exposed" in table.column_names:
            table = table.filter(pc.fill_null(table["exposed"].cast(pa.bool_()), False))
        bucket_ms = self.schema.count_bucket_hours * HOUR_MS
        bucket = (table["time_ms"].to_numpy() + int(self.schema.utc_offset_hours * HOUR_MS)) // bucket_ms
        columns = {"item_id": table["item_id"], "bucket": bucket, "exposure": np.ones(len(table))}
        for name in self.schema.labels:
            present = name in table.column_names
            columns[name] = pc.fill_null(table[name].cast(pa.float64()), 0.0) if present else np.zeros(len(table))
        self.events = _summed_events([t for t in (self.events, pa.table(columns)) if t is not None], self.counter_names)

    # ---- merging
    def merge(self, other: "FitPart") -> None:
        """Adds another part to this one."""
        for name, table in other.values.items():
            self._keep(name, table)
        for name, moments in other.moments.items():
            self._add_moments(name, moments)
        for name, sample in other.samples.items():
            self._add_sample(name, sample)
        for name, counts in other.labels.items():
            self._add_label(name, counts)
        parts = [table for table in (self.events, other.events) if table is not None]
        self.events = _summed_events(parts, self.counter_names) if parts else None

    def finish(self, items: pa.Table, as_of_ms: int) -> FeatureState:
        """The frozen state, given the raw items table (whose row order becomes the item rows)."""
        item_ids = Vocabulary(items["item_id"].combine_chunks())
        vocabularies = {}
        for feature in self.schema.features:
            if isinstance(feature, IdFeature):
                name = feature.vocabulary or feature.name
                vocabularies[name] = self._vocabulary(name, feature)
        dense = {f.name: self._stats(f) for f in self.schema.features if isinstance(f, DenseFeature)}
        counters, rates = self._counters(item_ids)
        labels = {name: (observed, positives) for name, (observed, positives) in self.labels.items()}
        return FeatureState(self.schema, vocabularies, dense, counters, item_ids, as_of_ms, rates, labels)

    def _vocabulary(self, name: str, feature: IdFeature) -> Vocabulary:
        if feature.buckets or name not in self.values:
            return Vocabulary(pa.array([], pa.int64()), feature.buckets)
        table = self.values[name].filter(pc.field("count") >= feature.min_count)
        if len(table) > feature.max_values:
            return Vocabulary(pa.array([], pa.int64()), feature.max_values)
        table = table.sort_by([("count", "descending"), ("value", "ascending")])
        return Vocabulary(table["value"].combine_chunks())

    def _stats(self, feature: DenseFeature) -> DenseStats:
        count, total, squares, missing = self.moments.get(feature.name, [0] * 4)
        mean = total / (count << UNIT_BITS) if count else 0.0
        variance = max((squares * count << UNIT_BITS) - total**2, 0) / (count**2 << 2 * UNIT_BITS) if count else 0.0
        spread = variance**0.5
        edges: tuple[float, ...] = ()
        if feature.normalise == "quantile":
            sample = self.samples[feature.name][:, 1] if count else np.zeros(1)
            edges = tuple(np.unique(np.quantile(sample, np.linspace(0, 1, NUM_EDGES))).tolist())
        # A smaller spread is the rounding of the squares of a constant.
        std = spread if spread > 1e-7 * abs(mean) else 1.0
        return DenseStats(mean=mean, std=std, missing=bool(missing), edges=edges)

    def _counters(self, item_ids: Vocabulary) -> tuple[Counters, dict[str, float]]:
        if self.events is None or len(self.events) == 0:
            return Counters.empty(self.counter_names), {}
        counts = np.stack([self.events[name].to_numpy() for name in self.counter_names], axis=1)
        counters = Counters.from_events(
            self.counter_names, item_ids.lookup(self.events["item_id"]), self.events["bucket"].to_numpy(), counts,
            bucket_ms=self.schema.count_bucket_hours * HOUR_MS, offset_ms=int(self.schema.utc_offset_hours * HOUR_MS))
        shown = max(float(counts[:, 0].sum()), 1.0)
        return counters, {name: float(counts[:, i].sum()) / shown for i, name in enumerate(self.counter_names) if i}

    # ---- files
    def save(self, uri: str) -> None:
        """Writes the part into a folder."""
        for name, table in self.values.items():
            storage.write_arrow(storage.join(uri, f"values.{name}.arrow"), table)
        for name, sample in self.samples.items():
            table = pa.table({"hash": sample[:, 0], "value": sample[:, 1]})
            storage.write_arrow(storage.join(uri, f"sample.{name}.arrow"), table)
        if self.events is not None:
            storage.write_arrow(storage.join(uri, "events.arrow"), self.events)
        storage.write_json(storage.join(uri, "part.json"), {
            "values": sorted(self.values), "samples": sorted(self.samples), "events": self.events is not None,
            "moments": self.moments, "labels": self.labels})

    @classmethod
    def load(cls, uri: str, schema: FeatureSchema) -> "FitPart":
        """The inverse of `save`."""
        facts = storage.read_json(storage.join(uri, "part.json"))
        samples = {n: storage.read_arrow(storage.join(uri, f"sample.{n}.arrow")) for n in facts["samples"]}
        return cls(
            schema,
            values={n: storage.read_arrow(storage.join(uri, f"values.{n}.arrow")) for n in facts["values"]},
            moments=facts["moments"],
            labels=facts["labels"],
            samples={n: np.stack([t["hash"].to_numpy(), t["value"].to_numpy()], axis=1) for n, t in samples.items()},
            events=storage.read_arrow(storage.join(uri, "events.arrow")) if facts["events"] else None,
        )


def exact_sum(values: np.ndarray) -> int:
    """The sum of finite float64 values in units of 2^-UNIT_BITS, without rounding, so that no order matters."""
    fractions, exponents = np.frexp(values)
    whole = np.ldexp(fractions, 53).astype(np.int64)
    shifts, owner = np.unique(exponents, return_inverse=True)
    halves = np.zeros((len(shifts), 2), np.int64)  # sums of 53-bit numbers in two parts, which cannot overflow
    np.add.at(halves, owner, np.stack([whole >> 26, whole & ((1 << 26) - 1)], axis=-1))
    sums = [(high << 26) + low for high, low in halves.tolist()]
    return sum(total << shift - 53 + UNIT_BITS for total, shift in zip(sums, shifts.tolist(), strict=True))


def _summed(tables: list[pa.Table]) -> pa.Table:
    tables = [table for table in tables if len(table)] or tables[:1]  # a column without any value has no type
    _one_type(tables, "value", "one vocabulary")
    grouped = pa.concat_tables(tables).group_by("value").aggregate([("count", "sum")])
    return grouped.rename_columns(["value", "count"])


def _summed_events(tables: list[pa.Table], names: tuple[str, ...]) -> pa.Table:
    tables = [table for table in tables if len(table)] or tables[:1]
    _one_type(tables, "item_id", "column 'item_id'")
    grouped = pa.concat_tables(tables).group_by(["item_id", "bucket"]).aggregate([(name, "sum") for name in names])
    return grouped.rename_columns(["item_id", "bucket", *names])


def _one_type(tables: list[pa.Table], name: str, what: str) -> None:
    kinds = sorted({str(table.schema.field(name).type) for table in tables})
    if len(kinds) > 1:
        raise DataError(f"{what} holds both {' and '.join(kinds)}; cast the columns to one type")


def merged(schema: FeatureSchema, parts: Iterable[FitPart]) -> FitPart:
    """All parts merged, like with like (as in a merge sort), so that no large part is copied once per small one."""
    waiting: list[tuple[int, FitPart]] = []  # levels fall from the first to the last
    for part in parts:
        level = 0
        while waiting and waiting[-1][0] == level:
            _, older = waiting.pop()
            older.merge(part)
            part, level = older, level + 1
        waiting.append((level, part))
    whole = FitPart(schema)
    while waiting:
        whole.merge(waiting.pop()[1])
    return whole


def declared_space(schema: FeatureSchema, given: Iterable[IdsFeature] = ()) -> FeatureSpace:
    """What models will see once the schema is fitted, before any log is read: vocabularies that grow with the log are
    empty, hashed ones have their size, and every dense feature has its indicator of missing values. `given` features
    will be added."""
    state = FitPart(schema).finish(pa.table({"item_id": pa.array([], pa.int64())}), as_of_ms=0)
    for feature in given:
        state = state.with_given(feature, FIRST_ROW)
    missing = {name: stats.model_copy(update={"missing": True}) for name, stats in state.dense.items()}
    return replace(state, dense=missing).space


def fitted_columns(schema: FeatureSchema) -> set[str]:
    """The columns of a raw table, of either form, that fitting reads."""
    events = {f"history_{feature.name}" for feature in schema.side("event")}
    return {"request_id", "user_id", "time_ms", "item_id", "candidates", "exposed", "history", *schema.labels,
            *events, *(feature.name for feature in schema.features)}


def required_columns(schema: FeatureSchema, form: str) -> list[str]:
    """The columns that a raw table of a form must have, features and labels included."""
    plain = [f.name for f in schema.side("user", "context") if not isinstance(f, ClockFeature) and f.kind != "history"]
    if form == "requests":
        return ["request_id", "user_id", "time_ms", "candidates", *plain, *schema.labels]
    events = [f.name for f in schema.side("event") if not isinstance(f, AgeFeature)]
    return ["user_id", "time_ms", "item_id", *plain, *events, *schema.labels]

"""One batch of requests as tensors, and `collate`, the only code that makes them.

Shape letters, in every tensor's name: Q requests, C candidates, N items, L history, D width, F fields, T tasks,
K kept, V values of a multi-valued field. Masks are bool, true = real.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raycascade.errors import DataError
from raycascade.features import FeatureState, clock_rows
from raycascade.items import ItemTable, age_rows
from raycascade.keys import fold
from raycascade.past import TIMES, known_ms, without_later_events
from raycascade.ragged import Ragged
from raycascade.schema import (
    FIRST_ROW,
    OF_HISTORY,
    AgeFeature,
    ClockFeature,
    CrossFeature,
    DenseFeature,
    HistoryFeature,
    IdFeature,
    IdsFeature,
    MatchFeature,
    VectorFeature,
)


@dataclass(frozen=True)
class Targets:
    """What is known of the logged candidates. `keep` holds the width of each stage's list, `k` the size of the truth.

    relevance_QC: graded, larger = better; reached_QC: the deepest logged level (0 = sampled from the catalogue);
    labels: each [Q, C] float, NaN where unobserved; log_q_QC: log of the probability with which a candidate was
    sampled into the list (0 for logged ones), for popularity-corrected losses; item_shares_QC: each item's share of the
    training positives, for models that hold the batch's positives against one another.
    """

    relevance_QC: Tensor
    reached_QC: Tensor
    mask_QC: Tensor
    keep: tuple[int, ...]
    k: int
    labels: Mapping[str, Tensor]
    log_q_QC: Tensor | None = None
    item_shares_QC: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """`user` holds user and context fields [Q, ...]; `item` item and pair fields [Q, C, ...]; `history` event fields
    and the events' own item fields [Q, L, ...], oldest first, left-aligned; `history_negatives`, in training only, the
    same item fields of a random other item beside each event. `history_time_ms_QL`: when the events were, 0 where that
    is not known; `dropped_events`: how many were left out because they were not before their request."""

    user: Mapping[str, Tensor]
    item: Mapping[str, Tensor]
    history: Mapping[str, Tensor]
    history_mask_QL: Tensor
    history_rows_QL: Tensor  # item rows of the events
    candidates_QC: Tensor  # item rows, 0 where masked
    mask_QC: Tensor
    time_ms_Q: Tensor
    request_ids: tuple[object, ...] = ()
    exclude: tuple[np.ndarray, ...] = ()  # item rows that must not be recommended, one array a request
    targets: Targets | None = None
    history_negatives: Mapping[str, Tensor] | None = None
    history_time_ms_QL: Tensor | None = None
    dropped_events: int = 0

    @property
    def num_requests(self) -> int:
        """Q."""
        return len(self.time_ms_Q)

    def to(self, device: "torch.device | str") -> "Batch":
        """The same batch with every tensor on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def take(self, chosen_Q: Tensor) -> "Batch":
        """The requests where `chosen_Q` (bool) is true."""
        places = chosen_Q.nonzero()[:, 0]
        taken = self._map(lambda tensor: tensor[places])
        ids, exclude = ([values[int(i)] for i in places.cpu()] if values else ()
                        for values in (self.request_ids, self.exclude))
        return replace(taken, request_ids=tuple(ids), exclude=tuple(exclude))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(self, **{name: _mapped(value, change) for name, value in vars(self).items()})

    def newest_events(self, num_events: int) -> "Batch":
        """The same requests with the newest `num_events` of their histories."""
        width = self.history_mask_QL.shape[1]
        if width <= num_events:
            return self
        length_Q1 = self.history_mask_QL.sum(1, keepdim=True)
        places_QL = (length_Q1 - num_events).clamp(min=0) + torch.arange(num_events, device=length_Q1.device)

        def cut(values: Tensor) -> Tensor:
            places = places_QL.reshape(*places_QL.shape, *[1] * (values.ndim - 2))
            return values.gather(1, places.expand(-1, -1, *values.shape[2:]))

        negatives, times_QL = self.history_negatives, self.history_time_ms_QL
        return replace(self, history={name: cut(values) for name, values in self.history.items()},
                       history_mask_QL=cut(self.history_mask_QL), history_rows_QL=cut(self.history_rows_QL),
                       history_negatives=negatives and {name: cut(values) for name, values in negatives.items()},
                       history_time_ms_QL=None if times_QL is None else cut(times_QL))

    def events_since(self, age_ms: int) -> "Batch":
        """The same requests without events older than that; those of unknown age stay. The places of the others do not
        change. DataError where the log says nothing of the times of events."""
        times_QL = self.history_time_ms_QL
        if times_QL is None:
            if not self.history_mask_QL.any():
                return self
            raise DataError("max_age_days: the histories have no times (history_time_ms); add them, or leave it out")
        recent_QL = (times_QL <= 0) | (self.time_ms_Q[:, None] - times_QL <= age_ms)
        return replace(self, history_mask_QL=self.history_mask_QL & recent_QL)

    def with_candidates(self, rows_QC: Tensor, mask_QC: Tensor, items: ItemTable) -> "Batch":
        """The same requests over other candidates (the survivors of a stage). There are no targets for them."""
        bare = self.with_rows(rows_QC, mask_QC)
        return replace(bare, item=_item_side(bare, items))

    def in_parts(self, most: int | None) -> Iterator["Batch"]:
        """The same requests with at most so many of their candidates at a time (None: all); no targets."""
        width = self.mask_QC.shape[1]
        if most is None or width <= most:
            yield self
            return
        for start in range(0, width, most):
            part = slice(start, start + most)
            yield replace(self, item={name: values[:, part] for name, values in self.item.items()}, targets=None,
                          candidates_QC=self.candidates_QC[:, part], mask_QC=self.mask_QC[:, part])

    def with_rows(self, rows_QC: Tensor, mask_QC: Tensor) -> "Batch":
        """The same requests over other candidates, of which no more is known than their rows."""
        return replace(self, candidates_QC=torch.where(mask_QC, rows_QC, 0), mask_QC=mask_QC, targets=None, item={})

    def with_history_negatives(self, rows_QL: np.ndarray, items: ItemTable) -> "Batch":
        """The same requests with another item beside each event of the history, for models that must tell them."""
        fields = items.fields(rows_QL, 0, names=items.state.space.history_fields)
        return replace(self, history_negatives=fields)


def _mapped(value: object, change: Callable[[Tensor], Tensor]) -> object:
    """Every tensor below a value changed; all have the requests as their first axis."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, Targets):
        return replace(value, **{name: _mapped(inner, change) for name, inner in vars(value).items()})
    return value


def collate(requests: pa.Table, items: ItemTable, *, keep: tuple[int, ...] = (), k: int = 0) -> Batch:
    """Encoded requests (rows of shards, or `FeatureState.encode_requests`) -> tensors, item fields gathered by row.

    Targets are made where the requests carry feedback (any of reached, relevance or labels). Without candidates
    C = 0: retrieval needs none. Events at or after the time of their request are left out and counted.
    """
    requests, dropped = without_later_events(requests)
    state, time_ms = items.state, requests["time_ms"].to_numpy()
    candidates = _lists(requests, "candidates")
    width = int(candidates.lengths_Q.max(initial=0))
    rows_QC, mask_QC = candidates.pad(width, np.int64)
    user = {}
    for feature in state.schema.side("user", "context"):
        if not isinstance(feature, HistoryFeature):
            user |= _request_field(requests, feature, state, time_ms)
    history, history_rows, history_mask, history_time_ms = _history_side(requests, items, time_ms)
    batch = Batch(
        user=user, item={}, history=history, history_mask_QL=history_mask, history_rows_QL=history_rows,
        candidates_QC=torch.from_numpy(rows_QC), mask_QC=torch.from_numpy(mask_QC),
        time_ms_Q=torch.from_numpy(time_ms.astype(np.int64)),
        request_ids=tuple(requests["request_id"].to_pylist()) if "request_id" in requests.column_names else (),
        exclude=_exclusions(requests), history_time_ms_QL=history_time_ms, dropped_events=dropped,
    )
    batch = replace(batch, user={**user, **_crosses(batch, state, "request")})
    batch = replace(batch, item=_item_side(batch, items))
    return replace(batch, targets=_targets(requests, state, width, batch.mask_QC, keep, k))


def _lists(requests: pa.Table, name: str) -> Ragged:
    if name not in requests.column_names:
        return Ragged(pa.array([], pa.int32()), np.zeros(len(requests), np.int64))
    return Ragged.from_arrow(requests[name])


def _request_field(requests: pa.Table, feature: object, state: FeatureState, time_ms: np.ndarray) -> dict[str, Tensor]:
    if isinstance(feature, ClockFeature):
        return {feature.name: torch.from_numpy(clock_rows(time_ms, feature))}
    if isinstance(feature, IdsFeature):
        return {feature.name: torch.from_numpy(_lists(requests, feature.name).pad(feature.max_len, np.int64)[0])}
    assert isinstance(feature, IdFeature | DenseFeature | VectorFeature), feature
    column = requests[feature.name].combine_chunks()
    if isinstance(feature, VectorFeature):
        return {feature.name: torch.tensor(column.flatten().to_numpy(zero_copy_only=False).reshape(-1, feature.dim))}
    if isinstance(feature, IdFeature):
        return {feature.name: torch.from_numpy(column.to_numpy(zero_copy_only=False).astype(np.int64))}
    names = [feature.name] + ([f"{feature.name}_missing"] if state.dense[feature.name].missing else [])
    return {name: torch.tensor(requests[name].to_numpy().astype(np.float32)) for name in names}


def _history_side(
    requests: pa.Table, items: ItemTable, time_ms: np.ndarray
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor | None]:
    state, feature = items.state, items.state.schema.history
    if feature is None:
        nothing = np.zeros((len(requests), 0), np.int64)
        return {}, torch.from_numpy(nothing), torch.from_numpy(nothing.astype(bool)), None
    lists = _lists(requests, "history")
    width = min(feature.max_len, int(lists.lengths_Q.max(initial=0)))
    rows, mask = lists.pad(width, np.int64, newest=True)
    fields = items.fields(rows, 0, names=items.with_keys(state.space.history_fields))
    at_ms, known = np.zeros_like(rows), mask & False
    if timed := TIMES in requests.column_names:
        times = _lists(requests, TIMES)
        at_ms, known = times.with_values(np.maximum(known_ms(times.values), 0)).pad(width, np.int64, newest=True)
    for event in state.schema.side("event"):
        if isinstance(event, AgeFeature):
            buckets = age_rows(time_ms[:, None] - at_ms, known & (at_ms > 0))
            fields[event.name] = torch.from_numpy(np.where(mask, buckets, 0))
            continue
        dense = isinstance(event, DenseFeature)
        names = [event.name] + ([f"{event.name}_missing"] if dense and state.dense[event.name].missing else [])
        for name in names:
            values, _ = _lists(requests, f"history_{name}").pad(width, np.float32 if dense else np.int64, newest=True)
            fields[name] = torch.from_numpy(values)
    return fields, torch.from_numpy(rows), torch.from_numpy(mask), torch.from_numpy(at_ms) if timed else None


def _exclusions(requests: pa.Table) -> tuple[np.ndarray, ...]:
    if "exclude" not in requests.column_names:
        return ()
    lists = Ragged.from_arrow(requests["exclude"])
    return tuple(np.split(lists.values.to_numpy(zero_copy_only=False).astype(np.int64), lists.offsets_Q1[1:-1]))


def _item_side(batch: Batch, items: ItemTable) -> dict[str, Tensor]:
    """Item and pair fields of the batch's candidates, as of each request's time."""
    fields = items.fields(batch.candidates_QC, batch.time_ms_Q.numpy()[:, None])
    batch = replace(batch, item=fields)
    for feature in items.state.schema.features:
        if isinstance(feature, MatchFeature):
            fields[feature.name] = _matches(batch, feature, items)
    return {**fields, **_crosses(batch, items.state, "item"), **_crosses(batch, items.state, "pair")}


def _matches(batch: Batch, feature: MatchFeature, items: ItemTable) -> Tensor:
    """log1p of the matching events, or the smoothed rate of the action among them; [Q, C] float32."""
    if feature.field == "item_id":
        events, candidates = batch.history_rows_QL[:, :, None], batch.candidates_QC[:, :, None]
    else:
        # The model may see fewer fields of an event (HistoryFeature.fields) than are matched.
        events = items.fields(batch.history_rows_QL, 0, names=(feature.field,))[feature.field]
        candidates = batch.item[feature.field]
        events = events if events.ndim == 3 else events[:, :, None]
        candidates = candidates if candidates.ndim == 3 else candidates[:, :, None]
    same_QCL = torch.zeros(*batch.mask_QC.shape, events.shape[1], dtype=torch.bool)
    for v in range(candidates.shape[2]):
        for w in range(events.shape[2]):
            same_QCL |= (candidates[:, :, None, v] == events[:, None, :, w]) & (candidates[:, :, None, v] >= FIRST_ROW)
    same_QCL &= batch.history_mask_QL[:, None, :]
    if feature.action is None:
        return torch.log1p(same_QCL.sum(-1).float())
    acted_QL = torch.isin(batch.history[feature.action], torch.from_numpy(_rows_of_values(feature, items.state)))
    acted_QC = (same_QCL & acted_QL[:, None, :]).sum(-1).float()
    if not feature.rate:
        return torch.log1p(acted_QC)
    return (acted_QC + 0.5) / (same_QCL.sum(-1).float() + 1.0)


def _rows_of_values(feature: MatchFeature, state: FeatureState) -> np.ndarray:
    """Rows of the chosen values of the action, whether the log holds them as text or as integers."""
    action = next(f for f in state.schema.features if f.name == feature.action)
    assert isinstance(action, IdFeature), action
    vocabulary = state.vocabularies[action.vocabulary or action.name]
    text = pa.array(feature.values, pa.string())
    whole = pa.array([int(v) for v in feature.values if v.removeprefix("-").isdecimal()], pa.int64())
    if vocabulary.buckets:  # a hashed vocabulary does not say which of the two it was fitted on
        rows = np.concatenate([vocabulary.lookup(text), vocabulary.lookup(whole)])
    else:
        rows = vocabulary.lookup(text if pa.types.is_string(vocabulary.values.type) else whole)
    return rows[rows >= FIRST_ROW]


def _crosses(batch: Batch, state: FeatureState, side: str) -> dict[str, Tensor]:
    crossed: dict[str, Tensor] = {}
    for position, feature in enumerate(state.schema.features):
        if isinstance(feature, CrossFeature) and state.side_of(feature) == side:
            parts = [_part(batch, part, feature) for part in feature.parts]
            aligned = [part.reshape(*part.shape[:2], *[1] * n, part.shape[2], *[1] * (len(parts) - n - 1))
                       for n, part in enumerate(parts)]
            rows = torch.broadcast_tensors(*aligned)  # [Q, C or 1, values of part 0, values of part 1, ...]
            known = torch.stack([part >= FIRST_ROW for part in rows]).all(0)
            hashed = fold([part.numpy() for part in rows], seed=position) % np.uint64(feature.buckets)
            combined = torch.where(known, torch.from_numpy(hashed.astype(np.int64)) + FIRST_ROW, 0)
            combined = combined.flatten(2)[:, 0] if side == "request" else combined.flatten(2)
            crossed[feature.name] = combined if state.space[feature.name].form == "ids" else combined[..., 0]
    return crossed


def _part(batch: Batch, part: str, cross: CrossFeature) -> Tensor:
    """Rows of a part of a cross [Q, C or 1, values]; 0 where there is no value."""
    if part.startswith(OF_HISTORY):
        newest = batch.newest_events(cross.max_events)
        rows, mask_QL = newest.history[part.removeprefix(OF_HISTORY)], newest.history_mask_QL
        return torch.where(mask_QL.reshape(*mask_QL.shape, *[1] * (rows.ndim - 2)), rows, 0).flatten(1)[:, None]
    rows = batch.item[part] if part in batch.item else batch.user[part][:, None]
    return rows if rows.ndim == 3 else rows.unsqueeze(-1)


def _targets(
    requests: pa.Table, state: FeatureState, width: int, mask_QC: Tensor, keep: tuple[int, ...], k: int
) -> Targets | None:
    """Graded relevance comes from `relevance`, else from `reached` and then `rank`, else from the positive label."""
    present = set(requests.column_names)
    if not present & {"reached", "relevance", *state.schema.labels}:
        return None

    def padded(name: str) -> Tensor:
        return torch.from_numpy(_lists(requests, name).pad(width, np.float32)[0])

    labels = {name: padded(name) for name in state.schema.labels if name in present}
    positive = torch.nan_to_num(labels.get(state.schema.positive, torch.zeros(mask_QC.shape)))
    reached = padded("reached").long() if "reached" in present else positive.long()
    rank = padded("rank") if "rank" in present else torch.zeros(mask_QC.shape)
    graded = reached.float() + torch.where(rank > 0, 1.0 / (1.0 + rank), 0.0)
    return Targets(relevance_QC=padded("relevance") if "relevance" in present else graded, reached_QC=reached,
                   mask_QC=mask_QC, keep=keep, k=k, labels=labels)

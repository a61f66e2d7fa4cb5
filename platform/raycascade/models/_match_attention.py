"""Hard matching attention (Hong et al. 2025, arXiv 2511.21095): match counts of declared pairs become one vector."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.errors import ConfigError
from raycascade.features import KEY
from raycascade.models._layers import MLP
from raycascade.models._match import EventIds, count_rows, event_ids
from raycascade.schema import FIRST_ROW, FeatureSpace, Field, Frozen, near_miss

ITEM = "item_id"  # of a pair: the item itself, compared by its row of the catalogue, which no hash blurs
RECENT_EVENTS = 10
HIDDEN = (128,)


class Pair(Frozen):
    """Counts the events whose item's field `event` has the candidate's value of `candidate`. `actions`: raw values of
    one event feature, of which an event must have one (none: all events count). `window`: only among the newest so
    many events (None: among all that the model reads)."""

    event: str
    candidate: str
    actions: tuple[str, ...] = ()
    window: int | None = Option(default=None, ge=1)


@dataclass(frozen=True)
class Selection:
    """Which events count: those with a row of `rows` of the event field `action` ("": any), among the newest."""

    action: str = ""
    rows: tuple[int, ...] = ()
    window: int | None = None

    def mask(self, batch: Batch) -> Tensor:
        """[Q, L] bool."""
        mask_QL = batch.history_mask_QL
        if self.window is not None:
            later_QL = mask_QL.sum(1, keepdim=True) - mask_QL.cumsum(1)
            mask_QL = mask_QL & (later_QL < self.window)
        if self.action:
            values_QL = batch.history[self.action]
            mask_QL = mask_QL & torch.isin(values_QL, torch.tensor(self.rows, device=values_QL.device))
        return mask_QL


@dataclass(frozen=True)
class Match:
    """Fields that are compared, and for each pair of theirs which events count."""

    event: str
    candidate: str
    selections: tuple[Selection, ...]


class HardMatching(nn.Module):
    """MLP([E[row(p, c_p)] for pairs p]) with c_p the number of matching events, at most `clip`.

    Values are compared as item rows, as exact ids where a batch brings them, or else as rows of their vocabulary.
    Missing values never match, and neither do those that rows of a vocabulary are unknown for.
    """

    def __init__(
        self, matches: tuple[Match, ...], *, clip: int, match_dim: int, width: int, std: float
    ) -> None:
        super().__init__()
        self.matches, self.clip = matches, clip
        num_pairs = sum(len(match.selections) for match in matches)
        self.vectors = nn.Parameter(torch.randn(num_pairs * (clip + 1), match_dim) * std)
        self.mlp = MLP(num_pairs * match_dim, HIDDEN, width, vector=True)

    def of_request(self, batch: Batch) -> tuple[EventIds, ...]:
        """The events of each match."""
        found = []
        for match in self.matches:
            ids_QLW = batch.history_rows_QL if match.event == ITEM else _exact(batch.history, match.event)
            ids_QLW = ids_QLW if ids_QLW.ndim == 3 else ids_QLW[:, :, None]
            masks_QPL = torch.stack([selection.mask(batch) for selection in match.selections], 1)
            masks_QPLW = masks_QPL[..., None] & (ids_QLW >= FIRST_ROW)[:, None]
            found.append(event_ids(ids_QLW.flatten(1), masks_QPLW.flatten(2)))
        return tuple(found)

    def of_items(self, item: Mapping[str, Tensor], dims: int) -> dict[str, Tensor]:
        """Ids that candidates are compared by, [*leading, V] by the name of the field; `dims` leading dimensions."""
        fields = {match.candidate for match in self.matches} - {ITEM}
        ids = {name: _exact(item, name) for name in sorted(fields)}
        return {f"ids.{name}": values if values.ndim > dims else values.unsqueeze(-1) for name, values in ids.items()}

    def counts(self, events: tuple[EventIds, ...], encoded: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Unclipped counts [Q, C, P]."""
        counts = []
        for match, ids in zip(self.matches, events, strict=True):
            of_item = match.candidate == ITEM
            values_QCV = batch.candidates_QC[..., None] if of_item else encoded[f"ids.{match.candidate}"]
            counts.append(ids.count(values_QCV, values_QCV >= FIRST_ROW))
        return torch.cat(counts, -1)

    def forward(self, counts_QCP: Tensor) -> Tensor:
        """T_match [Q, C, width]."""
        rows_QCP = count_rows(counts_QCP, clip=self.clip)
        return self.mlp(nn.functional.embedding(rows_QCP, self.vectors).flatten(-2))


def _exact(fields: Mapping[str, Tensor], name: str) -> Tensor:
    """Numbers that tell the values of a field apart; fields of one vocabulary have the same ones."""
    return fields.get(f"{name}{KEY}", fields[name])


# ---------------------------------------------------------------- which pairs
def default_pairs(space: FeatureSpace) -> tuple[Match, ...]:
    """The item itself and each of its fields that events carry, each over {all events, those with a rarer action} x
    {the newest 10, all}. The first event feature whose few values are known is the action; its commonest value, which
    has the first row, is taken for no more than having been shown."""
    actions = [field for field in space.of("event") if len(field.values) > 1]
    chosen = [Selection(window=window) for window in (RECENT_EVENTS, None)]
    if actions:
        rarer = tuple(range(FIRST_ROW + 1, actions[0].num_rows))
        chosen += [Selection(actions[0].name, rarer, window) for window in (RECENT_EVENTS, None)]
    fields = [f.name for f in space.of("item") if f.name in space.history_fields and f.table and f.name != ITEM]
    return tuple(Match(name, name, tuple(chosen)) for name in (ITEM, *fields))


def declared_pairs(pairs: tuple[Pair, ...], space: FeatureSpace) -> tuple[Match, ...]:
    """Declared pairs, those of the same fields together; ConfigError for what the stage cannot compare."""
    grouped: dict[tuple[str, str], list[Selection]] = {}
    for pair in pairs:
        _refuse_incomparable(pair, space)
        selection = Selection(*_action(pair, space), window=pair.window)
        grouped.setdefault((pair.event, pair.candidate), []).append(selection)
    return tuple(Match(event, candidate, tuple(chosen)) for (event, candidate), chosen in grouped.items())


def _refuse_incomparable(pair: Pair, space: FeatureSpace) -> None:
    of_item = {f.name: f.table for f in space.of("item") if f.table} | {ITEM: ITEM}
    of_event = {name: of_item[name] for name in space.history_fields if name in of_item} | {ITEM: ITEM}
    for side, name, known in (("event", pair.event, of_event), ("candidate", pair.candidate, of_item)):
        if name not in known:
            raise ConfigError(f"pairs: {name!r} is not an id field of the {side}{near_miss(name, set(known))}")
    if of_event[pair.event] != of_item[pair.candidate]:
        raise ConfigError(f"pairs: {pair.event!r} and {pair.candidate!r} do not share a vocabulary, so their rows mean "
                          "different values; give both features the same `vocabulary`")


def _action(pair: Pair, space: FeatureSpace) -> tuple[str, tuple[int, ...]]:
    """The event field that has the pair's actions among its values, and their rows."""
    if not pair.actions:
        return "", ()
    named = [field for field in space.of("event") if set(pair.actions) <= set(field.values)]
    if len(named) != 1:
        values = {value for field in space.of("event") for value in field.values}
        unknown = [action for action in pair.actions if action not in values]
        seen = f"{unknown[0]!r} is a value of none{near_miss(unknown[0], values)}" if unknown else (
            f"{len(named)} of them have all of {list(pair.actions)}")
        raise ConfigError(f"pairs: actions must be values of one id feature of the events, but {seen}")
    return named[0].name, tuple(_row(named[0], action) for action in pair.actions)


def _row(field: Field, value: str) -> int:
    return FIRST_ROW + field.values.index(value)

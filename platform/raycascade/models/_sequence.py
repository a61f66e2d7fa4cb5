"""Rows of a sequence model: events of the history and candidates in one space, told apart by their positions."""

from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.errors import ConfigError
from raycascade.models._layers import linear
from raycascade.plugins import PluginConfig
from raycascade.schema import FeatureSpace

SiluOn = Literal["all", "u"]
BlockOut = Literal["gate", "concat3"]
DAY_MS = 86_400_000


class SequenceOptions(PluginConfig):
    """Sizes of a stack of layers over the newest `history` events: rows of `width`, heads with keys of `key_dim` and
    values of `value_dim` numbers. `max_age_days`: older events are not read (None: whatever their age). `rab`: a
    learned bias for how far apart two events stand. `silu` and `block_out`: the paper's layer (`all`, `gate`) or the
    one of the released ranking model (`u`, `concat3`)."""

    width: int = Option(default=64, ge=1)
    layers: int = Option(default=2, ge=1)
    heads: int = Option(default=2, ge=1)
    key_dim: int = Option(default=32, ge=1)
    value_dim: int = Option(default=32, ge=1)
    history: int = Option(default=128, ge=1)
    max_age_days: float | None = Option(default=None, gt=0)
    rab: bool = False
    silu: SiluOn = "all"
    block_out: BlockOut = "gate"


def events_to_read(options: SequenceOptions, batch: Batch) -> Batch:
    """The same requests with the events that the layers read; DataError where `max_age_days` finds no times."""
    newest = batch.newest_events(options.history)
    return newest if options.max_age_days is None else newest.events_since(round(options.max_age_days * DAY_MS))


class SequenceRows(nn.Module):
    """x_j = W [item fields; event fields] + pos[j] for the j-th newest event, and for a candidate the same with
    pos[0] and a learned vector in place of the event fields, which it does not have.

    W is split: what it makes of a candidate's item fields depends on the item alone. Positions beyond `num_events`
    are those of `num_context` rows before the history. Without `candidates` there is no vector of theirs.
    """

    def __init__(
        self, item_width: int, event_width: int, width: int, *, num_events: int, num_context: int = 0, std: float,
        candidates: bool = True,
    ) -> None:
        super().__init__()
        self.num_events, self.num_context = num_events, num_context
        self.of_item = linear(item_width, width)
        self.of_event = linear(event_width, width, bias=False) if event_width else None
        self.positions = nn.Parameter(torch.randn(1 + num_events + num_context, width) * std)
        known = candidates and self.of_event is not None
        self.no_event = nn.Parameter(torch.randn(event_width) * std) if known else None

    def of_events(self, items_QLI: Tensor, events_QLE: Tensor, mask_QL: Tensor) -> Tensor:
        """Rows of the events [Q, L, D]; arbitrary where masked."""
        newest_QL = (mask_QL.sum(1, keepdim=True) - mask_QL.cumsum(1) + 1).clamp(max=self.num_events)  # 1 = newest
        rows_QLD = self.of_item(items_QLI) + nn.functional.embedding(newest_QL, self.positions)
        return rows_QLD if self.of_event is None else rows_QLD + self.of_event(events_QLE)

    def of_candidates(self, parts_QCD: Tensor) -> Tensor:
        """Rows of candidates [Q, C, D] from what `of_item` makes of their item fields."""
        beside_D = self.positions[0]
        if self.of_event is not None:
            beside_D = beside_D + self.of_event(self.no_event)
        return parts_QCD + beside_D

    def of_context(self) -> Tensor:
        """Positions of the rows before the history [num_context, D], the first one farthest away."""
        return self.positions[1 + self.num_events:].flip(0)


def refuse_sequences_that_cannot_be(config: SequenceOptions, space: FeatureSpace, *, model: str) -> None:
    """ConfigError without a history of items, and for a bias between events that no layer would read."""
    if not (space.history_len and space.history_fields):
        raise ConfigError(f"{model}: the stage sees no history of items; declare one or use mlp")
    if config.rab and config.layers == 1:
        raise ConfigError(f"{model}: rab acts between events, whose rows no layer reads where there is one alone; set "
                          "layers: 2 or more, or rab: false")

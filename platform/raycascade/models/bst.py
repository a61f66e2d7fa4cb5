"""bst: behaviour sequence transformer (Chen et al. 2019, arXiv 1905.06874)."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.errors import ConfigError
from raycascade.models._inputs import FieldInputs, InputOptions
from raycascade.models._layers import ActivationName, NormName, SplitMLP, linear, masked_softmax
from raycascade.models._model import RepresentingModel
from raycascade.schema import FeatureSpace

FEED_FORWARD = 2  # hidden width of a block's second half, in widths of its rows


@dataclass(frozen=True)
class BstState:
    """The request's half: its share of the MLP's first layer, keys and values of the events for each block (none with
    `mask: full`, where they depend on the candidate), and the events' rows after all blocks that read events alone."""

    request_QH: Tensor
    keys_values: tuple[tuple[Tensor, Tensor], ...]
    events_QLD: Tensor
    mask_QL: Tensor


class Block(nn.Module):
    """S = LN(X + MH(X)); F = LN(S + W_b LeakyReLU(W_a S + b_a) + b_b); projections of the heads without bias."""

    def __init__(self, width: int, heads: int, *, dropout: float) -> None:
        super().__init__()
        self.heads, inner = heads, heads * -(-width // heads)  # heads that do not divide the width are rounded up
        self.query, self.key, self.value = (linear(width, inner, bias=False) for _ in range(3))
        self.out = linear(inner, width, bias=False)
        self.attended, self.fed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.wide, self.narrow = linear(width, FEED_FORWARD * width), linear(FEED_FORWARD * width, width)
        self.dropout = nn.Dropout(dropout)

    def of_rows(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [..., R, D] that read one another where `mask` [..., R], and the weights [..., heads, R, R]."""
        query, key, value = (self._by_head(part(x)) for part in (self.query, self.key, self.value))
        query = query * query.shape[-1] ** -0.5
        weights = masked_softmax(query @ key.transpose(-1, -2), mask[..., None, None, :])
        return self._finished(x, weights @ value), weights

    def keys_values(self, events_QLD: Tensor) -> tuple[Tensor, Tensor]:
        """What candidates read of the events, both [Q, heads, L, inner / heads]."""
        return self._by_head(self.key(events_QLD)), self._by_head(self.value(events_QLD))

    def of_target(self, x_QCD: Tensor, key: Tensor, value: Tensor, mask_QL: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates that read the events and themselves, and the weights [Q, heads, C, L + 1]."""
        query, own_key, own_value = (self._by_head(part(x_QCD)) for part in (self.query, self.key, self.value))
        query = query * query.shape[-1] ** -0.5
        own = (query * own_key).sum(-1, keepdim=True)
        mask = torch.cat([mask_QL, mask_QL.new_ones(len(mask_QL), 1)], 1)
        weights = masked_softmax(torch.cat([query @ key.transpose(-1, -2), own], -1), mask[:, None, None])
        return self._finished(x_QCD, weights[..., :-1] @ value + weights[..., -1:] * own_value), weights

    def _by_head(self, x: Tensor) -> Tensor:
        """[..., R, inner] -> [..., heads, R, inner / heads]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    def _finished(self, x: Tensor, mixed: Tensor) -> Tensor:
        attended = self.attended(x + self.dropout(self.out(mixed.transpose(-2, -3).flatten(-2))))
        fed = self.narrow(nn.functional.leaky_relu(self.wide(attended)))
        return self.fed(attended + self.dropout(fed))


class Bst(RepresentingModel):
    """z = MLP([request; last block's row of the target; candidate]) over rows of the events and of the target.

    A row is [item fields; event fields; position], concatenated; in the target's the last two are learned, a bucket of
    its own. ConfigError without a history, and with `position: events` without an event feature.
    """

    class Config(InputOptions):
        """In the paper more than one block was worse.

        `position`: index, a learned vector for each rank from the newest event; events, what the event features say
        (the paper's: declare an `age`). `mask`: isolated, events read events and the target reads them and itself;
        full (the paper's), events read the target too, so that nothing is computed once a request. With one block and
        `pool: target` both are equal. `pool`: what enters the MLP of the last rows.
        """

        presets = {"paper": {"heads": 8, "dropout": 0.2, "hidden": (1024, 512, 256), "max_events": 20}}

        hidden: tuple[int, ...] = (64, 32)
        activation: ActivationName = "leaky_relu"
        norm: NormName = "none"
        dropout: float = Option(default=0.0, ge=0, lt=1)
        blocks: int = Option(default=1, ge=1)
        heads: int = Option(default=2, ge=1)
        position: Literal["index", "events"] = "index"
        mask: Literal["isolated", "full"] = "isolated"
        pool: Literal["target", "mean"] = "target"
        max_events: int | None = Option(default=None, ge=1)  # reads the newest so many events only

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        self.config, self.inputs = config, FieldInputs(config, space, model="bst")
        if not self.inputs.history_fields:
            raise ConfigError("bst: the stage sees no history of items; declare one or use mlp")
        if config.position == "events" and not self.inputs.event_fields:
            raise ConfigError("bst: position events needs an event feature that tells the time; declare an age of side "
                              "event, or set position: index")
        indexed = config.dim if config.position == "index" else 0
        beside = self.inputs.event_width + indexed
        width = self.inputs.history_width + beside
        std = config.embedding_std
        self.positions = nn.Parameter(torch.randn(max(1, space.history_len), indexed) * std) if indexed else None
        self.target_beside = nn.Parameter(torch.randn(beside) * std)
        self.blocks = nn.ModuleList(Block(width, config.heads, dropout=config.dropout) for _ in range(config.blocks))
        self.mlp = SplitMLP(self.inputs.request_width(history=False), width + self.inputs.candidate_width,
                            config.hidden, num_tasks, activation=config.activation, norm=config.norm,
                            dropout=config.dropout)
        self.representation_width = (0, *config.hidden)[-1]

    def silence(self) -> None:
        """Logits start at the bias of the MLP's last layer, 0."""
        self.mlp.silence()

    def encode_request(self, batch: Batch) -> BstState:
        """The request's share of the MLP, and the events as each block reads them."""
        if self.config.max_events is not None:
            batch = batch.newest_events(self.config.max_events)
        events_QLD, mask_QL, keys_values = self._events(batch), batch.history_mask_QL, []
        if self.config.mask == "isolated":
            for n, block in enumerate(self.blocks, 1):
                keys_values.append(block.keys_values(events_QLD))  # type: ignore[operator]
                if n < len(self.blocks) or self.config.pool == "mean":
                    events_QLD = block.of_rows(events_QLD, mask_QL)[0]  # type: ignore[operator]
        request_QH = self.mlp.of_request(self.inputs.request_matrix(batch, history=False))
        return BstState(request_QH, tuple(keys_values), events_QLD, mask_QL)

    def _events(self, batch: Batch) -> Tensor:
        """Rows of the events [Q, L, D]."""
        parts = [self.inputs.history_matrix(batch), self.inputs.event_matrix(batch)]
        if self.positions is not None:
            mask_QL = batch.history_mask_QL
            rank_QL = mask_QL.sum(1, keepdim=True) - mask_QL.cumsum(1)  # how many events came later
            parts.append(self.positions[rank_QL.clamp(max=len(self.positions) - 1)])
        return torch.cat(parts, -1)

    def score_candidates(self, state: BstState, batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        candidates_QCD = self.inputs.candidate_matrix(batch)
        pooled_QCD = self._read(state, candidates_QCD)[0]
        return self.mlp(state.request_QH, torch.cat([pooled_QCD, candidates_QCD], -1), batch.mask_QC)

    def _read(self, state: BstState, candidates_QCD: Tensor) -> tuple[Tensor, Tensor]:
        """What the blocks say of each candidate [Q, C, D], and the last block's weights [Q, C, heads, L + 1]."""
        own_QCD = self.inputs.as_event(candidates_QCD)
        target_QCD = torch.cat([own_QCD, self.target_beside.expand(*own_QCD.shape[:2], -1)], -1)
        read = self._read_in_full if self.config.mask == "full" else self._read_isolated
        target_QCD, events, weights = read(state, target_QCD)
        if self.config.pool == "target":
            return target_QCD, weights
        total = (events * state.mask_QL[:, None, :, None]).sum(2) + target_QCD
        return total / (state.mask_QL.sum(1)[:, None, None] + 1), weights

    def _read_isolated(self, state: BstState, target_QCD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The last rows of the target and of the events [Q, 1, L, D], and the weights."""
        weights = target_QCD
        for block, (key, value) in zip(self.blocks, state.keys_values, strict=True):
            target_QCD, weights = block.of_target(target_QCD, key, value, state.mask_QL)  # type: ignore[operator]
        return target_QCD, state.events_QLD[:, None], weights.transpose(1, 2)

    def _read_in_full(self, state: BstState, target_QCD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same where every row reads every other one, so that the events have rows for each candidate."""
        events = state.events_QLD[:, None].expand(-1, target_QCD.shape[1], -1, -1)
        mask_Q1R = torch.cat([state.mask_QL, state.mask_QL.new_ones(len(state.mask_QL), 1)], 1)[:, None]
        rows = weights = torch.cat([events, target_QCD[:, :, None]], 2)
        for block in self.blocks:
            rows, weights = block.of_rows(rows, mask_Q1R)  # type: ignore[operator]
        return rows[:, :, -1], rows[:, :, :-1], weights[..., -1, :]

    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """`attention` [Q, C, heads, L + 1]: what the target reads in the last block, itself at the end."""
        return {"attention": self._read(self.encode_request(batch), self.inputs.candidate_matrix(batch))[1]}

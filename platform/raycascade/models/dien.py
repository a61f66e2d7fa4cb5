"""dien: deep interest evolution network (Zhou et al. 2019, arXiv 1809.03672)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.errors import ConfigError, DataError
from raycascade.models._inputs import FieldInputs, InputOptions
from raycascade.models._layers import (
    MLP,
    ActivationName,
    NormName,
    SplitMLP,
    initialise,
    linear,
    masked_softmax,
)
from raycascade.models._model import RepresentingModel
from raycascade.models.din import DinState, InterestAttention
from raycascade.schema import FeatureSpace

AUXILIARY_HIDDEN = (100, 50)  # of the released code


@dataclass(frozen=True)
class DienState:
    """The request's half. Events stand left-aligned in `order_QL`; `interests_QLN` are the extractor's states, one an
    event, and `gates_QLG` their share of the evolution's gates."""

    request_QH: Tensor
    order_QL: Tensor
    mask_QL: Tensor
    events_QLN: Tensor
    interests_QLN: Tensor
    gates_QLG: Tensor


class Extractor(nn.Module):
    """h' = (1 - u) h + u n over the events, one fused call (equations 2 to 5), h_0 = 0.

    The GRU's keep gate is z = 1 - u, its rows are in the order r, z, n. Its last input is 1 and stands for the biases:
    PyTorch's own would add a second one inside r (U h).
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width + 1, out, bias=False, batch_first=True)
        with torch.no_grad():
            for weight in self.gru.parameters():
                initialise(weight)
            self.gru.get_parameter("weight_ih_l0")[:, -1] = 0.0

    def forward(self, x_QLD: Tensor) -> Tensor:
        """h after every event [Q, L, out]; events must be left-aligned, so that what follows is padding."""
        if x_QLD.shape[:2].numel() == 0:
            return x_QLD.new_zeros(*x_QLD.shape[:2], self.gru.hidden_size)
        return self.gru(torch.cat([x_QLD, x_QLD.new_ones(*x_QLD.shape[:2], 1)], -1))[0]


class Evolution(nn.Module):
    """GRU with attentional update gate (AUGRU, equations 14 and 15): s' = (1 - a u) s + a u n, s_0 = 0.

    Gates in the order u, r, n. What depends on the event alone runs once a request; a step costs one product with the
    states of all candidates.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input = linear(width, 3 * width)
        self.recurrent = nn.Parameter(torch.empty(3 * width, width))
        initialise(self.recurrent)

    def of_interests(self, interests_QLN: Tensor) -> Tensor:
        """W h_t + b of all gates [Q, L, 3 n]."""
        return self.input(interests_QLN)

    def forward(self, gates_QLG: Tensor, weights_QCL: Tensor) -> Tensor:
        """The last state of every candidate [Q, C, n]; a weight of 0 leaves a state as it is."""
        width = self.recurrent.shape[1]
        state = weights_QCL.new_zeros(*weights_QCL.shape[:2], width)
        for gates_QG, weight_QC in zip(gates_QLG.unbind(1), weights_QCL.unbind(2), strict=True):
            own_both, own_n = gates_QG[:, None].split((2 * width, width), -1)
            both, n = nn.functional.linear(state, self.recurrent).split((2 * width, width), -1)
            u, r = torch.sigmoid(own_both + both).chunk(2, -1)
            proposal = torch.tanh(torch.addcmul(own_n, r, n))
            state = torch.lerp(state, proposal.to(state.dtype), weight_QC[:, :, None] * u)
        return state


class Dien(RepresentingModel):
    """z = MLP([request; candidate; s_L]): interests by a GRU over the events, evolved towards each candidate.

    a_t = masked softmax over t of h_t^T W v; e_j and v are the same item fields of an event and of the candidate, and
    what only events have (action, age) enters the extractor. Training needs `Batch.history_negatives` for the
    auxiliary loss. Sequential in the history: for short lists. ConfigError without a history.
    """

    class Config(InputOptions):
        """`attention`: product, or mlp, the unit of din with a softmax. `alpha`: weight of the auxiliary loss, which
        asks each state to tell the next event from a random item (equation 7), 0 for none; `auxiliary`: by their
        product, or by an mlp of 100-50. `pooled` also feeds the sum of the history and its product with v."""

        presets = {"code": {"dim": 18, "hidden": (200, 80)}}

        hidden: tuple[int, ...] = (64, 32)
        activation: ActivationName = "dice"
        norm: NormName = "none"
        dropout: float = Option(default=0.0, ge=0, lt=1)
        attention: Literal["product", "mlp"] = "product"
        attention_hidden: tuple[int, ...] = Option(default=(80, 40), min_length=1)  # of attention: mlp
        attention_activation: ActivationName = "sigmoid"
        alpha: float = Option(default=1.0, ge=0)
        auxiliary: Literal["product", "mlp"] = "product"
        pooled: bool = False
        max_events: int | None = Option(default=None, ge=1)  # reads the newest so many events only

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        self.config, self.inputs = config, FieldInputs(config, space, model="dien")
        if not self.inputs.history_fields:
            raise ConfigError("dien: the stage sees no history of items; declare one or use mlp")
        width = self.inputs.history_width
        self.extractor = Extractor(width + self.inputs.event_width, width)
        self.evolution = Evolution(width)
        self.attention: nn.Module = linear(width, width, bias=False)
        if config.attention == "mlp":
            self.attention = InterestAttention(width, 0, config.attention_hidden,
                                               activation=config.attention_activation, normalise="softmax")
        learns_to_tell = config.alpha > 0 and config.auxiliary == "mlp"
        self.auxiliary = MLP(2 * width, AUXILIARY_HIDDEN, 1, activation="sigmoid") if learns_to_tell else None
        extra = width if config.pooled else 0
        self.mlp = SplitMLP(self.inputs.request_width(history=False) + extra,
                            self.inputs.candidate_width + width + extra, config.hidden, num_tasks,
                            activation=config.activation, norm=config.norm, dropout=config.dropout)
        self.representation_width = (0, *config.hidden)[-1]

    @property
    def training_needs(self) -> frozenset[str]:
        """Random items beside the history's, for the auxiliary loss."""
        return frozenset({"history_negatives"} if self.config.alpha > 0 else ())

    def silence(self) -> None:
        """Logits start at the bias of the MLP's last layer, 0."""
        self.mlp.silence()

    # ---- the two halves
    def encode_request(self, batch: Batch) -> DienState:
        """The extractor's states, and the request's share of all that follows."""
        batch = self._newest(batch)
        order_QL = (~batch.history_mask_QL).int().argsort(dim=1, stable=True)
        mask_QL = batch.history_mask_QL.gather(1, order_QL)
        events_QLN = _ordered(self.inputs.history_matrix(batch), order_QL)
        extra_QLG = _ordered(self.inputs.event_matrix(batch), order_QL)
        interests_QLN = self.extractor(torch.cat([events_QLN, extra_QLG], -1))
        x_QD = self.inputs.request_matrix(batch, history=False)
        if self.config.pooled:
            x_QD = torch.cat([x_QD, _summed(events_QLN, mask_QL)], -1)
        return DienState(self.mlp.of_request(x_QD), order_QL, mask_QL, events_QLN, interests_QLN,
                         self.evolution.of_interests(interests_QLN))

    def score_candidates(self, state: DienState, batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        candidates_QCD = self.inputs.candidate_matrix(batch)
        target_QCN = self.inputs.as_event(candidates_QCD)
        evolved_QCN = self.evolution(state.gates_QLG, self._weights(state, target_QCN, batch.mask_QC))
        parts = [candidates_QCD, evolved_QCN]
        if self.config.pooled:
            parts.append(_summed(state.events_QLN, state.mask_QL)[:, None] * target_QCN)
        return self.mlp(state.request_QH, torch.cat(parts, -1), batch.mask_QC)

    def _weights(self, state: DienState, target_QCN: Tensor, mask_QC: Tensor) -> Tensor:
        """a [Q, C, L], 0 where masked."""
        if isinstance(self.attention, InterestAttention):
            alike = DinState(state.request_QH, state.interests_QLN, state.interests_QLN[..., :0], state.mask_QL)
            return self.attention(alike, target_QCN, mask_QC)
        logits_QCL = self.attention(target_QCN) @ state.interests_QLN.transpose(1, 2)
        return masked_softmax(logits_QCL, state.mask_QL[:, None])

    def _newest(self, batch: Batch) -> Batch:
        return batch if self.config.max_events is None else batch.newest_events(self.config.max_events)

    # ---- training
    def train_outputs(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Logits, and alpha times the auxiliary loss as `aux`; DataError where the batch brings no negatives."""
        state = self.encode_request(batch)
        logits_QCT = self.score_candidates(state, batch)
        if self.config.alpha == 0:
            return logits_QCT, {}
        negatives = self._newest(batch).history_negatives
        if negatives is None:
            raise DataError("dien: the batch has no history_negatives for the auxiliary loss; draw them "
                            "(training.sampling.with_history_negatives) or set alpha: 0")
        drawn_QLN = _ordered(self.inputs.matrix(negatives, self.inputs.history_fields, state.order_QL.shape),
                             state.order_QL)
        return logits_QCT, {"aux": self.config.alpha * self._auxiliary_loss(state, drawn_QLN)}

    def _auxiliary_loss(self, state: DienState, drawn_QLN: Tensor) -> Tensor:
        """-mean over consecutive events of ln sigma(h_t . e_t+1) + ln(1 - sigma(h_t . e^-_t+1)); 0 without a pair."""
        before, valid = state.interests_QLN[:, :-1], state.mask_QL[:, 1:]
        real, drawn = (self._likeness(before, after[:, 1:]) for after in (state.events_QLN, drawn_QLN))
        loss = nn.functional.softplus(-real) + nn.functional.softplus(drawn)
        return torch.where(valid, loss, 0.0).sum() / valid.sum().clamp(min=1)

    def _likeness(self, interests: Tensor, events: Tensor) -> Tensor:
        if self.auxiliary is None:
            return (interests * events).sum(-1)
        return self.auxiliary(torch.cat([interests, events], -1)).squeeze(-1)

    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """`attention` [Q, C, L]: the weight of every event for every candidate, events left-aligned."""
        target_QCN = self.inputs.as_event(self.inputs.candidate_matrix(batch))
        return {"attention": self._weights(self.encode_request(batch), target_QCN, batch.mask_QC)}


def _ordered(values_QLD: Tensor, order_QL: Tensor) -> Tensor:
    return values_QLD.gather(1, order_QL[:, :, None].expand(-1, -1, values_QLD.shape[2]))


def _summed(events_QLN: Tensor, mask_QL: Tensor) -> Tensor:
    return (events_QLN * mask_QL[:, :, None]).sum(1)

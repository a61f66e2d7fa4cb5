"""din: deep interest network (Zhou et al. 2018, arXiv 1706.06978)."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.errors import ConfigError
from raycascade.models._inputs import FieldInputs, InputOptions
from raycascade.models._layers import ActivationName, NormName, SplitMLP, UpperLayers, linear, masked_softmax
from raycascade.models._model import RepresentingModel
from raycascade.schema import FeatureSpace

CACHE_FLOATS = 1 << 18  # one block of attention activations, sized to stay in a processor's cache


@dataclass(frozen=True)
class DinState:
    """The request's half: its share of the MLP's first layer [Q, H], the events' item fields [Q, L, D] and what only
    events have [Q, L, G]."""

    request_QH: Tensor
    events_QLD: Tensor
    extra_QLG: Tensor
    mask_QL: Tensor


class InterestAttention(nn.Module):
    """a_j = MLP([v; e_j; v - e_j; v * e_j; g_j]), zero where masked; no softmax unless asked for.

    The first layer of a pair is e_j (W_e - W_d + W_p diag(v)) + g_j W_g + v (W_v + W_d) + b: one map of the events for
    each candidate, and no v * e_j is ever written down.
    """

    def __init__(
        self, width: int, event_width: int, hidden: tuple[int, ...], *, activation: ActivationName,
        normalise: Literal["none", "softmax"],
    ) -> None:
        super().__init__()
        self.widths = [width] * 4 + [event_width]
        self.normalise = normalise
        self.whole_batch = activation == "dice"  # its statistics need every pair at once
        self.first = linear(sum(self.widths), hidden[0])
        self.upper = UpperLayers(hidden, 1, activation=activation, out_bias=normalise == "none")

    def forward(self, state: DinState, target_QCD: Tensor, mask_QC: Tensor) -> Tensor:
        """Weights [Q, C, L]."""
        own, _, difference, _, _ = self.first.weight.split(self.widths, 1)
        target_QCA = nn.functional.linear(target_QCD, own + difference, self.first.bias)
        ones_QL1 = state.events_QLD.new_ones(*state.mask_QL.shape, 1)
        events_QLE = torch.cat([state.events_QLD, state.extra_QLG, ones_QL1], -1)
        logits_QCL = self._in_blocks(target_QCD, target_QCA, events_QLE, mask_QC, state.mask_QL)
        mask_Q1L = state.mask_QL[:, None]
        if self.normalise == "softmax":
            return masked_softmax(logits_QCL, mask_Q1L)
        return logits_QCL.masked_fill(~mask_Q1L, 0.0)

    def _in_blocks(
        self, target_QCD: Tensor, target_QCA: Tensor, events_QLE: Tensor, mask_QC: Tensor, mask_QL: Tensor
    ) -> Tensor:
        """Logits [Q, C, L], on a processor a few requests, or a few candidates of one, at a time."""
        if target_QCD.device.type != "cpu" or self.whole_batch:
            return self._logits(target_QCD, target_QCA, events_QLE, mask_QC, mask_QL)
        of_one = max(1, mask_QL.shape[1] * target_QCA.shape[2])
        requests = max(1, CACHE_FLOATS // (of_one * max(1, mask_QC.shape[1])))
        candidates = max(1, CACHE_FLOATS // of_one) if requests == 1 else max(1, mask_QC.shape[1])
        found = []
        for t_QCD, t_QCA, e_QLE, m_QC, m_QL in zip(
            *(x.split(requests) for x in (target_QCD, target_QCA, events_QLE, mask_QC, mask_QL)), strict=True
        ):
            blocks = zip(*(x.split(candidates, 1) for x in (t_QCD, t_QCA, m_QC)), strict=True)
            found.append(torch.cat([self._logits(d, a, e_QLE, m, m_QL) for d, a, m in blocks], 1))
        return torch.cat(found)

    def _logits(
        self, target_QCD: Tensor, target_QCA: Tensor, events_QLE: Tensor, mask_QC: Tensor, mask_QL: Tensor
    ) -> Tensor:
        _, own_AD, difference_AD, product_AD, extra_AG = self.first.weight.split(self.widths, 1)
        maps_QCAE = torch.addcmul(own_AD - difference_AD, target_QCD[:, :, None], product_AD)
        beside = [extra_AG.expand(*target_QCA.shape, -1)] if extra_AG.shape[1] else []
        maps_QCAE = torch.cat([maps_QCAE, *beside, target_QCA[..., None]], -1)
        pairs_QLCA = (events_QLE @ maps_QCAE.flatten(1, 2).mT).unflatten(-1, target_QCA.shape[1:])
        return self.upper(pairs_QLCA, mask_QL[:, :, None] & mask_QC[:, None]).squeeze(-1).mT


class Din(RepresentingModel):
    """z = MLP([request; pooled; candidate]), pooled = sum_j a_j e_j over the history.

    e_j and v are the same item fields of an event and of the candidate; what only events have (action, age) enters the
    attention alone. ConfigError without a history.
    """

    class Config(InputOptions):
        """Options of din."""

        presets = {"paper": {
            "dim": 64, "hidden": (200, 80), "attention_hidden": (80, 40), "attention_activation": "sigmoid"}}

        dense_std: float | None = Option(default=None, gt=0)  # of the slopes, with dense: field
        hidden: tuple[int, ...] = (64, 32)
        activation: ActivationName = "dice"
        norm: NormName = "none"
        dropout: float = Option(default=0.0, ge=0, lt=1)
        attention_hidden: tuple[int, ...] = Option(default=(36,), min_length=1)
        attention_activation: ActivationName = "prelu"
        normalise: Literal["none", "softmax"] = "none"
        products: bool = False  # also feeds v * pooled to the MLP
        max_events: int | None = Option(default=None, ge=1)  # reads the newest so many events only

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        self.inputs = FieldInputs(config, space, model="din", dense_std=config.dense_std)
        if not self.inputs.history_fields:
            raise ConfigError("din: the stage sees no history of items; declare one or use mlp")
        width = self.inputs.history_width
        self.attention = InterestAttention(width, self.inputs.event_width, config.attention_hidden,
                                           activation=config.attention_activation, normalise=config.normalise)
        self.products, self.max_events = config.products, config.max_events
        self.product_scale = 1.0 / config.embedding_std  # products of two embeddings start at the scale of one
        pooled = width * (2 if config.products else 1)
        self.mlp = SplitMLP(self.inputs.request_width(history=False), pooled + self.inputs.candidate_width,
                            config.hidden, num_tasks, activation=config.activation, norm=config.norm,
                            dropout=config.dropout)
        self.representation_width = (0, *config.hidden)[-1]

    def silence(self) -> None:
        """Logits start at the bias of the MLP's last layer, 0."""
        self.mlp.silence()

    def encode_request(self, batch: Batch) -> DinState:
        """The request's share of both first layers, and the events."""
        if self.max_events is not None:
            batch = batch.newest_events(self.max_events)
        events_QLD = self.inputs.history_matrix(batch)
        return DinState(
            request_QH=self.mlp.of_request(self.inputs.request_matrix(batch, history=False)),
            events_QLD=events_QLD,
            extra_QLG=self.inputs.event_matrix(batch),
            mask_QL=batch.history_mask_QL,
        )

    def score_candidates(self, state: DinState, batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        candidates_QCD = self.inputs.candidate_matrix(batch)
        target_QCD = self.inputs.as_event(candidates_QCD)
        pooled_QCD = self.attention(state, target_QCD, batch.mask_QC) @ state.events_QLD
        if self.products:
            pooled_QCD = torch.cat([pooled_QCD, pooled_QCD * target_QCD * self.product_scale], -1)
        return self.mlp(state.request_QH, torch.cat([pooled_QCD, candidates_QCD], -1), batch.mask_QC)

    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """`attention` [Q, C, L]: the weight of every event for every candidate."""
        target_QCD = self.inputs.as_event(self.inputs.candidate_matrix(batch))
        return {"attention": self.attention(self.encode_request(batch), target_QCD, batch.mask_QC)}

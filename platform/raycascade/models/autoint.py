"""autoint: self-attention over fields (Song et al. 2019, arXiv 1810.11921, equations 5 to 10)."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.models._layers import ActivationName, NormName, SplitMLP, linear
from raycascade.models._model import RepresentingModel
from raycascade.models._stacks import FieldStacks, StackOptions
from raycascade.schema import FeatureSpace


@dataclass(frozen=True)
class AutoIntState:
    """The request's half: its fields through the first layer's maps [Q, m_u, 4 D], and its share of the MLP's first
    layer [Q, H]."""

    mapped_QFA: Tensor
    request_QH: Tensor | None


class FieldAttention(nn.Module):
    """e'_f = ReLU(concat_h sum_g a^h_fg W_V^h e_g + W_Res e_f), a^h_fg = softmax_g <W_Q^h e_f, W_K^h e_g>.

    Neither biases nor a division by the root of the width. `maps` holds W_Q, W_K, W_V and W_Res, one below the other,
    D = heads x head_dim rows each.
    """

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.maps = linear(width, 4 * heads * head_dim, bias=False)

    def forward(self, mapped: Tensor) -> Tensor:
        """The next vectors of the fields [..., m, D] from their `maps` [..., m, 4 D]."""
        query, key, value, residual = mapped.chunk(4, -1)
        query, key, value = (self._by_head(x) for x in (query, key, value))
        pooled = nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0)
        return torch.relu(pooled.transpose(-2, -3).reshape(residual.shape) + residual)

    def weights(self, mapped: Tensor) -> Tensor:
        """a [..., heads, m, m]."""
        query, key, _, _ = mapped.chunk(4, -1)
        leading, (num_fields, _) = mapped.shape[:-2], mapped.shape[-2:]
        logits = self._by_head(query) @ self._by_head(key).mT
        return torch.softmax(logits, -1).view(*leading, self.heads, num_fields, num_fields)

    def _by_head(self, x: Tensor) -> Tensor:
        """[rows, heads, m, head_dim]."""
        return x.reshape(-1, x.shape[-2], self.heads, x.shape[-1] // self.heads).transpose(-2, -3)


class AutoInt(RepresentingModel):
    """z = w . [e'_1; ...; e'_m] + b after `num_layers` of attention; a non-empty `hidden` adds MLP([e_1; ...; e_m]) and
    makes it AutoInt+. There is no first-order term."""

    class Config(StackOptions):
        """AutoInt+ has an MLP beside: `hidden`. `dense_std`: deviation of numbers' initial slopes; None: embedding_std,
        which an epoch of a small log hardly moves, and numbers have no way around the attention."""

        presets = {"paper": {"dim": 16, "num_layers": 3, "heads": 2, "head_dim": 16}}

        dense_std: float | None = Option(default=0.25, gt=0)
        num_layers: int = Option(default=2, ge=1)
        heads: int = Option(default=2, ge=1)
        head_dim: int = Option(default=8, ge=1)
        hidden: tuple[int, ...] = ()
        activation: ActivationName = "relu"
        norm: NormName = "none"
        dropout: float = Option(default=0.0, ge=0, lt=1)

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        self.inputs = FieldStacks(config, space, model="autoint", dense_std=config.dense_std)
        wide = config.heads * config.head_dim
        self.attention = nn.ModuleList(
            FieldAttention(config.dim if n == 0 else wide, config.heads, config.head_dim)
            for n in range(config.num_layers))
        self.out = linear(self.inputs.num_fields * wide, num_tasks) if num_tasks else None
        self.representation_width = self.inputs.num_fields * wide + (0, *config.hidden)[-1]
        self.mlp = SplitMLP(
            self.inputs.num_request * config.dim, self.inputs.num_candidate * config.dim, config.hidden, num_tasks,
            activation=config.activation, norm=config.norm, dropout=config.dropout, out_bias=False,
        ) if config.hidden else None

    def silence(self) -> None:
        """Logits start at the bias, 0."""
        assert self.out is not None
        nn.init.zeros_(self.out.weight)
        if self.mlp is not None:
            self.mlp.silence()

    def encode_request(self, batch: Batch) -> AutoIntState:
        """The request's fields through the first maps of both parts."""
        fields_QFK = self.inputs.of_request(batch)
        request_QH = self.mlp.of_request(fields_QFK.flatten(1)) if self.mlp is not None else None
        return AutoIntState(mapped_QFA=self._layers[0].maps(fields_QFK), request_QH=request_QH)

    def score_candidates(self, state: AutoIntState, batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        fields_QCFK = self.inputs.of_candidates(batch)
        last_QCD = self._layers[-1](self._mapped(state, fields_QCFK)[-1]).flatten(-2)
        own = last_QCD if self.out is None else self.out(last_QCD)
        if self.mlp is None or state.request_QH is None:
            return own
        deep = self.mlp(state.request_QH, fields_QCFK.flatten(-2), batch.mask_QC)
        return torch.cat([own, deep], -1) if self.out is None else own + deep

    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """`attention_0`, `attention_1`, ... [Q, C, heads, m, m]: the weights of every layer."""
        mapped = self._mapped(self.encode_request(batch), self.inputs.of_candidates(batch))
        return {f"attention_{n}": self._layers[n].weights(x) for n, x in enumerate(mapped)}

    @property
    def _layers(self) -> list[FieldAttention]:
        return [layer for layer in self.attention if isinstance(layer, FieldAttention)]

    def _mapped(self, state: AutoIntState, fields_QCFK: Tensor) -> list[Tensor]:
        """What the maps of every layer give [Q, C, m, 4 D]."""
        own = state.mapped_QFA[:, None].expand(-1, fields_QCFK.shape[1], -1, -1)
        mapped = [torch.cat([own, self._layers[0].maps(fields_QCFK)], -2)]
        for layer, following in pairwise(self._layers):
            mapped.append(following.maps(layer(mapped[-1])))
        return mapped

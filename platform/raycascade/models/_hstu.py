"""Layers of hierarchical sequential transduction units (Zhai et al. 2024, arXiv 2402.17152, equations 1 to 3).

History rows read the history rows up to their own; a candidate reads the history and itself and never another
candidate. So the history runs through the stack once a request, and leaves its keys and values to the candidates.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from raycascade.models._layers import linear
from raycascade.models._sequence import SequenceOptions

EPS = 1e-6


@dataclass(frozen=True)
class HstuState:
    """Keys [Q, heads, L, key_dim] and values [Q, heads, L, value_dim] of the history in every layer, as candidates read
    them: keys are divided by the root of their width and zero where masked (SiLU(0) = 0), values divided by N."""

    keys_values: tuple[tuple[Tensor, Tensor], ...]


class HstuLayer(nn.Module):
    """X + W_2 (LN(A V) * U) + b_2 with U, V, Q, K = SiLU(W_1 LN(X) + b_1) and, per head without a softmax,
    (A V)_i = 1/N sum_j SiLU(q_i . k_j / sqrt(key_dim) + rab_ij) v_j over the rows j that i reads.

    N is a constant: a score that depended on how long a batch's histories are would depend on the batch. The rows of
    W_1 are held as those of U and Q and those of V and K, because the `last` layer needs no more than V and K of the
    history.
    """

    def __init__(self, options: SequenceOptions, *, num_rows: int, dropout: float, last: bool) -> None:
        super().__init__()
        self.heads, self.num_rows, self.last = options.heads, num_rows, last
        self.all_silu, self.concat = options.silu == "all", options.block_out == "concat3"
        self.scale = options.key_dim**-0.5
        self.sizes = [options.heads * options.value_dim, options.heads * options.key_dim]
        self.before, self.after = nn.LayerNorm(options.width, eps=EPS), nn.LayerNorm(self.sizes[0], eps=EPS)
        self.gate_query = linear(options.width, sum(self.sizes))
        self.value_key = linear(options.width, sum(self.sizes))
        self.out = linear(self.sizes[0] * (3 if self.concat else 1), options.width)
        self.dropout = nn.Dropout(dropout)
        self.distance_bias = nn.Parameter(torch.zeros(num_rows)) if options.rab and not last else None

    def of_history(self, x_QLD: Tensor, mask_QL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows after this layer (as they were for the last one: nobody reads them), and their keys and values as
        in `HstuState`."""
        normed = self.before(x_QLD)
        value, key = self._value_key(normed)
        key, value = (key * self.scale).masked_fill(~mask_QL[:, None, :, None], 0.0), value / self.num_rows
        if self.last:
            return x_QLD, key, value
        gate, query = self._gate_query(normed)
        scores = query @ key.transpose(-1, -2)
        if self.distance_bias is not None:
            rank_QL = mask_QL.cumsum(1)
            apart_QLL = (rank_QL[:, :, None] - rank_QL[:, None]).clamp(min=0, max=self.num_rows - 1)
            scores = scores + self.distance_bias[apart_QLL][:, None]
        length = x_QLD.shape[1]
        earlier_LL = torch.ones(length, length, dtype=torch.bool, device=x_QLD.device).tril()
        weights = silu(scores).masked_fill(~(earlier_LL & mask_QL[:, None])[:, None], 0.0)
        return self._finished(x_QLD, gate, weights @ value), key, value

    def of_candidates(self, x_QCD: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates that read the history and themselves, and N times what they read, [Q, heads, C, L] of the history
        and [Q, heads, C, 1] of themselves."""
        normed = self.before(x_QCD)
        gate, query = self._gate_query(normed)
        own_value, own_key = self._value_key(normed)
        read = silu(query @ key.transpose(-1, -2))
        own = silu((query * own_key).sum(-1, keepdim=True) * self.scale)
        return self._finished(x_QCD, gate, torch.addcmul(read @ value, own / self.num_rows, own_value)), read, own

    def _gate_query(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """U as it is and Q by head."""
        gate, query = self.gate_query(normed).split(self.sizes, -1)
        return silu(gate), self._by_head(query)

    def _value_key(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """V and K by head."""
        value, key = self.value_key(normed).split(self.sizes, -1)
        return self._by_head(value), self._by_head(key)

    def _by_head(self, x: Tensor) -> Tensor:
        """[Q, R, inner] -> [Q, heads, R, inner / heads]."""
        x = silu(x) if self.all_silu else x
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _finished(self, x: Tensor, gate: Tensor, mixed: Tensor) -> Tensor:
        mixed = mixed.transpose(1, 2).flatten(-2)
        gated = self.after(mixed) * gate
        return x + self.dropout(self.out(torch.cat([gate, mixed, gated], -1) if self.concat else gated))


class HstuStack(nn.Module):
    """Layers one behind the other over at most `num_rows` rows."""

    def __init__(self, options: SequenceOptions, *, num_rows: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            HstuLayer(options, num_rows=num_rows, dropout=dropout, last=n == options.layers)
            for n in range(1, options.layers + 1))

    def read(self, rows_QLD: Tensor, mask_QL: Tensor) -> HstuState:
        """What candidates read of the history, oldest row first."""
        keys_values: list[tuple[Tensor, Tensor]] = []
        layer: Any
        for layer in self.layers:
            rows_QLD, key, value = layer.of_history(rows_QLD, mask_QL)
            keys_values.append((key, value))
        return HstuState(tuple(keys_values))

    def forward(self, state: HstuState, rows_QCD: Tensor) -> Tensor:
        """The candidates' rows after the last layer [Q, C, D]."""
        return self._through(state, rows_QCD)[0]

    def attention(self, state: HstuState, rows_QCD: Tensor) -> Tensor:
        """What candidates read in the last layer [Q, C, heads, L + 1], themselves at the end: SiLU of the scores, not
        normalised."""
        return torch.cat(self._through(state, rows_QCD)[1:], -1).transpose(1, 2)

    def _through(self, state: HstuState, rows_QCD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        read = own = rows_QCD
        for layer, (key, value) in zip(self.layers, state.keys_values, strict=True):
            rows_QCD, read, own = layer.of_candidates(rows_QCD, key, value)  # type: ignore[operator]
        return rows_QCD, read, own

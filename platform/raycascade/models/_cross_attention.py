"""Cross attention of two sets of rows: of a candidate on the history, and of a request on a candidate's fields."""

import torch
from torch import Tensor, nn

from raycascade.errors import ConfigError
from raycascade.models._layers import linear, masked_softmax

FEED_FORWARD = 2  # hidden width of the second half, in widths of a row


class CrossAttention(nn.Module):
    """LN(Z + FFN(Z)) with Z = LN(X + W_O heads(softmax(Q K^T / sqrt(width / heads)) V)); projections without bias.

    Queries, keys and values are made apart, each as often as its rows exist. ConfigError where heads do not divide the
    width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"heads {heads} must divide width {width}; change one of the two")
        self.heads = heads
        self.query, self.key, self.value, self.out = (linear(width, width, bias=False) for _ in range(4))
        self.attended, self.fed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.wide = linear(width, FEED_FORWARD * width)
        self.narrow = linear(FEED_FORWARD * width, width)

    def forward(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Rows [..., R, D] that read rows of `key` and `value` [..., M, D] where `mask` [..., M] is true; leading
        dimensions broadcast. `query`: `self.query` of x."""
        weights = self.weights(query, key, mask)
        mixed = (weights @ self._by_head(value)).transpose(-2, -3).flatten(-2)
        attended = self.attended(x + self.out(mixed))
        return self.fed(attended + self.narrow(torch.relu(self.wide(attended))))

    def weights(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """What each row reads [..., heads, R, M]; nothing where all is masked."""
        by_head = self._by_head(query)
        scores = by_head @ self._by_head(key).transpose(-1, -2) * by_head.shape[-1] ** -0.5
        return scores.softmax(-1) if mask is None else masked_softmax(scores, mask[..., None, None, :])

    def _by_head(self, x: Tensor) -> Tensor:
        """[..., R, D] -> [..., heads, R, D / heads]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)


class FieldRows(nn.Module):
    """Fields of an item as rows, each projected to one width by a matrix of its own."""

    def __init__(self, widths: list[int], width: int) -> None:
        super().__init__()
        self.widths = widths
        self.projections = nn.ModuleList(linear(own, width, bias=False) for own in widths)

    def forward(self, flat: Tensor) -> Tensor:
        """The fields side by side [..., sum of widths] -> [..., m, width]."""
        fields = flat.split(self.widths, -1)
        return torch.stack([project(field) for project, field in zip(self.projections, fields, strict=True)], -2)

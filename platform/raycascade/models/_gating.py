"""Several gated logits beside a primary one (multi-logit parameterised gating; Hong et al. 2025, arXiv 2511.21095)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from raycascade.models._layers import MLP, SplitLinear, linear


class GatedLogits(nn.Module):
    """sum_k a_kt MLP_k(g_k * h_k) with g_k = 2 sigmoid(B_k SiLU(A s) + c_k) and s = [LN(u); LN(v); LN(u * v);
    LN(h_1); ...], in which the towers' vectors get no gradient.

    Gates start at 1. With `rank` 0 there is no A: g_k = 2 sigmoid(B_k s + c_k). What u says of A s is computed once a
    request. `gated` false: g_k = 1. Several tasks have user vectors of their own, which stand side by side in u.
    """

    def __init__(
        self, names: tuple[str, ...], *, user_width: int, item_width: int, width: int, num_tasks: int, rank: int,
        hidden: tuple[int, ...], start: float, gated: bool,
    ) -> None:
        super().__init__()
        self.names, self.width = names, width
        self.heads = nn.ModuleDict({name: MLP(width, hidden, num_tasks) for name in names})
        self.shares = nn.Parameter(torch.full((len(names), num_tasks), start))
        self.squeeze = self.gates = None
        if gated:
            self.user_norm, self.item_norm = nn.LayerNorm(user_width), nn.LayerNorm(item_width)
            self.product_norm = nn.LayerNorm(user_width)
            self.norms = nn.ModuleDict({name: nn.LayerNorm(width) for name in names})
            out, beside = len(names) * width, item_width + user_width + len(names) * width
            self.squeeze = SplitLinear(user_width, beside, rank or out, bias=not rank)
            self.gates = linear(rank, out) if rank else None
            self._open_gates()

    def _open_gates(self) -> None:
        last = self.gates or self.squeeze
        if isinstance(last, SplitLinear):
            last.silence()
        elif last is not None:
            nn.init.zeros_(last.weight)

    def silence(self) -> None:
        """Every logit starts at 0."""
        for head in self.heads.values():
            head.silence()  # type: ignore[operator]

    def of_request(self, users_QTD: Tensor) -> Tensor | None:
        """What the user's vectors say of all gates [Q, rank]; None without gates."""
        if self.squeeze is None:
            return None
        return self.squeeze.of_request(self.user_norm(users_QTD.detach().flatten(1)))

    def forward(
        self, of_request: Tensor | None, users_QTD: Tensor, items_QCD: Tensor, parts: Mapping[str, Tensor]
    ) -> Tensor:
        """Logits [Q, C, T] to add to the primary ones, from the vectors h_k [Q, C, width] by name (a second dimension
        of 1 broadcasts)."""
        total = items_QCD.new_zeros(*items_QCD.shape[:2], self.shares.shape[1])
        gates = self.gates_of(of_request, users_QTD, items_QCD, parts)
        for k, name in enumerate(self.names):
            h_QCH = parts[name] if gates is None else parts[name] * gates[:, :, k]
            total = total + self.shares[k] * self.heads[name](h_QCH)
        return total

    def gates_of(
        self, of_request: Tensor | None, users_QTD: Tensor, items_QCD: Tensor, parts: Mapping[str, Tensor]
    ) -> Tensor | None:
        """g [Q, C, K, width], between 0 and 2."""
        if self.squeeze is None:
            return None
        assert of_request is not None
        users_QTD, items_QCD = users_QTD.detach(), items_QCD.detach()
        products_QCF = (users_QTD[:, None] * items_QCD[:, :, None]).flatten(2)
        blocks = [self.item_norm(items_QCD), self.product_norm(products_QCF)]
        blocks += [self.norms[name](parts[name]).expand(*items_QCD.shape[:2], -1) for name in self.names]
        squeezed = self.squeeze(of_request, torch.cat(blocks, -1))
        if self.gates is not None:
            squeezed = self.gates(nn.functional.silu(squeezed))
        return 2 * torch.sigmoid(squeezed.unflatten(-1, (len(self.names), self.width)))

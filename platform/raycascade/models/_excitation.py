"""A gate for every entry from all entries (squeeze and excitation), split into a request and a candidate half."""

from typing import Literal

import torch
from torch import Tensor, nn

from raycascade.models._layers import SplitLinear, linear


class Excitation(nn.Module):
    """A = f(W_2 ReLU(W_1 z)) in R^n for z = [request; candidate] in R^n, without biases; f is ReLU or the sigmoid.

    A ReLU gate whose weights are all negative would be shut for good, so those of W_2 start positive; those of W_1 do
    where z is `never_negative`.
    """

    def __init__(
        self, num_request: int, num_candidate: int, *, reduction: int, activation: Literal["relu", "sigmoid"] = "relu",
        never_negative: bool = False,
    ) -> None:
        super().__init__()
        self.sizes = [num_request, num_candidate]
        hidden = max(1, sum(self.sizes) // reduction)
        self.first = SplitLinear(num_request, num_candidate, hidden, bias=False)
        self.second = linear(hidden, sum(self.sizes), bias=False)
        self.activation = activation
        halves = (self.first.request, self.first.candidate) if never_negative else ()
        opened = (*halves, self.second) if activation == "relu" else halves
        with torch.no_grad():
            for layer in opened:
                if layer is not None:
                    layer.weight.abs_()

    def of_request(self, z_QN: Tensor) -> Tensor:
        """The request's share of the first map [Q, hidden]."""
        return self.first.of_request(z_QN)

    def forward(self, request_QH: Tensor, z_QCN: Tensor) -> Tensor:
        """Gates [Q, C, n] of the request's entries and then the candidate's, given `of_request`."""
        gates = self.second(torch.relu(self.first(request_QH, z_QCN)))
        return torch.relu(gates) if self.activation == "relu" else torch.sigmoid(gates)

    def share_of_zeros(self, gates_QCN: Tensor) -> Tensor:
        """Share of entries that a gate shuts [Q, C]: ReLU gates can die."""
        return (gates_QCN == 0).to(gates_QCN.dtype).mean(-1)

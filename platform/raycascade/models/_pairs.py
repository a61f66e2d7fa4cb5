"""Pairs of fields in three blocks: UU (both of the request), UC and CC (both of the candidate).

What is made of UU pairs alone is computed once a request. Pairs come in the order (0, 1), (0, 2), ..., (1, 2), ...,
fields of the request first; a block keeps that order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raycascade.models._layers import SplitLinear


class FieldPairs(nn.Module):
    """Element-wise products of pairs (i, j), i < j, of m_u fields of the request and m_c of the candidate.

    `left` and `right` are stacks [..., fields, k] of what stands for a field on either side of a product.
    """

    uu_left: Tensor
    uu_right: Tensor
    cc_left: Tensor
    cc_right: Tensor
    in_blocks: Tensor

    def __init__(self, num_request: int, num_candidate: int) -> None:
        super().__init__()
        self.num_request, self.num_candidate = num_request, num_candidate
        for block, num_fields in (("uu", num_request), ("cc", num_candidate)):
            left, right = torch.triu_indices(num_fields, num_fields, 1)
            self.register_buffer(f"{block}_left", left, persistent=False)
            self.register_buffer(f"{block}_right", right, persistent=False)
        left, right = torch.triu_indices(num_request + num_candidate, num_request + num_candidate, 1)
        block = (right >= num_request).long() + (left >= num_request).long()
        self.register_buffer("in_blocks", block.argsort(stable=True), persistent=False)  # pair of each place in blocks
        self.num_uu, self.num_uc, self.num_cc = len(self.uu_left), num_request * num_candidate, len(self.cc_left)

    @property
    def num_pairs(self) -> int:
        """P = m (m - 1) / 2."""
        return self.num_uu + self.num_uc + self.num_cc

    def uu(self, left: Tensor, right: Tensor) -> Tensor:
        """Products [..., P_uu, k] of stacks [..., m_u, k]."""
        return left.index_select(-2, self.uu_left) * right.index_select(-2, self.uu_right)

    def uc(self, left: Tensor, right: Tensor) -> Tensor:
        """Products [..., P_uc, k] of [..., m_u, k] with [..., m_c, k]; leading axes broadcast."""
        return (left.unsqueeze(-2) * right.unsqueeze(-3)).flatten(-3, -2)

    def cc(self, left: Tensor, right: Tensor) -> Tensor:
        """Products [..., P_cc, k] of stacks [..., m_c, k]."""
        return left.index_select(-2, self.cc_left) * right.index_select(-2, self.cc_right)

    def in_order(self, blocks: Tensor) -> Tensor:
        """[UU, UC, CC] side by side [..., P], put into the order of pairs."""
        return blocks.index_select(-1, self.in_blocks.argsort())


def rescaled(products_QPK: Tensor, scale_QCP: Tensor, weight_HD: Tensor) -> Tensor:
    """W [s_1 h_1; ...; s_P h_P] [Q, C, H] of the request's vectors h and the candidates' scales s.

    Multiplied in the order with the smaller intermediate: for long lists W h is made once a request.
    """
    _, num_pairs, width = products_QPK.shape
    if scale_QCP.shape[1] * width <= len(weight_HD):
        return nn.functional.linear((scale_QCP[..., None] * products_QPK[:, None]).flatten(-2), weight_HD)
    mapped_QPH = torch.einsum("qpk,hpk->qph", products_QPK, weight_HD.view(len(weight_HD), num_pairs, width))
    return scale_QCP @ mapped_QPH


def split_with_rescaled(
    layer: SplitLinear, request_QH: Tensor, products_QPK: Tensor, scale_QCP: Tensor, rest: Sequence[Tensor]
) -> Tensor:
    """The split map [Q, C, H] of a candidate's [s_1 h_1; ...; s_P h_P; rest], given its `of_request`.

    `rest` are stacks [Q, C, P', k], which are mapped one by one: side by side they would be copied first.
    """
    assert layer.candidate is not None
    blocks = [block.flatten(-2) for block in rest]
    widths = [products_QPK.shape[1] * products_QPK.shape[2], *(block.shape[-1] for block in blocks)]
    own_HD, *weights = layer.candidate.weight.split(widths, 1)
    y_QCH = rescaled(products_QPK, scale_QCP, own_HD) + request_QH[:, None]
    for block_QCD, weight_HD in zip(blocks, weights, strict=True):
        y_QCH = y_QCH + nn.functional.linear(block_QCD, weight_HD)
    return y_QCH

"""Field-aware vectors: a field has one vector for each other field, its partner."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.models._inputs import InputOptions
from raycascade.models._stacks import FieldStacks, count_fields
from raycascade.schema import FeatureSpace

ProductName = Literal["hadamard", "inner"]


class FieldAwarePairs(nn.Module):
    """V[i, j] * V[j, i] of every pair of fields i < j, in blocks UU, UC and CC.

    Field i owns m - 1 vectors V[i, j], j != i, in a table (m - 1) k wide: its cells, `slots[i, j]` says which. Fields
    of one vocabulary share its table; their cells for partners of other vocabularies are the same ones. Cells of the
    request come before the candidate's, field after field. ConfigError with fewer than two fields.
    """

    order: Tensor
    uu_left: Tensor
    uu_right: Tensor
    uc_left: Tensor

    def __init__(self, options: InputOptions, space: FeatureSpace, *, model: str, product: ProductName) -> None:
        super().__init__()
        (num_request, num_candidate), self.product, self.dim = count_fields(space), product, options.dim
        num_fields = num_request + num_candidate
        self.num_partners = max(1, num_fields - 1)
        self.inputs = FieldStacks(options.model_copy(update={"dim": self.num_partners * options.dim}), space,
                                  model=model, least=2)
        events = (*self.inputs.history_fields, *self.inputs.event_fields)
        fields = (*self.inputs.request_fields, *events, *self.inputs.candidate_fields)
        self.slots = partner_slots([f.table or f.name for f in fields])
        left, right = torch.triu_indices(num_fields, num_fields, 1)
        cells = torch.stack([left * self.num_partners + self.slots[left, right],
                             right * self.num_partners + self.slots[right, left]])
        self.num_cells = (num_request * self.num_partners, num_candidate * self.num_partners)
        of_request, of_candidate = right < num_request, left >= num_request
        mixed = ~of_request & ~of_candidate
        cells_uc, cells_cc = cells[:, mixed], cells[:, of_candidate] - self.num_cells[0]
        self.sizes = [cells_uc.shape[1], cells_cc.shape[1], cells_cc.shape[1]]
        self.num_uu = int(of_request.sum())
        buffers = {"uu_left": cells[0, of_request], "uu_right": cells[1, of_request], "uc_left": cells_uc[0],
                   "order": torch.cat([cells_uc[1] - self.num_cells[0], cells_cc[0], cells_cc[1]])}
        for name, cell in buffers.items():
            self.register_buffer(name, cell, persistent=False)

    @property
    def width(self) -> int:
        """What a pair gives: k numbers for `hadamard`, one for `inner`."""
        return self.dim if self.product == "hadamard" else 1

    @property
    def num_rest(self) -> int:
        """Pairs with a field of the candidate."""
        return self.sizes[0] + self.sizes[1]

    def cells_of_request(self, batch: Batch) -> Tensor:
        """[Q, m_u (m - 1), k]."""
        return self.inputs.of_request(batch).view(batch.num_requests, self.num_cells[0], self.dim)

    def cells_of_candidates(self, batch: Batch) -> Tensor:
        """[Q, C, m_c (m - 1), k]."""
        return self.inputs.of_candidates(batch).view(*batch.mask_QC.shape, self.num_cells[1], self.dim)

    def of_request(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Products of the request's pairs [..., P_uu, width], and its cells for fields of candidates [..., P_uc, k].

        A last axis of width 1 is a scale of the cells, whatever the width of a product."""
        products = self._product(cells.index_select(-2, self.uu_left), cells.index_select(-2, self.uu_right))
        return products, cells.index_select(-2, self.uc_left)

    def of_candidates(self, left_uc: Tensor, cells_QCNK: Tensor) -> Tensor:
        """Products of the pairs with a field of the candidate [Q, C, P_uc + P_cc, width]; `left_uc` broadcasts."""
        right_uc, left_cc, right_cc = cells_QCNK.index_select(-2, self.order).split(self.sizes, -2)
        return torch.cat([self._product(left_uc, right_uc), self._product(left_cc, right_cc)], -2)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        return left * right if self.product == "hadamard" else (left * right).sum(-1, keepdim=True)


def partner_slots(vocabularies: Sequence[str]) -> Tensor:
    """slots[i, j] in 0..m-2: which of the m - 1 vectors of field i is meant for field j [m, m]; -1 on the diagonal.

    Partners of other vocabularies come first, in order, so that they have the same place in every field of a
    vocabulary; then those of the own one, from the field on and around.
    """
    num_fields = len(vocabularies)
    slots = torch.full((num_fields, num_fields), -1)
    for i, own in enumerate(vocabularies):
        others = [j for j, vocabulary in enumerate(vocabularies) if vocabulary != own]
        siblings = [j for j, vocabulary in enumerate(vocabularies) if vocabulary == own]
        at = siblings.index(i)
        partners = [*others, *siblings[at + 1:], *siblings[:at]]
        slots[i, partners] = torch.arange(num_fields - 1)
    return slots

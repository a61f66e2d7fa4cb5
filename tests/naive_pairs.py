"""All fields of every candidate in one stack, and loops over their pairs: what models with pairs are compared with."""

from itertools import combinations

import torch
from torch import Tensor

from raycascade.batch import Batch
from raycascade.models._stacks import FieldStacks


def whole_stack(inputs: FieldStacks, batch: Batch) -> Tensor:
    """The request's fields repeated for every candidate, and the candidate's [Q, C, m, k]."""
    of_request = inputs.of_request(batch)[:, None].expand(-1, batch.mask_QC.shape[1], -1, -1)
    return torch.cat([of_request, inputs.of_candidates(batch)], -2)


def pairs_of(num_fields: int) -> list[tuple[int, int]]:
    """(0, 1), (0, 2), ..., (1, 2), ..."""
    return list(combinations(range(num_fields), 2))


def block_order(num_request: int, num_candidate: int) -> list[int]:
    """Positions of the pairs in blocks: both of the request, then one of each side, then both of the candidate."""
    pairs = pairs_of(num_request + num_candidate)
    of_candidate = [(i >= num_request) + (j >= num_request) for i, j in pairs]
    return [p for block in range(3) for p in range(len(pairs)) if of_candidate[p] == block]

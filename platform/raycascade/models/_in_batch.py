"""A batch's positives held against one another, corrected for how often each item is a positive."""

import torch
from torch import Tensor, nn


def in_batch_softmax(scores_PP: Tensor, shares_P: Tensor, hidden_PP: Tensor) -> Tensor:
    """-mean_i ln softmax_j(s_ij - ln p_j)[i] over P positives (Yi et al. 2019, equations 2 and 4); 0 without any.

    s_ij: score of positive j for the request of positive i; p_j: the item's share of all positives. Of row i the
    entries `hidden` are left out: the same item again, and the request's other positives.
    """
    corrected_PP = (scores_PP - shares_P.log()).masked_fill(hidden_PP, -torch.inf)
    own_P = torch.arange(len(scores_PP), device=scores_PP.device)
    return nn.functional.cross_entropy(corrected_PP, own_P, reduction="sum") / max(1, len(scores_PP))


def hidden_among_positives(rows_P: Tensor, requests_P: Tensor) -> Tensor:
    """[P, P] bool: another positive of the same item or of the same request."""
    same_PP = (rows_P[:, None] == rows_P) | (requests_P[:, None] == requests_P)
    return same_PP.fill_diagonal_(False)

"""Differentiable sorting and top-k: the soft rank of every candidate of a list, and the chance to be among the best q.

Operators: `neuralsort` (Grover, Wang, Zweig and Ermon, ICLR 2019), `softsort` (Prillo and Eisenschlos, ICML 2020) and
`dftopk` (Zhu et al., arXiv 2510.11472), each for lists of their own length N: padding has no part in anything, and
where q >= N everybody is in, as a constant. Probabilities are invariant to a shift of a request's scores.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from raycascade.losses._chunks import in_chunks
from raycascade.losses._neural_sort import LOG_ZERO, neural_row_sums, neural_sort, rows

Operator = Literal["neuralsort", "softsort", "dftopk"]
LogForm = Literal["eps", "exact"]
NegativeForm = Literal["complement", "direct"]
EPS = 1e-6
TEMPERATURES: dict[Operator, float] = {"neuralsort": 50.0, "softsort": 1.0, "dftopk": 1.0}
_CLOSEST_TO_ZERO = -1e-7  # the largest logarithm below 0 that float32 tells from 0 after expm1


# ---------------------------------------------------------------- the operators
def soft_sort(scores_QC: Tensor, mask_QC: Tensor, *, temperature: float) -> Tensor:
    """Row logits [Q, C ranks, C items] of SoftSort: -|s_[rank] - s_j| / temperature, LOG_ZERO on padding. The sorted
    values carry gradient."""
    sorted_QC = torch.where(mask_QC, scores_QC, LOG_ZERO).sort(dim=1, descending=True).values
    sorted_QC = torch.where(rows(mask_QC), sorted_QC, 0.0)
    logits_QCC = -(sorted_QC[:, :, None] - scores_QC[:, None, :]).abs() / temperature
    return torch.where(mask_QC[:, None, :], logits_QCC, LOG_ZERO)


def df_topk(scores_QC: Tensor, mask_QC: Tensor, q: int, *, temperature: float) -> Tensor:
    """Logits [Q, C] of being among the best q: (s_j - (s_[q] + s_[q+1]) / 2) / temperature; 0 on padding and where
    N <= q. The threshold carries gradient."""
    if q >= scores_QC.shape[1]:
        return 0.0 * scores_QC
    best_Qq = torch.where(mask_QC, scores_QC, LOG_ZERO).topk(q + 1, dim=1).values
    binding_Q1 = mask_QC.sum(dim=1, keepdim=True) > q
    threshold_Q1 = torch.where(binding_Q1, (best_Qq[:, q - 1 : q] + best_Qq[:, q:]) / 2, 0.0)
    return torch.where(mask_QC & binding_Q1, (scores_QC - threshold_Q1) / temperature, 0.0)


def _row_logits(scores_QC: Tensor, mask_QC: Tensor, operator: Operator, temperature: float) -> tuple[Tensor, Tensor]:
    assert operator != "dftopk", "dftopk has no permutation matrix"
    sort = neural_sort if operator == "neuralsort" else soft_sort
    scores_QC = torch.where(mask_QC, scores_QC, 0.0)
    logits_QCC = sort(scores_QC, mask_QC, temperature=temperature)
    return logits_QCC, rows(mask_QC)[:, :, None] & mask_QC[:, None, :]


def soft_permutation(scores_QC: Tensor, mask_QC: Tensor, operator: Operator, temperature: float) -> Tensor:
    """P [Q, C ranks, C items] of neuralsort or softsort. Rows of ranks <= N sum to 1; other rows and padding are 0."""
    logits_QCC, real_QCC = _row_logits(scores_QC, mask_QC, operator, temperature)
    return torch.where(real_QCC, logits_QCC.softmax(dim=2), 0.0)


def log_permutation(scores_QC: Tensor, mask_QC: Tensor, operator: Operator, temperature: float) -> Tensor:
    """ln P without underflow, LOG_ZERO at ranks beyond N and on padding."""
    logits_QCC, real_QCC = _row_logits(scores_QC, mask_QC, operator, temperature)
    return torch.where(real_QCC, logits_QCC.log_softmax(dim=2), LOG_ZERO)


def row_sums(
    scores_QC: Tensor, mask_QC: Tensor, *, widths: tuple[int, ...], operator: Operator, temperature: float
) -> Tensor:
    """[Q, 2 w, C]: for each of w rising widths q the sums of P over the first q ranks and over the others."""
    if operator == "neuralsort":
        return neural_row_sums(scores_QC, mask_QC, widths=widths, temperature=temperature)
    matrix_QCC = soft_permutation(scores_QC, mask_QC, operator, temperature)
    return torch.stack([part.sum(dim=1) for q in widths for part in (matrix_QCC[:, :q], matrix_QCC[:, q:])], dim=1)


def row_log_sums(
    scores_QC: Tensor, mask_QC: Tensor, *, widths: tuple[int, ...], operator: Operator, temperature: float
) -> Tensor:
    """The logarithms of `row_sums` without underflow; LOG_ZERO or less over no ranks at all."""
    matrix_QCC = log_permutation(scores_QC, mask_QC, operator, temperature)
    nothing_QC = torch.full_like(scores_QC, LOG_ZERO)
    parts = [part for q in widths for part in (matrix_QCC[:, :q], matrix_QCC[:, q:])]
    return torch.stack([part.logsumexp(dim=1) if part.shape[1] else nothing_QC for part in parts], dim=1)


# ---------------------------------------------------------------- the chance to be among the best q
@dataclass(frozen=True)
class TopProbability:
    """p, the chance to be among the best q, and rest, the chance not to be, with their logarithms; [Q, C].

    `exact_pair`: the two logarithms come from one logit, so that each is the exact complement of the other.
    """

    p_QC: Tensor
    rest_QC: Tensor
    log_p_QC: Tensor
    log_rest_QC: Tensor
    binding_Q1: Tensor
    exact_pair: bool

    def survival(self, negative_form: NegativeForm) -> Tensor:
        """r, the chance to survive as negatives see it: 1 - rest (complement) or p itself (direct)."""
        return 1.0 - self.rest_QC if negative_form == "complement" else self.p_QC

    def log_survival(self, negative_form: NegativeForm) -> tuple[Tensor, Tensor]:
        """(ln r, ln(1 - r)); the gradient runs through the ranks beyond q (complement) or up to q (direct)."""
        if self.exact_pair:
            return self.log_p_QC, self.log_rest_QC
        if negative_form == "complement":
            return _log_one_minus_exp(self.log_rest_QC), self.log_rest_QC
        return self.log_p_QC, torch.where(self.binding_Q1, _log_one_minus_exp(self.log_p_QC), LOG_ZERO)


def _log_one_minus_exp(log_x: Tensor) -> Tensor:
    return torch.log(-torch.expm1(log_x.clamp(max=_CLOSEST_TO_ZERO)))


class SoftRanking:
    """The soft ranking of one stage's lists: the chance to be among the best q, for one or several widths q.

    `log_form`: eps is ln(x + eps), which caps a term at -ln eps and ends its gradient there; exact works on logarithms
    throughout, and is always used for dftopk. `temperature` None takes the operator's own. `chunk_requests`: how many
    requests have their C x C matrices in memory at once (_chunks.py).
    """

    def __init__(
        self, scores_QC: Tensor, mask_QC: Tensor, *, operator: Operator, temperature: float | None = None,
        log_form: LogForm = "eps", eps: float = EPS, chunk_requests: int | None = None,
    ) -> None:
        self.temperature = TEMPERATURES[operator] if temperature is None else temperature
        self.operator: Operator = operator
        self.eps, self.chunk_requests = eps, chunk_requests
        self.log_form: LogForm = "exact" if operator == "dftopk" else log_form
        self.mask_QC, self.scores_QC = mask_QC, torch.where(mask_QC, scores_QC, 0.0)

    def top(self, q: int) -> TopProbability:
        """Probabilities of the best q. On padding p and rest are 0; where N <= q, p is 1 and rest 0 as constants."""
        return self.tops((q,))[q]

    def tops(self, widths: Iterable[int]) -> dict[int, TopProbability]:
        """The same for several widths at the price of one: the matrix is made once."""
        widths = sorted(set(widths))
        if self.operator == "dftopk":
            return {q: self._from_logit(q) for q in widths}
        sums = row_log_sums if self.log_form == "exact" else row_sums
        compute = partial(sums, widths=tuple(widths), operator=self.operator, temperature=self.temperature)
        sums_Q2wC = in_chunks(compute, self.scores_QC, self.mask_QC, requests=self.chunk_requests)
        form = self._from_log_sums if self.log_form == "exact" else self._from_sums
        return {q: form(sums_Q2wC[:, 2 * i], sums_Q2wC[:, 2 * i + 1], q) for i, q in enumerate(widths)}

    def _binding(self, q: int) -> Tensor:
        return self.mask_QC.sum(dim=1, keepdim=True) > q

    def _from_logit(self, q: int) -> TopProbability:
        logit_QC = df_topk(self.scores_QC, self.mask_QC, q, temperature=self.temperature)
        return self._from_logs(torch.nn.functional.logsigmoid(logit_QC), torch.nn.functional.logsigmoid(-logit_QC), q)

    def _from_log_sums(self, inside_QC: Tensor, outside_QC: Tensor, q: int) -> TopProbability:
        all_QC = torch.logaddexp(inside_QC, outside_QC).detach()
        return self._from_logs(inside_QC - all_QC, outside_QC - all_QC, q)

    def _from_sums(self, inside_QC: Tensor, outside_QC: Tensor, q: int) -> TopProbability:
        binding_Q1 = self._binding(q)
        # the column sum must not carry gradient: it normalises, it is not part of the objective (LCRON, eq. 10)
        column_QC = (inside_QC + outside_QC).detach() + self.eps
        p_QC = torch.where(binding_Q1, inside_QC / column_QC, self.mask_QC.to(column_QC.dtype))
        rest_QC = torch.where(binding_Q1, outside_QC / column_QC, 0.0)
        return TopProbability(p_QC, rest_QC, torch.log(p_QC + self.eps), torch.log(rest_QC + self.eps), binding_Q1,
                              exact_pair=False)

    def _from_logs(self, inside_QC: Tensor, outside_QC: Tensor, q: int) -> TopProbability:
        binding_Q1 = self._binding(q)
        known_QC = self.mask_QC & binding_Q1
        log_p_QC = torch.where(known_QC, inside_QC, 0.0)
        log_rest_QC = torch.where(known_QC, outside_QC, LOG_ZERO)
        return TopProbability(torch.where(self.mask_QC, log_p_QC.exp(), 0.0), log_rest_QC.exp(), log_p_QC, log_rest_QC,
                              binding_Q1, exact_pair=self.operator == "dftopk")


def topk_probability(
    scores_QC: Tensor, mask_QC: Tensor, q: int, operator: Operator, temperature: float
) -> tuple[Tensor, Tensor]:
    """(p, rest) [Q, C] of the best q for any operator; p + rest is S / (S + eps), for dftopk 1."""
    top = SoftRanking(scores_QC, mask_QC, operator=operator, temperature=temperature).top(q)
    return top.p_QC, top.rest_QC

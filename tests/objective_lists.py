"""Scored lists with known losses and metrics, shared by the tests of losses, operators and metrics, and how to run a
loss on one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from raycascade import plugins
from raycascade.batch import Targets
from raycascade.losses import LossOutput

STAGES = ("retriever", "pre_ranker", "ranker", "re_ranker", "last")


@dataclass(frozen=True)
class ListCase:
    """Scores [Q, C] per stage in cascade order and what is known of the candidates; float64 unless said."""

    scores: dict[str, Tensor]
    targets: Targets
    entry_levels: tuple[int, ...]

    @property
    def stage_names(self) -> tuple[str, ...]:
        return tuple(self.scores)

    def leaves(self, dtype: torch.dtype = torch.float64, *, scale: float = 1.0) -> dict[str, Tensor]:
        """Copies of the scores that ask for a gradient."""
        return {name: (scale * s).to(dtype).detach().requires_grad_() for name, s in self.scores.items()}

    def with_scores(self, scores: dict[str, Tensor]) -> "ListCase":
        return replace(self, scores=scores)

    def take(self, columns: Sequence[int] | Tensor) -> "ListCase":
        """The same lists with their columns chosen or permuted."""
        at = torch.as_tensor(columns)
        return self._mapped(lambda x: x[:, at])

    def requests(self, rows: Sequence[int]) -> "ListCase":
        """Some of the requests, in the given order."""
        at = torch.as_tensor(rows)
        return self._mapped(lambda x: x[at])

    def _mapped(self, change) -> "ListCase":
        t = self.targets
        targets = replace(
            t, relevance_QC=change(t.relevance_QC), reached_QC=change(t.reached_QC), mask_QC=change(t.mask_QC),
            labels={name: change(label) for name, label in t.labels.items()},
            log_q_QC=None if t.log_q_QC is None else change(t.log_q_QC),
        )
        return replace(self, scores={name: change(s) for name, s in self.scores.items()}, targets=targets)

    def padded(self, value: float, *, front: int = 1, back: int = 2) -> "ListCase":
        """The same lists with padding before and after: `value` wherever a float stands, and a high level."""
        num_requests = len(self.targets.mask_QC)

        def change(x: Tensor) -> Tensor:
            filler = {torch.bool: False, torch.int64: 3}.get(x.dtype, value)
            return torch.cat([torch.full((num_requests, front), filler, dtype=x.dtype), x,
                              torch.full((num_requests, back), filler, dtype=x.dtype)], dim=1)

        return self._mapped(change)

    def stacked(self, other: "ListCase") -> "ListCase":
        """The requests of both."""
        both = (self, other)
        scores = {name: torch.cat([case.scores[name] for case in both]) for name in self.scores}
        t = [case.targets for case in both]
        targets = replace(
            self.targets, relevance_QC=torch.cat([x.relevance_QC for x in t]),
            reached_QC=torch.cat([x.reached_QC for x in t]), mask_QC=torch.cat([x.mask_QC for x in t]),
            labels={name: torch.cat([x.labels[name] for x in t]) for name in self.targets.labels},
        )
        return replace(self, scores=scores, targets=targets)

    def only(self, num_candidates: int) -> "ListCase":
        """The same lists with all but the first few candidates masked."""
        mask_QC = self.targets.mask_QC.clone()
        mask_QC[:, num_candidates:] = False
        return replace(self, targets=replace(self.targets, mask_QC=mask_QC))


def list_case(
    scores: list[list[float]] | list[Tensor], relevance: Sequence[float], reached: Sequence[int], *,
    keep: tuple[int, ...], k: int, entry: tuple[int, ...] = (), mask: Sequence[int] = (), num_requests: int = 1,
) -> ListCase:
    """Lists that share one relevance; the label `click` is 1 for every other candidate and unobserved for the third."""
    width = len(relevance)
    click = torch.tensor([1.0 - j % 2 if j != 2 else torch.nan for j in range(width)], dtype=torch.float64)
    real = torch.tensor(mask or [1] * width, dtype=torch.bool)

    def rows(values: Tensor) -> Tensor:
        return values.repeat(num_requests, 1)

    names = STAGES[: len(scores)]
    tensors = [s if isinstance(s, Tensor) else torch.tensor([s], dtype=torch.float64) for s in scores]
    targets = Targets(
        relevance_QC=rows(torch.tensor(relevance, dtype=torch.float64)), reached_QC=rows(torch.tensor(reached)),
        mask_QC=rows(real), keep=keep, k=k, labels={"click": rows(click)},
    )
    return ListCase(dict(zip(names, tensors, strict=True)), targets, entry)


CASE_A = list_case(
    [[1.2, -0.9, 0.8, -0.5, 0.1, -1.0], [0.5, 1.5, -0.2, 0.9, -0.7, 0.0]],
    (29, 27, 7, 7, 6, 5), (3, 3, 2, 2, 1, 0), keep=(4, 3), k=2, entry=(0, 2),
)
CASE_B = list_case(
    [[0.4, -0.3, 1.1, -0.8, 0.2, -0.6], [1.0, -1.3, -0.4, 0.3, -1.2, 0.1], [0.2, 0.9, 1.4, -0.5, -0.1, -0.7]],
    (29, 28, 8, 8, 7, 5), (4, 4, 3, 3, 2, 0), keep=(5, 4, 3), k=2, entry=(0, 1, 3),
)
CASE_C = list_case(
    [[0.9, -0.2, 5.0, 0.4, -0.6, 0.1], [0.3, 0.7, -4.0, -0.1, 0.2, -0.5]],
    (9, 4, 99, 4, 4, 1), (3, 2, 3, 2, 2, 0), keep=(4, 3), k=2, entry=(0, 2), mask=(1, 1, 0, 1, 1, 1),
)


def _waves(num_stages: int, width: int) -> list[Tensor]:
    j, q = torch.arange(1, width + 1, dtype=torch.float64), torch.arange(2, dtype=torch.float64)[:, None]
    return [a * torch.sin(w * j + 0.5 * q) for a, w in zip((1, 1.5, 0.8), (1.3, 0.9, 2.1), strict=True)][:num_stages]


def _tens(values: Sequence[int]) -> list[int]:
    return [value for value in values for _ in range(10)]


CASE_P2 = list_case(
    _waves(2, 40), [*range(29, 19, -1), *_tens((7, 6, 5))], _tens((3, 2, 1, 0)),
    keep=(30, 20), k=10, entry=(0, 2), num_requests=2,
)
CASE_P3 = list_case(
    _waves(3, 50), [*range(29, 19, -1), *_tens((8, 7, 6, 5))], _tens((4, 3, 2, 1, 0)),
    keep=(40, 30, 20), k=10, entry=(0, 1, 3), num_requests=2,
)
CASES = {"A": CASE_A, "B": CASE_B, "C": CASE_C, "P2": CASE_P2, "P3": CASE_P3}


def deep_case(num_stages: int) -> ListCase:
    """P2 with five levels and any number of stages: distinct scores, quotas from 30 downwards."""
    j, q = torch.arange(1, 41, dtype=torch.float64), torch.arange(2, dtype=torch.float64)[:, None]
    scores = [(1 + 0.2 * i) * torch.sin((1.3 + 0.7 * i) * j + 0.5 * q + i) for i in range(num_stages)]
    case = CASE_P2.with_scores(dict(zip(STAGES, scores, strict=False)))
    targets = replace(
        case.targets, keep=tuple(30 - 2 * i for i in range(num_stages)),
        relevance_QC=torch.arange(40, 0, -1, dtype=torch.float64).repeat(2, 1),
        reached_QC=(4 - torch.arange(40) // 8).repeat(2, 1),
    )
    return replace(case, targets=targets, entry_levels=tuple(range(num_stages)))


def loss_of(name: str, case: ListCase, **options: Any) -> Any:
    """The loss plug-in for the stages of a case."""
    plugin, config = plugins.options("losses", {"name": name, **options}, "loss")
    return plugin(config, case.stage_names)


def output_of(name: str, case: ListCase, options: dict[str, Any] | None = None) -> LossOutput:
    return loss_of(name, case, **options or {})(case.scores, case.targets)


def parts_of(output: LossOutput, prefix: str) -> list[float]:
    return [value.item() for name, value in output.parts.items() if name.startswith(prefix)]


def gradients_of(name: str, case: ListCase, options: dict[str, Any]) -> list[Tensor]:
    leaves = case.leaves()
    loss_of(name, case, **options)(leaves, case.targets).total.backward()
    return [leaf.grad for leaf in leaves.values() if leaf.grad is not None]

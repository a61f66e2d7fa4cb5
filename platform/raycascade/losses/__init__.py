"""Plug-ins that turn the scores of all stages into one number. Each file is one objective: `loss: {name: lcron}`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from raycascade.batch import Targets


@dataclass(frozen=True)
class LossOutput:
    """`total`: 0-dim with graph, float32 (float64 stays). `parts`: detached 0-dim tensors, "<term>/<stage>" or
    "<term>"."""

    total: Tensor
    parts: Mapping[str, Tensor]


@dataclass(frozen=True)
class SharedNegatives:
    """Catalogue items that every request of a batch holds against its positives, without being on its list.

    `log_q_S`: log of the probability with which each was sampled, None for a whole catalogue.
    """

    scores_QS: Tensor
    mask_QS: Tensor
    log_q_S: Tensor | None = None


class CascadeLoss(Protocol):
    """Scores of every stage (insertion order = cascade order, first = retriever) on the same lists -> one loss."""

    def __call__(self, scores: Mapping[str, Tensor], targets: Targets) -> LossOutput:
        """scores: raw logits [Q, C] per stage, larger = better."""
        ...

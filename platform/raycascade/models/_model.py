"""The contract that torch models share: one code path, split into a request and a candidate half."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from raycascade.batch import Batch


class TorchModel(nn.Module, ABC):
    """Scores candidates in two halves, so that whatever depends on the request alone is computed once a request.

    A subclass lists its per-value scalars (first-order weights) in `first_order`; they train as the group "linear".
    `default_l2_touched`: what a stage's `l2_touched` is where the config says nothing. `linear_rate`: learning rate of
    the group "linear" in multiples of the stage's; None: like the other tables and dense parameters.
    """

    default_l2_touched: float = 0.0
    linear_rate: float | None = None

    def first_order(self) -> tuple[nn.Module, ...]:
        """Modules that hold one weight per value or dense feature; most models have none."""
        return ()

    @property
    def training_needs(self) -> frozenset[str]:
        """What a training batch must bring beyond the log: "history_negatives" (of `Batch`), "item_shares"
        (`Targets.item_shares_QC`)."""
        return frozenset()

    @abstractmethod
    def silence(self) -> None:
        """Zeroes the last linear map, so that every logit starts at its bias: a stage that adds to the score of the
        stage before starts as that stage."""

    @abstractmethod
    def encode_request(self, batch: Batch) -> Any:
        """Everything that depends on the request only: Q (or Q x L) rows, whatever the number of candidates."""

    @abstractmethod
    def score_candidates(self, state: Any, batch: Batch) -> Tensor:
        """Logits [Q, C, T] of the batch's candidates; reads the candidates' side of the batch and nothing else."""

    def forward(self, batch: Batch) -> Tensor:
        """Logits [Q, C, T]; masked candidates get arbitrary finite ones."""
        return self.score_candidates(self.encode_request(batch), batch)

    def train_outputs(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Logits [Q, C, T] and auxiliary losses by name."""
        return self(batch), {}

    def explain(self, batch: Batch) -> Mapping[str, Tensor]:
        """Attention weights and gates by name, normalised (where they are) along the last axis."""
        return {}

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter once: "linear" (first-order) and "embedding" tables have sparse gradients, "dense" the rest.

        Dense parameters of first-order modules are in "linear" too.
        """
        linear = [p for module in self.first_order() for p in module.parameters()]
        tables = [p for m in self.modules() if isinstance(m, nn.Embedding) for p in m.parameters()]
        seen = {id(p) for p in linear}
        embedding = [p for p in tables if id(p) not in seen]
        seen |= {id(p) for p in embedding}
        return {"linear": linear, "embedding": embedding, "dense": [p for p in self.parameters() if id(p) not in seen]}


class RepresentingModel(TorchModel):
    """A model whose logits are a linear map of one vector per candidate, its representation.

    Built with `num_tasks` 0 it has no such map, and gives the vectors [Q, C, representation_width] where it would give
    logits: what a multi-task model reads as its `tower`.
    """

    representation_width: int

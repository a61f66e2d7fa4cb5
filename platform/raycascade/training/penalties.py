"""L2 penalties of embedding tables: of the rows a batch touches (gradients stay sparse), or of whole tables."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.cascade import Cascade
from raycascade.errors import ConfigError

LARGEST_WHOLE_TABLE = 1_000_000  # rows


@dataclass
class TablePenalties:
    """What is added to the gradients of tables before they are clipped.

    touched: lambda / n_j times row j, once for every row j that the batch touches, n_j being how often training looks
    the row up in an epoch: mini-batch aware regularisation (Zhou et al. 2018, equation 6). whole: lambda times the
    table, the gradient of (lambda / 2) |E|^2.
    """

    touched: Mapping[Tensor, float] = field(default_factory=dict)
    whole: Mapping[Tensor, float] = field(default_factory=dict)
    counts: Mapping[Tensor, Tensor] = field(default_factory=dict)  # n_j, at least 1

    @classmethod
    def of(cls, cascade: Cascade) -> "TablePenalties":
        """Those of the stages' `l2_touched` and `l2_embedding`, and of what models take by default. Tables that are
        penalised as a whole get dense gradients, those penalised by row sparse ones; ConfigError for a whole table of
        more than a million rows."""
        touched: dict[Tensor, float] = {}
        whole: dict[Tensor, float] = {}
        for name, model in cascade.models.items():
            stage = cascade.stages[name]
            default = 0.0 if stage.l2_embedding else getattr(model, "default_l2_touched", 0.0)
            of_touched = default if stage.l2_touched is None else stage.l2_touched
            for module in _tables(model):
                if stage.l2_embedding:
                    _refuse_large(len(module.weight), name)
                    module.sparse = False
                    whole[module.weight] = stage.l2_embedding
                elif of_touched:
                    module.sparse = True
                    touched[module.weight] = of_touched
        return cls(touched, whole)

    @property
    def waits_for_counts(self) -> bool:
        """Whether `count` must run before the first step."""
        return bool(self.touched) and not self.counts

    @torch.no_grad()
    def count(self, models: Mapping[str, nn.Module], batches: Iterable[Batch]) -> None:
        """Counts how often the models look up every row of the penalised tables, over the batches of all workers."""
        counts = {table: torch.zeros(len(table), dtype=torch.long, device=table.device) for table in self.touched}
        counted = [model for model in models.values() if any(m.weight in counts for m in _tables(model))]
        hooks = [m.register_forward_pre_hook(_counting(counts[m.weight]))
                 for model in counted for m in _tables(model) if m.weight in counts]
        modes = [model.training for model in counted]
        for model in counted:
            model.eval()
        for batch in batches:
            for model in counted:
                model(batch)
        for model, mode in zip(counted, modes, strict=True):
            model.train(mode)
        for hook in hooks:
            hook.remove()
        if torch.distributed.is_initialized():
            for lookups in counts.values():
                torch.distributed.all_reduce(lookups)
        self.counts = {table: lookups.clamp(min=1) for table, lookups in counts.items()}

    @torch.no_grad()
    def add_to_gradients(self) -> None:
        """Adds the penalties to gradients, of which sparse ones are coalesced and stay so; tables without a gradient
        are left alone."""
        for table, weight in self.touched.items():
            if table.grad is not None:
                rows_R, values_RK = table.grad.indices()[0], table.grad.values()
                shares_R = weight / self.counts[table][rows_R]
                table.grad = torch.sparse_coo_tensor(
                    rows_R[None], values_RK + shares_R[:, None] * table[rows_R], table.shape, check_invariants=False,
                    is_coalesced=True)
        for table, weight in self.whole.items():
            if table.grad is not None:
                table.grad = table.grad.add(table, alpha=weight)


def _tables(model: nn.Module) -> list[nn.Embedding]:
    return [module for module in model.modules() if isinstance(module, nn.Embedding)]


def _counting(lookups_N: Tensor) -> Any:
    """A hook that counts the rows which its module is asked for."""
    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].flatten()
        lookups_N.index_add_(0, rows, torch.ones_like(rows))

    return count


def _refuse_large(num_rows: int, stage: str) -> None:
    if num_rows > LARGEST_WHOLE_TABLE:
        raise ConfigError(f"stage {stage!r}: l2_embedding reads and writes whole tables in every step, and one has "
                          f"{num_rows:,} rows; use l2_touched, which costs the rows of the batch (limit "
                          f"{LARGEST_WHOLE_TABLE:,} rows)")

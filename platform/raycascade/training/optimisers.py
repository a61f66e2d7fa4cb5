"""Optimisers and gradients: sparse rows for embeddings, AdamW for the rest, clipping per stage, means over workers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from raycascade.cascade import Cascade
from raycascade.config import Train
from raycascade.models._model import TorchModel
from raycascade.training.penalties import TablePenalties
from raycascade.training.row_adam import RowAdam, coalesce_gradients, coalesced


class Optimisers:
    """One sparse and one dense optimiser over all stages and the loss's own parameters.

    RowAdam touches only the rows of the batch, so that the size of a table does not change the time of a step. Tables,
    and weights per value and number (the group "linear" of a model), have no weight decay. `penalties` that wait for
    counts must have counted before the first step.
    """

    def __init__(
        self, cascade: Cascade, objective: nn.Module, train: Train, *, penalties: TablePenalties | None = None
    ) -> None:
        own = {name: list(model.parameters()) for name, model in cascade.models.items()}
        for name, scale in cascade.prior_scales.items():
            own[name].append(scale)
        self.stages = {name: [p for p in parameters if p.requires_grad] for name, parameters in own.items()}
        in_tables = {id(m.weight) for m in cascade.modules() if isinstance(m, nn.Embedding) and m.sparse}
        extra = [p for p in objective.parameters() if p.requires_grad]
        sparse = {name: [p for p in parameters if id(p) in in_tables] for name, parameters in self.stages.items()}
        dense = {name: [p for p in parameters if id(p) not in in_tables] for name, parameters in self.stages.items()}
        self.tables: list[nn.Parameter] = [p for parameters in sparse.values() for p in parameters]
        self.dense: list[nn.Parameter] = [*(p for parameters in dense.values() for p in parameters), *extra]
        self.clip, self.penalties = train.clip, penalties or TablePenalties()
        options = _options(cascade, train)
        tables = [group for name, ps in sparse.items() for group in _grouped(name, ps, options)]
        groups = [group for name, ps in dense.items() for group in _grouped(name, ps, options)]
        groups += [{"params": extra, "stage": "", "weight_decay": 0.0}] if extra else []
        self._all: list[torch.optim.Optimizer] = []
        if tables:
            self._all.append(RowAdam(tables, lr=train.lr, betas=(train.table_momentum, 0.999)))
        if groups:
            self._all.append(torch.optim.AdamW(groups, lr=train.lr))
        self._rates = [[group["lr"] for group in optimiser.param_groups] for optimiser in self._all]

    def zero(self) -> None:
        """Forgets the gradients."""
        for parameter in (*self.tables, *self.dense):
            parameter.grad = None

    def step(self, *, lr_scales: Mapping[str, float] | None = None) -> None:
        """Averages over workers, clips each stage, updates with the config's learning rates times the stage's scale."""
        average_gradients(self.tables, self.dense)
        coalesce_gradients(self.tables)
        self.penalties.add_to_gradients()
        if self.clip is not None:
            for parameters in self.stages.values():
                clip_norm(parameters, self.clip)
        for optimiser, rates in zip(self._all, self._rates, strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * (lr_scales or {}).get(group["stage"], 1.0)
            optimiser.step()

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Tensors and plain numbers of both optimisers, by flat name."""
        tensors, numbers = {}, {}
        for i, optimiser in enumerate(self._all):
            for parameter, entries in optimiser.state_dict()["state"].items():
                for key, value in entries.items():
                    name = f"{i}.{parameter}.{key}"
                    if isinstance(value, Tensor):
                        tensors[name] = value.contiguous()
                    else:
                        numbers[name] = value
        return tensors, numbers

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """The inverse of `state`."""
        for i, optimiser in enumerate(self._all):
            state: dict[int, dict[str, object]] = {}
            for name, value in {**tensors, **numbers}.items():
                owner, parameter, key = name.split(".", 2)
                if int(owner) == i:
                    state.setdefault(int(parameter), {})[key] = value
            optimiser.load_state_dict({**optimiser.state_dict(), "state": state})


def _options(cascade: Cascade, train: Train) -> dict[int, tuple[float, float]]:
    """(learning rate, weight decay) of every parameter of the stages, by its id."""
    chosen = {id(p): (train.lr, train.weight_decay) for p in cascade.parameters()}
    tables = [m.weight for m in cascade.modules() if isinstance(m, nn.Embedding)]
    chosen |= {id(table): (train.embedding_lr or train.lr, 0.0) for table in tables}
    for model in cascade.models.values():
        if isinstance(model, TorchModel):
            for p in model.param_groups()["linear"]:
                rate = chosen[id(p)][0] if model.linear_rate is None else model.linear_rate * train.lr
                chosen[id(p)] = (rate, 0.0)
    return chosen


def _grouped(
    stage: str, parameters: Sequence[nn.Parameter], options: Mapping[int, tuple[float, float]]
) -> list[dict[str, Any]]:
    """Groups of a stage's parameters with one rate and one weight decay each."""
    kinds = dict.fromkeys(options[id(p)] for p in parameters)
    return [{"params": [p for p in parameters if options[id(p)] == (rate, decay)], "stage": stage, "lr": rate,
             "weight_decay": decay} for rate, decay in kinds]


def clip_norm(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scales the gradients of one stage, coalesced sparse ones included, to a total L2 norm of at most `limit`."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    values = [g.values() if g.is_sparse else g for g in gradients]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(v) for v in values]))
    scale = torch.clamp(limit / (norm + 1e-6), max=1.0)
    if scale < 1.0:
        for value in values:
            value.mul_(scale)


def average_gradients(tables: Sequence[Tensor], dense: Sequence[Tensor]) -> None:
    """Means over all workers; nothing for one. Dense gradients travel as one flat tensor, tables as their touched rows.

    A parameter that got no gradient on a worker counts as zero there.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    world = torch.distributed.get_world_size()
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in dense])
    torch.distributed.all_reduce(flat)
    flat /= world
    for parameter, part in zip(dense, flat.split([p.numel() for p in dense]), strict=True):
        parameter.grad = part.view_as(parameter)
    for table in tables:
        table.grad = _gathered(table, world)


def _gathered(parameter: Tensor, world: int) -> Tensor:
    """Every worker's touched rows of a table, added up and divided by the number of workers."""
    if parameter.grad is None:
        rows = torch.zeros(0, dtype=torch.long, device=parameter.device)
        values = parameter.new_zeros(0, *parameter.shape[1:])
    else:
        gradient = coalesced(parameter.grad)
        rows, values = gradient.indices()[0], gradient.values()
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world)]
    torch.distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    most = int(max(counts))
    padded_rows = torch.cat([rows, rows.new_zeros(most - len(rows))])
    padded_values = torch.cat([values, values.new_zeros(most - len(values), *values.shape[1:])])
    all_rows = [torch.empty_like(padded_rows) for _ in range(world)]
    all_values = [torch.empty_like(padded_values) for _ in range(world)]
    torch.distributed.all_gather(all_rows, padded_rows)
    torch.distributed.all_gather(all_values, padded_values)
    joined_rows = torch.cat([r[:int(n)] for r, n in zip(all_rows, counts, strict=True)])
    joined_values = torch.cat([v[:int(n)] for v, n in zip(all_values, counts, strict=True)])
    mean = torch.sparse_coo_tensor(joined_rows[None], joined_values / world, parameter.shape, check_invariants=False)
    return coalesced(mean)

"""Field-aware models with the fixture's vectors, and their vectors one by one."""

from typing import Any

import torch
from torch import Tensor

from raycascade import plugins
from raycascade.batch import Batch
from raycascade.models._first_order import FirstOrder
from tests import f3


def with_field_aware_vectors(name: str, *, step: float = 0.1, **options: Any) -> Any:
    """A model over the fixture's fields u = 0, i = 1, c = 2 with V[i, j] = e_i + step (j + 1) and its first-order
    weights; float64, in evaluation mode."""
    cls, config = plugins.options("models", {"name": name, "dim": 2, **options}, "model")
    model = cls(config, f3.SPACE).double().eval()
    partners = {"u": (1, 2), "i": (0, 2), "c": (0, 1)}
    for table, rows in (("u", [f3.U_ROW]), ("i", f3.I_ROWS[:2]), ("c", f3.C_ROWS)):
        vectors = torch.tensor(rows, dtype=torch.float64)
        aware = torch.cat([vectors + step * (partner + 1) for partner in partners[table]], -1)
        f3.assign(model.pairs.inputs.tables.of(table)[1:1 + len(rows)], aware)
    linear = model.linear
    assert isinstance(linear, FirstOrder)
    f3.assign(linear.bias, [f3.W_0])
    for table, weights in f3.WEIGHTS.items():
        f3.assign_first_order(linear, table, weights)
    return model


def cell_vectors(model: Any, batch: Batch) -> dict[tuple[int, int], Tensor]:
    """V[i, j] of every candidate [Q, C, k]."""
    pairs = model.pairs
    of_request = pairs.cells_of_request(batch)[:, None].expand(-1, batch.mask_QC.shape[1], -1, -1)
    cells = torch.cat([of_request, pairs.cells_of_candidates(batch)], -2)
    num_fields = pairs.inputs.num_fields
    return {(i, j): cells[:, :, i * (num_fields - 1) + int(pairs.slots[i, j])]
            for i in range(num_fields) for j in range(num_fields) if i != j}

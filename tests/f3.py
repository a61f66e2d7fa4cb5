"""The fixture of the hand-computed oracles: one request, two candidates, three id fields of width 2."""

import math
from typing import Any

import torch
from torch import Tensor

from raycascade import plugins
from raycascade.batch import Batch
from raycascade.models._first_order import FirstOrder
from raycascade.models._inputs import FieldInputs
from raycascade.models._layers import MLP, SplitLinear, SplitMLP
from raycascade.schema import FeatureSpace, Field

FIELDS = (
    Field(name="u", side="request", form="id", table="u", num_rows=8),
    Field(name="i", side="item", form="id", table="i", num_rows=8),
    Field(name="c", side="item", form="id", table="c", num_rows=8),
)
SPACE = FeatureSpace(fields=FIELDS)
WITH_HISTORY = FeatureSpace(fields=FIELDS, history_len=4, history_fields=("i",))
U_ROW = (0.1, 0.2)  # row 2
I_ROWS = ((0.3, -0.4), (0.2, 0.5), (0.1, 0.4), (-0.3, 0.2), (0.5, -0.1), (9.0, 9.0))  # rows 2 to 7
C_ROWS = ((-0.5, 0.6), (0.7, -0.3))  # rows 2 and 3
X_0 = ((0.1, 0.2, 0.3, -0.4, -0.5, 0.6), (0.1, 0.2, 0.2, 0.5, 0.7, -0.3))  # of candidate 1 and of candidate 2
W_0 = 0.3
WEIGHTS = {"u": (0.05,), "i": (-0.1, 0.25), "c": (0.2, -0.05)}  # first-order weights of rows 2 and 3
EVENTS = [((4, 5, 6), (True,) * 3), ((7, 4, 5, 6), (False, True, True, True))]  # then with a masked (9, 9) in front


def T(shape: tuple[int, ...], s: int) -> Tensor:
    """Flat element n is (((5n + 3s) mod 11) - 5) / 10."""
    n = torch.arange(math.prod(shape))
    return ((((5 * n + 3 * s) % 11) - 5).double() / 10).view(shape)


def close(actual: Tensor, expected: Any, *, atol: float = 1e-6) -> None:
    """Fails where an element differs by more than `atol`."""
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=atol, rtol=0)


def assign(parameter: Any, value: Any) -> None:
    """Overwrites a parameter, or some of its rows, in place."""
    with torch.no_grad():
        parameter.copy_(torch.as_tensor(value, dtype=parameter.dtype))


def assign_split(layer: SplitLinear, weight: Tensor) -> None:
    """Overwrites a split map with the one over [request; candidate]."""
    width = 0
    if layer.request is not None:
        width = layer.request.in_features
        assign(layer.request.weight, weight[:, :width])
    if layer.candidate is not None:
        assign(layer.candidate.weight, weight[:, width:])


def assign_mlp(mlp: SplitMLP | MLP, s: int, *, width: int = 6) -> None:
    """MLP_s: one hidden layer of 2 units, without an output bias."""
    if isinstance(mlp.first, SplitLinear):
        assign_split(mlp.first, T((2, width), s))
    else:
        assign(mlp.first.weight, T((2, width), s))
    assign(mlp.first.bias, T((2,), s + 1))
    assign(mlp.upper.linears[0].weight, T((1, 2), s + 2))  # type: ignore[union-attr]


def build(name: str, space: FeatureSpace = SPACE, *, num_tasks: int = 1, **options: Any) -> Any:
    """A float64 model in evaluation mode whose tables and first-order weights are the fixture's."""
    cls, config = plugins.options("models", {"name": name, **options}, "model")
    model = cls(config, space, num_tasks=num_tasks).double().eval()
    for module in model.modules():
        if isinstance(module, FieldInputs):
            rows = {"u": [U_ROW], "i": I_ROWS, "c": C_ROWS}
            for table, vectors in rows.items():
                assign(module.tables.of(table)[1:1 + len(vectors)], vectors)  # type: ignore[union-attr]
        if isinstance(module, FirstOrder):
            assign(module.bias, [W_0])
            for table, weights in WEIGHTS.items():
                assign_first_order(module, table, weights)
    return model


def assign_first_order(module: FirstOrder, table: str, weights: tuple[float, ...]) -> None:
    """Overwrites the first-order weights of a vocabulary from row 2 on."""
    assign(module.values.of(table)[1:1 + len(weights)], [[w] for w in weights])


def batch(events: tuple[int, ...] = (), mask: tuple[bool, ...] = ()) -> Batch:
    """Candidate 1 has row 2 of i and c, candidate 2 row 3; `events` are rows of i."""
    events_QL = torch.tensor([events], dtype=torch.long).view(1, -1)
    rows_QC = torch.tensor([[2, 3]])
    return Batch(user={"u": torch.tensor([2])}, item={"i": rows_QC, "c": rows_QC}, history={"i": events_QL},
                 history_mask_QL=torch.tensor([mask], dtype=torch.bool).view(1, -1), history_rows_QL=events_QL,
                 candidates_QC=rows_QC, mask_QC=torch.ones(1, 2, dtype=torch.bool), time_ms_Q=torch.zeros(1))

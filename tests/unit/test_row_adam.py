"""RowAdam against SparseAdam, and against Adam where every row is in every batch; with momentum and without."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycascade.training import row_adam
from raycascade.training.row_adam import RowAdam, SumsByRow, coalesce_gradients, coalesced


def gradients(num_rows: int, width: int, *, steps: int, every_row: bool = False) -> list[Tensor]:
    """Coalesced sparse gradients of random rows."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for step in range(steps):
        rows = torch.arange(num_rows) if every_row else torch.randperm(num_rows, generator=generator)[:3 + step]
        values = torch.randn(len(rows), width, generator=generator, dtype=torch.float64) * 10.0 ** -step
        found.append(torch.sparse_coo_tensor(rows[None], values, (num_rows, width), check_invariants=True).coalesce())
    return found


def trained(
    optimiser: Callable[..., torch.optim.Optimizer], found: list[Tensor], *, dense: bool = False, **options: Any
) -> Tensor:
    torch.manual_seed(2)
    table = nn.Parameter(torch.randn(found[0].shape, dtype=torch.float64))
    steps = optimiser([table], lr=0.03, **options)
    for gradient in found:
        table.grad = gradient.to_dense() if dense else gradient
        steps.step()
    return table.detach()


both_momenta = pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.999)])


@both_momenta
@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("chunk", [2, 1000])
def test_every_step_equals_sparse_adam(
    width: int, chunk: int, betas: tuple[float, float], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(row_adam, "CHUNK_ROWS", chunk)
    found = gradients(20, width, steps=7)
    expected = trained(torch.optim.SparseAdam, found, betas=betas)
    torch.testing.assert_close(trained(RowAdam, found, betas=betas), expected, rtol=1e-9, atol=1e-12)


@both_momenta
def test_with_every_row_in_every_batch_it_is_adam(betas: tuple[float, float]):
    found = gradients(20, 3, steps=7, every_row=True)
    expected = trained(torch.optim.Adam, found, dense=True, betas=betas)
    torch.testing.assert_close(trained(RowAdam, found, betas=betas), expected, rtol=1e-6, atol=1e-6)


def test_without_momentum_there_is_no_first_moment():
    table = nn.Parameter(torch.zeros(6, 2, dtype=torch.float64))
    (table.grad,) = gradients(6, 2, steps=1)
    optimiser = RowAdam([table], lr=0.1, betas=(0.0, 0.999))
    optimiser.step()
    assert set(optimiser.state[table]) == {"step", "exp_avg_sq"}


def test_rows_outside_the_batch_stay_bit_for_bit():
    torch.manual_seed(2)
    table = nn.Parameter(torch.randn(6, 2))
    before, optimiser = table.detach().clone(), RowAdam([table], lr=0.1)
    for _ in range(3):
        table.grad = torch.sparse_coo_tensor(torch.tensor([[1, 4]]), torch.ones(2, 2), (6, 2),
                                             check_invariants=True).coalesce()
        optimiser.step()
    kept = [0, 2, 3, 5]
    assert torch.equal(table[kept], before[kept])
    assert (table[[1, 4]] < before[[1, 4]]).all()
    for moment in ("exp_avg", "exp_avg_sq"):
        assert not optimiser.state[table][moment][kept].any()


def test_a_state_that_is_loaded_goes_on_as_if_nothing_had_happened():
    found = gradients(20, 3, steps=6)
    torch.manual_seed(2)
    table = nn.Parameter(torch.randn(20, 3, dtype=torch.float64))
    optimiser = RowAdam([table], lr=0.03)
    for step, gradient in enumerate(found):
        if step == 3:
            saved, optimiser = optimiser.state_dict(), RowAdam([table], lr=0.03)
            optimiser.load_state_dict(saved)
        table.grad = gradient
        optimiser.step()
    assert torch.equal(table.detach(), trained(RowAdam, found))


def test_sums_by_row_equal_a_loop():
    generator = torch.Generator().manual_seed(3)
    rows_N = torch.randint(0, 9, (200,), generator=generator)
    values_NK = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    sums = SumsByRow(rows_N)
    assert sums.touched_R.tolist() == sorted(set(rows_N.tolist()))
    for row, total in zip(sums.touched_R, sums(values_NK), strict=True):
        torch.testing.assert_close(total, values_NK[rows_N == row].sum(0))


@pytest.mark.parametrize("rows", [[3, 1, 3, 0, 2], [5], []])
def test_a_gradient_is_coalesced_as_pytorch_would(rows: list[int]):
    values = torch.randn(len(rows), 2, dtype=torch.float64)
    raw = torch.sparse_coo_tensor(torch.tensor([rows], dtype=torch.long), values, (7, 2), check_invariants=True)
    ours, expected = coalesced(raw), raw.coalesce()
    assert ours.is_coalesced()
    assert torch.equal(ours.indices(), expected.indices())
    torch.testing.assert_close(ours.values(), expected.values())
    assert coalesced(ours) is ours


def test_gradients_of_tables_read_at_the_same_or_at_other_rows_are_each_coalesced():
    draw = torch.Generator().manual_seed(5)
    same, other = (torch.randint(0, 7, (9,), generator=draw) for _ in range(2))
    tables = [nn.Parameter(torch.zeros(7, width)) for width in (2, 1, 2, 3)]
    for table, rows in zip(tables, (same, same, other, None), strict=True):
        if rows is not None:
            values = torch.randn(9, table.shape[1], generator=draw)
            table.grad = torch.sparse_coo_tensor(rows[None], values, table.shape, check_invariants=True)
    expected = [None if t.grad is None else t.grad.coalesce() for t in tables]
    coalesce_gradients(tables)
    for table, plain in zip(tables, expected, strict=True):
        assert (table.grad is None) == (plain is None)
        if table.grad is not None and plain is not None:
            assert torch.equal(table.grad.indices(), plain.indices())
            torch.testing.assert_close(table.grad.values(), plain.values())

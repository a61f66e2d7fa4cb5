"""Joined embedding tables: their rows and their gradients."""

import copy

import pytest
import torch
from torch import nn

from raycascade.models._tables import JoinedTables
from raycascade.schema import Field

FIELDS = (
    Field(name="a", side="item", form="id", table="a", num_rows=5),
    Field(name="b", side="item", form="id", table="b", num_rows=4),
    Field(name="again", side="request", form="id", table="a", num_rows=5),
    Field(name="tags", side="item", form="ids", table="tag", num_rows=6),
    Field(name="price", side="item", form="dense"),
)
A, B, AGAIN, TAGS, _ = FIELDS


def joined(width: int = 3) -> JoinedTables:
    torch.manual_seed(1)
    return JoinedTables(FIELDS, width, std=0.5).double()


def test_every_vocabulary_has_its_rows_and_all_share_the_padding():
    tables = joined()
    assert tables.sizes == {"a": 5, "b": 4, "tag": 6}
    assert tables.num_embeddings == 1 + 4 + 3 + 5
    single = tables.single_rows({n: torch.tensor([0, 1, 3]) for n in ("a", "b", "again")}, (A, B, AGAIN))
    assert single.tolist() == [[0, 0, 0], [1, 5, 1], [3, 7, 3]]
    listed = tables.listed_rows({"tags": torch.tensor([[0, 1], [5, 0]]), "more": torch.tensor([[4], [0]])},
                                (TAGS, Field(name="more", side="item", form="ids", table="a", num_rows=5)))
    assert listed.tolist() == [[0, 8, 4], [12, 0, 0]]
    assert torch.equal(tables.of("b"), tables(torch.tensor([5, 6, 7])))
    assert not tables(torch.tensor([0])).any()


@pytest.mark.parametrize("rows", [[3, 1, 3, 0, 7, 3, 0, 1], [0, 0], [4], []])
def test_the_gradient_is_that_of_a_plain_embedding_and_never_touches_the_padding(rows: list[int]):
    tables = joined()
    plain = nn.Embedding(*tables.weight.shape, padding_idx=0, _weight=tables.weight.detach().clone())
    wanted = torch.randn(len(rows), 3, dtype=torch.float64)
    for table in (tables, plain):
        (table(torch.tensor(rows, dtype=torch.long)) * wanted).sum().backward()
    gradient = tables.weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    assert gradient._indices()[0].tolist() == [row for row in rows if row]
    torch.testing.assert_close(gradient.to_dense(), plain.weight.grad)


def test_lookups_of_one_pass_leave_one_gradient_that_adds_up():
    tables = joined()
    (tables(torch.tensor([2, 2, 5])).sum() + 2 * tables(torch.tensor([[5], [1]])).sum()).backward()
    assert tables.weight.grad is not None
    assert tables.weight.grad._nnz() == 5
    assert tables.weight.grad.to_dense()[:, 0].tolist() == [0, 2, 2, 0, 0, 3, *[0] * 7]


def test_passes_do_not_mix_whatever_becomes_of_them():
    """A pass without a way back, one that is gone back twice, and one in two parts leave nothing to the next."""
    tables, rows = joined(), torch.tensor([3, 4])
    tables(rows)
    kept = tables(rows).sum()
    for _ in range(2):
        (gradient,) = torch.autograd.grad(kept, tables.weight, retain_graph=True)
        assert gradient.to_dense().sum() == 2 * 3
    first, second = tables(rows).sum(), tables(rows[:1]).sum()
    first.backward()
    second.backward()
    assert tables.weight.grad is not None
    assert tables.weight.grad.to_dense()[:, 0].tolist() == [0, 0, 0, 2, 1, *[0] * 8]
    unused = tables(rows)
    (gradient,) = torch.autograd.grad(tables(rows[1:]).sum(), tables.weight)
    assert gradient.to_dense()[:, 0].tolist() == [0, 0, 0, 0, 1, *[0] * 8]
    assert unused.requires_grad
    assert torch.equal(copy.deepcopy(tables).weight, tables.weight)


def test_a_table_that_is_moved_or_gets_another_weight_between_two_passes_collects_for_the_new_one():
    tables, rows = joined(), torch.tensor([3, 4])
    tables(rows)
    tables.float()(rows).sum().backward()
    assert tables.weight.grad is not None
    assert tables.weight.grad.dtype == torch.float32
    tables(rows)
    tables.weight = nn.Parameter(tables.weight.detach().clone())
    tables(rows).sum().backward()
    assert tables.weight.grad is not None
    assert tables.weight.grad.to_dense()[:, 0].tolist() == [0, 0, 0, 1, 1, *[0] * 8]

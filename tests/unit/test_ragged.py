"""Lists of different lengths as padded arrays, against loops over the lists."""

import numpy as np
import pyarrow as pa
import pytest

from raycascade.errors import DataError
from raycascade.ragged import Ragged, id_lists, parallel_lists

LISTS = [[1, 2, 3], [], None, [4], [5, 6, 7, 8, 9]]


def padded(lists: list, width: int, *, newest: bool) -> tuple[list, list]:
    values, mask = [], []
    for one in lists:
        kept = (one or [])[-width:] if newest and width else (one or [])[:width]
        values.append(kept + [0] * (width - len(kept)))
        mask.append([True] * len(kept) + [False] * (width - len(kept)))
    return values, mask


@pytest.mark.parametrize("newest", [False, True])
@pytest.mark.parametrize("width", [0, 1, 2, 4, 7])
def test_padding_equals_a_loop_over_the_lists(width: int, newest: bool):
    values, mask = Ragged.from_arrow(pa.array(LISTS, pa.list_(pa.int64()))).pad(width, np.int64, newest=newest)
    expected, expected_mask = padded(LISTS, width, newest=newest)
    assert values.shape == mask.shape == (5, width)
    assert values.tolist() == expected
    assert mask.tolist() == expected_mask
    assert mask.dtype == bool


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.int64())])
def test_slices_and_chunks_of_a_column_give_their_own_lists(kind: pa.DataType):
    column = pa.chunked_array([pa.array(LISTS, kind).slice(1), pa.array([[10]], kind)])
    lists = Ragged.from_arrow(column)
    assert lists.lengths_Q.tolist() == [0, 0, 1, 5, 1]
    assert lists.values.to_pylist() == [4, 5, 6, 7, 8, 9, 10]
    assert lists.to_arrow().to_pylist() == [[], [], [4], [5, 6, 7, 8, 9], [10]]


def test_fixed_size_lists_and_columns_without_any_value_are_lists_too():
    fixed = pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int64(), 2))
    assert Ragged.from_arrow(fixed).values.to_pylist() == [1, 2, 3, 4]
    assert Ragged.from_arrow(fixed).lengths_Q.tolist() == [2, 0, 2]
    assert Ragged.from_arrow(pa.nulls(3)).lengths_Q.tolist() == [0, 0, 0]


def test_other_values_keep_the_lists_and_nulls_become_nan():
    lists = Ragged.from_arrow(pa.array([[1.0, None], [2.0]]))
    values, _ = lists.pad(2, np.float32)
    np.testing.assert_array_equal(values, np.array([[1, np.nan], [2, 0]], np.float32))
    assert lists.with_values(np.array([7, 8, 9])).to_arrow().to_pylist() == [[7, 8], [9]]


def test_lists_that_are_not_parallel_or_do_not_fit_the_type_are_refused_in_one_line():
    table = pa.table({"a": [[1, 2], [3]], "b": [[1, 2], [3, 4]], "c": [[1, 2], [300]]})
    candidates = Ragged.from_arrow(table["a"])
    with pytest.raises(DataError, match="log: 'b' has 2 values for 1 of 'a' in row 1; lists must be parallel"):
        parallel_lists(table, "b", candidates, "a", where="log")
    with pytest.raises(DataError, match="log: 'c' does not fit int8, got int64"):
        parallel_lists(table, "c", candidates, "a", kind=pa.int8(), where="log")
    assert parallel_lists(table, "c", candidates, "a", kind=pa.int16(), where="log").values.to_pylist() == [1, 2, 300]


def test_a_column_of_something_else_than_lists_is_no_multi_valued_id():
    with pytest.raises(DataError, match="log: column 'tags' must hold lists, got string; declare it as an id"):
        id_lists(pa.array(["x", "y"]), "tags", where="log")
    assert id_lists(pa.nulls(2), "tags", where="log").lengths_Q.tolist() == [0, 0]

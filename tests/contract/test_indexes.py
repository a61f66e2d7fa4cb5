"""Every index of indexes/ finds the items it should, keeps its promise on disk and copes with few items."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raycascade import plugins, storage
from raycascade.errors import BundleError, ConfigError, DataError
from raycascade.indexes import Candidates

RECALL_FLOOR = {"exact": 1.0, "ivf_pq": 0.9}  # all others: 0.95
every_index = pytest.mark.parametrize("name", plugins.names("indexes"))


def make(name: str, **options: Any) -> Any:
    plugin, config = plugins.options("indexes", {"name": name, **options}, "index")
    return plugin(config)


@cache
def clustered() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """5,000 items in 60 clusters with rows that are no positions, and 64 users near items."""
    random = np.random.default_rng(5)
    centres = random.normal(size=(60, 32))
    items_ND = (centres[random.integers(0, 60, 5000)] + 0.5 * random.normal(size=(5000, 32))).astype(np.float32)
    users_QD = (items_ND[:64] + 0.3 * random.normal(size=(64, 32))).astype(np.float32)
    rows_N = random.permutation(20_000)[:5000].astype(np.int64) + 2
    return rows_N, items_ND, users_QD


@cache
def built(name: str) -> Any:
    rows_N, items_ND, _ = clustered()
    index = make(name)
    index.build(rows_N, items_ND)
    return index


def brute_force(rows_N: np.ndarray, items_ND: np.ndarray, users_QD: np.ndarray, k: int) -> Candidates:
    scores_QN = users_QD.astype(np.float64) @ items_ND.astype(np.float64).T
    best_QK = np.argsort(-scores_QN, axis=1, kind="stable")[:, :k]
    return Candidates(rows_N[best_QK], np.take_along_axis(scores_QN, best_QK, axis=1).astype(np.float32))


def assert_same(a: Candidates, b: Candidates) -> None:
    np.testing.assert_array_equal(a.rows_QK, b.rows_QK)
    np.testing.assert_array_equal(a.scores_QK, b.scores_QK)


def test_exact_equals_brute_force() -> None:
    truth = brute_force(*clustered(), k=50)
    found = built("exact").search(clustered()[2], 50)
    np.testing.assert_array_equal(found.rows_QK, truth.rows_QK)
    np.testing.assert_allclose(found.scores_QK, truth.scores_QK, rtol=1e-6)


@every_index
def test_recall_of_the_true_top_100_is_high(name: str) -> None:
    truth = brute_force(*clustered(), k=100)
    found = built(name).search(clustered()[2], 100)
    hits = [len(np.intersect1d(a, b)) for a, b in zip(found.rows_QK, truth.rows_QK, strict=True)]
    assert np.mean(hits) / 100 >= RECALL_FLOOR.get(name, 0.95)


@every_index
def test_scores_are_the_inner_products_of_the_rows_best_first_and_no_row_comes_twice(name: str) -> None:
    rows_N, items_ND, users_QD = clustered()
    found = built(name).search(users_QD, 100)
    position = {int(row): place for place, row in enumerate(rows_N)}
    places_QK = np.vectorize(position.__getitem__)(found.rows_QK)
    expected_QK = np.einsum("qkd,qd->qk", items_ND[places_QK].astype(np.float64), users_QD.astype(np.float64))
    np.testing.assert_allclose(found.scores_QK, expected_QK, rtol=1e-5, atol=1e-5)
    assert (np.diff(found.scores_QK, axis=1) <= 0).all()
    assert all(len(set(row_K)) == 100 for row_K in found.rows_QK.tolist())
    assert (found.rows_QK.dtype, found.scores_QK.dtype) == (np.int64, np.float32)


@every_index
def test_a_user_gets_the_same_answer_whatever_the_size_of_the_batch(name: str) -> None:
    users_QD = clustered()[2]
    whole = built(name).search(users_QD, 30)
    for size in (1, 7, 33):
        parts = [built(name).search(users_QD[start:start + size], 30) for start in range(0, len(users_QD), size)]
        assert_same(whole, Candidates(np.concatenate([part.rows_QK for part in parts]),
                                      np.concatenate([part.scores_QK for part in parts])))


@every_index
def test_two_builds_of_the_same_vectors_are_the_same_index(name: str, tmp_path: Path) -> None:
    rows_N, items_ND, _ = clustered()
    again = make(name)
    again.build(rows_N, items_ND)
    built(name).save(str(tmp_path / "a"))
    again.save(str(tmp_path / "b"))
    files = storage.list_files(str(tmp_path / "a"))
    assert "index.json" in files
    assert files == storage.list_files(str(tmp_path / "b"))
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


@every_index
def test_a_loaded_index_answers_bitwise_as_the_saved_one(name: str, tmp_path: Path) -> None:
    built(name).save(str(tmp_path))
    loaded = make(name)
    loaded.load(str(tmp_path))
    assert_same(built(name).search(clustered()[2], 100), loaded.search(clustered()[2], 100))


@every_index
def test_a_loaded_index_can_be_saved_over_itself(name: str, tmp_path: Path) -> None:
    built(name).save(str(tmp_path))
    for _ in range(2):
        loaded = make(name)
        loaded.load(str(tmp_path))
        loaded.save(str(tmp_path))
    assert_same(built(name).search(clustered()[2], 20), loaded.search(clustered()[2], 20))


@every_index
@pytest.mark.parametrize("num_items", [1, 3, 40, 300])
def test_few_items_are_all_found_and_the_rest_is_padding(name: str, num_items: int, tmp_path: Path) -> None:
    rows_N, items_ND, users_QD = (array[:num_items] for array in clustered())
    index = make(name)
    index.build(rows_N, items_ND)
    index.save(str(tmp_path))
    index = make(name)
    index.load(str(tmp_path))
    found = index.search(users_QD[:2], num_items + 5)
    assert found.rows_QK.shape == found.scores_QK.shape == (min(2, num_items), num_items + 5)
    assert (found.rows_QK[:, num_items:] == 0).all()
    assert (found.scores_QK[:, num_items:] == -np.inf).all()
    if num_items <= 40 or name == "exact":
        truth = brute_force(rows_N, items_ND, users_QD[:2], num_items)
        np.testing.assert_array_equal(found.rows_QK[:, :num_items], truth.rows_QK)
        np.testing.assert_allclose(found.scores_QK[:, :num_items], truth.scores_QK, rtol=1e-5, atol=1e-5)


@every_index
def test_items_with_one_and_the_same_vector_come_in_order_of_their_row(name: str) -> None:
    index = make(name)
    index.build(np.array([9, 4, 7, 2]), np.ones((4, 8), np.float32))
    assert index.search(np.ones((1, 8), np.float32), 4).rows_QK.tolist() == [[2, 4, 7, 9]]


@every_index
def test_no_user_gets_no_answer(name: str) -> None:
    assert built(name).search(np.empty((0, 32), np.float32), 10).rows_QK.shape == (0, 10)


@every_index
def test_a_rebuild_replaces_the_content(name: str, tmp_path: Path) -> None:
    index = make(name)
    index.build(np.array([5, 6]), np.eye(2, 8, dtype=np.float32))
    index.save(str(tmp_path))
    index.build(np.array([8]), np.ones((1, 4), np.float32))
    index.save(str(tmp_path))
    loaded = make(name)
    loaded.load(str(tmp_path))
    for one in (index, loaded):
        assert one.search(np.ones((1, 4), np.float32), 3).rows_QK.tolist() == [[8, 0, 0]]


@every_index
def test_the_index_keeps_its_own_copy_of_the_vectors(name: str) -> None:
    rows_N, items_ND = np.array([5, 6]), np.eye(2, 8, dtype=np.float32)
    index = make(name)
    index.build(rows_N, items_ND)
    rows_N[:], items_ND[:] = 0, 0
    assert index.search(np.eye(1, 8, dtype=np.float32), 1).rows_QK.tolist() == [[5]]


@every_index
@pytest.mark.parametrize("damage", ["missing", "shortened", "changed"])
def test_a_damaged_file_is_refused_by_its_name(name: str, damage: str, tmp_path: Path) -> None:
    index = make(name)
    index.build(np.arange(10), np.random.default_rng(0).normal(size=(10, 8)).astype(np.float32))
    for file in ("index.faiss", "rows.npy", "index.json"):
        index.save(str(tmp_path))
        content = (tmp_path / file).read_bytes()
        wrong = {"shortened": content[:-3], "changed": bytes([content[0] ^ 1]) + content[1:]}
        (tmp_path / file).unlink()
        if damage in wrong:
            (tmp_path / file).write_bytes(wrong[damage])
        with pytest.raises(BundleError, match=file) as caught:
            make(name).load(str(tmp_path))
        assert "\n" not in str(caught.value)


def test_an_index_of_another_kind_is_refused(tmp_path: Path) -> None:
    built("exact").save(str(tmp_path))
    with pytest.raises(BundleError, match="expected an index 'ivf' of format 1, found 'exact'"):
        make("ivf").load(str(tmp_path))


@every_index
def test_vectors_of_a_diverged_model_are_refused(name: str) -> None:
    vectors_ND = np.ones((3, 4), np.float32)
    vectors_ND[1, 2] = np.nan
    with pytest.raises(DataError, match="1 of 3 item vectors are not finite"):
        make(name).build(np.arange(3), vectors_ND)


def test_code_bytes_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="code_bytes: 7 does not divide the 8 numbers"):
        make("ivf_pq", code_bytes=7).build(np.arange(3), np.ones((3, 8), np.float32))


def test_refine_raises_the_recall_of_compressed_vectors_and_zero_keeps_no_vectors(tmp_path: Path) -> None:
    rows_N, items_ND, users_QD = clustered()
    truth = brute_force(rows_N, items_ND, users_QD, 20)
    recall = {}
    for refine in (0, 4):
        index = make("ivf_pq", refine=refine, code_bytes=4)
        index.build(rows_N, items_ND)
        found = index.search(users_QD, 20).rows_QK
        recall[refine] = np.mean([len(np.intersect1d(a, b)) / 20 for a, b in zip(found, truth.rows_QK, strict=True)])
        index.save(str(tmp_path / str(refine)))
    assert recall[4] > recall[0] + 0.1
    assert "vectors.npy" not in storage.list_files(str(tmp_path / "0"))
    with pytest.raises(BundleError, match="without the vectors that refine needs"):
        make("ivf_pq").load(str(tmp_path / "0"))

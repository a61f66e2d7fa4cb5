"""The self-check of a bundle: what it records, and that whatever answers otherwise does not pass."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raycascade import selfcheck, storage
from raycascade.bundle import Bundle, add_to_manifest, load_bundle, verify
from raycascade.errors import BundleError
from raycascade.selfcheck import SelfCheck
from tests.served import checked_bundle
from tests.tiny_world import KEEPS, write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(checked_bundle(str(tmp_path_factory.mktemp("bundles") / "checked")))


def check_of(bundle: Bundle) -> SelfCheck:
    check = selfcheck.read(bundle)
    assert check is not None
    return check


def test_a_bundle_passes_its_own_check_and_one_without_a_check_says_so(bundle: Bundle, tiny_bundle: str):
    assert selfcheck.require_whole(bundle)
    assert not selfcheck.require_whole(load_bundle(tiny_bundle))


def test_the_requests_are_of_known_users_of_nobody_and_of_one_who_brings_a_history(bundle: Bundle):
    requests = check_of(bundle).requests
    known = bundle.users.rows(requests["user_id"]) >= 0
    assert known.tolist() == [True, True, True, True, False, False]
    assert requests["history"].is_valid().to_pylist() == [False] * 5 + [True]
    assert len(requests["exclude"][5]) > 0


def test_the_record_is_under_the_hashes_of_the_bundle(bundle: Bundle):
    assert "selfcheck/answers.json" in verify(bundle.uri)["files"]
    assert bundle.version == load_bundle(bundle.uri).version


def test_the_recorded_answers_are_those_of_the_cascade(bundle: Bundle):
    check = check_of(bundle)
    ranking = bundle.recommend(bundle.encode(check.requests))
    assert [stage.name for stage in ranking.stages] == list(KEEPS)
    for stage in ranking.stages:
        np.testing.assert_array_equal(check.rows[stage.name], stage.kept()[0])
        np.testing.assert_allclose(check.scores[stage.name], stage.scores_QC[:, :stage.keep], rtol=1e-6)
    ids = storage.read_json(storage.join(bundle.uri, "selfcheck/answers.json"))["items"]
    assert ids == [bundle.items.ids_of(rows[mask]) for rows, mask in zip(*ranking.final.kept(), strict=True)]


def test_other_weights_do_not_pass(bundle: Bundle, tmp_path: Path):
    other = load_bundle(write_bundle(str(tmp_path / "other"), seed=12))
    check, found = check_of(bundle), other.recommend(other.encode(check_of(bundle).requests)).final
    with pytest.raises(BundleError, match=r"self-check failed at stage 'ranker', request 0: score .* recorded"):
        check.require("ranker", found.kept()[0], found.scores_QC[:, :found.keep])


@pytest.mark.parametrize(("change", "passes"), [
    ({}, True),
    ({"scores": [0.00005, 0, 0]}, True), ({"scores": [0.001, 0, 0]}, False), ({"scores": [np.nan, 0, 0]}, False),
    ({"rows": [3, 2, 4]}, False),  # of different scores
    ({"rows": [2, 3, 9]}, True), ({"rows": [9, 3, 4]}, False),  # the last one may be another of the same score
    ({"rows": [2, 3, 0]}, False),
])
def test_only_items_of_equal_scores_may_change_places(change: dict[str, list[float]], passes: bool):
    rows, scores = np.array([[2, 3, 4]]), np.array([[3.0, 2.0, 1.0]])
    check = SelfCheck("b", pa.table({}), pa.table({}), {"s": rows}, {"s": scores}, 1e-4)
    found_rows = np.array([change.get("rows", rows[0])])
    found_scores = np.where(found_rows == 0, -np.inf, scores + np.array(change.get("scores", [0, 0, 0])))
    if passes:
        check.require("s", found_rows, found_scores)
    else:
        with pytest.raises(BundleError, match="self-check failed"):
            check.require("s", found_rows, found_scores)


def test_items_of_equal_scores_are_in_any_order():
    check = SelfCheck("b", pa.table({}), pa.table({}), {"s": np.array([[2, 3, 4]])},
                      {"s": np.array([[2.0, 2.0, 1.0]])}, 1e-4)
    check.require("s", np.array([[3, 2, 4]]), np.array([[2.0, 2.0, 1.0]]))


def test_another_encoding_does_not_pass(bundle: Bundle):
    check = check_of(bundle)
    encoded = check.encoded
    city = encoded.column_names.index("city")
    changed = encoded.set_column(city, "city", pa.chunked_array([pa.array(np.ones(len(encoded), np.int32))]))
    check.require_encoding(bundle.encode(check.requests))
    with pytest.raises(BundleError, match="failed at encoding: column 'city' is not as recorded"):
        check.require_encoding(changed)
    with pytest.raises(BundleError, match="failed at encoding: columns"):
        check.require_encoding(encoded.drop_columns(["city"]))


def test_a_check_of_another_format_is_refused(tmp_path: Path):
    uri = checked_bundle(str(tmp_path / "b"))
    file = storage.join(uri, "selfcheck/answers.json")
    storage.write_json(file, storage.read_json(file) | {"format": 99})
    add_to_manifest(uri, ["selfcheck/answers.json"])
    with pytest.raises(BundleError, match="format 99, this version reads 1"):
        selfcheck.read(load_bundle(uri))

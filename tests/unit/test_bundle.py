"""The bundle: the same answers after a round trip, and every kind of damage named."""

import json
import pickletools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch

from raycascade import storage
from raycascade.batch import collate
from raycascade.bundle import FORMAT_VERSION, Bundle, build_index, load_bundle, save_bundle
from raycascade.cascade import Cascade
from raycascade.errors import BundleError, DataError
from tests.tiny_world import NUM_ITEMS, encoded_users, fitted, item_id, raw_items, raw_requests, write_bundle

KINDS = ["config.yaml", "features/counters.arrow", "features/schema.json", "features/state.json",
         "features/vocabulary.author.arrow", "index/index.faiss", "index/index.json", "index/rows.npy",
         "items/items.parquet", "metrics.json", "stages/ranker/weights.safetensors", "users/users.parquet"]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: str) -> Bundle:
    return load_bundle(tiny_bundle)


@pytest.fixture
def copy(tiny_bundle: str, tmp_path: Path) -> Path:
    """A bundle of one's own to damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


def change(copy: Path, **facts: object) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, **facts}))


# ---------------------------------------------------------------- the round trip
def test_saved_and_loaded_gives_bitwise_the_same_recommendations(bundle: Bundle, tmp_path: Path):
    users = encoded_users(bundle.state)
    uri = save_bundle(str(tmp_path / "again"), config=bundle.config, cascade=bundle.cascade, items=bundle.items,
                      encoded_items=bundle.state.encode_items(raw_items(), where="tiny"), users=users, metrics={})
    memory = Bundle("", {}, bundle.config, bundle.items, bundle.cascade,
                    build_index(bundle.config, bundle.cascade, bundle.items))
    for left, right in zip(memory.recommend(users).stages, load_bundle(uri).recommend(users).stages, strict=True):
        assert np.array_equal(left.rows_QC, right.rows_QC)
        assert np.array_equal(left.scores_QC, right.scores_QC)
        assert np.array_equal(left.mask_QC, right.mask_QC)


def test_the_factor_of_a_prior_is_part_of_the_bundle(bundle: Bundle, tmp_path: Path):
    *stages, last = bundle.config.stages
    config = bundle.config.model_copy(update={"stages": (*stages, last.model_copy(update={"prior": True}))})
    cascade = Cascade(config, bundle.state.space).eval()
    cascade.prior_scales["ranker"].data.fill_(0.25)
    users = encoded_users(bundle.state)
    uri = save_bundle(str(tmp_path / "prior"), config=config, cascade=cascade, items=bundle.items,
                      encoded_items=bundle.state.encode_items(raw_items(), where="tiny"), users=users, metrics={})
    loaded = load_bundle(uri)
    assert loaded.cascade.prior_scales["ranker"].item() == 0.25
    expected = cascade.recommend(bundle.batch(users), loaded.index, bundle.items).final
    assert np.array_equal(loaded.recommend(users).final.scores_QC, expected.scores_QC)


def test_two_bundles_of_other_weights_do_not_agree(bundle: Bundle, tmp_path: Path):
    users = encoded_users(bundle.state)
    other = load_bundle(write_bundle(str(tmp_path / "other"), seed=12))
    assert not np.array_equal(bundle.recommend(users).final.rows_QC, other.recommend(users).final.rows_QC)


def test_logged_lists_collate_as_with_the_items_they_were_encoded_with(bundle: Bundle):
    state = fitted()
    requests = state.encode_requests(raw_requests().slice(0, 30), where="tiny")
    batch = collate(requests, bundle.items, keep=(5, 4, 3), k=2)
    again = collate(bundle.state.encode_requests(raw_requests().slice(0, 30), where="tiny"), bundle.items)
    assert batch.item.keys() == again.item.keys()
    assert all(bool((batch.item[name] == again.item[name]).all()) for name in batch.item)


# ---------------------------------------------------------------- damage
def test_every_file_of_a_bundle_is_under_the_manifest(tiny_bundle: str):
    files = set(json.loads(Path(tiny_bundle, "manifest.json").read_text())["files"])
    assert files == set(storage.list_files(tiny_bundle)) - {"manifest.json"}
    assert set(KINDS) <= files


@pytest.mark.parametrize("name", KINDS)
def test_one_changed_byte_is_found_and_the_file_named(copy: Path, name: str):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name}: changed since it was written"):
        load_bundle(str(copy))


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_file_is_named(copy: Path, name: str):
    (copy / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: missing"):
        load_bundle(str(copy))


def test_a_folder_without_a_manifest_is_no_bundle(copy: Path):
    (copy / "manifest.json").unlink()
    with pytest.raises(BundleError, match=r"copy: no manifest.json, so no finished bundle"):
        load_bundle(str(copy))


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"format_version": 1}', "", b"\xff\xfe"])
def test_a_damaged_manifest_is_named(copy: Path, content: str | bytes):
    (copy / "manifest.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BundleError, match=r"manifest.json: damaged"):
        load_bundle(str(copy))


def test_a_hash_that_was_changed_in_the_manifest_is_found(copy: Path):
    files = json.loads((copy / "manifest.json").read_text())["files"]
    change(copy, files={**files, "config.yaml": "0" * 64})
    with pytest.raises(BundleError, match=r"config.yaml: changed"):
        load_bundle(str(copy))


def test_another_format_version_is_refused(copy: Path):
    change(copy, format_version=FORMAT_VERSION + 1)
    with pytest.raises(BundleError, match=f"manifest.json: format {FORMAT_VERSION + 1}, this version reads"):
        load_bundle(str(copy))


def test_features_of_another_schema_are_refused(copy: Path):
    schema = json.loads((copy / "features/schema.json").read_text())
    schema["features"][0]["min_count"] = 2
    storage.write_json(str(copy / "features/schema.json"), schema)
    files = json.loads((copy / "manifest.json").read_text())["files"]
    change(copy, files={**files, "features/schema.json": storage.sha256(str(copy / "features/schema.json"))})
    with pytest.raises(BundleError, match=r"features/schema.json: schema \w{16}, but the bundle was made for"):
        load_bundle(str(copy))


def test_weights_of_another_shape_are_refused_by_name(copy: Path):
    file = copy / "stages/ranker/weights.safetensors"
    weights = safetensors.torch.load(file.read_bytes())
    name = min(name for name, value in weights.items() if value.ndim == 2 and len(value) > 1)
    file.write_bytes(safetensors.torch.save({**weights, name: weights[name][:1].clone()}))
    files = json.loads((copy / "manifest.json").read_text())["files"]
    change(copy, files={**files, "stages/ranker/weights.safetensors": storage.sha256(str(file))})
    with pytest.raises(BundleError, match=r"stages/ranker/weights.safetensors: they do not fit the config") as caught:
        load_bundle(str(copy))
    assert "\n" not in str(caught.value)


def test_an_existing_bundle_is_never_overwritten(bundle: Bundle, tiny_bundle: str):
    with pytest.raises(BundleError, match="there is a bundle already; bundles are immutable"):
        save_bundle(tiny_bundle, config=bundle.config, cascade=bundle.cascade, items=bundle.items,
                    encoded_items=pa.table({}), users=pa.table({}), metrics={})


def is_pickle(content: bytes) -> bool:
    """Whether a file could be read as a pickle of protocol 2 or later, or holds one behind a numpy header."""
    for start in (0, content.find(b"\x80\x04")):
        if start < 0 or content[start:start + 1] != b"\x80":
            continue
        try:
            if len(list(pickletools.genops(content[start:]))) > 1:
                return True
        except (ValueError, KeyError, IndexError):
            continue
    return False


def test_nothing_in_a_bundle_is_a_pickle(tiny_bundle: str):
    assert is_pickle(b"\x80\x04]q\x00.")  # the test can fail
    for name in storage.list_files(tiny_bundle):
        content = Path(tiny_bundle, name).read_bytes()
        assert Path(name).suffix in {".json", ".yaml", ".arrow", ".parquet", ".safetensors", ".faiss", ".npy", ".html"}
        assert not content.startswith(b"PK"), name  # an archive, as torch.save writes it
        assert not is_pickle(content), name
        if name.endswith(".npy"):
            np.load(Path(tiny_bundle, name), allow_pickle=False)


# ---------------------------------------------------------------- users
def test_a_bare_user_id_is_completed_from_the_users_table(bundle: Bundle):
    encoded = bundle.encode(pa.table({"user_id": [103, 107]}))
    stored = encoded_users(bundle.state).take([3, 7])
    for name in stored.column_names:
        if name not in ("request_id", "time_ms"):
            assert encoded[name].to_pylist() == stored[name].to_pylist(), name
    assert encoded["time_ms"].to_pylist() == [bundle.state.as_of_ms] * 2


def test_what_a_request_brings_wins_and_null_brings_nothing(bundle: Bundle):
    history = pa.array([[item_id(4), item_id(9)], None, []], pa.list_(pa.int64()))
    cities = pa.array([None, "city 2", None])
    encoded = bundle.encode(pa.table({"user_id": [107, 107, 107], "city": cities, "history": history}))
    stored = encoded_users(bundle.state).take([7])
    own = bundle.state.vocabularies["city"].lookup(pa.array(["city 2"]))[0]
    theirs = stored["city"][0].as_py()
    assert own != theirs
    assert encoded["city"].to_pylist() == [theirs, own, theirs]
    assert encoded["history"].to_pylist() == [[6, 11], stored["history"][0].as_py(), []]
    assert [len(row) for row in encoded["history_action"].to_pylist()] == [2, len(stored["history"][0].as_py()), 0]


def test_what_a_request_excludes_adds_to_what_its_user_excludes(bundle: Bundle):
    exclude = pa.array([[item_id(40)], [item_id(41)], None], pa.list_(pa.int64()))
    encoded = bundle.encode(pa.table({"user_id": [103, 104, 103], "exclude": exclude}))
    assert [sorted(rows) for rows in encoded["exclude"].to_pylist()] == [[2, 3, 4, 5, 6, 42], [43], [2, 3, 4, 5, 6]]


def test_an_unknown_user_is_served_a_full_list(bundle: Bundle):
    encoded = bundle.encode(pa.table({"user_id": [999, 104]}))
    assert encoded["city"].to_pylist()[0] == 1
    rows_QK, mask_QK = bundle.recommend(encoded).final.kept()
    assert mask_QK.all()
    alone, _ = bundle.recommend(bundle.encode(pa.table({"user_id": [104]}))).final.kept()
    assert rows_QK[1].tolist() == alone[0].tolist()


@pytest.mark.parametrize("kind", [pa.string(), pa.int32(), pa.uint64()])
def test_user_ids_are_compared_as_the_type_of_the_table(bundle: Bundle, kind: pa.DataType):
    assert bundle.users.rows(pa.array([107, 9]).cast(kind)).tolist() == [7, -1]


def test_user_ids_that_cannot_be_of_the_tables_type_are_unknown(bundle: Bundle):
    assert bundle.users.rows(pa.array(["somebody"])).tolist() == [-1]
    assert bundle.users.rows(pa.array(["somebody", "107", None, "1e2", "103"])).tolist() == [-1, 7, -1, -1, 3]
    users = replace(bundle.users, table=pa.table({"user_key": [0, 1]}))
    assert users.rows(pa.array([None, 0, 1], pa.int64())).tolist() == [-1, 0, 1]


def test_requests_without_users_are_refused(bundle: Bundle):
    with pytest.raises(DataError, match="column 'user_id' is missing"):
        bundle.encode(pa.table({"request_id": ["a"]}))


def test_the_catalogue_is_whole(bundle: Bundle):
    assert bundle.items.num_items == NUM_ITEMS
    assert bundle.items.ids_of(np.array([2, 121, 0])) == [item_id(0), item_id(119), None]

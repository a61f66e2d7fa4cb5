"""Tokens as features: what a stage sees of them in every mode, sums with ids, and items that are new when serving."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from raycascade import storage
from raycascade.batch import Batch, collate
from raycascade.bundle import Bundle, load_bundle, save_bundle, write_manifest
from raycascade.cascade import Cascade
from raycascade.config import Config, load_config, parse_config
from raycascade.errors import BundleError, ConfigError, DataError
from raycascade.features import FeatureState
from raycascade.fitting import FitPart, declared_space
from raycascade.flows.prepare import open_dataset
from raycascade.flows.semantic_ids import reused
from raycascade.items import ItemTable
from raycascade.models._inputs import FieldInputs, InputOptions
from raycascade.schema import FeatureSchema, FeatureSpace
from raycascade.semantic_ids.artefact import ItemContent, SemanticIds
from raycascade.semantic_ids.columns import declared_features, seen_by, with_features, with_tokens
from raycascade.semantic_ids.rqvae import RQVAE
from raycascade.semantic_ids.tokenizers import Tokenizer
from raycascade.semantic_ids.training import RQVAETraining
from tests import tiny_world

ROOT = Path(__file__).resolve().parents[2]
RQ = {"levels": 3, "codes": 8, "hidden": [6], "dim": 4, "batch": 32, "steps": 5}
KINDS = {"main": {"rows": 60}, "grams": {"kind": "bigram", "rows": 50}}
TWINS, BARE = (7, 8), 5  # positions of two items of the same content, and of one without


def config(**stage: Any) -> Config:
    """Three stages; the ranker has the options. Of the others one adds, one hides the tokens."""
    models = {"retriever": "two_tower", "pre_ranker": "mlp", "ranker": "din"}
    more = {"retriever": {"exclude": ["same_author", "city_author"]}, "pre_ranker": {"semantic_ids": {"mode": "add"}},
            "ranker": {"semantic_ids": {"mode": "replace"}} | stage}
    return parse_config({
        "dataset": {"name": "simulated"},
        "semantic_ids": {"main": {"content": "content", "rqvae": RQ, "tokenizer": KINDS["main"]},
                         "grams": {"content": "content", "feature": "pairs", "rqvae": RQ, "tokenizer": KINDS["grams"]}},
        "stages": [{"name": name, "keep": keep, "model": {"name": models[name], "dim": 8, "hidden": [16]}, **more[name]}
                   for name, keep in tiny_world.KEEPS.items()]}, where="tiny")


def raw_items() -> pa.Table:
    items = tiny_world.raw_items()
    content = items["content"].to_pylist()
    content[TWINS[1]] = [2 * number for number in content[TWINS[0]]]
    content[BARE] = None
    return items.set_column(items.column_names.index("content"), "content", pa.array(content, pa.list_(pa.float32())))


def learned(name: str, content: ItemContent) -> SemanticIds:
    training = RQVAETraining(RQVAE.Config.model_validate(RQ), *content.training_rows())
    return SemanticIds.build(training.run(), Tokenizer.Config.model_validate(KINDS[name]), content,
                             period_ms=(0, 100))


@pytest.fixture(scope="module")
def ids() -> dict[str, SemanticIds]:
    state = tiny_world.fitted()
    content = ItemContent.of(state.encode_items(raw_items(), where="tiny"), "content", state.counters)
    return {name: learned(name, content) for name in KINDS}


@pytest.fixture(scope="module")
def state(ids: dict[str, SemanticIds]) -> FeatureState:
    state = tiny_world.fitted()
    for name, found in ids.items():
        state = with_features(state, config(), name, found)
    return state


@pytest.fixture(scope="module")
def encoded(state: FeatureState, ids: dict[str, SemanticIds]) -> pa.Table:
    return with_tokens(state.encode_items(raw_items(), where="tiny"), state, ids)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, state: FeatureState, encoded: pa.Table, ids: dict[str, SemanticIds]
        ) -> str:
    """A bundle with random weights."""
    folder = tmp_path_factory.mktemp("sid")
    for name, found in ids.items():
        found.save(str(folder / name))
    torch.manual_seed(3)
    cascade = Cascade(config(), state.space)
    users = state.encode_requests(tiny_world.raw_requests().take(np.arange(7, 200, 8)).drop_columns(
        ["candidates", "click"]), where="tiny", strict=False)
    return save_bundle(str(folder / "bundle"), config=config(), cascade=cascade, encoded_items=encoded, users=users,
                       items=ItemTable.from_encoded(encoded, state), metrics={},
                       semantic_ids={name: str(folder / name) for name in ids})


# ---------------------------------------------------------------- what a stage sees
def seen(space: FeatureSpace, option: dict[str, Any] | None, **stage: Any) -> FeatureSpace:
    return seen_by(config(semantic_ids=option, **stage).stages[2], space)


def of_items(space: FeatureSpace) -> set[str]:
    return {field.name for field in space.of("item")} & {
        "item_id", "sid", "sid_missing", "pairs", "pairs_missing", "sid+item_id", "sid+item_id_missing"}


@pytest.mark.parametrize(("option", "item", "history"), [
    (None, {"item_id"}, {"item_id"}),
    ({"mode": "replace"}, {"sid", "sid_missing"}, {"sid"}),
    ({"mode": "concat"}, {"item_id", "sid", "sid_missing"}, {"item_id", "sid"}),
    ({"mode": "concat", "ids": "grams"}, {"item_id", "pairs", "pairs_missing"}, {"item_id", "pairs"}),
    ({"mode": "add"}, {"sid+item_id", "sid_missing"}, {"sid+item_id"}),
])
def test_a_stage_sees_the_tokens_that_it_asks_for_on_candidates_and_history_alike(
    state: FeatureState, option: dict[str, Any] | None, item: set[str], history: set[str]
):
    space = seen(state.space, option)
    assert of_items(space) == item
    assert set(space.history_fields) - {"author", "tags"} == history
    assert {"author", "tags", "content"} <= {field.name for field in space.of("item")}


@pytest.mark.parametrize(("option", "stage", "message"), [
    ({"features": ["item_ids"]}, {}, "'item_ids' is not an id of the items that the stage sees; did you mean"),
    ({"features": ["tags"]}, {}, "'tags' is not an id of the items"),
    ({}, {"exclude": ["sid"]}, "there are no tokens of 'main'"),
    ({"mode": "add", "features": ["author"]}, {}, r"no sum of 'sid' with \['author'\]; run prepare with this config"),
])
def test_a_stage_that_asks_for_what_is_not_there_is_refused(
    state: FeatureState, option: dict[str, Any], stage: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        seen(state.space, option, **stage)


def test_an_id_that_is_replaced_must_not_stay_elsewhere(state: FeatureState):
    last = state.space["item_id"].model_copy(update={"name": "last_item", "side": "request"})
    space = state.space.model_copy(update={"fields": (*state.space.fields, last)})
    with pytest.raises(ConfigError, match="'last_item' shares the table 'item_id' and would keep the ids"):
        seen(space, {"mode": "replace"})
    assert "sid" in of_items(seen(space, {"mode": "replace"}, exclude=["last_item"]))
    assert "sid" in of_items(seen(space, {"mode": "concat"}))


@pytest.mark.parametrize(("tree", "message"), [
    ({"semantic_ids": {"main": {"content": "content", "rqvae": {"code": 8}}}}, "main.rqvae.code: unknown key"),
    ({"semantic_ids": {"main": {"content": "content", "tokenizer": {"kind": "trigram"}}}}, "main.tokenizer.kind"),
    ({"semantic_ids": {"main": {"conten": "content"}}}, "semantic_ids.main"),
    ({"semantic_ids": {"Main/": {"content": "content"}}}, "'Main/' is a folder's name, too"),
    ({"semantic_ids": {"a": {"content": "content"}, "b": {"content": "content"}}}, "a feature of their own"),
    ({"stages": [{"name": "r", "keep": 1, "model": {"name": "mlp"}, "semantic_ids": {"ids": "main"}}]},
     "stage 'r': semantic_ids: 'main' is not declared in the section semantic_ids"),
    ({"stages": [{"name": "r", "keep": 1, "model": {"name": "mlp"}, "semantic_ids": {"features": []}}]},
     "mode replace needs features"),
    ({"stages": [{"name": "r", "keep": 1, "model": {"name": "mlp"}, "semantic_ids": {"mods": "add"}}]},
     "unknown key; did you mean 'mode'"),
])
def test_a_section_that_cannot_be_is_refused_in_one_line(tree: dict[str, Any], message: str):
    whole = {"dataset": {"name": "simulated"}, "stages": [{"name": "r", "keep": 1, "model": {"name": "mlp"}}], **tree}
    with pytest.raises(ConfigError, match=message) as error:
        parse_config(whole, where="test")
    assert "\n" not in str(error.value)


def test_what_prepare_will_add_is_known_before_the_log_is_read():
    given = declared_features(config(), tiny_world.SCHEMA)
    assert [feature.name for feature in given] == ["sid", "sid+item_id", "pairs"]
    space = declared_space(tiny_world.SCHEMA, given)
    assert list(Cascade(config(), space).models) == list(tiny_world.KEEPS)


@pytest.mark.parametrize(("changes", "message"), [
    ({"content": "contents"}, "'contents' is not a vector feature of the items; did you mean 'content'"),
    ({"content": "content", "feature": "author"}, "'author' is a feature already"),
])
def test_content_and_names_that_do_not_fit_the_data_set_are_refused(changes: dict[str, str], message: str):
    tree = {"dataset": {"name": "simulated"}, "stages": [{"name": "r", "keep": 1, "model": {"name": "mlp"}}]}
    bad = parse_config({**tree, "semantic_ids": {"main": changes}}, where="test")
    with pytest.raises(ConfigError, match=message):
        declared_features(bad, tiny_world.SCHEMA)


def test_a_log_cannot_bring_given_rows():
    own = FeatureSchema.model_validate({"features": [{"kind": "ids", "name": "made", "side": "item", "given": True}]})
    with pytest.raises(ConfigError, match="'made' is given, but no log holds given rows"):
        declared_features(config(), own)


def test_the_commands_of_the_page_have_configs_that_can_be_and_its_example_is_that_config():
    """tests/flow/test_semantic_ids.py runs these verbs with this config, made small."""
    page = (ROOT / "docs" / "semantic-ids.md").read_text()
    commands = [line.split() for line in re.findall(r"^raycascade .+", page, flags=re.M)]
    assert [words[1] for words in commands] == ["prepare", "train", "evaluate", "semantic-ids"]
    for _, _, file, *overrides in commands:
        chosen = load_config(str(ROOT / file), overrides)
    assert chosen.semantic_ids["main"].rqvae["codes"] == 64
    (block,) = re.findall(r"^```yaml\n(.*?)^```", page, flags=re.M | re.S)
    whole, shown = load_config(str(ROOT / "configs" / "semantic_ids.yaml")), yaml.safe_load(block)
    assert whole.semantic_ids["main"].model_dump(exclude_defaults=True) == shown["semantic_ids"]["main"]
    of_page = parse_config({**whole.model_dump(mode="json"), **shown, "lists": {}}, where="page")
    assert of_page.stages[0] == whole.stages[-1]
    schema = open_dataset(whole).schema()
    space = declared_space(schema, declared_features(whole, schema))
    names = {field.name for field in seen_by(whole.stages[2], space).fields}
    assert "sid" in names
    assert "item_id" not in names


# ---------------------------------------------------------------- columns
def test_a_sum_holds_the_tokens_and_behind_all_their_rows_those_of_the_ids(
    state: FeatureState, encoded: pa.Table, ids: dict[str, SemanticIds]
):
    sums, tokens, rows = (encoded[name].to_pylist() for name in ("sid+item_id", "sid", "item_id"))
    assert sums == [found + ([row + ids["main"].num_rows - 2] if row >= 2 else [])
                    for found, row in zip(tokens, rows, strict=True)]
    field = state.space["sid+item_id"]
    assert field.num_rows == ids["main"].num_rows + state.space["item_id"].num_rows - 2
    assert max(max(row, default=0) for row in sums) < field.num_rows
    assert (field.pool, field.width) == ("sum", state.space["sid"].width + 1)


def test_items_of_equal_codes_have_equal_vectors_in_place_of_their_ids_and_others_when_ids_are_added(
    state: FeatureState, encoded: pa.Table
):
    fields = ItemTable.from_encoded(encoded, state).fields(np.array(TWINS) + 2, 0)
    for mode, name, equal in (("replace", "sid", True), ("add", "sid+item_id", False)):
        space = seen(state.space, {"mode": mode})
        vectors_ND = FieldInputs(InputOptions(dim=5), space, model="test").matrix(fields, [space[name]], (2,))
        assert torch.equal(vectors_ND[0], vectors_ND[1]) == equal
        assert vectors_ND.abs().min() > 0


def test_an_item_without_content_has_no_token_and_an_indicator(state: FeatureState, encoded: pa.Table):
    items = ItemTable.from_encoded(encoded, state)
    assert encoded["sid"].to_pylist()[BARE] == []
    fields = items.fields(np.array([0, 1, BARE + 2, TWINS[0] + 2]), 0)
    assert fields["sid_missing"].tolist() == [0.0, 1.0, 1.0, 0.0]
    assert fields["sid"][:3].sum() == 0
    inputs = FieldInputs(InputOptions(dim=5), seen(state.space, {"mode": "replace"}), model="test")
    assert inputs.matrix(fields, [state.space["sid"]], (4,))[2].tolist() == [0.0] * 5


def test_items_that_appear_after_training_change_no_byte_of_what_is_learned(
    tmp_path: Path, ids: dict[str, SemanticIds]
):
    """Scales, codes, tokenizer: all come from the items that were shown."""
    raw = raw_items()
    rng = np.random.default_rng(5)
    new = raw.take(pa.array(rng.integers(0, len(raw), 1000)))
    new = new.set_column(0, "item_id", pa.array(np.arange(1000), pa.int64()))
    vectors = pa.array(list(rng.normal(3.0, 9.0, (1000, 4)).astype(np.float32)), pa.list_(pa.float32()))
    new = new.set_column(new.column_names.index("content"), "content", vectors)
    both = pa.concat_tables([raw, new])
    part = FitPart(tiny_world.SCHEMA)
    part.add_requests(tiny_world.raw_requests(), where="tiny")
    part.add_items(both, where="tiny")
    state = part.finish(both, as_of_ms=tiny_world.fitted().as_of_ms)
    content = ItemContent.of(state.encode_items(both, where="tiny"), "content", state.counters)
    assert (content.impressions_N[len(raw):] == 0).all()
    later = learned("main", content)
    for name, found in (("before", ids["main"]), ("after", later)):
        found.save(str(tmp_path / name))
    for file in ("rqvae.safetensors", "rqvae.json", "tokenizer.json", "pieces.model"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes(), file
    assert (later.codes_NL[:len(raw)] == ids["main"].codes_NL).all()
    assert len(np.unique(later.codes_NL[len(raw):], axis=0)) > 1


# ---------------------------------------------------------------- bundles and items that are new when serving
def batch_of(bundle: Bundle, items: ItemTable, rows: "list[int]") -> Batch:
    """Two requests whose candidates are the rows."""
    requests = bundle.state.encode_requests(tiny_world.raw_requests().slice(0, 2), where="tiny")
    rows_QC = torch.tensor([rows, rows])
    return collate(requests, items).with_candidates(rows_QC, rows_QC > 0, items)


def test_a_bundle_keeps_the_semantic_ids_and_their_versions(uri: str, ids: dict[str, SemanticIds]):
    bundle = load_bundle(uri)
    assert bundle.manifest["semantic_ids"] == {name: found.version for name, found in ids.items()}
    assert {name: found.version for name, found in bundle.semantic_ids.items()} == bundle.manifest["semantic_ids"]
    assert "semantic_ids/main/rqvae.safetensors" in bundle.manifest["files"]
    assert bundle.recommend(bundle.users.table).final.kept()[1].any()


def test_a_new_item_becomes_the_row_of_a_catalogue_that_always_had_it_and_scores_alike(uri: str):
    """Nothing is trained: the weights' bytes stay, and the item needs nobody but itself."""
    bundle, before = load_bundle(uri), storage.sha256(f"{uri}/stages/ranker/weights.safetensors")
    rng = np.random.default_rng(2)
    new = tiny_world.raw_items().slice(20, 3).set_column(0, "item_id", pa.array([1, 2, 3], pa.int64()))
    vectors = [*rng.normal(size=(2, 4)).astype(np.float32).tolist(), None]
    new = new.set_column(new.column_names.index("content"), "content", pa.array(vectors, pa.list_(pa.float32())))
    whole = bundle.encode_items(pa.concat_tables([raw_items(), new]))
    assert whole.slice(0, bundle.items.num_items).equals(pq.read_table(f"{uri}/items/items.parquet"))
    alone = [bundle.encode_items(new.slice(n, 1)) for n in range(3)]
    assert pa.concat_tables(alone).equals(whole.slice(bundle.items.num_items))
    assert [len(tokens) > 0 for tokens in whole["sid"].to_pylist()[-3:]] == [True, True, False]

    one_by_one = bundle.items
    for row in alone:
        one_by_one = one_by_one.with_items(row)
    indexed = replace(ItemTable.from_encoded(whole, bundle.state), count_stats=bundle.items.count_stats)
    rows = [3, len(raw_items()) + 2, len(raw_items()) + 3, len(raw_items()) + 4]
    assert one_by_one.ids_of(np.array(rows)) == [tiny_world.item_id(1), 1, 2, 3]
    for name in bundle.cascade.names:
        scores = [bundle.cascade.score(name, batch_of(bundle, items, rows)) for items in (one_by_one, indexed)]
        assert torch.equal(*scores)
        assert torch.isfinite(scores[0]).all()
        alone_QC = bundle.cascade.score(name, batch_of(bundle, bundle.items, rows[:1]))
        torch.testing.assert_close(scores[0][:, :1], alone_QC)
    ranker = bundle.cascade.score("ranker", batch_of(bundle, one_by_one, rows))
    assert ranker[0, 1] != ranker[0, 2]
    assert storage.sha256(f"{uri}/stages/ranker/weights.safetensors") == before


def test_a_new_item_with_a_trained_twin_has_its_tokens(uri: str):
    bundle = load_bundle(uri)
    twin = raw_items().slice(TWINS[0], 1).set_column(0, "item_id", pa.array([1], pa.int64()))
    assert bundle.encode_items(twin)["sid"][0] == bundle.encode_items(raw_items().slice(TWINS[1], 1))["sid"][0]


@pytest.mark.parametrize(("content", "message"), [
    ([1.0, 2.0, 3.0], "vector 'content' must have 4 numbers, got 3"),
    ([1.0, float("nan"), 0.0, 0.0], "vector 'content' holds NaN or infinity"),
])
def test_content_that_does_not_fit_is_refused_in_one_line(uri: str, content: list[float], message: str):
    bundle, row = load_bundle(uri), raw_items().slice(0, 1)
    column = row.column_names.index("content")
    with pytest.raises(DataError, match=message):
        bundle.encode_items(row.set_column(column, "content", pa.array([content], pa.list_(pa.float32()))))
    with pytest.raises(DataError, match="column 'content' is missing"):
        bundle.encode_items(row.drop_columns(["content"]))


def test_an_item_that_is_there_already_is_refused(uri: str):
    bundle = load_bundle(uri)
    with pytest.raises(DataError, match=f"items: {tiny_world.item_id(4)} is in the catalogue already"):
        bundle.items.with_items(bundle.encode_items(raw_items().slice(4, 1)))


def test_items_with_tokens_of_another_version_are_refused(uri: str, tmp_path: Path, ids: dict[str, SemanticIds]):
    target = str(tmp_path / "bundle")
    for file in storage.list_files(uri):
        storage.copy_file(f"{uri}/{file}", f"{target}/{file}")
    other = replace(ids["main"], facts={**ids["main"].facts, "fingerprint": "0" * 16})
    other.save(f"{target}/semantic_ids/main")
    write_manifest(target, fingerprint=json.loads(storage.read_bytes(f"{uri}/manifest.json"))["fingerprint"])
    with pytest.raises(BundleError, match=f"sid: tokens of semantic ids {ids['main'].version}, but these are "
                                          f"{other.version}; run prepare and train again"):
        load_bundle(target)
    storage.remove_folder(f"{target}/semantic_ids/main")
    write_manifest(target, fingerprint=json.loads(storage.read_bytes(f"{uri}/manifest.json"))["fingerprint"])
    with pytest.raises(BundleError, match="'sid' needs the semantic ids 'main', which are not there"):
        load_bundle(target)


def test_ids_that_have_seen_a_later_time_are_not_reused(tmp_path: Path, ids: dict[str, SemanticIds]):
    ids["main"].save(str(tmp_path))
    tree = config().model_dump(mode="json")
    tree["semantic_ids"]["main"]["reuse"] = str(tmp_path)
    chosen = parse_config(tree, where="test")
    half = ItemContent(ids["main"].item_ids[:9], np.eye(4, dtype=np.float32)[np.arange(9) % 4], np.ones(9))
    again = reused(chosen, "main", half, until_ms=100)
    assert again.version == ids["main"].version
    assert (again.codes_NL == ids["main"].model.encode(half.vectors_NV)).all()
    with pytest.raises(ConfigError, match="learned from what was shown until 1970-01-01T00:00Z, but the training log"):
        reused(chosen, "main", half, until_ms=99)

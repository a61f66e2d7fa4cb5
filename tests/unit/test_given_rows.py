"""Tokens of semantic ids as an ordinary feature: candidates and history have the same rows, and models add them up."""

from pathlib import Path

import pyarrow as pa
import pytest
import torch

from raycascade.batch import Batch, collate
from raycascade.cascade import Cascade
from raycascade.features import FeatureState
from raycascade.items import ItemTable
from raycascade.models._inputs import FieldInputs, InputOptions
from raycascade.schema import IdsFeature
from raycascade.semantic_ids.artefact import ItemContent, SemanticIds
from raycascade.semantic_ids.rqvae import RQVAE
from raycascade.semantic_ids.tokenizers import Tokenizer
from raycascade.semantic_ids.training import RQVAETraining
from tests import tiny_world

World = tuple[FeatureState, pa.Table, SemanticIds]


@pytest.fixture(scope="module")
def world() -> World:
    """The fitted state with tokens, the encoded items with their column, and the semantic ids."""
    state = tiny_world.fitted()
    encoded = state.encode_items(tiny_world.raw_items(), where="tiny")
    content = ItemContent.of(encoded, "content", state.counters)
    training = RQVAETraining(RQVAE.Config(levels=3, codes=8, hidden=(), dim=4, batch=32, steps=5),
                             *content.training_rows())
    ids = SemanticIds.build(training.run(), Tokenizer.Config(rows=60), content, period_ms=(0, state.as_of_ms))
    feature = IdsFeature(name="sid", side="item", vocabulary="semantic_ids/main", max_len=ids.tokenizer.max_tokens,
                         pool="sum", given=True)
    column = ids.tokens(content.vectors_NV).to_arrow()
    return state.with_given(feature, ids.num_rows), encoded.append_column("sid", column), ids


def _batch(state: FeatureState, encoded: pa.Table) -> Batch:
    items = ItemTable.from_encoded(encoded, state)
    return collate(state.encode_requests(tiny_world.raw_requests(), where="tiny"), items)


def test_candidate_and_history_of_an_item_have_the_same_rows(world: World):
    state, encoded, _ = world
    batch = _batch(state, encoded)
    column = encoded["sid"].to_pylist()
    assert "sid" in state.space.history_fields
    for rows, values, mask in ((batch.candidates_QC, batch.item["sid"], batch.mask_QC),
                               (batch.history_rows_QL, batch.history["sid"], batch.history_mask_QL)):
        for row, tokens in zip(rows[mask].tolist(), values[mask].tolist(), strict=True):
            assert [token for token in tokens if token] == column[row - 2]


def test_the_vector_is_the_sum_of_the_rows_and_padding_adds_nothing(world: World):
    state, _, ids = world
    field = state.space["sid"]
    assert (field.num_rows, field.pool, field.width) == (ids.num_rows, "sum", 3)
    inputs = FieldInputs(InputOptions(dim=5), state.space, model="test")
    tokens = torch.tensor([[4, 4, 9], [7, 0, 0], [0, 0, 0]])
    seen = inputs.matrix({"sid": tokens}, [field], (3,))
    assert inputs.tables is not None
    table = inputs.tables.of("semantic_ids/main")
    torch.testing.assert_close(seen, torch.stack([2 * table[3] + table[8], table[6], torch.zeros(5)]))


def test_the_state_keeps_given_rows_when_it_is_loaded_again(tmp_path: Path, world: World):
    state, _, _ = world
    state.save(str(tmp_path))
    again = FeatureState.load(str(tmp_path))
    assert again.space == state.space
    assert again.schema == state.schema
    assert again.encode_items(tiny_world.raw_items(), where="tiny").column_names == [
        name for name in state.encode_items(tiny_world.raw_items(), where="tiny").column_names if name != "sid"]


def test_models_score_with_tokens(world: World):
    state, encoded, _ = world
    cascade = Cascade(tiny_world.config(), state.space).eval()
    batch = _batch(state, encoded)
    scores = cascade.models["ranker"](batch)
    assert bool(torch.isfinite(scores[batch.mask_QC]).all())

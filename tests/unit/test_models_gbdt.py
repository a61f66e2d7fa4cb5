"""Trees alone: leaves worked out by hand, the table they read, what is refused, their files."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from raycascade.batch import Batch
from raycascade.errors import ConfigError
from raycascade.models._tree_columns import TreeColumns
from raycascade.schema import FeatureSpace, Field
from raycascade.training.gbdt import fit_rows
from tests.f3 import close
from tests.model_cases import SPACE, random_batch
from tests.tree_rows import fitted, hand_rows, model_of, rows_of

ONE = FeatureSpace(fields=(Field(name="x", side="item", form="dense"),))
STUMP = {"rounds": 1, "depth": 1, "eta": 1.0, "subsample": 1.0, "colsample": 1.0, "min_child_weight": 0.0, "l2": 1.0,
         "base_score": 0.5}


def stump(labels: list[float], **options: Any) -> Any:
    """One round on the column 0, 0, 1, 1; the margins of the four rows."""
    model = model_of(ONE, **{**STUMP, **options})
    fit_rows(model, hand_rows([[0], [0], [1], [1]], labels), keep=1, seed=0, threads=1)
    return scores(model, [0.0, 0.0, 1.0, 1.0])


def scores(model: Any, values: list[float]) -> torch.Tensor:
    """The margins of candidates with these values of x, in one request."""
    return model(one_list({"x": torch.tensor([values])}))[0, :, 0]


def one_list(item: dict[str, torch.Tensor], *, history: dict[str, torch.Tensor] | None = None,
             events: torch.Tensor | None = None) -> Batch:
    """One request with these candidates and this history."""
    width = next(iter(item.values())).shape[1]
    events = torch.zeros(1, 0, dtype=torch.bool) if events is None else events
    return Batch(user={}, item=item, history=history or {}, history_mask_QL=events,
                 history_rows_QL=torch.zeros(events.shape, dtype=torch.long), time_ms_Q=torch.zeros(1),
                 candidates_QC=torch.full((1, width), 2), mask_QC=torch.ones(1, width, dtype=torch.bool))


# ---------------------------------------------------------------- leaves
def test_leaves_are_minus_the_gradients_over_the_hessians_and_lambda():
    """Left: G = 2 * 0.5, H = 2 * 0.25, leaf = -1 / 1.5."""
    close(stump([0, 0, 1, 1]), [-2 / 3, -2 / 3, 2 / 3, 2 / 3])


def test_a_leaf_with_as_many_ones_as_zeros_is_zero():
    close(stump([0, 0, 1, 0]), [-2 / 3, -2 / 3, 0.0, 0.0])


def test_a_leaf_below_the_least_weight_is_not_made():
    """Each side of the split has H = 0.5; without the split G = 0."""
    close(stump([0, 0, 1, 1], min_child_weight=1.0), [0.0] * 4)


def test_the_base_is_fitted_where_none_is_given_and_is_part_of_the_margin():
    """p = 1/4: left G = 1/2, H = 3/8, leaf = -(1/2) / (11/8); right G = -1/2; both on top of ln(1/3)."""
    by_hand = [np.log(1 / 3) + sign * 4 / 11 for sign in (-1, -1, 1, 1)]
    close(stump([0, 0, 1, 0], base_score=None), by_hand, atol=1e-5)


def test_a_missing_number_goes_to_the_side_that_was_learnt_and_not_to_zero():
    model = model_of(ONE, **STUMP)
    rows = hand_rows([[0], [0], [1], [1], [np.nan], [np.nan]], [0, 0, 1, 1, 1, 1])
    fit_rows(model, rows, keep=1, seed=0, threads=1)
    margins = scores(model, [0.0, 1.0, float("nan")])
    assert margins[2] == margins[1] > margins[0]


def test_a_category_is_a_set_and_not_an_order():
    """Labels 1, 0, 1 of three values: a threshold on the codes takes two splits, a set one."""
    space = FeatureSpace(fields=(Field(name="x", side="item", form="id", table="x", num_rows=5),))
    model = model_of(space, **STUMP)
    codes, labels = [0, 0, 1, 1, 2, 2], [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    fit_rows(model, hand_rows([[code] for code in codes], labels), keep=1, seed=0, threads=1)
    margins = model(one_list({"x": torch.tensor([[2, 3, 4]])}))[0, :, 0]
    assert margins[0] > 0
    assert margins[2] > 0
    assert margins[1] < 0


def test_rank_ndcg_orders_within_requests_only():
    """Request 0 prefers x = 1 to 0, request 1 prefers 11 to 10: labels across requests say nothing."""
    options = {**STUMP, "base_score": None, "objective": "rank:ndcg", "rounds": 20, "depth": 2, "eta": 0.3}
    model = model_of(ONE, **options)
    rows = hand_rows([[0], [1], [10], [11]] * 5, [0, 1, 0, 1] * 5, np.repeat(np.arange(10), 2).tolist())
    fit_rows(model, rows, keep=1, seed=0, threads=1)
    low, high, other_low, other_high = scores(model, [0.0, 1.0, 10.0, 11.0]).tolist()
    assert high > low
    assert other_high > other_low
    assert not model.calibrated


def test_requests_with_one_label_value_are_left_out_of_an_order():
    rows = hand_rows([[0], [1], [2], [3], [4]], [0, 0, 1, 0, 1], [4, 4, 6, 7, 7])
    kept = rows.comparable()
    assert kept.columns_RF[:, 0].tolist() == [3.0, 4.0]
    assert kept.request_R.tolist() == [7, 7]


def test_the_trees_after_the_best_round_of_the_validation_rows_are_dropped():
    """The labels of the validation rows are the opposite of what was learnt."""
    model, batch = model_of(ONE, rounds=60, early_stop=3), random_batch(num_requests=40, space=SPACE)
    labels = torch.randint(0, 2, (40, 5, 1), generator=torch.Generator().manual_seed(1))
    values = {"x": torch.randn(40, 5, generator=torch.Generator().manual_seed(2))}
    rows = rows_of(model, replace(batch, user={}, item=values), labels)
    held = replace(rows, labels_RT=1 - rows.labels_RT)
    fit_rows(model, rows, held, keep=3, seed=0, threads=1)  # worse with every round
    assert model.boosters[0].num_boosted_rounds() == 1
    fit_rows(model, rows, keep=3, seed=0, threads=1)
    assert model.boosters[0].num_boosted_rounds() == 60


# ---------------------------------------------------------------- columns
HISTORY = FeatureSpace(
    fields=(
        Field(name="item_id", side="item", form="id", table="item_id", num_rows=1000),
        Field(name="tags", side="item", form="ids", table="tag", num_rows=9, width=2),
        Field(name="content", side="item", form="vector", width=2),
        Field(name="action", side="event", form="id", table="action", num_rows=4),
        Field(name="share", side="event", form="dense"),
    ),
    history_len=4, history_fields=("item_id", "tags", "content"),
)


def test_the_columns_of_a_history_by_hand():
    batch = one_list(
        {"item_id": torch.tensor([[7, 8, 1]]), "tags": torch.tensor([[[2, 0], [3, 4], [0, 0]]]),
         "content": torch.tensor([[[1.0, 0.0], [0.0, -2.0], [0.0, 0.0]]])},
        history={"item_id": torch.tensor([[7, 9, 7, 8, 7]]), "action": torch.tensor([[2, 3, 3, 2, 2]]),
                 "tags": torch.tensor([[[2, 3], [3, 0], [5, 4], [0, 0], [2, 0]]]),
                 "share": torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5]]),
                 "content": torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [2.0, 2.0], [9.0, 9.0]]])},
        events=torch.tensor([[True, True, True, True, False]]))
    columns = TreeColumns(HISTORY, max_categories=256)
    table = dict(zip([c.name for c in columns.columns], columns.table(batch).T.tolist(), strict=True))
    assert "item_id" not in table
    nan = float("nan")
    half = 2 ** -0.5
    expected = {
        "tags.count": [1, 2, 0], "history.length": [4, 4, 4],
        "history.item_id.matches": [2, 1, 0], "history.item_id.since": [1, 0, nan],
        "history.item_id.last.action": [1, 0, nan], "history.item_id.last.share": [0.3, 0.4, nan],
        "history.tags.matches": [1, 3, 0], "history.tags.since": [3, 1, nan],
        "history.tags.last.action": [0, 1, nan], "history.tags.last.share": [0.1, 0.3, nan],
        "history.content.cosine": [half, -half, nan],
    }
    assert table.keys() == expected.keys()
    for name, values in expected.items():
        assert table[name] == pytest.approx(values, nan_ok=True, abs=1e-6), name
    kinds = {column.name: column.kind for column in columns.columns}
    assert [name for name, kind in kinds.items() if kind == "c"] == [
        "history.item_id.last.action", "history.tags.last.action"]


def test_unknown_values_are_missing_and_never_match():
    batch = one_list({"item_id": torch.tensor([[1]]), "tags": torch.tensor([[[1, 0]]]),
                      "content": torch.ones(1, 1, 2)},
                     history={"item_id": torch.tensor([[1]]), "tags": torch.tensor([[[1, 0]]]),
                              "action": torch.tensor([[1]]), "share": torch.tensor([[0.5]]),
                              "content": torch.ones(1, 1, 2)}, events=torch.ones(1, 1, dtype=torch.bool))
    columns = TreeColumns(HISTORY, max_categories=2000)
    table = dict(zip([c.name for c in columns.columns], columns.table(batch)[0].tolist(), strict=True))
    assert np.isnan(table["item_id"])
    assert table["history.item_id.matches"] == table["history.tags.matches"] == 0


def test_the_order_of_the_batch_and_of_its_mappings_changes_nothing():
    model, batch = fitted(), random_batch()
    turned = replace(batch, **{side: dict(reversed(getattr(batch, side).items()))
                               for side in ("user", "item", "history")})
    assert torch.equal(model(turned), model(batch))


def test_what_is_excluded_from_the_stage_is_no_column():
    names = {column.name for column in model_of(SPACE.without(("history", "price"))).columns.columns}
    assert "price" not in names
    assert not any(name.startswith("history.") for name in names)
    assert "type" in names


def test_importance_is_of_the_column_that_decides():
    space = FeatureSpace(fields=(Field(name="noise", side="item", form="dense"),
                                 Field(name="signal", side="item", form="dense")))
    draw = np.random.default_rng(0)
    values = draw.normal(size=(400, 2)).astype(np.float32)
    model = model_of(space, rounds=5, subsample=1.0, colsample=1.0)
    fit_rows(model, hand_rows(values.tolist(), (values[:, 1] > 0).tolist()), keep=1, seed=0, threads=1)
    (one,) = model.importance
    assert one.shap_F[1] > 10 * one.shap_F[0]
    assert one.gain_F[1] > 10 * one.gain_F[0]


def test_the_shap_values_of_a_stump_are_its_leaves():
    """Both leaves are 2/3 away from the mean 0; the only split gains 2 * (1 / 1.5) - 0."""
    model = model_of(ONE, **STUMP)
    fit_rows(model, hand_rows([[0], [0], [1], [1]], [0, 0, 1, 1]), keep=1, seed=0, threads=1)
    (one,) = model.importance
    assert one.shap_F == pytest.approx([2 / 3])
    assert one.gain_F == pytest.approx([4 / 3])


# ---------------------------------------------------------------- refused
@pytest.mark.parametrize(("options", "num_tasks", "message"), [
    ({"label": "clik"}, 1, "'clik' is not a label of the log; did you mean 'click'"),
    ({"objective": "rank:ndcg"}, 2, "orders by one label, got 2 tasks"),
    ({"label": "click"}, 2, "both name labels"),
    ({"objective": "rank:ndcg", "base_score": 0.5}, 1, "no probability to start from"),
])
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], num_tasks: int, message: str):
    with pytest.raises(ConfigError, match=message):
        model_of(SPACE, num_tasks=num_tasks, **options)


def test_a_space_without_anything_to_tell_candidates_apart_is_refused():
    space = FeatureSpace(fields=(Field(name="age", side="request", form="dense"),
                                 Field(name="item_id", side="item", form="id", table="item_id", num_rows=1000)))
    with pytest.raises(ConfigError, match="no feature of the candidates is left that trees can read"):
        model_of(space)


# ---------------------------------------------------------------- files
@pytest.mark.parametrize(("change", "message"), [
    (lambda facts: facts["columns"].reverse(), "lists .* as column 0 where the features give"),
    (lambda facts: facts["columns"].pop(), "columns where the features give"),
    (lambda facts: facts.update(objective="rank:ndcg"), "fitted by rank:ndcg, the config says binary:logistic"),
])
def test_trees_over_other_columns_are_not_loaded(change: Any, message: str):
    model = fitted()
    files = model.to_files()
    facts = json.loads(files["columns.json"])
    change(facts)
    with pytest.raises(RuntimeError, match=message):
        model_of(SPACE).from_files({**files, "columns.json": json.dumps(facts).encode()})


def test_trees_that_cannot_be_read_or_are_missing_are_named():
    files = fitted().to_files()
    with pytest.raises(RuntimeError, match=r"model\.ubj cannot be read"):
        model_of(SPACE).from_files({**files, "model.ubj": b"nothing"})
    with pytest.raises(RuntimeError, match="were expected"):
        model_of(SPACE, num_tasks=2).from_files(files)

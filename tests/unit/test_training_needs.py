"""What some models' training batches bring beyond the log: items beside events, and how popular candidates are."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from raycascade.batch import collate
from raycascade.errors import ConfigError, DataError
from raycascade.items import ItemTable
from raycascade.models._in_batch import hidden_among_positives, in_batch_softmax
from raycascade.schema import FIRST_ROW
from raycascade.shards import Shards
from raycascade.training.loop import Place, Run
from raycascade.training.sampling import Catalogue, with_history_negatives, with_item_shares
from tests import model_cases
from tests.f3 import close
from tests.tiny_shards import STAGES, same, train_config, trained, weights, write_shards

DIEN = {**STAGES[-1], "model": {"name": "dien", "dim": 4, "hidden": [8]}}
IN_BATCH = {**STAGES[0], "model": {**STAGES[0]["model"], "in_batch_weight": 0.5}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(str(tmp_path_factory.mktemp("shards") / "s"))


# ---------------------------------------------------------------- items beside the history's
def small(items: ItemTable, num: int) -> ItemTable:
    """The table cut to so many items."""
    cut = num + FIRST_ROW
    return replace(items, static={n: x[:cut] for n, x in items.static.items()}, keys=items.keys[:num],
                   source_ms={n: x[:cut] for n, x in items.source_ms.items()})


def test_every_other_item_is_drawn_equally_often_and_the_events_own_never(shards: str):
    opened = Shards.open(shards)
    items = small(opened.items, 4)
    batch = collate(opened.table("requests/test").slice(0, 1), opened.items)
    own_QL = torch.tensor([[2, 3, 5, 1]] * 3000)  # three items, and one that is unknown
    found = with_history_negatives(replace(batch, history_rows_QL=own_QL), items, rng=np.random.default_rng(0))
    assert found.history_negatives is not None
    assert set(found.history_negatives) == set(items.state.space.history_fields)
    rows_QL = found.history_negatives["item_id"].numpy()
    known = {int(items.static["item_id"][row]): row for row in range(FIRST_ROW, FIRST_ROW + 4)}
    for column, own in enumerate((2, 3, 5, None)):
        drawn, counts = np.unique(rows_QL[:, column], return_counts=True)
        assert {known[int(value)] for value in drawn} == {2, 3, 4, 5} - {own}
        assert np.abs(counts / 3000 - 1 / len(drawn)).max() < 0.05


def test_dien_trains_as_the_last_stage_the_same_every_time_and_reports_its_own_loss(shards: str):
    config = train_config(shards, stages=[*STAGES[:2], DIEN], train={"epochs": 1})
    run, progress = trained(config)
    assert np.isfinite([value for _, value in progress.curves["aux/ranker"]]).all()
    again, _ = trained(config)
    assert same(weights(run), weights(again))
    assert "history_negatives" in run.cascade.training_needs


def test_the_validation_loss_is_that_of_the_task_alone(shards: str):
    """An auxiliary loss says nothing about the ranking, so it has no say in when to stop."""
    run, _ = trained(train_config(shards, stages=[*STAGES[:2], DIEN]))
    rows = next(iter(run.reader("train").batches(0)))
    batch = with_history_negatives(collate(rows, run.shards.items, keep=run.cascade.quotas, k=run.config.lists.k),
                                   run.shards.items, rng=np.random.default_rng(0))
    training, validating = (run.objective(run.cascade.train(mode), batch, run.catalogue, np.random.default_rng(1))
                            for mode in (True, False))
    assert "aux/ranker" in training.parts
    assert set(training.parts) - set(validating.parts) == {"aux/ranker"}


def test_dien_resumed_in_the_middle_of_an_epoch_ends_with_the_same_weights(shards: str):
    config = train_config(shards, stages=[*STAGES[:2], DIEN])
    whole, _ = trained(config)
    half = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 4})})
    run, progress = trained(half)
    resumed = replace(run, config=config)
    trained(config, run=resumed, progress=replace(progress, finished=False, epoch=0, step=4))
    assert same(weights(resumed), weights(whole))


def test_a_cascade_without_such_a_model_draws_nothing(shards: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("drawn")

    monkeypatch.setattr("raycascade.training.loop.with_history_negatives", refuse)
    run, _ = trained(train_config(shards))
    assert run.cascade.training_needs == set()


# ---------------------------------------------------------------- positives of a batch against one another
def test_the_corrected_softmax_equals_the_hand_computed_losses():
    scores_PP, shares_P = torch.tensor([[2.0, 1.0], [0.5, 1.5]]), torch.tensor([0.6, 0.1])
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    close(in_batch_softmax(scores_PP, shares_P, nothing), (1.165422 + 0.059507) / 2)
    close(in_batch_softmax(scores_PP, torch.ones(2), nothing), 0.313262)
    assert float(in_batch_softmax(scores_PP[:0, :0], shares_P[:0], nothing[:0, :0])) == 0.0


def test_the_same_item_and_the_same_request_are_no_negatives():
    hidden = hidden_among_positives(torch.tensor([7, 8, 7, 9]), torch.tensor([0, 0, 1, 2]))
    assert hidden.tolist() == [[False, True, True, False], [True, False, False, False], [True, False, False, False],
                               [False] * 4]
    scores_PP = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    shares_P = torch.tensor([0.4, 0.1, 0.4, 0.2])
    expected = [-torch.log_softmax((scores_PP[i] - shares_P.log())[~hidden[i]], 0)[int((~hidden[i])[:i].sum())]
                for i in range(4)]
    close(in_batch_softmax(scores_PP, shares_P, hidden), torch.stack(expected).mean())


def positives_batch(shards: str) -> Any:
    opened = Shards.open(shards)
    catalogue = Catalogue.of(opened.items)
    return with_item_shares(collate(opened.table("requests/test").slice(0, 6), opened.items), catalogue), catalogue


def test_the_shares_are_those_of_the_training_positives_plus_one(shards: str):
    batch, catalogue = positives_batch(shards)
    items = catalogue.items
    counts = items.state.counters.as_of(items.all_rows, 1 << 60, "click") + 1.0
    expected = counts[batch.candidates_QC.numpy() - FIRST_ROW] / counts.sum()
    close(batch.targets.item_shares_QC, expected, atol=1e-7)


@pytest.mark.parametrize("item_bias", [False, True])
def test_the_loss_of_a_batch_is_the_softmax_over_the_scores_of_its_positives(shards: str, item_bias: bool):
    batch, _ = positives_batch(shards)
    space = Shards.open(shards).state.space
    options = {"in_batch_weight": 0.5, "item_bias": item_bias}
    model = model_cases.build("two_tower", options, space=space.without(("pair",)))
    logits, extra = model.train_outputs(batch)
    close(logits, model(batch), atol=1e-10)
    positive = batch.mask_QC & (batch.targets.labels["click"] > 0.5)
    q_P, c_P = positive.nonzero(as_tuple=True)
    item = {name: x[q_P, c_P] for name, x in batch.item.items()}
    scores_PP = model.score_items(model.encode_request(batch), item)[q_P]
    expected = in_batch_softmax(scores_PP, batch.targets.item_shares_QC[q_P, c_P],
                                hidden_among_positives(batch.candidates_QC[q_P, c_P], q_P))
    close(extra["in_batch"], 0.5 * expected, atol=1e-7)


def test_the_retriever_trains_with_it_and_without_it_the_model_asks_for_nothing(shards: str):
    run, progress = trained(train_config(shards, stages=[IN_BATCH, *STAGES[1:]]))
    curve = [value for _, value in progress.curves["in_batch/retriever"]]
    assert np.mean(curve[-3:]) < np.mean(curve[:3])
    assert run.cascade.training_needs == {"item_shares"}
    assert model_cases.build("two_tower", {}).training_needs == set()


def test_what_cannot_give_in_batch_negatives_is_refused(shards: str):
    space = model_cases.SPACE
    with pytest.raises(ConfigError, match=r"two_tower: in_batch_weight needs a label .*'clik' is not a label.*'click'"):
        model_cases.build("two_tower", {"in_batch_weight": 1.0, "in_batch_label": "clik"})
    with pytest.raises(ConfigError, match=r"in_batch_weight needs a label .*the log has none"):
        model_cases.build("two_tower", {"in_batch_weight": 1.0}, space=space.model_copy(update={"labels": ()}))
    with pytest.raises(DataError, match="the label 'click' and item_shares_QC"):
        model_cases.build("two_tower", {"in_batch_weight": 1.0}).train_outputs(model_cases.random_batch())
    stage = {**IN_BATCH, "loss": {"name": "softmax", "label": "click", "over": "catalogue"}}
    with pytest.raises(ConfigError, match="in_batch_weight both bring negatives"):
        Run.build(train_config(shards, stages=[stage, *STAGES[1:]]), Shards.open(shards), Place())

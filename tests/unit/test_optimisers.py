"""Penalties of tables, and the learning rates and weight decays of a stage's groups: by hand and by brute force."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycascade.batch import Batch, collate
from raycascade.config import Train
from raycascade.errors import ConfigError
from raycascade.models._tables import JoinedTables
from raycascade.shards import Shards
from raycascade.training import checkpoint, penalties
from raycascade.training.checkpoint import Progress
from raycascade.training.loop import Place, Run, Save, fit
from raycascade.training.optimisers import Optimisers
from raycascade.training.penalties import TablePenalties
from tests.f3 import close
from tests.tiny_shards import STAGES, train_config, trained, write_shards

LR: dict[str, Any] = {"name": "ranker", "keep": 5, "model": {"name": "lr"}}
DEEPFM: dict[str, Any] = {"name": "ranker", "keep": 5, "model": {"name": "deepfm", "dim": 4, "hidden": [8]}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(str(tmp_path_factory.mktemp("shards") / "s"), num_files=1)


def run_of(shards: str, *stages: dict[str, Any], **train: Any) -> Run:
    return Run.build(train_config(shards, stages=list(stages), loss={"name": "bce", "label": "click"}, train=train),
                     Shards.open(shards), Place())


def tables_of(model: nn.Module) -> list[nn.Embedding]:
    return [m for m in model.modules() if isinstance(m, nn.Embedding)]


# ---------------------------------------------------------------- by hand
def table_with_gradient(rows: list[int], values: list[float]) -> nn.Parameter:
    """Rows 0, 10, 20, 30 and 40, one number each."""
    table = nn.Parameter(10.0 * torch.arange(5.0)[:, None])
    table.grad = torch.sparse_coo_tensor(torch.tensor([rows]), torch.tensor(values)[:, None], (5, 1),
                                         check_invariants=True).coalesce()
    return table


def test_a_touched_row_is_pulled_back_once_by_lambda_over_its_count_and_the_gradient_stays_sparse():
    table = table_with_gradient([1, 3, 3], [0.5, 1.0, 2.0])  # row 3 twice: added once all the same
    TablePenalties(touched={table: 0.1}, counts={table: torch.tensor([1, 4, 1, 20, 1])}).add_to_gradients()
    assert table.grad is not None
    assert table.grad.is_sparse
    assert table.grad.is_coalesced()
    assert table.grad.indices().tolist() == [[1, 3]]
    close(table.grad.values(), [[0.5 + 0.1 / 4 * 10.0], [3.0 + 0.1 / 20 * 30.0]])


def test_a_whole_table_is_pulled_back_by_lambda_and_one_without_a_gradient_is_left_alone():
    table, idle = (nn.Parameter(torch.tensor([[0.0], [1.0], [-2.0]])) for _ in range(2))
    table.grad = torch.tensor([[0.0], [0.25], [0.0]])
    TablePenalties(whole={table: 0.1, idle: 0.1}).add_to_gradients()
    close(table.grad, [[0.0], [0.35], [-0.2]])
    assert idle.grad is None


# ---------------------------------------------------------------- by brute force
def looked_up(batch: Batch, fields: tuple[Any, ...]) -> Counter[tuple[str, int]]:
    """How often each value stands in a batch, one at a time: once a request, a candidate and an event."""
    counts: Counter[tuple[str, int]] = Counter()
    for side, group in (("request", batch.user), ("item", batch.item), ("pair", batch.item), ("event", batch.history)):
        for field in fields:
            if field.form in ("id", "ids") and field.side == side:
                counts.update((field.table, int(row)) for row in group[field.name].flatten() if row > 0)
    return counts


def test_the_counts_are_those_of_every_value_in_the_training_split(shards: str):
    run = run_of(shards, {**LR, "exclude": ["history"]}, epochs=1, batch_size=64)
    assert run.optimisers.penalties.waits_for_counts
    trained(run.config, run=run)
    (table,) = tables_of(run.cascade)
    assert isinstance(table, JoinedTables)
    space = run.shards.state.space.without(("history",))
    whole = collate(run.shards.table("requests/train"), run.shards.items)
    expected = torch.zeros(len(table.weight))
    for (vocabulary, row), times in looked_up(whole, space.fields).items():
        expected[table.first_rows[vocabulary] + row] += times
    assert expected.max() > 50
    assert (expected == 0).any()
    found = run.optimisers.penalties.counts[table.weight]
    assert found[1:].tolist() == expected[1:].clamp(min=1).tolist()


@pytest.mark.parametrize("option", ["l2_touched", "l2_embedding"])
@pytest.mark.parametrize("stage", [LR, DEEPFM, STAGES[0]], ids=lambda s: s["model"]["name"])
def test_the_gradients_are_those_of_the_penalty_added_to_the_loss(shards: str, stage: dict[str, Any], option: str):
    plain, penalised = (run_of(shards, {**stage, "l2_touched": 0.0, **extra}) for extra in ({}, {option: 0.5}))
    with torch.no_grad():
        for table in tables_of(plain.cascade):
            table.weight[1:].normal_(generator=torch.Generator().manual_seed(1))
    penalised.cascade.load_state_dict(plain.cascade.state_dict())
    batch = collate(plain.shards.table("requests/train").slice(0, 6), plain.shards.items, keep=(5,), k=2)
    found = penalised.optimisers.penalties
    found.count(dict(penalised.cascade.models.items()), [batch, batch])
    for run in (plain, penalised):
        run.cascade.forward(batch)[stage["name"]].sum().backward()
        for table in tables_of(run.cascade):
            assert table.weight.grad is not None
            assert table.weight.grad.is_sparse == (run is plain or option == "l2_touched")
            if table.weight.grad.is_sparse:
                table.weight.grad = table.weight.grad.coalesce()
    found.add_to_gradients()
    for before, after in zip(tables_of(plain.cascade), tables_of(penalised.cascade), strict=True):
        gradient = before.weight.grad
        assert gradient is not None
        assert after.weight.grad is not None
        free = before.weight.detach().clone().requires_grad_()
        if option == "l2_embedding":
            (0.25 * free.square().sum()).backward()
        else:
            rows = gradient.indices()[0]
            (0.25 * free[rows].square().sum(1) / found.counts[after.weight][rows]).sum().backward()
        assert free.grad is not None
        torch.testing.assert_close(after.weight.grad.to_dense(), gradient.to_dense() + free.grad, rtol=1e-5, atol=1e-5)


def test_rows_that_no_batch_touches_keep_their_bits_under_l2_touched_and_shrink_under_l2_embedding(shards: str):
    for option, moves in (("l2_touched", False), ("l2_embedding", True)):
        run = run_of(shards, {**DEEPFM, option: 0.1}, epochs=1, batch_size=64)
        table = tables_of(run.cascade.models["ranker"].get_submodule("inputs"))[0]
        batch = collate(run.shards.table("requests/train"), run.shards.items)
        run.cascade.forward(batch)["ranker"].sum().backward()
        assert table.weight.grad is not None
        touched = table.weight.grad.to_dense().any(1)
        idle = ~touched & table.weight.any(1)
        assert idle.any()
        before = table.weight.detach().clone()
        trained(run.config, run=run)
        assert torch.equal(table.weight[idle], before[idle]) != moves
        assert not table.weight[0].any()


def test_a_resumed_run_counts_again_and_ends_with_the_same_bits(shards: str, tmp_path: Path):
    run = run_of(shards, {**LR, "l2_touched": 0.5}, epochs=2, batch_size=64, checkpoint_steps=1)

    def keep(progress: Progress, steps: int, save: Save | None) -> None:
        if save is not None and progress.total_steps == 4:
            save(str(tmp_path))

    fit(run, Progress(), keep)
    again = run_of(shards, {**LR, "l2_touched": 0.5}, epochs=2, batch_size=64, checkpoint_steps=1)
    progress = checkpoint.load(str(tmp_path), again.cascade, again.objective, again.optimisers)
    trained(again.config, run=again, progress=progress)
    assert all(torch.equal(x, run.cascade.state_dict()[name]) for name, x in again.cascade.state_dict().items())


# ---------------------------------------------------------------- which stages have which
def weights_of(given: Mapping[Tensor, float]) -> set[float]:
    return set(given.values())


def test_lr_has_a_penalty_by_default_and_every_other_model_none(shards: str):
    found = run_of(shards, STAGES[1], {**LR, "keep": 4}).optimisers.penalties
    assert (weights_of(found.touched), len(found.touched), found.whole) == ({1e-6}, 1, {})
    for stage in (STAGES[1], {**LR, "l2_touched": 0.0}):
        found = run_of(shards, stage).optimisers.penalties
        assert (found.touched, found.whole, found.waits_for_counts) == ({}, {}, False)
    found = run_of(shards, {**LR, "l2_embedding": 0.1}).optimisers.penalties
    assert (found.touched, weights_of(found.whole)) == ({}, {0.1})


def test_both_penalties_at_once_and_whole_tables_of_many_rows_are_refused_in_one_line(
    shards: str, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ConfigError, match=r"l2_touched 0\.1 and l2_embedding 0\.2 penalise the same tables"):
        run_of(shards, {**DEEPFM, "l2_touched": 0.1, "l2_embedding": 0.2})
    assert penalties.LARGEST_WHOLE_TABLE == 1_000_000
    monkeypatch.setattr(penalties, "LARGEST_WHOLE_TABLE", 100)
    with pytest.raises(ConfigError, match=r"stage 'ranker': l2_embedding .* rows; use l2_touched") as error:
        run_of(shards, {**DEEPFM, "l2_embedding": 0.2})
    assert "\n" not in str(error.value)


def test_trees_have_no_penalty_of_tables(shards: str):
    trees = {"name": "ranker", "keep": 4, "model": {"name": "gbdt", "label": "click"}, "l2_embedding": 0.1}
    with pytest.raises(ConfigError, match=r"stages.1 \(ranker\): l2_embedding: gbdt is fitted by its own objective"):
        run_of(shards, STAGES[1], trees)


# ---------------------------------------------------------------- rates
def rates_of(run: Run, **train: Any) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) of every parameter, by its name."""
    chosen = Optimisers(run.cascade, run.objective, Train(lr=0.01, weight_decay=0.3, **train))
    names = {id(p): name for name, p in run.cascade.models["ranker"].named_parameters()}
    return {names[id(p)]: (group["lr"], group.get("weight_decay", 0.0)) for optimiser in chosen._all
            for group in optimiser.param_groups for p in group["params"]}


def test_weights_per_value_of_lr_learn_at_ten_times_the_dense_rate_without_decay(shards: str):
    run = run_of(shards, LR)
    assert set(rates_of(run, embedding_lr=0.5).values()) == {(0.1, 0.0)}
    slow = run_of(shards, {**LR, "model": {"name": "lr", "linear_rate": 2.0}})
    assert set(rates_of(slow).values()) == {(0.02, 0.0)}


def test_other_models_learn_their_tables_at_the_embeddings_rate_and_decay_their_layers_alone(shards: str):
    rates = rates_of(run_of(shards, DEEPFM), embedding_lr=0.5)
    assert {rate for name, rate in rates.items() if name.endswith(("tables.weight", "values.weight"))} == {(0.5, 0.0)}
    numbers = {rate for name, rate in rates.items() if name.startswith("linear.") and "values" not in name}
    assert numbers == {(0.01, 0.0)}
    assert {rate for name, rate in rates.items() if name.startswith("deep.")} == {(0.01, 0.3)}
    whole = rates_of(run_of(shards, {**DEEPFM, "l2_embedding": 0.1}), embedding_lr=0.5)
    assert whole == rates


def test_a_table_that_is_dense_by_itself_gets_sparse_gradients_where_its_rows_are_penalised(shards: str):
    run = run_of(shards, STAGES[1])
    for table in tables_of(run.cascade):
        table.sparse = False
    stage = run.cascade.stages["pre_ranker"]
    run.cascade.stages["pre_ranker"] = stage.model_copy(update={"l2_touched": 0.1})
    found = TablePenalties.of(run.cascade)
    assert weights_of(found.touched) == {0.1}
    assert all(table.sparse for table in tables_of(run.cascade))

"""shared_bottom, mmoe and ple against numbers computed by hand, and the experts they share."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycascade import plugins
from raycascade.batch import Targets
from raycascade.errors import ConfigError
from raycascade.losses.bce import BinaryCrossEntropy
from raycascade.models._experts import ExpertOptions, Experts
from raycascade.shards import Shards
from raycascade.training import checkpoint
from raycascade.training.checkpoint import Progress
from raycascade.training.loop import Place, Run, Save, fit
from tests import f3, model_cases
from tests.f3 import T, assign, assign_split, close
from tests.model_cases import REPRESENTING, random_batch
from tests.tiny_shards import STAGES, train_config, trained, write_shards


def hand_set(name: str, *, heads: int, **options: Any) -> Any:
    """Two tasks, hidden layers of 2 units, towers of one map T((2,), heads + t)."""
    model = f3.build(name, num_tasks=2, dim=2, hidden=[2], tower_hidden=[], **options)
    for task, tower in enumerate(model.towers.of_task):
        assign(tower.first.weight, T((1, 2), heads + task))
    return model


def assign_experts(experts: Experts, seeds: tuple[int, ...]) -> None:
    assign_split(experts.first, torch.cat([T((2, 6), s) for s in seeds]))
    assign(experts.first.bias, torch.cat([T((2,), s + 1) for s in seeds]))


def mmoe() -> Any:
    model = hand_set("mmoe", heads=3, experts=2)
    assign_experts(model.experts, (6, 8))
    assign_split(model.gate.map, torch.cat([T((2, 6), 1), T((2, 6), 2)]))
    return model


def ple() -> Any:
    model = hand_set("ple", heads=9, own_experts=1, shared_experts=1)
    (level,) = model.levels
    for bank, seed in zip(level.banks, (6, 8, 4), strict=True):
        assign_experts(bank, (seed,))
    for task, gate in enumerate(level.gates):
        assign_split(gate.map, T((2, 6), 1 + task))
    return model


# ---------------------------------------------------------------- by hand
def test_shared_bottom_equals_the_hand_computed_logits():
    model = hand_set("shared_bottom", heads=3)
    assign_experts(model.bottom, (6,))
    close(model(f3.batch())[0], [(0.376, -0.382), (0.024, -0.024)])


def test_mmoe_equals_the_hand_computed_experts_gates_and_logits():
    model, batch = mmoe(), f3.batch()
    close(model.explain(batch)["gates"][0], [[(0.576885, 0.423115), (0.467546, 0.532454)],
                                             [(0.361237, 0.638763), (0.549834, 0.450166)]])
    state = model.encode_request(batch)
    found = model.experts(state.shares[0], model.trunk.of_candidates(state.trunk, batch), batch.mask_QC)
    close(found[0], [[(0.97, 0.06), (0.10, 0.40)], [(0.06, 0.0), (0.0, 0.81)]])
    close(model(batch)[0], [(0.199984, -0.178602), (-0.094810, 0.023267)])


def test_ple_equals_the_hand_computed_gates_and_logits():
    model, batch = ple(), f3.batch()
    close(model.explain(batch)["task_gates.1"][0], [[(0.576885, 0.423115), (0.467546, 0.532454)],
                                                    [(0.361237, 0.638763), (0.549834, 0.450166)]])
    close(model(batch)[0], [(0.074427, -0.085208), (0.182048, -0.188980)])


# ---------------------------------------------------------------- by another way
def test_experts_side_by_side_equal_one_mlp_after_the_other():
    torch.manual_seed(2)
    options = ExpertOptions(hidden=(6, 5, 4), activation="tanh")
    experts = Experts(options, 3, 7, num=3).double()
    model_cases.with_generic_parameters(experts, seed=2)
    request_QD, x_QCD = torch.randn(2, 3).double(), torch.randn(2, 4, 7).double()
    mask_QC = torch.ones(2, 4, dtype=torch.bool)
    found = experts(experts.of_request(request_QD), x_QCD, mask_QC)
    first = experts.first
    assert first.request is not None
    assert first.candidate is not None
    assert first.bias is not None
    whole = torch.cat([first.request.weight, first.candidate.weight], 1)
    for e in range(3):
        y = torch.cat([request_QD[:, None].expand(-1, 4, -1), x_QCD], -1)
        y = torch.tanh(nn.functional.linear(y, whole[e * 6:e * 6 + 6], first.bias[e * 6:e * 6 + 6]))
        for weight, bias in zip(experts.weights, experts.biases, strict=True):
            y = torch.tanh(y @ weight[e].T + bias[e])
        close(found[:, :, e], y, atol=1e-10)


def test_gates_of_ple_see_own_and_shared_experts_and_the_shared_gate_sees_all():
    model, batch = model_cases.build("ple", {"levels": 3, "own_experts": 2, "shared_experts": 3}, num_tasks=2), \
        random_batch()
    widths = {name: weights.shape[-1] for name, weights in model.explain(batch).items()}
    assert widths == {"task_gates.1": 5, "shared_gate.1": 7, "task_gates.2": 5, "shared_gate.2": 7, "task_gates.3": 5}


def test_the_experts_of_one_task_reach_another_task_through_the_shared_path_of_a_deeper_level_only():
    def touched(levels: int) -> bool:
        model = model_cases.build("ple", {"levels": levels}, num_tasks=2)
        model(random_batch())[..., 0].sum().backward()
        gradient: Tensor | None = model.levels[0].banks[1].first.bias.grad
        return gradient is not None and bool(gradient.abs().max() > 0)

    assert (touched(1), touched(2)) == (False, True)


@pytest.mark.parametrize(("name", "options", "key"), [
    ("mmoe", {"experts": 1}, "experts"), ("ple", {"own_experts": 0}, "own_experts"),
    ("ple", {"shared_experts": 0}, "shared_experts"), ("shared_bottom", {"hidden": []}, "hidden")])
def test_too_few_experts_are_refused(name: str, options: dict[str, Any], key: str):
    with pytest.raises(ConfigError, match=rf"model\.{key}: "):
        plugins.options("models", {"name": name, **options}, "model")


# ---------------------------------------------------------------- over a tower
def test_a_bottom_that_passes_on_the_towers_vector_gives_the_logits_of_the_bottom_alone():
    """The tower's hidden layer is the hand-set bottom, and the bottom above it the identity (of what ReLU left)."""
    model = f3.build("shared_bottom", num_tasks=2, hidden=[2], tower_hidden=[],
                     tower={"name": "mlp", "dim": 2, "hidden": [2]})
    assign_split(model.trunk.tower.mlp.first, T((2, 6), 6))
    assign(model.trunk.tower.mlp.first.bias, T((2,), 7))
    assign_split(model.bottom.first, torch.eye(2))
    for task, tower in enumerate(model.towers.of_task):
        assign(tower.first.weight, T((1, 2), 3 + task))
    close(model(f3.batch())[0], [(0.376, -0.382), (0.024, -0.024)])


@pytest.mark.parametrize("name", REPRESENTING)
def test_the_logits_of_a_model_are_a_linear_map_of_the_vectors_it_gives_without_an_output(name: str):
    whole = model_cases.build(name, {"dim": 2}, num_tasks=2)
    bare = model_cases.build(name, {"dim": 2}, num_tasks=0)
    source = whole.state_dict()  # dcn's first map has the rows of the output behind its own
    bare.load_state_dict({k: source[k][tuple(slice(n) for n in x.shape)] for k, x in bare.state_dict().items()})
    batch = random_batch(num_requests=120)
    vectors = bare(batch)
    assert vectors.shape == (120, 5, bare.representation_width)
    logits = whole(batch)
    for term in whole.first_order():  # says something of logits alone
        logits = logits - term(term.of_request(batch), batch)
    vectors_NH, logits_NT = (x[batch.mask_QC].detach() for x in (vectors, logits))
    vectors_NH = torch.cat([vectors_NH, torch.ones(len(vectors_NH), 1)], 1)
    assert len(vectors_NH) > vectors_NH.shape[1]
    weights = torch.linalg.lstsq(vectors_NH, logits_NT, driver="gelsd").solution
    close(vectors_NH @ weights, logits_NT, atol=1e-8)
    assert logits_NT.std() > 1e-6


@pytest.mark.parametrize("name", ["shared_bottom", "mmoe", "ple"])
def test_the_losses_of_a_tower_and_what_it_needs_reach_the_training_of_the_whole(name: str):
    model, batch = model_cases.build(name, {"tower": {"name": "dien"}}, num_tasks=2), random_batch()
    alone = model_cases.build("dien", {}, num_tasks=2)
    assert model.training_needs == alone.training_needs == {"history_negatives"}
    logits, extra = model.train_outputs(batch)
    assert torch.equal(logits, model(batch))
    close(extra["aux"], model.trunk.tower.train_outputs(batch)[1]["aux"], atol=1e-12)
    assert "tower.attention" in model.explain(batch)


@pytest.mark.parametrize(("options", "words"), [
    ({"tower": {"name": "lr"}}, r"tower: lr makes no vector .* use one of afm, autoint, .*, mlp$"),
    ({"tower": {"name": "two_tower"}}, "tower: two_tower makes no vector"),
    ({"tower": {"name": "mmoe"}}, "tower: mmoe makes no vector"),
    ({"tower": {"name": "gbdt"}}, "tower: gbdt makes no vector"),
    ({"tower": {"name": "dcnv2"}}, "there is no 'dcnv2'; did you mean 'dcn_v2'"),
    ({"tower": {"name": "din", "hiden": [8]}}, r"tower\.hiden: unknown key; did you mean 'hidden'"),
    ({"tower": {"name": "din"}, "dim": 8}, r"tower: .* dim of the model mean nothing; .* tower\.dim"),
    ({"tower": {"name": "mlp", "hidden": []}}, "tower: without hidden layers there is no vector"),
])
def test_a_tower_that_experts_cannot_read_is_refused_in_one_line(options: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words) as error:
        model_cases.build("ple", options)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- weights of tasks over the epochs
@pytest.mark.parametrize(("epoch", "weights"), [(0, (1.0, 3.0)), (1, (1.0, 1.5)), (4, (1.0, 0.1875))])
def test_the_weight_of_a_task_is_multiplied_by_its_gamma_after_every_epoch(epoch: int, weights: tuple[float, float]):
    loss = BinaryCrossEntropy(BinaryCrossEntropy.Config(task_weights={"like": 3.0}, task_gammas={"like": 0.5}), ("r",))
    labels = {"click": torch.tensor([[1.0], [0.0]]), "like": torch.tensor([[0.0], [torch.nan]])}
    targets = Targets(relevance_QC=torch.zeros(2, 1), reached_QC=torch.zeros(2, 1, dtype=torch.long),
                      mask_QC=torch.ones(2, 1, dtype=torch.bool), keep=(1,), k=1, labels=labels)
    logits_QCT = torch.tensor([[[0.2, -0.4]], [[1.0, 0.5]]])
    output = loss.over_tasks(logits_QCT, ("click", "like"), targets, epoch=epoch)
    close(output.total, weights[0] * 0.955700 + weights[1] * 0.513015, atol=3e-6)
    close(torch.stack([*output.parts.values()]), [0.955700, 0.513015])


def test_training_uses_the_weights_of_its_epoch_also_when_resumed_and_validation_those_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stage = {**STAGES[1], "tasks": ["click"], "loss": {"name": "bce", "task_gammas": {"click": 0.5}}}
    config = train_config(write_shards(str(tmp_path / "s"), num_files=1), stages=[stage],
                          train={"epochs": 3, "batch_size": 64, "checkpoint_steps": 1})
    seen: list[tuple[bool, int]] = []
    over_tasks = BinaryCrossEntropy.over_tasks

    def spied(self: Any, *args: Any, epoch: int) -> Any:
        seen.append((torch.is_grad_enabled(), epoch))
        return over_tasks(self, *args, epoch=epoch)

    monkeypatch.setattr(BinaryCrossEntropy, "over_tasks", spied)

    def keep(progress: Progress, steps: int, save: Save | None) -> None:
        if save is not None and progress.total_steps == 4:
            (tmp_path / "kept").mkdir()
            save(str(tmp_path / "kept"))

    run = Run.build(config, Shards.open(config.paths.shards), Place())
    fit(run, Progress(), keep)  # three steps an epoch, and one over the validation split
    assert [epoch for training, epoch in seen if training] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert {epoch for training, epoch in seen if not training} == {0}
    seen.clear()
    again = Run.build(config, run.shards, Place())
    progress = checkpoint.load(str(tmp_path / "kept"), again.cascade, again.objective, again.optimisers)
    trained(config, run=again, progress=progress)
    assert [epoch for training, epoch in seen if training] == [1, 1, 2, 2, 2]
    assert all(torch.equal(x, run.cascade.state_dict()[name]) for name, x in again.cascade.state_dict().items())


@pytest.mark.parametrize(("loss", "words"), [
    ({"task_gammas": {"clik": 0.5}}, r"loss\.task_gammas: 'clik' is not a task of the stage; did you mean 'click'"),
    ({"task_gammas": {"click": 0.0}}, r"loss\.task_gammas\.click: .*greater than 0"),
])
def test_gammas_that_make_no_sense_are_refused(loss: dict[str, Any], words: str):
    stage = {**STAGES[1], "tasks": ["click"], "loss": {"name": "bce", **loss}}
    with pytest.raises(ConfigError, match=words):
        train_config("nowhere", stages=[stage])

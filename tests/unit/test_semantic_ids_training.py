"""Training the RQ-VAE: what it learns, how dead codes come back, and that it goes on exactly where it stopped."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed

from raycascade.errors import ConfigError, DataError
from raycascade.semantic_ids.report import quality
from raycascade.semantic_ids.rqvae import RQVAE
from raycascade.semantic_ids.training import RQVAETraining

TINY: dict[str, Any] = {"levels": 2, "codes": 8, "hidden": (12,), "dim": 4, "batch": 32, "steps": 12, "reset_every": 4,
                        "lr": 5e-3}
FAR = 1000.0


def _training(**options: Any) -> RQVAETraining:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 6)).astype(np.float32)
    return RQVAETraining(RQVAE.Config.model_validate({**TINY, **options}), vectors, rng.integers(1, 50, 60))


def _state(training: RQVAETraining) -> dict[str, torch.Tensor]:
    moments = {f"{number}/{key}": value for number, state in enumerate(training.optimiser.state.values())
               for key, value in state.items()}
    return {**training.model.state_dict(), **moments}


def _assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=0, rtol=0, msg=name)


# ---------------------------------------------------------------- dead codes
def test_a_code_that_nobody_uses_becomes_a_residual_of_the_batch_and_the_others_stay_as_they_are():
    with_reset, without = _training(reset_every=4), _training(reset_every=12)
    for training in (with_reset, without):
        training.model.train()
        training.start()
        for _ in range(3):
            training.train_step()
        with torch.no_grad():
            training.model.codebooks_LKZ[1, 5] = FAR
        training.model.usage_LK[1, 5] = 0
        training.model.usage_LK[0, 2] = 1  # used before, whatever the last step does
    output = with_reset.train_step()
    without.train_step()
    seen, expected = with_reset.model.codebooks_LKZ, without.model.codebooks_LKZ
    unused_LK = without.model.usage_LK == 0
    assert bool(unused_LK[1, 5])
    assert not bool(unused_LK.all())
    torch.testing.assert_close(seen[~unused_LK], expected[~unused_LK], atol=0, rtol=0)
    for level, code in unused_LK.nonzero().tolist():
        residuals_NZ = output.quantised.residuals_LNZ[level]
        assert bool((residuals_NZ == seen[level, code]).all(dim=1).any())
    state = with_reset.optimiser.state[seen]
    for moment in ("exp_avg", "exp_avg_sq"):
        assert not bool(state[moment][unused_LK].any())
        assert bool(state[moment][~unused_LK].any())
    assert not bool(with_reset.model.usage_LK.any())


def test_codes_stay_as_they_are_in_the_last_steps():
    training = _training(steps=12, reset_every=4)
    training.model.train()
    training.start()
    while training.step_number < 8:
        training.train_step()
    with torch.no_grad():
        training.model.codebooks_LKZ[0, 1] = FAR
    model = training.run()
    assert bool((model.codebooks_LKZ[0, 1] > FAR / 2).all())


def test_without_resets_a_bad_start_leaves_codes_unused():
    """Codes that all lie far away but one: with resets most come into use."""
    used = {}
    for reset_every in (5, 60):
        training = _training(kmeans_init=False, steps=60, reset_every=reset_every)
        with torch.no_grad():
            training.model.codebooks_LKZ[:, 1:] += FAR
        model = training.run()
        codes = model.encode(np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32))
        used[reset_every] = len(np.unique(codes[:, 0]))
    assert used[60] == 1
    assert used[5] >= 5


# ---------------------------------------------------------------- what it learns
def test_items_in_clusters_get_codes_that_say_the_cluster():
    """60 groups of 10 groups each: codes are used, prefixes are ever more alike, little is lost."""
    rng = np.random.default_rng(1)
    coarse, fine = rng.normal(size=(60, 1, 64)), 0.4 * rng.normal(size=(60, 10, 64))
    items = (coarse + fine)[:, :, None] + 0.2 * rng.normal(size=(60, 10, 4, 64))
    vectors = items.reshape(-1, 64).astype(np.float32)
    config = RQVAE.Config(steps=600, batch=128, hidden=(64,), lr=2e-3)
    training = RQVAETraining(config, vectors, np.ones(len(vectors), int))
    model = training.run()
    report = quality(vectors, model.encode(vectors), np.ones(len(vectors), int), codes=256,
                     errors=model.errors(vectors))
    assert [level["items"]["used"] >= 0.8 for level in report["usage"]] == [True] * 4, report["usage"]
    cosines = [row["mean"] for row in report["prefixes"][:3]]
    assert cosines == sorted(set(cosines)), cosines
    assert report["error"]["training"] < 0.2
    losses = [value for _, value in training.curves["loss"]]
    assert losses[-1] < losses[0] / 2


def test_frequent_items_are_drawn_in_proportion_to_the_root_of_their_impressions():
    vectors = np.eye(3, dtype=np.float32)
    training = RQVAETraining(RQVAE.Config.model_validate({**TINY, "codes": 3, "batch": 40_000}), vectors,
                             np.array([0, 9, 100]))
    rows = training.rows_NV[training._draw()]
    shares = [float((rows == row).all(dim=1).float().mean()) for row in training.rows_NV]
    assert shares == pytest.approx([1 / 16, 4 / 16, 11 / 16], abs=0.01)


# ---------------------------------------------------------------- going on
def test_a_run_that_was_interrupted_ends_with_the_same_bits(tmp_path: Path):
    whole, stopped, resumed = _training(), _training(), _training()
    whole.run()
    stopped.model.train()
    stopped.start()
    while stopped.step_number < 6:
        stopped.train_step()
    stopped.save(str(tmp_path))
    resumed.load(str(tmp_path))
    resumed.run()
    _assert_same(_state(whole), _state(resumed))
    assert whole.curves == resumed.curves


def test_a_trained_model_that_is_loaded_does_not_start_its_codebooks_again(tmp_path: Path):
    training, loaded = _training(), _training()
    trained = training.run()
    training.save(str(tmp_path))
    loaded.load(str(tmp_path))
    loaded.start()
    torch.testing.assert_close(loaded.model.codebooks_LKZ.data, trained.codebooks_LKZ.data, atol=0, rtol=0)
    assert bool(loaded.model.kmeans_done)
    assert not [name for name, parameter in trained.named_parameters() if parameter.requires_grad]


def test_a_run_of_no_more_steps_is_frozen_and_says_nothing(tmp_path: Path):
    steps: list[int] = []
    training = _training(steps=5, reset_every=2)
    training.run(lambda state: steps.append(state.step_number))
    assert steps == [1, 2, 3, 4, 5]
    training.run(lambda state: steps.append(state.step_number))
    assert len(steps) == 5


def test_the_state_of_the_callers_random_numbers_is_left_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    _training()
    assert torch.rand(1) == expected


# ---------------------------------------------------------------- several workers
class Meeting:
    """torch.distributed of two threads of this process: what one gives, the other waits for."""

    def __init__(self) -> None:
        self.mine = threading.local()
        self.given: dict[int, torch.Tensor] = {}
        self.both = threading.Barrier(2, timeout=30)

    def become(self, rank: int) -> None:
        self.mine.rank = rank

    def _all(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.given[self.mine.rank] = tensor.clone()
        self.both.wait()
        everybody = [self.given[rank] for rank in range(2)]
        self.both.wait()
        return everybody

    def all_reduce(self, tensor: torch.Tensor) -> None:
        tensor.copy_(sum(self._all(tensor), start=torch.zeros_like(tensor)))

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        tensor.copy_(self._all(tensor)[src])


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> Meeting:
    meeting = Meeting()
    for name, function in {"is_initialized": lambda: True, "get_world_size": lambda: 2,
                           "get_rank": lambda: meeting.mine.rank, "all_reduce": meeting.all_reduce,
                           "broadcast": meeting.broadcast}.items():
        monkeypatch.setattr(torch.distributed, name, function)
    return meeting


def test_two_workers_train_the_model_that_one_worker_trains(meeting: Meeting, monkeypatch: pytest.MonkeyPatch):
    workers = []
    for rank in range(2):
        meeting.become(rank)
        workers.append(_training(steps=9, reset_every=3))
        with torch.no_grad():
            workers[rank].model.codebooks_LKZ[:, 0] = rank  # what one believes alone; rank 0's k-means replaces it

    def run(rank: int) -> None:
        meeting.become(rank)
        workers[rank].run()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    _assert_same(_state(workers[0]), _state(workers[1]))
    assert workers[0].curves == workers[1].curves
    monkeypatch.undo()
    alone = _training(steps=9, reset_every=3)
    alone.run()
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(workers[0].model.state_dict()[name], value, atol=1e-4, rtol=1e-4, msg=name)


def test_a_batch_that_workers_cannot_share_is_refused(meeting: Meeting):
    meeting.become(0)
    with pytest.raises(ConfigError, match="batch 33 must be a multiple of the 2 workers"):
        _training(batch=33)


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(("options", "items", "problem"), [
    ({"codes": 61}, 60, "60 items with content cannot start 61 codes"),
    ({}, 0, "no item with a content vector was shown in the training period"),
])
def test_what_cannot_be_trained_is_refused(options: dict[str, Any], items: int, problem: str):
    config = RQVAE.Config.model_validate({**TINY, **options})
    with pytest.raises((ConfigError, DataError), match=problem):
        RQVAETraining(config, np.ones((items, 6), np.float32), np.ones(items, int))


def test_a_loss_that_is_not_finite_is_an_error_that_says_what_to_do():
    training = _training(kmeans_init=False)
    training.model.codebooks_LKZ.data.fill_(torch.nan)
    with pytest.raises(ConfigError, match="not finite at step 0; lower lr"):
        training.run()

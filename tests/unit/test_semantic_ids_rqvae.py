"""The residual quantiser of semantic ids: worked out by hand, its gradients, and what its frozen form promises."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors, save as save_tensors
from torch import Tensor, nn

from raycascade.errors import ConfigError, DataError
from raycascade.semantic_ids.kmeans import k_means, residual_codebooks
from raycascade.semantic_ids.rqvae import RQVAE, nearest, quantise

LATENT_NZ = [[1.1, 0.2], [0.9, -0.3], [-0.2, 0.9]]
CODEBOOKS_LKZ = [[[1.0, 0.0], [0.0, 1.0]], [[0.2, 0.1], [-0.1, -0.2]]]


def _by_hand() -> tuple[RQVAE, Tensor]:
    """The model of the worked example: encoder and decoder hand on what they get, in float64."""
    model = RQVAE(RQVAE.Config(levels=2, codes=2, hidden=(), dim=2), 2).double()
    model.encoder, model.decoder = nn.Sequential(), nn.Sequential()
    model.codebooks_LKZ.data = torch.tensor(CODEBOOKS_LKZ, dtype=torch.float64)
    return model, torch.tensor(LATENT_NZ, dtype=torch.float64, requires_grad=True)


def _close(seen: Tensor | None, expected: object) -> None:
    assert seen is not None
    torch.testing.assert_close(seen, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def _random_model(*, levels: int = 3, codes: int = 16, width: int = 12) -> RQVAE:
    torch.manual_seed(3)
    return RQVAE(RQVAE.Config(levels=levels, codes=codes, hidden=(16,), dim=6), width)


# ---------------------------------------------------------------- worked out by hand
def test_codes_residuals_and_losses_of_three_vectors_are_those_worked_out_by_hand():
    model, latent = _by_hand()
    output = model(latent)
    found = output.quantised
    assert found.codes_NL.tolist() == [[0, 0], [0, 1], [1, 1]]
    _close(found.residuals_LNZ[1], [[0.1, 0.2], [-0.1, -0.3], [-0.2, -0.1]])
    _close(found.sum_NZ, [[1.2, 0.1], [0.9, -0.2], [-0.1, 0.8]])
    _close(output.parts["commitment"], 0.25 / 3)
    _close(output.parts["codebook"], 0.25 / 3)
    _close(output.total - output.parts["reconstruction"], 0.3125 / 3)
    _close(output.parts["reconstruction"], (0.02 + 0.01 + 0.02) / 3)  # rows are their own latent vectors


def test_the_commitment_of_every_level_reaches_the_encoder():
    model, latent = _by_hand()
    (0.25 * model(latent).quantised.commitment).backward()
    _close(latent.grad, [[0, 0.05], [-1 / 60, -4 / 60], [-0.05, 0]])


def test_the_reconstruction_reaches_the_encoder_once_and_the_codebooks_not_at_all():
    model, latent = _by_hand()
    model(latent).restored_NV.sum().backward()
    _close(latent.grad, [[1, 1], [1, 1], [1, 1]])
    assert model.codebooks_LKZ.grad is None


def test_each_code_is_drawn_towards_the_residuals_that_chose_it():
    model, latent = _by_hand()
    model(latent).quantised.codebook.backward()
    third = 1 / 15
    _close(model.codebooks_LKZ.grad, [[[0, third], [2 * third, third]], [[third, -third], [third, 0]]])
    assert latent.grad is None


@pytest.mark.parametrize("levels", [1, 3, 8])
def test_the_straight_through_gradient_does_not_depend_on_the_number_of_levels(levels: int):
    codebooks = torch.randn(levels, 5, 4, dtype=torch.float64)
    latent = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    found = quantise(latent, codebooks)
    (latent + (found.sum_NZ - latent).detach()).sum().backward()
    torch.testing.assert_close(latent.grad, torch.ones_like(latent))
    terms = [quantise(latent, codebooks[:n]).commitment for n in range(1, levels + 1)]
    for before, after in pairwise(terms):
        (of_level,) = torch.autograd.grad(after - before, latent, retain_graph=True)
        assert (of_level.abs().sum(dim=1) > 1e-3).all()


# ---------------------------------------------------------------- codes
def test_codes_equal_those_of_nested_loops():
    model = _random_model().freeze()
    vectors = np.random.default_rng(0).normal(size=(1000, 12)).astype(np.float32)
    latent_NZ = model.encoder(model.standardised(vectors)).double().numpy()
    books = model.codebooks_LKZ.double().numpy()
    for vector_codes, point in zip(model.encode(vectors), latent_NZ, strict=True):
        for code, book in zip(vector_codes, books, strict=True):
            distances = [((point - entry) ** 2).sum() for entry in book]
            assert code == distances.index(min(distances))
            point = point - book[code]


def test_batches_of_any_size_and_an_outer_autocast_give_the_same_codes():
    model = _random_model(levels=4, codes=64).freeze()
    vectors = np.random.default_rng(1).normal(size=(1000, 12)).astype(np.float32)
    whole = model.encode(vectors)
    for size in (1, 7):
        rows = vectors[:210]
        parts = [model.encode(rows[start:start + size]) for start in range(0, len(rows), size)]
        assert (np.concatenate(parts) == whole[:210]).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert (model.encode(vectors) == whole).all()
        narrow = quantise(model.encoder(model.standardised(vectors)).float(), model.codebooks_LKZ).codes_NL.numpy()
    assert (narrow != whole).any(), "the encoder in bfloat16 gives other codes, or this test shows nothing"
    assert whole.dtype == np.int64
    assert model.encode(np.zeros((0, 12), np.float32)).shape == (0, 4)


def test_the_precision_of_products_does_not_change_codes_and_is_left_as_it_was():
    model = _random_model().freeze()
    vectors = np.random.default_rng(2).normal(size=(300, 12)).astype(np.float32)
    expected = model.encode(vectors)
    torch.set_float32_matmul_precision("medium")
    try:
        assert (model.encode(vectors) == expected).all()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_of_codes_equally_near_the_lowest_is_taken():
    codes_KZ = torch.tensor([[3.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert nearest(torch.tensor([[0.0, 5.0], [1.0, 1.0]]), codes_KZ).tolist() == [1, 1]


def test_length_of_a_vector_does_not_matter_but_its_direction_does():
    model = _random_model()
    vectors = np.random.default_rng(3).normal(size=(50, 12)).astype(np.float32)
    model.fit_scale(vectors)
    torch.testing.assert_close(model.standardised(vectors), model.standardised(4 * vectors))
    rows = model.standardised(vectors)
    torch.testing.assert_close(rows.mean(dim=0), torch.zeros(12), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows.std(dim=0, correction=0), torch.ones(12))


def test_a_number_that_is_the_same_everywhere_is_not_divided_by_nothing():
    model = _random_model(width=2)
    model.fit_scale(np.ones((5, 2), np.float32))
    assert bool(torch.isfinite(model.standardised(np.ones((1, 2), np.float32))).all())


@pytest.mark.parametrize(("vectors", "problem"), [
    (np.zeros((2, 3)), "expected 12 numbers"), (np.zeros(12), "expected 12 numbers"),
    (np.full((2, 12), np.nan), r"NaN or infinity in row 0 \(2 such"), (np.full((1, 12), np.inf), "NaN or infinity"),
])
def test_vectors_of_another_width_or_without_a_value_are_refused_in_one_line(vectors: np.ndarray, problem: str):
    with pytest.raises(DataError, match=problem) as error:
        _random_model().encode(vectors)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- state
def test_a_model_that_is_loaded_again_has_the_same_codes_in_training_and_when_frozen():
    model = _random_model()
    vectors = np.random.default_rng(4).normal(size=(40, 12)).astype(np.float32)
    model.fit_scale(vectors)
    model.kmeans_done.fill_(True)
    again = RQVAE(model.config, 12)
    again.load_state_dict(load_tensors(save_tensors(dict(model.state_dict()))))
    assert bool(again.kmeans_done)
    rows = model.standardised(vectors)
    assert again.train()(rows).quantised.codes_NL.tolist() == model(rows).quantised.codes_NL.tolist()
    assert (again.freeze().encode(vectors) == model.freeze().encode(vectors)).all()
    assert not [name for name, parameter in again.named_parameters() if parameter.requires_grad]
    assert not again.training


def test_the_error_of_an_item_is_that_of_its_restored_vector():
    model = _random_model()
    vectors = np.random.default_rng(5).normal(size=(9, 12)).astype(np.float32)
    lost, whole = model.errors(vectors)
    rows = model.standardised(vectors)
    expected = (rows - model(rows).restored_NV).square().sum(dim=1)
    np.testing.assert_allclose(lost, expected.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(whole, rows.square().sum(dim=1).numpy(), rtol=1e-6)


# ---------------------------------------------------------------- config and k-means
def test_the_preset_of_the_paper_can_be_changed_in_single_options():
    config = RQVAE.Config.model_validate({"preset": "youtube", "codes": 512})
    assert (config.levels, config.codes, config.hidden, config.dim, config.beta) == (8, 512, (), 256, 0.25)
    assert RQVAE.Config.model_validate(config.model_dump()) == config


def test_fewer_rows_than_codes_cannot_start_the_codebooks():
    with pytest.raises(ConfigError, match="kmeans_rows 100 cannot start 256 codes"):
        RQVAE.Config(kmeans_rows=100)


def test_k_means_finds_the_centres_of_groups_that_lie_apart():
    groups_KZ = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    offsets = torch.tensor([[0.1, 0.0], [-0.1, 0.0], [0.0, 0.1], [0.0, -0.1]])
    points = (groups_KZ[:, None] + offsets).reshape(-1, 2)
    for seed in range(5):
        centres = k_means(points, 4, iterations=5, rng=np.random.default_rng(seed))
        torch.testing.assert_close(centres[nearest(groups_KZ, centres)], groups_KZ, atol=1e-5, rtol=0)


def test_k_means_of_equal_points_ends():
    books = residual_codebooks(torch.ones(6, 3), levels=2, codes=4, iterations=3, rng=np.random.default_rng(0))
    torch.testing.assert_close(books[0], torch.ones(4, 3))
    torch.testing.assert_close(books[1], torch.zeros(4, 3))

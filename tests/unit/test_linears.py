"""Linear maps in fewer bits against products worked out in float32, and every model with such maps in it."""

import logging
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycascade import linears
from raycascade.errors import ConfigError
from raycascade.linears import Bf16Linear, Fp8Linear, Int8Linear, fp8_product, narrow, to_fp8
from tests.model_cases import TORCH_MODELS, build, random_batch

HAS_FP8 = torch.cuda.is_available() and linears.has_fp8(torch.device("cuda"))


def product_by_hand(x_ND: Tensor, weight_OD: Tensor, scale_O1: Tensor) -> Tensor:
    """What float8 should give: both sides rounded, the product of the rounded numbers in float32."""
    scale_N1 = x_ND.abs().amax(1, keepdim=True) / 448.0
    rounded_ND = (x_ND / scale_N1).to(torch.float8_e4m3fn).float() * scale_N1
    return rounded_ND @ (weight_OD.float() * scale_O1).T


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of any size count as large."""
    monkeypatch.setattr(linears, "FEWEST_OUTPUTS", 2)
    monkeypatch.setattr(linears, "INT8_INPUTS", 2)


def test_bf16_is_the_product_of_rounded_numbers():
    linear = nn.Linear(32, 16)
    x = torch.randn(3, 5, 32)
    found = Bf16Linear(linear)(x)
    by_hand = (x.bfloat16().float() @ linear.weight.bfloat16().float().T).bfloat16().float() + linear.bias
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_hand, atol=2e-2, rtol=1e-2)
    assert not torch.equal(found, linear(x))


def test_int8_is_within_the_steps_of_its_scales_and_says_nothing():
    linear = nn.Linear(128, 16)
    x = torch.randn(4, 7, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        narrowed = Int8Linear(linear)
        found = narrowed(x)
    # torch gives inputs seven of the eight bits
    steps = (x.max() - x.min()) / 127 * linear.weight.abs().sum(1).max() / 2
    rounding = linear.weight.abs().max() / 127 * x.abs().sum(-1).max() / 2
    assert found.shape == (4, 7, 16)
    assert 0 < (found - linear(x)).abs().max() < steps + rounding
    assert (narrowed.weight - linear.weight).abs().max() <= linear.weight.abs().max() / 127


def test_the_deprecation_of_another_function_is_still_seen(monkeypatch: pytest.MonkeyPatch):
    def deprecated(model: nn.Module, *_: Any, **__: Any) -> nn.Module:
        warnings.warn("another function is deprecated", DeprecationWarning, stacklevel=1)
        return model

    monkeypatch.setattr(torch.ao.quantization, "quantize_dynamic", deprecated)
    with pytest.warns(DeprecationWarning, match="another function"):
        Int8Linear(nn.Linear(128, 16))


def test_float8_is_the_product_of_rounded_rows():
    x_ND, weight_OD = torch.randn(5, 256) * torch.logspace(-3, 3, 5)[:, None], torch.randn(272, 256)
    low, scale_O1 = to_fp8(weight_OD)
    expected = product_by_hand(x_ND, low, scale_O1)
    found = fp8_product(x_ND, low, scale_O1)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=float(expected.abs().max()) * 1e-6 + 1e-4)
    assert (found - x_ND @ weight_OD.T).abs().max() > 0
    assert fp8_product(x_ND[:0], low, scale_O1).shape == (0, 272)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_FP8, reason="needs a CUDA device of compute capability 8.9")
def test_float8_on_a_gpu_is_the_product_of_rounded_rows():
    x_ND, weight_OD = torch.randn(5, 256, device="cuda"), torch.randn(512, 256, device="cuda")
    low, scale_O1 = to_fp8(weight_OD)
    torch.testing.assert_close(fp8_product(x_ND, low, scale_O1), product_by_hand(x_ND, low, scale_O1), rtol=2**-6,
                               atol=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_gpu_gives_nearly_the_scores_of_float32(precision: Any):
    model = nn.Sequential(nn.Linear(256, 512), nn.LayerNorm(512), nn.Linear(512, 1)).cuda()
    x = torch.randn(40, 256, device="cuda")
    expected = model(x).detach()
    assert narrow(model, precision) == 1
    assert torch.corrcoef(torch.stack([model(x)[:, 0], expected[:, 0]]))[0, 1] > 0.99


def test_only_large_maps_are_narrowed_and_each_once():
    def model() -> nn.ModuleDict:
        shared = nn.Linear(256, 256)
        return nn.ModuleDict({"one": shared, "same": shared, "odd": nn.Linear(257, 256), "small": nn.Linear(64, 64),
                              "logits": nn.Linear(256, 1), "norm": nn.LayerNorm(256)})

    def kinds(precision: Any) -> dict[str, type]:
        made = model()
        count = narrow(made, precision)
        assert made["one"] is made["same"]
        assert count == len({id(m) for m in made.values() if isinstance(m, linears.NarrowLinear)})
        return {name: type(module) for name, module in made.items() if name != "same"}

    stays = {"logits": nn.Linear, "norm": nn.LayerNorm}
    assert kinds("fp32") == {"one": nn.Linear, "odd": nn.Linear, "small": nn.Linear, **stays}
    assert kinds("bf16") == {"one": Bf16Linear, "odd": Bf16Linear, "small": Bf16Linear, **stays}
    assert kinds("int8") == {"one": Int8Linear, "odd": Int8Linear, "small": nn.Linear, **stays}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linears, "has_fp8", lambda device: True)
        assert kinds("fp8") == {"one": Fp8Linear, "odd": Bf16Linear, "small": Bf16Linear, **stays}


def test_without_float8_in_the_device_it_is_bf16_with_one_warning(caplog: pytest.LogCaptureFixture):
    linears._say_once.cache_clear()
    models = [nn.Sequential(nn.Linear(256, 256)) for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        for model in models:
            narrow(model, "fp8")
    assert [type(model[0]) for model in models] == [Bf16Linear, Bf16Linear]
    assert len(caplog.records) == 1
    assert "needs a GPU of compute capability 8.9" in caplog.records[0].getMessage()


def test_int8_is_refused_where_the_model_is_not_on_cpu():
    with pytest.raises(ConfigError, match="int8 is for stages on CPU, and this one is on meta"):
        narrow(nn.Sequential(nn.Linear(128, 16, device="meta")), "int8")


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("name", TORCH_MODELS)
def test_every_model_scores_nearly_as_in_float32(small: None, name: str, precision: Any):
    """Models that read the weights of a map in parts included."""
    batch = random_batch()._map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    model = build(name, {}).float()
    with torch.no_grad():
        expected = model(batch)[batch.mask_QC]
        narrow(model, precision)
        found = model(batch)[batch.mask_QC]
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.2 * expected.std() + 1e-3  # a wrong product differs by about its spread

"""Linear maps in fewer bits, made from trained ones in place: bfloat16, int8 and float8.

Inputs and results are float32, and nothing but the product of a large linear map is in fewer bits: layer norm, softmax,
sums over attention, cosines and logits keep float32 on every device. Maps to fewer than `FEWEST_OUTPUTS` are logits or
gates and stay as they are, too.
"""

import logging
import warnings
from abc import ABC, abstractmethod
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from raycascade.errors import ConfigError
from raycascade.variants_config import Precision

FEWEST_OUTPUTS = 16
INT8_INPUTS = 128  # below, the quantisation of the input costs more than the product saves
FP8_SIDE, FP8_MULTIPLE = 256, 16
FP8_CAPABILITY = (8, 9)
LARGEST_E4M3 = 448.0
DEPRECATIONS = (  # torch's own, of the only int8 product that it has without another package
    (DeprecationWarning, r"torch\.ao\.quantization is deprecated"),
    (UserWarning, r"torch\.quantize_per_tensor, torch\.quantize_per_channel and other quantized tensor"),
)
log = logging.getLogger(__name__)


class NarrowLinear(nn.Module, ABC):
    """y = x W^T + b with W in fewer bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """W [out, in] as float32, for models that read it in parts: rounded, at the cost of a conversion."""

    @abstractmethod
    def product(self, x_ND: Tensor) -> Tensor:
        """x W^T [N, out], float32."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], float32."""
        y = self.product(x.reshape(-1, self.in_features)).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class Bf16Linear(NarrowLinear):
    """Weight and input rounded to bfloat16, summed in float32 where the device does, the result rounded to bfloat16."""

    low: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.register_buffer("low", linear.weight.detach().bfloat16())

    @property
    def weight(self) -> Tensor:
        """W as float32."""
        return self.low.float()

    def product(self, x_ND: Tensor) -> Tensor:
        """x W^T."""
        return functional.linear(x_ND.bfloat16(), self.low).float()


class Int8Linear(NarrowLinear):
    """int8 weights with a scale for each output; inputs become int8 as they come, with one scale for the whole tensor:
    scores depend a little on what else is in the batch. On CPU only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        bare = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        bare.weight = nn.Parameter(linear.weight.detach().float(), requires_grad=False)
        self.quantised = _quantised(bare)

    @property
    def weight(self) -> Tensor:
        """W as float32."""
        weight = self.quantised.weight
        return (weight() if callable(weight) else weight).dequantize()

    def product(self, x_ND: Tensor) -> Tensor:
        """x W^T."""
        return self.quantised(x_ND.float())


class Fp8Linear(NarrowLinear):
    """float8 (e4m3) weights with a scale for each output, inputs with one for each row."""

    low: Tensor
    scale_O1: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        low, scale_O1 = to_fp8(linear.weight.detach())
        self.register_buffer("low", low)
        self.register_buffer("scale_O1", scale_O1)

    @property
    def weight(self) -> Tensor:
        """W as float32."""
        return self.low.float() * self.scale_O1

    def product(self, x_ND: Tensor) -> Tensor:
        """x W^T."""
        return fp8_product(x_ND, self.low, self.scale_O1)


def to_fp8(values_ND: Tensor) -> tuple[Tensor, Tensor]:
    """(rows as e4m3, scale_N1): each row divided by its scale, so that its largest number is the largest of e4m3."""
    scale_N1 = values_ND.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / LARGEST_E4M3
    return (values_ND / scale_N1).to(torch.float8_e4m3fn), scale_N1


def fp8_product(x_ND: Tensor, weight_OD: Tensor, scale_O1: Tensor) -> Tensor:
    """x W^T [N, out] as float32 of `to_fp8` weights, the rows of x rounded in the same way.

    The only place that calls torch's private product of float8; D and O must be multiples of 16.
    """
    if x_ND.shape[0] == 0:
        return x_ND.new_zeros(0, weight_OD.shape[0])
    low_ND, scale_N1 = to_fp8(x_ND)
    y_NO = torch._scaled_mm(  # type: ignore[attr-defined]
        low_ND, weight_OD.T, scale_a=scale_N1, scale_b=scale_O1.T, out_dtype=torch.bfloat16)
    return y_NO.float()


def narrow(model: nn.Module, precision: Precision) -> int:
    """Replaces the large linear maps of a model, which need not be on CPU, in place; returns how many.

    bf16: all but those to few outputs; int8: those of 128 inputs or more; fp8: those with both sides of 256 or more in
    multiples of 16, the others as bf16, and all of them where the device has no float8 (one warning says so).
    ConfigError for int8 where the model is not on CPU or torch has no int8 product.
    """
    if precision == "fp32":
        return 0
    device = next(model.parameters()).device
    if precision == "int8" and device.type != "cpu":
        raise ConfigError(f"precision: int8 is for stages on CPU, and this one is on {device}; set bf16 or fp8")
    if precision == "fp8" and not has_fp8(device):
        _say_once(f"precision fp8 needs a GPU of compute capability {'.'.join(map(str, FP8_CAPABILITY))} or more; on "
                  f"{device} it is bf16 instead")
        precision = "bf16"
    made: dict[nn.Module, NarrowLinear] = {}  # a map that stands in two places stays one
    for path, module in list(model.named_modules(remove_duplicate=False)):
        kind = _kind_of(module, precision)
        if kind is None:
            continue
        assert isinstance(module, nn.Linear), module
        if module not in made:
            made[module] = kind(module)
        before, _, name = path.rpartition(".")
        setattr(model.get_submodule(before), name, made[module])
    return len(made)


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies float8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def _kind_of(module: nn.Module, precision: Precision) -> type[NarrowLinear] | None:
    """What a module becomes; None: it stays."""
    if type(module) is not nn.Linear or module.out_features < FEWEST_OUTPUTS:
        return None
    sides = module.in_features, module.out_features
    if precision == "int8":
        return Int8Linear if module.in_features >= INT8_INPUTS else None
    large = min(sides) >= FP8_SIDE and not any(side % FP8_MULTIPLE for side in sides)
    return Fp8Linear if precision == "fp8" and large else Bf16Linear


def _quantised(linear: nn.Linear) -> nn.Module:
    """An int8 map by torch itself, else (a torch that has dropped it) by torchao; ConfigError without either."""
    holder = nn.Sequential(linear)
    with warnings.catch_warnings():
        for category, message in DEPRECATIONS:
            warnings.filterwarnings("ignore", message=message, category=category)
        try:
            from torch.ao.quantization import quantize_dynamic
            from torch.ao.quantization.qconfig import per_channel_dynamic_qconfig

            return quantize_dynamic(holder, {"0": per_channel_dynamic_qconfig}, inplace=True)[0]
        except ImportError:
            return _quantised_by_torchao(holder)


def _quantised_by_torchao(holder: nn.Sequential) -> nn.Module:
    try:
        from torchao.quantization import (  # type: ignore[import-not-found]
            Int8DynamicActivationInt8WeightConfig,
            quantize_,
        )
    except ImportError:
        raise ConfigError("precision: int8 needs torchao with this version of torch; install torchao, or set bf16"
                          ) from None
    quantize_(holder, Int8DynamicActivationInt8WeightConfig())
    return holder[0]


@cache
def _say_once(message: str) -> None:
    log.warning(message)

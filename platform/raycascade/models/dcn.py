"""dcn: deep and cross network (Wang et al. 2017, arXiv 1708.05123), with its cross layers in compact form."""

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.models._deep import DeepOptions, DeepPart
from raycascade.models._inputs import FieldInputs
from raycascade.models._layers import SplitLinear
from raycascade.models._model import RepresentingModel
from raycascade.schema import FeatureSpace


class Dcn(RepresentingModel):
    """x_{l+1} = x_0 (x_l . w_l) + b_l + x_l;  z = w^T [x_n; MLP(x_0)] + b.

    Every x_l is a_l x_0 + B_l with a scalar a_l and a vector B_l that is the same for all candidates: a_0 = 1, B_0 = 0,
    a_{l+1} = a_l (1 + x_0 . w_l) + B_l . w_l, B_{l+1} = B_l + b_l. So a candidate costs its products with the n + T
    vectors w_l and w, and no row of x is ever built.
    """

    class Config(DeepOptions):
        """`hidden: []` leaves the crosses alone. The paper has 2 to 6 cross layers."""

        presets = {"paper": {"num_layers": 6, "hidden": (1024, 1024)}}

        num_layers: int = Option(default=2, ge=1)

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        self.inputs = FieldInputs(config, space, model="dcn")
        widths = self.inputs.request_width(history=True), self.inputs.candidate_width
        self.num_layers = config.num_layers
        self.products = SplitLinear(*widths, config.num_layers + num_tasks, bias=False)  # rows w_0 .. w_{n-1}, then w
        self.offsets = nn.Parameter(torch.zeros(config.num_layers, sum(widths)))  # b_l
        self.deep = DeepPart(config, *widths, num_tasks)
        self.bias = nn.Parameter(torch.zeros(num_tasks)) if num_tasks else None
        self.representation_width = sum(widths) + (0, *config.hidden)[-1]

    def silence(self) -> None:
        """Zeroes w: logits start at the bias, 0."""
        with torch.no_grad():
            for side in (self.products.request, self.products.candidate):
                if side is not None:
                    side.weight[self.num_layers:] = 0.0
        self.deep.silence()

    def encode_request(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The request's part of x_0 [Q, d_u], its shares of the products [Q, n + T] and of the MLP's first layer
        [Q, H]."""
        x_QD = self.inputs.request_matrix(batch, history=True)
        return x_QD, self.products.of_request(x_QD), self.deep.of_request(x_QD)

    def score_candidates(self, state: tuple[Tensor, Tensor, Tensor], batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        request_QD, products_QP, request_QH = state
        x_QCD = self.inputs.candidate_matrix(batch)
        scale_QC1, outer_QCT, shift_T = self._crossed(self.products(products_QP, x_QCD))
        deep = self.deep(request_QH, x_QCD, batch.mask_QC)
        if self.bias is None:
            x0_QCD = torch.cat([request_QD[:, None].expand(-1, x_QCD.shape[1], -1), x_QCD], -1)
            return torch.cat([scale_QC1 * x0_QCD + self.offsets.sum(0), deep], -1)
        return scale_QC1 * outer_QCT + (shift_T + self.bias) + deep

    def _crossed(self, products_QCP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a_n [Q, C, 1], w^T x_0 [Q, C, T] and w^T B_n [T] from the products of x_0 with w_0 .. w_{n-1} and w."""
        inner_QCL, outer_QCT = products_QCP[..., :self.num_layers], products_QCP[..., self.num_layers:]
        sides = [side.weight for side in (self.products.request, self.products.candidate) if side is not None]
        weights_PD = torch.cat(sides, 1)
        shifts_LD = self.offsets.cumsum(0)  # B_1 .. B_n
        scale_QC = 1.0 + inner_QCL[..., 0]
        for layer in range(1, self.num_layers):
            shift = shifts_LD[layer - 1] @ weights_PD[layer]
            scale_QC = scale_QC * (1.0 + inner_QCL[..., layer]) + shift
        return scale_QC.unsqueeze(-1), outer_QCT, weights_PD[self.num_layers:] @ shifts_LD[-1]

"""dlrm: dot products of fields beside the numbers (Naumov et al. 2019, arXiv 1906.00091)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.errors import ConfigError
from raycascade.models._apart import InputsApart
from raycascade.models._deep import DeepOptions
from raycascade.models._layers import SplitMLP
from raycascade.models._model import RepresentingModel
from raycascade.schema import FeatureSpace


@dataclass(frozen=True)
class DlrmState:
    """The request's half: its rows of Z [Q, M, k], its share of the top MLP's first layer [Q, H] and, where candidates
    have numbers too, of the bottom MLP's [Q, H]."""

    rows_QMK: Tensor
    top_QH: Tensor
    bottom_QH: Tensor | None


class RowDots(nn.Module):
    """Dot products of the rows of Z strictly below its diagonal, row after row: those of request rows, then the rest.

    The rows of the request come first.
    """

    in_request: Tensor
    in_candidate: Tensor

    def __init__(self, num_request: int, num_candidate: int) -> None:
        super().__init__()
        self.num_candidate = num_candidate
        num_rows = num_request + num_candidate
        row, column = torch.tril_indices(num_request, num_request, -1)
        self.register_buffer("in_request", row * num_request + column, persistent=False)
        row, column = torch.tril_indices(num_candidate, num_rows, num_request - 1)
        self.register_buffer("in_candidate", row * num_rows + column, persistent=False)

    def of_request(self, rows_QMK: Tensor) -> Tensor:
        """Products of two rows of the request [Q, P_uu]."""
        return (rows_QMK @ rows_QMK.mT).flatten(1).index_select(-1, self.in_request)

    def forward(self, rows_QMK: Tensor, rows_QCNK: Tensor) -> Tensor:
        """Products with a row of the candidate [Q, C, P_uc + P_cc]."""
        shape = (*rows_QCNK.shape[:3], rows_QMK.shape[1])
        mixed_QCNM = (rows_QCNK.flatten(1, 2) @ rows_QMK.mT).view(shape)
        own_QCNN = rows_QCNK @ rows_QCNK.mT
        return torch.cat([mixed_QCNM, own_QCNN], -1).flatten(-2).index_select(-1, self.in_candidate)


class Dlrm(RepresentingModel):
    """z = MLP_top([b; dots]): the products of all pairs of rows [b; e_1; ...; e_m], b = MLP_bottom(numbers) in R^k.

    b stands first on the request's side, or on the candidate's if candidates have numbers; without numbers there is no
    b. A column of the history is one field, its mean. There is no first-order term. ConfigError with fewer than two
    rows.
    """

    class Config(DeepOptions):
        """`bottom_hidden` are the layers over the numbers."""

        presets = {"code": {"dim": 16, "bottom_hidden": (512, 256, 64), "hidden": (512, 256)}}

        dense: Literal["raw"] = "raw"  # pyright: ignore[reportIncompatibleVariableOverride]
        bottom_hidden: tuple[int, ...] = (32,)

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        self.inputs = InputsApart(config, space, model="dlrm")
        self.bottom = SplitMLP(
            *self.inputs.num_numbers, config.bottom_hidden, config.dim, activation=config.activation,
            dropout=config.dropout) if any(self.inputs.num_numbers) else None
        of_candidate = int(self.inputs.num_numbers[1] > 0)  # rows b on either side
        of_request = int(self.bottom is not None) - of_candidate
        num_request = self.inputs.num_fields[0] + of_request
        num_candidate = self.inputs.num_fields[1] + of_candidate
        if num_request + num_candidate < 2:
            raise ConfigError("dlrm: it multiplies pairs of fields, the numbers being one, and the stage sees one "
                              "alone; exclude fewer features or use mlp")
        self.num_rows = (num_request, num_candidate)
        self.dots = RowDots(num_request, num_candidate)
        self.top = SplitMLP(
            config.dim * of_request + len(self.dots.in_request),
            config.dim * of_candidate + len(self.dots.in_candidate), config.hidden, num_tasks,
            activation=config.activation, norm=config.norm, dropout=config.dropout)
        self.representation_width = (0, *config.hidden)[-1]

    def silence(self) -> None:
        """Logits start at the bias of the top MLP's last layer, 0."""
        self.top.silence()

    def encode_request(self, batch: Batch) -> DlrmState:
        """The request's rows and products, and b if candidates have no numbers."""
        rows_QD, numbers_QD = self.inputs.of_request(batch)
        bottom_QH, b_QK = None, rows_QD[:, :0]
        if self.bottom is not None:
            bottom_QH = self.bottom.of_request(numbers_QD)
            if not self.inputs.num_numbers[1]:
                b_QK = torch.relu(self.bottom(bottom_QH, bottom_QH[:, None, :0])).flatten(1)
        rows_QMK = torch.cat([b_QK, rows_QD], -1).view(len(rows_QD), self.num_rows[0], self.inputs.dim)
        top_QH = self.top.of_request(torch.cat([b_QK, self.dots.of_request(rows_QMK)], -1))
        return DlrmState(rows_QMK=rows_QMK, top_QH=top_QH, bottom_QH=bottom_QH)

    def score_candidates(self, state: DlrmState, batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        shape = batch.mask_QC.shape
        rows_QCD, numbers_QCD = self.inputs.of_candidates(batch)
        b_QCK = rows_QCD[..., :0]
        if self.inputs.num_numbers[1] and self.bottom is not None and state.bottom_QH is not None:
            b_QCK = torch.relu(self.bottom(state.bottom_QH, numbers_QCD, batch.mask_QC))
        rows_QCNK = torch.cat([b_QCK, rows_QCD], -1).view(*shape, self.num_rows[1], self.inputs.dim)
        dots_QCP = self.dots(state.rows_QMK, rows_QCNK)
        return self.top(state.top_QH, torch.cat([b_QCK, dots_QCP], -1), batch.mask_QC)

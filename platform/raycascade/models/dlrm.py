"""dlrm: dot products of fields beside the numbers (Naumov et al. 2019, arXiv 1906.00091)."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.errors import ConfigError
from raycascade.models._inputs import FieldInputs, InputOptions
from raycascade.models._layers import ActivationName, NormName, SplitMLP, masked_mean
from raycascade.models._model import RepresentingModel
from raycascade.schema import FeatureSpace, Field


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

    class Config(InputOptions):
        """The preset of the released code: dim 16, bottom_hidden [512, 256, 64], hidden [512, 256]."""

        dense: Literal["raw"] = "raw"  # pyright: ignore[reportIncompatibleVariableOverride]
        bottom_hidden: tuple[int, ...] = (32,)
        hidden: tuple[int, ...] = (64, 32)
        activation: ActivationName = "relu"
        norm: NormName = "none"
        dropout: float = Option(default=0.0, ge=0, lt=1)

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        self.inputs = FieldInputs(config, space, model="dlrm")
        groups = {"request": self.inputs.request_fields, "candidate": self.inputs.candidate_fields,
                  "event": (*self.inputs.history_fields, *self.inputs.event_fields)}
        self.numbers = {side: tuple(f for f in fields if f.form == "dense") for side, fields in groups.items()}
        self.fields = {side: tuple(f for f in fields if f.form != "dense") for side, fields in groups.items()}
        widths = {side: len(fields) for side, fields in self.numbers.items()}
        self.candidate_numbers = widths["candidate"]
        self.bottom = SplitMLP(
            widths["request"] + widths["event"], widths["candidate"], config.bottom_hidden, config.dim,
            activation=config.activation, dropout=config.dropout,
        ) if any(widths.values()) else None
        of_candidate = int(self.candidate_numbers > 0)  # rows b on either side
        of_request = int(self.bottom is not None) - of_candidate
        num_request = len(self.fields["request"]) + len(self.fields["event"]) + of_request
        num_candidate = len(self.fields["candidate"]) + of_candidate
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
        rows_QD = self._request_side(batch, self.fields)
        bottom_QH, b_QK = None, rows_QD[:, :0]
        if self.bottom is not None:
            bottom_QH = self.bottom.of_request(self._request_side(batch, self.numbers))
            if not self.candidate_numbers:
                b_QK = torch.relu(self.bottom(bottom_QH, bottom_QH[:, None, :0])).flatten(1)
        rows_QMK = torch.cat([b_QK, rows_QD], -1).view(len(rows_QD), self.num_rows[0], self.inputs.dim)
        top_QH = self.top.of_request(torch.cat([b_QK, self.dots.of_request(rows_QMK)], -1))
        return DlrmState(rows_QMK=rows_QMK, top_QH=top_QH, bottom_QH=bottom_QH)

    def score_candidates(self, state: DlrmState, batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        shape = batch.mask_QC.shape
        rows_QCD = self.inputs.matrix(batch.item, self.fields["candidate"], shape)
        b_QCK = rows_QCD[..., :0]
        if self.candidate_numbers and self.bottom is not None and state.bottom_QH is not None:
            numbers_QCD = self.inputs.matrix(batch.item, self.numbers["candidate"], shape)
            b_QCK = torch.relu(self.bottom(state.bottom_QH, numbers_QCD, batch.mask_QC))
        rows_QCNK = torch.cat([b_QCK, rows_QCD], -1).view(*shape, self.num_rows[1], self.inputs.dim)
        dots_QCP = self.dots(state.rows_QMK, rows_QCNK)
        return self.top(state.top_QH, torch.cat([b_QCK, dots_QCP], -1), batch.mask_QC)

    def _request_side(self, batch: Batch, fields: dict[str, tuple[Field, ...]]) -> Tensor:
        """Some fields of the request, and the means of some of its history's columns [Q, D]."""
        own_QD = self.inputs.matrix(batch.user, fields["request"], (batch.num_requests,))
        events_QLD = self.inputs.matrix(batch.history, fields["event"], batch.history_mask_QL.shape)
        return torch.cat([own_QD, masked_mean(events_QLD, batch.history_mask_QL)], -1)

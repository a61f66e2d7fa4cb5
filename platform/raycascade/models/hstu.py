"""hstu: a generative sequence model as a ranker (Zhai et al. 2024, arXiv 2402.17152)."""

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.models._hstu import EPS, HstuStack, HstuState
from raycascade.models._inputs import FieldInputs, InputOptions
from raycascade.models._layers import linear
from raycascade.models._model import TorchModel
from raycascade.models._sequence import SequenceOptions, SequenceRows, events_to_read, refuse_sequences_that_cannot_be
from raycascade.schema import FeatureSpace


class NormedSwish(nn.Module):
    """sw(x) = x sigmoid(LN(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return x * torch.sigmoid(self.norm(x))


class Hstu(TorchModel):
    """z = W_2 sw(W_1 (y * i)) with y = LN(the candidate's row after the last layer) and
    i = LN(G_2 sw(G_1 [candidate fields])); sw(x) = x sigmoid(LN(x)).

    Rows: one for each field of the request, at the earliest positions, then the events, then the candidates. A
    candidate's row knows what an event of it would; all its fields enter i. ConfigError without a history of items.
    """

    class Config(SequenceOptions, InputOptions):
        """`dropout` of what a layer adds, `input_dropout` of the rows of the history. `preset: code` is the
        released ranking model's."""

        presets = {"code": {"width": 512, "layers": 5, "heads": 4, "key_dim": 128, "value_dim": 128, "history": 8192,
                            "input_dropout": 0.2, "silu": "u", "block_out": "concat3"}}

        history: int = Option(default=200, ge=1)
        dropout: float = Option(default=0.1, ge=0, lt=1)
        input_dropout: float = Option(default=0.0, ge=0, lt=1)

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        refuse_sequences_that_cannot_be(config, space, model="hstu")
        self.config, self.inputs = config, FieldInputs(config, space, model="hstu")
        width, fields = config.width, self.inputs.request_fields
        self.context = nn.ModuleList(linear(self.inputs.width([field]), width) for field in fields)
        self.rows = SequenceRows(self.inputs.history_width, self.inputs.event_width, width, num_events=config.history,
                                 num_context=len(fields), std=config.embedding_std)
        self.input_dropout = nn.Dropout(config.input_dropout)
        self.stack = HstuStack(config, num_rows=config.history + len(fields), dropout=config.dropout)
        self.row_norm, self.item_norm = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.item = nn.Sequential(linear(self.inputs.candidate_width, width), NormedSwish(width), linear(width, width))
        self.hidden = nn.Sequential(linear(width, width), NormedSwish(width))
        self.logits = linear(width, num_tasks)

    def silence(self) -> None:
        """Logits start at their bias, 0."""
        nn.init.zeros_(self.logits.weight)

    def encode_request(self, batch: Batch) -> HstuState:
        """What candidates read of the request's fields and of the events, in each layer."""
        batch = events_to_read(self.config, batch)
        mask_QL = batch.history_mask_QL
        events_QLD = self.rows.of_events(self.inputs.history_matrix(batch), self.inputs.event_matrix(batch), mask_QL)
        rows_QRD = self.input_dropout(torch.cat([self._context(batch), events_QLD], 1))
        return self.stack.read(rows_QRD, torch.cat([mask_QL.new_ones(len(mask_QL), len(self.context)), mask_QL], 1))

    def _context(self, batch: Batch) -> Tensor:
        """Rows of the request's fields [Q, m, D]."""
        fields = self.inputs.request_fields
        flat_QD = self.inputs.request_matrix(batch, history=False)
        vectors = flat_QD.split([self.inputs.width([field]) for field in fields], -1) if fields else ()
        rows = [project(vector) for project, vector in zip(self.context, vectors, strict=True)]
        stacked = torch.stack(rows, 1) if rows else flat_QD.new_zeros(len(flat_QD), 0, self.config.width)
        return stacked + self.rows.of_context()

    def score_candidates(self, state: HstuState, batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        candidates_QCD = self.inputs.candidate_matrix(batch)
        rows_QCD = self.row_norm(self.stack(state, self._rows(candidates_QCD)))
        return self.logits(self.hidden(rows_QCD * self.item_norm(self.item(candidates_QCD))))

    def _rows(self, candidates_QCD: Tensor) -> Tensor:
        """The candidates' rows before the first layer [Q, C, D]."""
        return self.rows.of_candidates(self.rows.of_item(self.inputs.as_event(candidates_QCD)))

    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """`attention` [Q, C, heads, m + L + 1]: what a candidate reads of the request's fields, the events and itself
        in the last layer; not normalised."""
        rows_QCD = self._rows(self.inputs.candidate_matrix(batch))
        return {"attention": self.stack.attention(self.encode_request(batch), rows_QCD)}

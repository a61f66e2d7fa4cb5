"""The parts that see user and item together before a gate weighs them (Hong et al. 2025, arXiv 2511.21095).

Which side of a cross attention asks is not published; here a part is named after the side whose rows are the queries:
NRO, one row a candidate, and RO, rows of the request alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.models._cross_attention import CrossAttention, FieldRows
from raycascade.models._hstu import HstuStack, HstuState
from raycascade.models._inputs import FieldInputs
from raycascade.models._layers import linear
from raycascade.models._match import EventIds
from raycascade.models._match_attention import HardMatching
from raycascade.models._sequence import SequenceOptions, SequenceRows


@dataclass(frozen=True)
class RequestParts:
    """What each part keeps of a request: the events' ids, keys and values in the stack's layers and for NRO, and RO's
    row with its query, or RO's whole answer [Q, 1, D] where it reads the history."""

    match: tuple[EventIds, ...] = ()
    stack: HstuState | None = None
    keys_values: tuple[Tensor, Tensor] | None = None
    mask_QL: Tensor | None = None
    asking: tuple[Tensor, Tensor] | None = None
    answer_Q1D: Tensor | None = None


class AskingRequest(nn.Module):
    """RO cross attention: W [rows of `seeds` learned queries; row of the user's vector], all of which read the item's
    fields, or the history.

    What the learned queries read of an item depends on the item alone, and is encoded with it.
    """

    def __init__(
        self, user_width: int, item_widths: list[int], width: int, *, heads: int, seeds: int, std: float
    ) -> None:
        super().__init__()
        self.of_user = linear(user_width, width, bias=False)
        self.attention = CrossAttention(width, heads)
        self.fields = FieldRows(item_widths, width) if item_widths else None
        self.out = linear(width, width)
        self.seeds = nn.Parameter(torch.randn(seeds, width) * std) if seeds else None
        self.out_of_seeds = linear(seeds * width, width, bias=False) if seeds else None

    def of_request(self, users_QTD: Tensor) -> tuple[Tensor, Tensor]:
        """The row of the user's vector [Q, 1, D] and its query."""
        own_Q1D = self.of_user(users_QTD.flatten(1))[:, None]
        return own_Q1D, self.attention.query(own_Q1D)

    def of_items(self, fields_ND: Tensor) -> dict[str, Tensor]:
        """`keys` and `values` of the item's fields [*leading, m, D], and `seeds` [*leading, D], what the learned
        queries make of them; nothing where the history is read."""
        if self.fields is None:
            return {}
        rows = self.fields(fields_ND)
        encoded = {"keys": self.attention.key(rows), "values": self.attention.value(rows)}
        return encoded if self.seeds is None else encoded | {"seeds": self._of_seeds(**encoded)}

    def of_events(self, asking: tuple[Tensor, Tensor], rows_QLD: Tensor, mask_QL: Tensor) -> Tensor:
        """The answer of the history [Q, 1, D], the same for every candidate."""
        keys, values = self.attention.key(rows_QLD), self.attention.value(rows_QLD)
        answer_QD = self.out(self.attention(*asking, keys, values, mask_QL)[:, 0])
        return (answer_QD if self.seeds is None else answer_QD + self._of_seeds(keys, values, mask_QL))[:, None]

    def _of_seeds(self, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        assert self.out_of_seeds is not None
        read = self.attention(self.seeds, self.attention.query(self.seeds), keys, values, mask)
        return self.out_of_seeds(read.flatten(-2))

    def forward(self, asking: tuple[Tensor, Tensor], encoded: Mapping[str, Tensor]) -> Tensor:
        """The answer of each candidate's fields [Q, C, D]."""
        row, query = (part[:, None] for part in asking)
        answer_QCD = self.out(self.attention(row, query, encoded["keys"], encoded["values"])[:, :, 0])
        return answer_QCD if self.seeds is None else answer_QCD + encoded["seeds"]


class AttentionParts(nn.Module):
    """Vectors of each candidate by name: `hma` of match counts, `self` of the candidate's row behind layers over the
    history, `nro` and `ro` of cross attention. A part that is switched off has no parameters."""

    def __init__(
        self, options: SequenceOptions, inputs: FieldInputs, matching: HardMatching | None, *, user_width: int,
        self_attention: bool, nro: bool, ro: Literal["", "item", "history"], seeds: int, std: float,
    ) -> None:
        super().__init__()
        width = options.width
        self.inputs = [inputs]  # in a list: they belong to the towers
        self.hma, self.reads_candidates = matching, self_attention or nro
        self.rows = self.stack = self.nro = self.ro = None
        if self.reads_candidates or ro == "history":
            self.rows = SequenceRows(inputs.history_width, inputs.event_width, width, num_events=options.history,
                                     std=std, candidates=self.reads_candidates)
        if self_attention:
            self.stack = HstuStack(options, num_rows=options.history)
        if nro:
            self.nro = CrossAttention(width, options.heads)
        if ro:
            widths = [inputs.width([field]) for field in inputs.item_fields] if ro == "item" else []
            self.ro = AskingRequest(user_width, widths, width, heads=options.heads, seeds=seeds, std=std)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parts there are."""
        parts = {"hma": self.hma, "self": self.stack, "nro": self.nro, "ro": self.ro}
        return tuple(name for name, part in parts.items() if part is not None)

    def of_request(self, batch: Batch, users_QTD: Tensor) -> RequestParts:
        """Everything that the parts need of a request, whatever the candidates."""
        mask_QL, inputs = batch.history_mask_QL, self.inputs[0]
        match = () if self.hma is None else self.hma.of_request(batch)
        stack = keys_values = asking = answer = None
        if self.ro is not None:
            asking = self.ro.of_request(users_QTD)
        if self.rows is not None:
            rows_QLD = self.rows.of_events(inputs.history_matrix(batch), inputs.event_matrix(batch), mask_QL)
            if self.stack is not None:
                stack = self.stack.read(rows_QLD, mask_QL)
            if self.nro is not None:
                keys_values = self.nro.key(rows_QLD), self.nro.value(rows_QLD)
            if self.ro is not None and self.ro.fields is None:
                assert asking is not None
                answer = self.ro.of_events(asking, rows_QLD, mask_QL)
        return RequestParts(match, stack, keys_values, mask_QL, asking, answer)

    def of_items(self, item: Mapping[str, Tensor], fields_ND: Tensor, leading: Sequence[int]) -> dict[str, Tensor]:
        """Everything that the parts need of an item: `row` [*leading, D], `keys`, `values`, `seeds` and
        `ids.<field>`."""
        encoded: dict[str, Tensor] = {}
        if self.reads_candidates:
            assert self.rows is not None
            encoded["row"] = self.rows.of_item(self.inputs[0].as_event(fields_ND))
        if self.ro is not None:
            encoded |= self.ro.of_items(fields_ND)
        if self.hma is not None:
            encoded |= self.hma.of_items(item, len(leading))
        return encoded

    def forward(self, state: RequestParts, encoded: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """h_k [Q, C, D] by name; [Q, 1, D] where it is the same for all candidates."""
        parts: dict[str, Tensor] = {}
        if self.hma is not None:
            parts["hma"] = self.hma(self.hma.counts(state.match, encoded, batch))
        if self.reads_candidates:
            assert self.rows is not None
            rows_QCD = self.rows.of_candidates(encoded["row"])
            if self.stack is not None:
                assert state.stack is not None
                parts["self"] = self.stack(state.stack, rows_QCD)
            if self.nro is not None:
                assert state.keys_values is not None
                parts["nro"] = self.nro(rows_QCD, self.nro.query(rows_QCD), *state.keys_values, state.mask_QL)
        if self.ro is not None:
            assert state.asking is not None
            parts["ro"] = self.ro(state.asking, encoded) if state.answer_Q1D is None else state.answer_Q1D
        return parts

    def attention(self, state: RequestParts, encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What candidates read: `self` [Q, C, heads, L + 1] (not normalised) and `nro` [Q, C, heads, L], and what the
        user's row reads of their fields, `ro` [Q, C, heads, 1, m]."""
        weights: dict[str, Tensor] = {}
        if self.rows is not None and self.reads_candidates:
            rows_QCD = self.rows.of_candidates(encoded["row"])
            if self.stack is not None and state.stack is not None:
                weights["self"] = self.stack.attention(state.stack, rows_QCD)
            if self.nro is not None and state.keys_values is not None:
                key = state.keys_values[0]
                weights["nro"] = self.nro.weights(self.nro.query(rows_QCD), key, state.mask_QL).transpose(1, 2)
        if self.ro is not None and self.ro.fields is not None and state.asking is not None:
            weights["ro"] = self.ro.attention.weights(state.asking[1][:, None], encoded["keys"])
        return weights

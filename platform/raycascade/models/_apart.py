"""Fields apart from numbers: the input of models that treat a number otherwise than a vector."""

import torch
from torch import Tensor

from raycascade.batch import Batch
from raycascade.models._inputs import FieldInputs, InputOptions
from raycascade.models._layers import masked_mean
from raycascade.schema import FeatureSpace, Field


class InputsApart(FieldInputs):
    """`FieldInputs` in two parts: vectors side by side, and numbers as they are. History columns stand behind the
    request's own, each as its mean."""

    def __init__(self, options: InputOptions, space: FeatureSpace, *, model: str) -> None:
        super().__init__(options.model_copy(update={"dense": "raw"}), space, model=model)
        sides = {"request": self.request_fields, "candidate": self.candidate_fields,
                 "event": (*self.history_fields, *self.event_fields)}
        self.fields = {side: tuple(f for f in fields if f.form != "dense") for side, fields in sides.items()}
        self.numbers = {side: tuple(f for f in fields if f.form == "dense") for side, fields in sides.items()}
        self.num_numbers = (len(self.numbers["request"]) + len(self.numbers["event"]), len(self.numbers["candidate"]))
        self.num_fields = (len(self.fields["request"]) + len(self.fields["event"]), len(self.fields["candidate"]))

    def of_request(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Vectors [Q, m_u k] and numbers [Q, n_u]."""
        return self._of_request(batch, self.fields), self._of_request(batch, self.numbers)

    def of_candidates(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Vectors [Q, C, m_c k] and numbers [Q, C, n_c]."""
        shape = batch.mask_QC.shape
        return (self.matrix(batch.item, self.fields["candidate"], shape),
                self.matrix(batch.item, self.numbers["candidate"], shape))

    def _of_request(self, batch: Batch, fields: dict[str, tuple[Field, ...]]) -> Tensor:
        own_QD = self.matrix(batch.user, fields["request"], (batch.num_requests,))
        if not fields["event"]:
            return own_QD
        events_QLD = self.matrix(batch.history, fields["event"], batch.history_mask_QL.shape)
        return torch.cat([own_QD, masked_mean(events_QLD, batch.history_mask_QL)], -1)

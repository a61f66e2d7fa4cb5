"""A history in a few vectors: one mean per value of an event field, with learned weights by recency."""

import torch
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.errors import ConfigError
from raycascade.models._inputs import FieldInputs
from raycascade.schema import FIRST_ROW, FeatureSpace, near_miss

MOST_GROUPS = 8


class GroupedHistory(nn.Module):
    """pool_g = sum_j w_gj e_j / (1 + sum_j w_gj) over the events j whose `field` has value g; [Q, G * d_h].

    w_gj = exp(theta_g[age of event j in events]), theta starts at 0. The 1 below shrinks pools of few events, so that
    their length says how much is known. Without a field there is one group of all events.
    """

    def __init__(self, inputs: FieldInputs, space: FeatureSpace, field: str | None) -> None:
        super().__init__()
        if not inputs.history_width:
            raise ConfigError("two_tower, mlp: pooling by recency needs a history of items; declare one, or leave out "
                              "user_history: recency and interest")
        self.inputs, self.field, self.groups = [inputs], field, 1  # in a list: the inputs belong to the model
        if field is not None:
            known = {f.name: f for f in space.of("event") if f.form == "id"}
            if field not in known:
                raise ConfigError(f"history_by: {field!r} is not an id feature of the events"
                                  f"{near_miss(field, set(known))}")
            self.groups = known[field].num_rows - FIRST_ROW
            if not 1 <= self.groups <= MOST_GROUPS:
                raise ConfigError(f"history_by: {field!r} has {self.groups} values; "
                                  f"a field of 1 to {MOST_GROUPS} can group")
        self.recency = nn.Parameter(torch.zeros(self.groups, max(1, space.history_len)))

    @property
    def width(self) -> int:
        """G * d_h."""
        return self.groups * self.inputs[0].history_width

    def forward(self, batch: Batch) -> Tensor:
        """Pools [Q, G, d_h]."""
        events_QLD = self.inputs[0].history_matrix(batch)
        mask_QL = batch.history_mask_QL
        age_QL = mask_QL.sum(1, keepdim=True) - mask_QL.cumsum(1)  # how many events came later
        age_QL = age_QL.clamp(max=self.recency.shape[1] - 1)  # of masked events too, which weigh nothing
        weights_QGL = self.recency.exp()[:, age_QL].transpose(0, 1) * mask_QL[:, None]
        if self.field is not None:
            values = torch.arange(FIRST_ROW, FIRST_ROW + self.groups, device=mask_QL.device)
            weights_QGL = weights_QGL * (batch.history[self.field][:, None] == values[None, :, None])
        return weights_QGL @ events_QLD / (1.0 + weights_QGL.sum(-1, keepdim=True))

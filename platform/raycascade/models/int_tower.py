"""int_tower: late interaction of every layer of the user's tower with the item's (Li et al. 2022, arXiv 2210.09890)."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.errors import ConfigError, DataError
from raycascade.models._encoded_items import ItemEncodingModel
from raycascade.models._in_batch import hidden_among_positives, in_batch_softmax
from raycascade.models._layers import RECTIFIERS, ActivationName, HiddenUnits, NormName, initialise, linear
from raycascade.models._stacks import FieldStacks, StackOptions
from raycascade.schema import FeatureSpace, near_miss

CONTRAST_TEMPERATURE = 0.07  # of the authors' code


class LightExcitation(nn.Module):
    """x_f <- x_f + x_f softmax_f(W mean_k(x))_f over fields f, W [m, m] without bias; one field is doubled."""

    def __init__(self, num_fields: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_fields, num_fields)) if num_fields > 1 else None
        if self.weight is not None:
            initialise(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Fields [..., m, k] -> the same, weighed."""
        return x + x * self.shares(x).unsqueeze(-1)

    def shares(self, x: Tensor) -> Tensor:
        """The softmax [..., m]."""
        means = x.mean(-1)
        return torch.ones_like(means) if self.weight is None else (means @ self.weight.T).softmax(-1)


class Layers(nn.Module):
    """The hidden layers of a tower, of which each one's output is wanted."""

    def __init__(
        self, width: int, hidden: Sequence[int], *, activation: ActivationName, norm: NormName, dropout: float
    ) -> None:
        super().__init__()
        widths = [width, *hidden]
        self.linears = nn.ModuleList(linear(a, b, bias=norm != "batch", wide=activation in RECTIFIERS)
                                     for a, b in pairwise(widths))
        self.units = nn.ModuleList(HiddenUnits(b, activation=activation, norm=norm, dropout=dropout) for b in hidden)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """h_0 = x, h_1, ..., h_n."""
        outputs = [x]
        for layer, units in zip(self.linears, self.units, strict=True):
            outputs.append(units(layer(outputs[-1]), mask))
        return outputs


class IntTower(ItemEncodingModel):
    """z_t = exp(g_t) s_t + b_t with s = sum_l sum_a max_b U_l[a] . V[b]: layers l of the user's tower, user's heads a,
    item's heads b (equations 4 to 6).

    Each task has its own heads of the user; the item's are shared. An item's row is heads x head_dim numbers. A maximum
    is no product of vectors, so no index can search by it. ConfigError for a feature that depends on the user and the
    item together.
    """

    class Config(StackOptions):
        """`tap: output` reads the layers' outputs (the paper's), `input` their inputs (the authors' code). `contrast`:
        weight of an in-batch contrast of users and items at temperature 0.07, among the positives of `contrast_label`
        (None: the log's first)."""

        presets = {"code": {"hidden": (300, 300, 128), "heads": 32, "head_dim": 64, "dropout": 0.3}}

        hidden: tuple[int, ...] = Option(default=(64, 32, 32), min_length=1)
        heads: int = Option(default=4, ge=1)
        head_dim: int = Option(default=16, ge=1)
        activation: ActivationName = "relu"
        norm: NormName = "none"
        dropout: float = Option(default=0.0, ge=0, lt=1)
        tap: Literal["output", "input"] = "output"
        contrast: float = Option(default=0.0, ge=0)
        contrast_label: str | None = None

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        _refuse_what_towers_cannot_use(config, space)
        self.config, self.num_tasks = config, num_tasks
        self.contrast_label = config.contrast_label or (*space.labels, "")[0]
        self.inputs = FieldStacks(config, space, model="int_tower")
        num_request, num_item, dim = self.inputs.num_request, self.inputs.num_candidate, config.dim
        if not num_request:
            raise ConfigError("int_tower: no feature of the user is left; exclude fewer features from the stage")
        user_hidden = config.hidden if config.tap == "output" else config.hidden[:-1]
        options = {"activation": config.activation, "norm": config.norm, "dropout": config.dropout}
        self.user_excitation, self.item_excitation = LightExcitation(num_request), LightExcitation(num_item)
        self.user_layers = Layers(num_request * dim, user_hidden, **options)
        self.item_layers = Layers(num_item * dim, config.hidden, **options)
        row = config.heads * config.head_dim
        tapped = config.hidden if config.tap == "output" else (num_request * dim, *user_hidden)
        self.user_heads = nn.ModuleList(linear(width, num_tasks * row, bias=False) for width in tapped)
        self.item_heads = linear(config.hidden[-1], row, bias=False)
        self.log_scale = nn.Parameter(torch.full((num_tasks,), -math.log(len(tapped) * config.heads)))
        self.bias = nn.Parameter(torch.zeros(num_tasks))

    def silence(self) -> None:
        """The user's heads start at 0."""
        for layer in self.user_heads:
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]

    # ---- the two halves
    def encode_request(self, batch: Batch) -> Tensor:
        """The user's heads of all layers [Q, T, n, heads, head_dim]."""
        x_QD = self.user_excitation(self.inputs.of_request(batch)).flatten(-2)
        outputs = self.user_layers(x_QD)
        tapped = outputs[1:] if self.config.tap == "output" else outputs
        heads = [project(h_QD) for project, h_QD in zip(self.user_heads, tapped, strict=True)]
        shape = (self.num_tasks, self.config.heads, self.config.head_dim)
        return torch.stack([flat.unflatten(-1, shape) for flat in heads], 2)

    def encode_items(
        self, item: Mapping[str, Tensor], leading: Sequence[int], mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`heads` [*leading, heads, head_dim]."""
        flat = self.inputs.matrix(item, self.inputs.item_fields, leading)
        fields = flat.unflatten(-1, (self.inputs.num_candidate, self.inputs.dim))
        last = self.item_layers(self.item_excitation(fields).flatten(-2), mask)[-1]
        return {"heads": self.item_heads(last).unflatten(-1, (self.config.heads, self.config.head_dim))}

    def score_encoded(self, state: Tensor, encoded: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        return self.log_scale.exp() * self.interaction(state, encoded["heads"]) + self.bias

    def interaction(self, state: Tensor, heads_QCHK: Tensor) -> Tensor:
        """s_t [Q, C, T]: of each of the user's heads the item's best match, summed."""
        users_Q1AK = state.flatten(1, 3)[:, None]
        best_QCA = (users_Q1AK @ heads_QCHK.transpose(-1, -2)).amax(-1)
        return best_QCA.unflatten(-1, (self.num_tasks, -1)).sum(-1)

    # ---- training
    def train_outputs(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Logits, and `contrast` times the loss among the batch's positives under that name; DataError where the batch
        brings no labels."""
        state = self.encode_request(batch)
        encoded = self.encode_items(batch.item, batch.mask_QC.shape, batch.mask_QC)
        logits_QCT = self.score_encoded(state, encoded, batch)
        if not self.config.contrast:
            return logits_QCT, {}
        targets, label = batch.targets, self.contrast_label
        if targets is None or label not in targets.labels:
            raise DataError(f"int_tower: contrast needs the label {label!r}, which the batch does not bring; "
                            "train on logged lists or set contrast: 0")
        q_P, c_P = (batch.mask_QC & (targets.labels[label] > 0.5)).nonzero(as_tuple=True)
        users_PD, items_PD = (nn.functional.normalize(heads.flatten(1), dim=-1)
                              for heads in (state[q_P, 0, -1], encoded["heads"][q_P, c_P]))
        hidden_PP = hidden_among_positives(batch.candidates_QC[q_P, c_P], q_P)
        loss = in_batch_softmax(users_PD @ items_PD.T / CONTRAST_TEMPERATURE, users_PD.new_ones(len(q_P)), hidden_PP)
        return logits_QCT, {"contrast": self.config.contrast * loss}

    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """`user_fields` [Q, m_u] and `item_fields` [Q, C, m_c]: the shares of the fields before the towers."""
        fields = {"user_fields": (self.user_excitation, self.inputs.of_request(batch)),
                  "item_fields": (self.item_excitation, self.inputs.of_candidates(batch))}
        return {name: module.shares(x) for name, (module, x) in fields.items() if x.shape[-2] > 1}


def _refuse_what_towers_cannot_use(config: IntTower.Config, space: FeatureSpace) -> None:
    for field in space.of("pair"):
        raise ConfigError(f"int_tower: {field.name!r} depends on the user and the item together, which no tower sees; "
                          "add it to the stage's `exclude`")
    if config.contrast and (config.contrast_label or (*space.labels, "")[0]) not in space.labels:
        wrong = f"{config.contrast_label!r} is not a label of the log" if config.contrast_label else "the log has none"
        raise ConfigError(f"int_tower: contrast needs a label of the positives, but {wrong}"
                          f"{near_miss(config.contrast_label or '', space.labels)}")

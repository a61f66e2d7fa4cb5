"""two_tower: one vector for the user, one for the item (DSSM, Huang et al. 2013)."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.errors import ConfigError, DataError
from raycascade.models._history import GroupedHistory
from raycascade.models._in_batch import hidden_among_positives, in_batch_softmax
from raycascade.models._inputs import FieldInputs, InputOptions
from raycascade.models._layers import MLP, ActivationName, NormName, masked_softmax
from raycascade.models._model import TorchModel
from raycascade.models._tables import JoinedTables
from raycascade.schema import FeatureSpace, near_miss

LARGEST_LOG_SCALE = math.log(100.0)


class TwoTower(TorchModel):
    """z = exp(g_t) u_t . v + b_t, with u and v L2-normalised (cosine) or as they are (dot).

    An item has one vector for all tasks, a user one per task. ConfigError for a feature that depends on the user and
    the item together: a tower cannot see it.
    """

    class Config(InputOptions):
        """`vector_dim`: width of u and v. `item_hidden`: hidden layers of the item tower, None for the same as the
        user's; none at all leaves v linear in the item's embeddings. `temperature`: 1 / exp(g) at first
        (None: 0.1 for cosine, 1 for dot). `user_history`: how the history enters the user's tower; recency: one mean
        per value of the event field `history_by`, weighted by learned factors of recency (`GroupedHistory`).
        `item_bias`: adds a learned scalar per item id to the score. `index_task`: the task whose order an index
        reproduces. `in_batch_weight`: of a softmax of each positive among those of the batch, corrected by how popular
        they are (`in_batch_softmax`), beside the stage's loss; positives have the label `in_batch_label` (None: the
        log's first)."""

        presets = {"paper": {"hidden": (300, 300), "vector_dim": 128, "activation": "tanh"}}

        hidden: tuple[int, ...] = (64,)
        item_hidden: tuple[int, ...] | None = None
        vector_dim: int = Option(default=32, ge=1)
        activation: ActivationName = "relu"
        norm: NormName = "none"
        dropout: float = Option(default=0.0, ge=0, lt=1)
        similarity: Literal["cosine", "dot"] = "cosine"
        temperature: float | None = Option(default=None, gt=0)
        user_history: Literal["mean", "attention", "recency"] = "mean"
        history_by: str | None = None
        item_bias: bool = False
        index_task: int = Option(default=0, ge=0)
        in_batch_weight: float = Option(default=0.0, ge=0)
        in_batch_label: str | None = None

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        _refuse_what_towers_cannot_use(config, space, num_tasks)
        self.config, self.num_tasks = config, num_tasks
        self.in_batch_label = config.in_batch_label or (*space.labels, "")[0]
        self.inputs = FieldInputs(config, space, model="two_tower")
        self.pools = None
        if config.user_history == "recency":
            self.pools = GroupedHistory(self.inputs, space, config.history_by)
        width = self.inputs.request_width(history=self.pools is None) + (self.pools.width + 1 if self.pools else 0)
        if not width:
            raise ConfigError("two_tower: no feature of the user is left; exclude fewer features from the stage")
        item_hidden = config.hidden if config.item_hidden is None else config.item_hidden
        self.user_tower = self._tower(width, config.hidden, num_tasks * config.vector_dim)
        self.item_tower = self._tower(self.inputs.candidate_width, item_hidden, config.vector_dim)
        events = self.inputs.history_width + self.inputs.event_width
        self.history_query = (
            nn.Parameter(torch.randn(events) * events**-0.5) if config.user_history == "attention" else None)
        default = 0.1 if config.similarity == "cosine" else 1.0
        self.log_scale = nn.Parameter(torch.full((num_tasks,), -math.log(config.temperature or default)))
        self.bias = nn.Parameter(torch.zeros(num_tasks))
        self.item_bias = JoinedTables((space["item_id"],), num_tasks, std=0.0) if config.item_bias else None

    def _tower(self, width: int, hidden: tuple[int, ...], out: int) -> MLP:
        config = self.config
        return MLP(width, hidden, out, activation=config.activation, norm=config.norm, dropout=config.dropout,
                   vector=True)

    def first_order(self) -> tuple[nn.Module, ...]:
        """The items' biases."""
        return () if self.item_bias is None else (self.item_bias,)

    def silence(self) -> None:
        """With `similarity: dot` the users' vectors start at 0; a direction has no zero, so cosine starts as it is."""
        if self.config.similarity == "dot":
            self.user_tower.silence()

    @property
    def training_needs(self) -> frozenset[str]:
        """How popular items are, for the correction of in-batch negatives."""
        return frozenset({"item_shares"} if self.config.in_batch_weight else ())

    # ---- the two halves
    def encode_request(self, batch: Batch) -> Tensor:
        """users_QTD, without scale and bias."""
        if self.pools is not None:
            length_Q1 = batch.history_mask_QL.sum(1, keepdim=True).float().log1p()
            own_QD = self.inputs.request_matrix(batch, history=False)
            x_QD = torch.cat([own_QD, self.pools(batch).flatten(1), length_Q1], -1)
        elif self.history_query is None:
            x_QD = self.inputs.request_matrix(batch, history=True)
        else:
            own_QD = self.inputs.request_matrix(batch, history=False)
            events_QLD = self._events(batch)
            pooled_Q1D = self._history_weights(events_QLD, batch.history_mask_QL)[:, None] @ events_QLD
            x_QD = torch.cat([own_QD, pooled_Q1D.flatten(1)], -1)
        return self._normalised(self.user_tower(x_QD).unflatten(-1, (self.num_tasks, self.config.vector_dim)))

    def score_candidates(self, state: Tensor, batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        return self._logits(state, self._item_vectors(batch.item, batch.mask_QC.shape, batch.mask_QC), batch)

    def _logits(self, state: Tensor, items_QCD: Tensor, batch: Batch) -> Tensor:
        logits_QCT = self.scale * (items_QCD @ state.transpose(1, 2)) + self.bias
        return logits_QCT if self.item_bias is None else logits_QCT + self.item_bias(batch.item["item_id"])

    def train_outputs(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Logits, and in_batch_weight times the loss among the batch's positives as `in_batch`; DataError where the
        batch brings no labels or no `item_shares_QC`."""
        state = self.encode_request(batch)
        items_QCD = self._item_vectors(batch.item, batch.mask_QC.shape, batch.mask_QC)
        logits_QCT = self._logits(state, items_QCD, batch)
        if not self.config.in_batch_weight:
            return logits_QCT, {}
        targets, label, task = batch.targets, self.in_batch_label, self.config.index_task
        if targets is None or label not in targets.labels or targets.item_shares_QC is None:
            raise DataError(f"two_tower: in_batch_weight needs the label {label!r} and item_shares_QC, which the batch "
                            "does not bring; train on logged lists or set in_batch_weight: 0")
        q_P, c_P = (batch.mask_QC & (targets.labels[label] > 0.5)).nonzero(as_tuple=True)
        rows_P, scores_PP = batch.candidates_QC[q_P, c_P], self.scale[task] * (state[q_P, task] @ items_QCD[q_P, c_P].T)
        if self.item_bias is not None:
            scores_PP = scores_PP + self.item_bias(batch.item["item_id"][q_P, c_P])[:, task]
        loss = in_batch_softmax(scores_PP, targets.item_shares_QC[q_P, c_P], hidden_among_positives(rows_P, q_P))
        return logits_QCT, {"in_batch": self.config.in_batch_weight * loss}

    def _events(self, batch: Batch) -> Tensor:
        return torch.cat([self.inputs.history_matrix(batch), self.inputs.event_matrix(batch)], -1)

    def _history_weights(self, events_QLD: Tensor, mask_QL: Tensor) -> Tensor:
        assert self.history_query is not None
        return masked_softmax(events_QLD @ self.history_query, mask_QL)

    def _item_vectors(self, item: Mapping[str, Tensor], leading: tuple[int, ...], mask: Tensor | None) -> Tensor:
        return self._normalised(self.item_tower(self.inputs.matrix(item, self.inputs.item_fields, leading), mask))

    def _normalised(self, vectors: Tensor) -> Tensor:
        return nn.functional.normalize(vectors, dim=-1) if self.config.similarity == "cosine" else vectors

    @property
    def scale(self) -> Tensor:
        """exp(g) [T], at most 100."""
        return self.log_scale.clamp(max=LARGEST_LOG_SCALE).exp()

    # ---- for an index, and for negatives shared by a batch
    def embed_users(self, batch: Batch) -> Tensor:
        """users_QD of task `index_task`: scale * users_QD @ items_ND.T + b is the score. With item biases D grows by 1,
        whose value is 1."""
        users_QD = self.encode_request(batch)[:, self.config.index_task]
        return users_QD if self.item_bias is None else torch.cat([users_QD, users_QD.new_ones(len(users_QD), 1)], -1)

    def embed_items(self, item: Mapping[str, Tensor]) -> Tensor:
        """items_ND from item-side fields [N, ...]; the last column is bias / scale where there are item biases."""
        task = self.config.index_task
        items_ND = self._item_vectors(item, next(iter(item.values())).shape[:1], None)
        if self.item_bias is None:
            return items_ND
        return torch.cat([items_ND, self.item_bias(item["item_id"])[:, task : task + 1] / self.scale[task]], -1)

    def to_logits(self, products: Tensor) -> Tensor:
        """Scores from users_QD @ items_ND.T."""
        task = self.config.index_task
        return self.scale[task] * products + self.bias[task]

    def score_items(self, state: Tensor, item: Mapping[str, Tensor]) -> Tensor:
        """scores_QN of task `index_task`: every request of `encode_request` against one list of items [N, ...]."""
        task = self.config.index_task
        items_ND = self._item_vectors(item, next(iter(item.values())).shape[:1], None)
        scores_QN = self.scale[task] * (state[:, task] @ items_ND.T) + self.bias[task]
        return scores_QN if self.item_bias is None else scores_QN + self.item_bias(item["item_id"])[:, task]

    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """`history_attention` [Q, L], with `user_history: attention`."""
        if self.history_query is None:
            return {}
        return {"history_attention": self._history_weights(self._events(batch), batch.history_mask_QL)}


def _refuse_what_towers_cannot_use(config: TwoTower.Config, space: FeatureSpace, num_tasks: int) -> None:
    for field in space.of("pair"):
        raise ConfigError(f"two_tower: {field.name!r} depends on the user and the item together, which no tower sees; "
                          "add it to the stage's `exclude`")
    if config.in_batch_weight and (config.in_batch_label or (*space.labels, "")[0]) not in space.labels:
        wrong = f"{config.in_batch_label!r} is not a label of the log" if config.in_batch_label else "the log has none"
        raise ConfigError(f"two_tower: in_batch_weight needs a label of the positives, but {wrong}"
                          f"{near_miss(config.in_batch_label or '', space.labels)}")
    if config.index_task >= num_tasks:
        raise ConfigError(f"two_tower: index_task is {config.index_task}, but there are {num_tasks} tasks, from 0 on")
    if config.user_history == "attention" and not (space.history_len and (space.history_fields or space.of("event"))):
        raise ConfigError("two_tower: user_history attention needs a history; declare one or set user_history: mean")
    if config.item_bias and not any(f.name == "item_id" and f.form == "id" for f in space.of("item")):
        raise ConfigError("two_tower: item_bias needs an id feature 'item_id' of the items; declare it or set "
                          "item_bias: false")

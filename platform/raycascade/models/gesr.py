"""gesr: an early-stage ranker that sees user and item together (Hong et al. 2025, arXiv 2511.21095)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.batch import Batch, Targets
from raycascade.errors import ConfigError, DataError
from raycascade.models._encoded_items import ItemEncodingModel
from raycascade.models._gating import GatedLogits
from raycascade.models._match_attention import HardMatching, Pair, declared_pairs, default_pairs
from raycascade.models._moa import AttentionParts, RequestParts
from raycascade.models._sequence import SequenceOptions, events_to_read, refuse_sequences_that_cannot_be
from raycascade.models._towers import Towers
from raycascade.models.two_tower import TwoTower
from raycascade.schema import FeatureSpace, near_miss

TOWER = "tower."  # in front of the names of a two_tower's weights


@dataclass(frozen=True)
class GesrState:
    """A request: its vectors, one a task, what they say of the gates, and what the parts keep of it."""

    users_QTD: Tensor
    gates_QR: Tensor | None
    parts: RequestParts


class Gesr(ItemEncodingModel):
    """z = z_0 + sum_k a_kt z_k: z_0 is a two_tower's logit, z_k those of parts that read the history with the candidate
    (`AttentionParts`), each behind a gate (`GatedLogits`). With a = 0 it is the two_tower to the bit.

    What a candidate costs depends neither on its user tower nor on the history's layers: both run once a request, and
    what an item brings can be encoded once for all (`encode_items`). ConfigError for a feature that depends on the user
    and the item together, and without a history where a part reads it.
    """

    task_labels: tuple[str, ...] = ()  # the labels of the tasks, where the stage declares tasks

    class Config(SequenceOptions, TwoTower.Config):
        """The towers' options are those of two_tower. `pairs`: what is matched (None: the item and each of its fields
        that events carry, over all events and over those with a rarer action, among the newest 10 and among all), in
        counts of at most `match_clip`. `seeds`: learned queries beside the user's vector that read a candidate's
        fields, or the history with `ro_kv: history`. `gate_rank` 0: full matrices. `primary_weight`: of the pointwise
        loss of z_0 beside the stage's, on `primary_label` (None: the log's first) or on the labels of the stage's
        tasks. `hma`, `self`, `nro`, `ro`, `mlpg`: parts, and the gates."""

        presets = {"lite": {"width": 32, "layers": 1, "history": 50, "ro": False, "gate_rank": 16}}

        vector_dim: int = Option(default=64, ge=1)
        pairs: tuple[Pair, ...] | None = Option(default=None, min_length=1)
        match_clip: int = Option(default=16, ge=1)
        match_dim: int = Option(default=16, ge=1)
        seeds: int = Option(default=4, ge=0)
        gate_rank: int = Option(default=32, ge=0)
        head_hidden: tuple[int, ...] = (32,)
        a_init: float = Option(default=0.1, gt=0)
        primary_weight: float = Option(default=0.2, ge=0)
        primary_label: str | None = None
        hma: bool = True
        self: bool = True
        nro: bool = True
        ro: bool = True
        mlpg: bool = True
        ro_kv: Literal["item", "history"] = "item"

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        _refuse_what_it_cannot_use(config, space)
        self.config, self.num_tasks, self.labels = config, num_tasks, space.labels
        self.tower = Towers(config, space, num_tasks=num_tasks)
        user_width, std = num_tasks * config.vector_dim, config.embedding_std
        self.parts = AttentionParts(
            config, self.tower.inputs, _matching(config, space), user_width=user_width, self_attention=config.self,
            nro=config.nro, ro=config.ro_kv if config.ro else "", seeds=config.seeds, std=std)
        names = self.parts.names
        self.gated = GatedLogits(
            names, user_width=user_width, item_width=config.vector_dim, width=config.width, num_tasks=num_tasks,
            rank=config.gate_rank, hidden=config.head_hidden, start=config.a_init, gated=config.mlpg) if names else None

    def first_order(self) -> tuple[nn.Module, ...]:
        """The items' biases, if the towers have them."""
        return self.tower.first_order()

    def silence(self) -> None:
        """The parts' logits start at 0, and z_0 as a silenced two_tower's."""
        self.tower.silence()
        if self.gated is not None:
            self.gated.silence()

    # ---- the two halves
    def encode_request(self, batch: Batch) -> GesrState:
        """The user's vectors, and the newest `history` events as the parts read them."""
        users_QTD = self.tower.encode_request(batch)
        parts = self.parts.of_request(events_to_read(self.config, batch), users_QTD)
        return GesrState(users_QTD, None if self.gated is None else self.gated.of_request(users_QTD), parts)

    def encode_items(
        self, item: Mapping[str, Tensor], leading: Sequence[int], mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`vector`, and where the parts need them `bias`, `row`, `keys`, `values`, `seeds` and `ids.<field>`
        (int64)."""
        inputs = self.tower.inputs
        fields = inputs.matrix(item, inputs.item_fields, leading)
        return {**self.tower.of_items(item, fields, mask), **self.parts.of_items(item, fields, leading)}

    def score_encoded(self, state: GesrState, encoded: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """z [Q, C, T]."""
        primary_QCT = self.primary(state, encoded)
        return primary_QCT if self.gated is None else primary_QCT + self._beside(state, encoded, batch)

    def primary(self, state: GesrState, encoded: Mapping[str, Tensor]) -> Tensor:
        """z_0 [Q, C, T], which `vector` is enough for: what a stage can fall back to when time is short."""
        return self.tower.primary(state.users_QTD, encoded)

    def _beside(self, state: GesrState, encoded: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """What the parts add [Q, C, T]."""
        assert self.gated is not None
        parts = self.parts(state.parts, encoded, batch)
        return self.gated(state.gates_QR, state.users_QTD, encoded["vector"], parts)

    # ---- training
    def train_outputs(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """z, and `primary`: the mean cross entropy of z_0 of each task over the candidates whose label is known, summed
        over tasks with weight `primary_weight`. Without targets, or without labels in the log, there is no such
        term."""
        state = self.encode_request(batch)
        encoded = self.encode_items(batch.item, batch.mask_QC.shape, batch.mask_QC)
        primary_QCT = self.primary(state, encoded)
        logits_QCT = primary_QCT if self.gated is None else primary_QCT + self._beside(state, encoded, batch)
        if not self.config.primary_weight or batch.targets is None or not self.labels:
            return logits_QCT, {}
        return logits_QCT, {"primary": self.config.primary_weight * _pointwise(
            primary_QCT, batch.mask_QC, batch.targets, self._labels_of_tasks())}

    def _labels_of_tasks(self) -> tuple[str, ...]:
        if self.num_tasks == 1 and not self.task_labels:
            return (self.config.primary_label or self.labels[0],)
        labels = self.task_labels or self.labels
        if len(labels) != self.num_tasks:
            raise ConfigError(f"gesr: which of the labels {list(labels)} belong to its {self.num_tasks} tasks is not "
                              "known; set task_labels, or primary_weight: 0")
        return labels

    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """What is read, as in `AttentionParts.attention`, and `gates` [Q, C, parts, width]."""
        state = self.encode_request(batch)
        encoded = self.encode_items(batch.item, batch.mask_QC.shape, batch.mask_QC)
        shown = {f"{name}_attention": weights for name, weights in self.parts.attention(state.parts, encoded).items()}
        if self.gated is None or state.gates_QR is None:
            return shown
        gates = self.gated.gates_of(state.gates_QR, state.users_QTD, encoded["vector"],
                                    self.parts(state.parts, encoded, batch))
        return shown if gates is None else {**shown, "gates": gates}


def with_towers_of(weights: Mapping[str, Tensor], two_tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A gesr's weights with the towers of a trained two_tower; ConfigError where the towers are not of one shape."""
    own = {name.removeprefix(TOWER): tuple(x.shape) for name, x in weights.items() if name.startswith(TOWER)}
    given = {name: tuple(x.shape) for name, x in two_tower.items()}
    if own != given:
        name = min(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
        raise ConfigError(f"init_from: the towers differ in {name!r}: {given.get(name, 'none')} there, "
                          f"{own.get(name, 'none')} here; give both stages the same features and tower options")
    return {**weights, **{TOWER + name: value for name, value in two_tower.items()}}


def _matching(config: Gesr.Config, space: FeatureSpace) -> HardMatching | None:
    if not config.hma:
        return None
    matches = default_pairs(space) if config.pairs is None else declared_pairs(config.pairs, space)
    return HardMatching(matches, clip=config.match_clip, match_dim=config.match_dim, width=config.width,
                        std=config.embedding_std)


def _pointwise(logits_QCT: Tensor, mask_QC: Tensor, targets: Targets, labels: tuple[str, ...]) -> Tensor:
    total = logits_QCT.new_zeros(())
    for task, label in enumerate(labels):
        if label not in targets.labels:
            raise DataError(f"gesr: primary_weight needs the label {label!r}, which the batch does not bring; train on "
                            "logged lists or set primary_weight: 0")
        truth_QC = targets.labels[label].to(logits_QCT.dtype)
        known_QC = mask_QC & ~truth_QC.isnan()
        losses_QC = nn.functional.binary_cross_entropy_with_logits(
            logits_QCT[..., task], torch.where(known_QC, truth_QC, 0.0), reduction="none")
        total = total + torch.where(known_QC, losses_QC, 0.0).sum() / known_QC.sum().clamp(min=1)
    return total


def _refuse_what_it_cannot_use(config: Gesr.Config, space: FeatureSpace) -> None:
    for field in space.of("pair"):
        raise ConfigError(f"gesr: {field.name!r} depends on the user and the item together, which no tower sees; add "
                          "it to the stage's `exclude`")
    if config.self or config.nro or (config.ro and config.ro_kv == "history"):
        refuse_sequences_that_cannot_be(config, space, model="gesr")
    if config.hma and not space.history_len:
        raise ConfigError("gesr: hma counts events and the stage sees no history; declare one or set hma: false")
    if config.in_batch_weight:
        raise ConfigError("gesr: in_batch_weight is of a two_tower alone; leave it out, or train a two_tower with it "
                          "and start from that")
    if config.primary_label is not None and config.primary_label not in space.labels:
        raise ConfigError(f"gesr: primary_label: {config.primary_label!r} is not a label of the log"
                          f"{near_miss(config.primary_label, space.labels)}")

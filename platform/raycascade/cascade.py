"""The cascade as one module: every stage scores, a funnel narrows, and every answer says where an item was lost."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from raycascade import plugins
from raycascade.batch import Batch
from raycascade.config import Config, Stage
from raycascade.errors import ConfigError
from raycascade.indexes import Candidates, ItemIndex
from raycascade.item_cache import ItemCache
from raycascade.items import ItemTable
from raycascade.models import FittedModel, StageModel, TowerModel
from raycascade.models._encoded_items import ItemEncodingModel, encode_catalogue, score_from_cache
from raycascade.models._model import TorchModel
from raycascade.schema import PADDING, FeatureSpace, near_miss
from raycascade.semantic_ids.columns import seen_by

ITEM_CHUNK = 65_536  # items embedded at once
MARGINS = (64, 1024)  # above the last one, powers of two


@dataclass(frozen=True)
class StageOutcome:
    """What one stage saw, best first; the first `keep` went on. Of the first stage's catalogue only the best."""

    name: str
    keep: int
    rows_QC: np.ndarray  # item rows; 0 where masked
    scores_QC: np.ndarray  # the stage's logits; -inf where masked
    mask_QC: np.ndarray

    def kept(self, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Item rows and mask of the first `width` (default: keep)."""
        width = self.keep if width is None else width
        return self.rows_QC[:, :width], self.mask_QC[:, :width]


@dataclass(frozen=True)
class Ranking:
    """What each stage saw and kept, for every request."""

    stages: tuple[StageOutcome, ...]

    @property
    def final(self) -> StageOutcome:
        """The last stage; its kept rows are the answer."""
        return self.stages[-1]

    def __getitem__(self, name: str) -> StageOutcome:
        return next(stage for stage in self.stages if stage.name == name)


class Cascade(nn.Module):
    """The stages of a config over a feature space. Stages share no parameters.

    `models` are those that train by gradients; `fitted` those that are fitted at once and have no parameters.
    `item_caches`: what some stages' models have encoded of the items, read instead of the items' fields by whatever
    recommends; they belong to the weights, and only a bundle brings them.
    """

    def __init__(self, config: Config, space: FeatureSpace) -> None:
        super().__init__()
        self.names = tuple(stage.name for stage in config.stages)
        self.keeps = tuple(stage.keep for stage in config.stages)
        self.quotas = config.quotas
        self.stages = {stage.name: stage for stage in config.stages}
        self.models = nn.ModuleDict()
        self.fitted: dict[str, FittedModel] = {}
        self.item_caches: dict[str, ItemCache] = {}
        self.item_fields: dict[str, tuple[str, ...]] = {}
        for position, stage in enumerate(config.stages):
            plugin, options = plugins.options("models", stage.model, f"stages.{position}.model")
            try:
                _refuse_unknown_tasks(stage, space)
                seen = seen_by(stage, space)
                model = plugin(options, seen, num_tasks=stage.num_tasks)
                self.item_fields[stage.name] = tuple(field.name for field in seen.of("item"))
                _refuse_precision_of_nothing(stage, model)
                if isinstance(model, nn.Module):
                    self.models[stage.name] = model
                    if hasattr(model, "task_labels"):
                        setattr(model, "task_labels", stage.tasks)  # noqa: B010 - only some models have it
                else:
                    _refuse_of_fitted(stage, first=position == 0)
                    self.fitted[stage.name] = model
            except ConfigError as error:
                raise ConfigError(f"stages.{position} ({stage.name}): {error}") from None
            if stage.prior:  # starts as the stage before it, and learns what to add
                self.model(stage.name).silence()
        first = config.stages[0]
        if first.fusion and hasattr(self.models[first.name], "embed_items"):
            raise ConfigError(f"stages.0 ({first.name}): an index searches by one product of vectors, which the fusion "
                              f"of {list(first.tasks)} is not; give the first stage a single task without a fusion")
        self.prior_scales = nn.ParameterDict({s.name: nn.Parameter(torch.ones(())) for s in config.stages if s.prior})

    def stage_state(self, name: str) -> dict[str, Tensor]:
        """Everything learned by one stage, its prior's scale included."""
        state = dict(self.models[name].state_dict())
        return state | ({"prior_scale": self.prior_scales[name].data} if name in self.prior_scales else {})

    def load_stage_state(self, name: str, state: dict[str, Tensor]) -> None:
        """The inverse of `stage_state`; RuntimeError where the weights do not fit."""
        state = dict(state)
        if name in self.prior_scales:
            if "prior_scale" not in state:
                raise RuntimeError("prior_scale is missing")
            self.prior_scales[name].data.copy_(state.pop("prior_scale"))
        self.models[name].load_state_dict(state)

    def model(self, name: str) -> StageModel:
        """The model of a stage."""
        return self.fitted[name] if name in self.fitted else cast(StageModel, self.models[name])

    @property
    def training_needs(self) -> frozenset[str]:
        """What the models' training batches must bring beyond the log (`TorchModel.training_needs`)."""
        return frozenset().union(*(getattr(model, "training_needs", ()) for model in self.models.values()))

    @property
    def searches(self) -> bool:
        """Whether the first stage has item vectors and so searches the catalogue; else requests bring candidates."""
        return hasattr(self.models[self.names[0]], "embed_items")

    def require_search(self) -> None:
        """ConfigError where the first stage does not search."""
        if not self.searches:
            raise ConfigError(f"stage {self.names[0]!r} cannot search a catalogue: only a model with item vectors, "
                              "such as two_tower, can; put one first")

    @property
    def retriever(self) -> TowerModel:
        """The first stage, which must embed users and items to search the catalogue."""
        self.require_search()
        return cast(TowerModel, self.models[self.names[0]])

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scores [Q, C] of every stage for every candidate."""
        return self.scores_from(self.logits(batch))

    def logits(self, batch: Batch) -> dict[str, Tensor]:
        """Logits [Q, C, T] of every stage's model, a column for each task."""
        return {name: self.model(name)(batch) for name in self.names}

    def scores_from(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scores [Q, C] of every stage from the logits of all."""
        scores: dict[str, Tensor] = {}
        before_QC: Tensor | None = None
        for name in self.names:
            before_QC = scores[name] = self.with_prior(name, self.fused(name, logits[name]), before_QC)
        return scores

    def score(self, name: str, batch: Batch) -> Tensor:
        """Scores [Q, C] of a stage's model alone, float32, without the prior; `micro_batch` candidates at a time."""
        most = self.stages[name].micro_batch
        if most is None or batch.mask_QC.shape[1] <= most:
            return self.fused(name, self.model(name)(batch))
        model = cast(TorchModel, self.models[name])
        state = model.encode_request(batch)
        parts = [model.score_candidates(state, part) for part in batch.in_parts(most)]
        return self.fused(name, torch.cat(parts, 1))

    def score_cached(self, name: str, batch: Batch, items: ItemTable) -> Tensor:
        """As `score`, by the stage's item cache; of the batch's candidates only the rows and the mask are read."""
        model, names = cast(ItemEncodingModel, self.models[name]), self.item_fields[name]
        state = model.encode_request(batch)
        parts = [score_from_cache(model, state, part, self.item_caches[name], items, names)
                 for part in batch.in_parts(self.stages[name].micro_batch)]
        return self.fused(name, torch.cat(parts, 1))

    def caches_items(self, name: str, items: ItemTable) -> bool:
        """Whether a bundle keeps what the stage's model encodes of each item: the model does so, the stage wants it,
        and every item field that it sees is one that no moment changes."""
        encodes = name in self.models and isinstance(self.models[name], ItemEncodingModel)
        return encodes and bool(self.stages[name].item_cache) and set(self.item_fields[name]) <= items.static.keys()

    def encode_items(self, name: str, items: ItemTable) -> Iterator[dict[str, Tensor]]:
        """What a stage's model encodes of every item, in pieces by item row."""
        return encode_catalogue(cast(ItemEncodingModel, self.models[name]), items, self.item_fields[name])

    def fused(self, name: str, logits_QCT: Tensor) -> Tensor:
        """The stage's score [Q, C], float32, from its tasks' logits: the only one, or as its fusion declares."""
        fusion = self.stages[name].fusion
        if fusion is None:
            return logits_QCT[:, :, 0].float()
        weights_T = logits_QCT.new_tensor([fusion.weights.get(task, 0.0) for task in self.stages[name].tasks]).float()
        share = functional.logsigmoid if fusion.product else torch.sigmoid
        return (share(logits_QCT.float()) * weights_T).sum(-1)

    def with_prior(self, name: str, own_QC: Tensor, before_QC: Tensor | None) -> Tensor:
        """A stage's score from its model's logit and the score of the stage before (which gets no gradient)."""
        if name not in self.prior_scales:
            return own_QC
        assert before_QC is not None, "the first stage has no prior"
        return own_QC + self.prior_scales[name] * before_QC.detach()

    @torch.no_grad()
    def rank(self, batch: Batch) -> Ranking:
        """The funnel replayed on the logged candidates, with the list quotas as widths."""
        outcomes, current = [], batch
        order_QC = torch.arange(batch.mask_QC.shape[1]).expand(batch.mask_QC.shape)
        scores = self.forward(batch)
        for name, quota in zip(self.names, self.quotas, strict=True):
            picked = torch.where(current.mask_QC, scores[name].gather(1, order_QC), -torch.inf)
            outcome, best_QC = _outcome(name, quota, current.candidates_QC, picked, current.mask_QC)
            order_QC = order_QC.gather(1, best_QC)[:, :quota]
            outcomes.append(outcome)
            current = _Survivors(*(torch.from_numpy(kept) for kept in outcome.kept()))
        return Ranking(tuple(outcomes))

    @torch.no_grad()
    def recommend(self, batch: Batch, index: ItemIndex | None, items: ItemTable) -> Ranking:
        """From the whole catalogue: retrieve, leave out what each request excludes, then stage by stage.

        Where the first stage does not search, it chooses among the candidates of the batch.
        """
        outcomes = [self.retrieve(batch, index) if self.searches else self.choose(batch, items)]
        for name, keep in zip(self.names[1:], self.keeps[1:], strict=True):
            outcomes.append(self.narrow(name, keep, batch, outcomes[-1], items))
        return Ranking(tuple(outcomes))

    @torch.no_grad()
    def choose(self, batch: Batch, items: ItemTable) -> StageOutcome:
        """The first stage over the batch's own candidates, without what each request excludes."""
        name, allowed_QC = self.names[0], batch.mask_QC & ~excluded_mask(batch)
        own_QC = self.score_cached(name, batch, items) if name in self.item_caches else self.score(name, batch)
        scores_QC = torch.where(allowed_QC, own_QC, -torch.inf)
        return _outcome(name, self.keeps[0], batch.candidates_QC, scores_QC, allowed_QC)[0]

    @torch.no_grad()
    def retrieve(self, batch: Batch, index: ItemIndex | None) -> StageOutcome:
        """The first stage over the whole catalogue, without what each request excludes."""
        users_QD = self.retriever.embed_users(batch).float().numpy()
        assert index is not None, "a bundle whose first stage searches has an index"
        margin = search_margin(max((len(rows) for rows in batch.exclude), default=0))
        found = without_excluded(index.search(users_QD, self.keeps[0] + margin), batch.exclude, self.keeps[0])
        logits_QK = self.retriever.to_logits(torch.from_numpy(found.scores_QK)).float().numpy()
        return StageOutcome(self.names[0], self.keeps[0], found.rows_QK, logits_QK, found.rows_QK != PADDING)

    @torch.no_grad()
    def narrow(self, name: str, keep: int, batch: Batch, before: StageOutcome, items: ItemTable) -> StageOutcome:
        """One later stage over the survivors of the stage before it, by the stage's item cache where there is one."""
        rows_QC, mask_QC = (torch.from_numpy(np.ascontiguousarray(kept)) for kept in before.kept())
        if name in self.item_caches:
            current = batch.with_rows(rows_QC, mask_QC)
            own_QC = self.score_cached(name, current, items)
        else:
            current = batch.with_candidates(rows_QC, mask_QC, items)
            own_QC = self.score(name, current)
        before_QC = torch.from_numpy(np.ascontiguousarray(before.scores_QC[:, :before.keep]))
        scores_QC = torch.where(mask_QC, self.with_prior(name, own_QC, before_QC), -torch.inf)
        return _outcome(name, keep, current.candidates_QC, scores_QC, mask_QC)[0]

    @torch.no_grad()
    def embed_catalogue(self, items: ItemTable) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows_N, vectors_ND) of the catalogue in chunks, as of the end of the training log."""
        rows_N = items.all_rows
        for start in range(0, len(rows_N), ITEM_CHUNK):
            rows = rows_N[start:start + ITEM_CHUNK]
            fields = items.fields(rows, items.state.as_of_ms)
            yield rows, self.retriever.embed_items(fields).float().numpy()


def _refuse_of_fitted(stage: Stage, *, first: bool) -> None:
    """What only means something for a stage that trains by gradients."""
    kind = stage.model["name"]
    if first:
        raise ConfigError(f"{kind} has no item vectors to search a catalogue by; put a model such as two_tower first")
    if stage.prior:
        raise ConfigError(f"{kind} is fitted before the other stages train, so there is no score yet to add to; "
                          "leave prior out")
    if stage.micro_batch:
        raise ConfigError(f"micro_batch: {kind} keeps nothing of a request between candidates; leave it out")
    if stage.precision != "fp32" or stage.compile:
        raise ConfigError(f"precision and compile are for models of torch, which {kind} is not; leave them out")
    for option in ("loss", "epochs", "lr", "l2_touched", "l2_embedding", "init_from"):
        if getattr(stage, option):
            raise ConfigError(f"{option}: {kind} is fitted by its own objective in its own rounds; leave it out, and "
                              "set the options of the model")


def _refuse_precision_of_nothing(stage: Stage, model: object) -> None:
    if stage.item_cache == "float32" and not isinstance(model, ItemEncodingModel):
        raise ConfigError(f"item_cache: {stage.model['name']} encodes no items that a bundle could keep; leave it out")


def _refuse_unknown_tasks(stage: Stage, space: FeatureSpace) -> None:
    for task in stage.tasks:
        if task not in space.labels:
            raise ConfigError(f"tasks: {task!r} is not a label of the log{near_miss(task, space.labels)}")


@dataclass(frozen=True)
class _Survivors:
    candidates_QC: Tensor
    mask_QC: Tensor


def _outcome(name: str, keep: int, rows_QC: Tensor, scores_QC: Tensor, mask_QC: Tensor) -> tuple[StageOutcome, Tensor]:
    """Sorted by score; equal scores keep the order of the stage before."""
    sorted_QC, best_QC = scores_QC.sort(dim=1, descending=True, stable=True)
    best_rows_QC, best_mask_QC = rows_QC.gather(1, best_QC), mask_QC.gather(1, best_QC)
    return StageOutcome(name, keep, best_rows_QC.numpy(), sorted_QC.numpy(), best_mask_QC.numpy()), best_QC


def excluded_mask(batch: Batch) -> Tensor:
    """[Q, C] true where a candidate is one that the request excludes."""
    mask = torch.zeros_like(batch.mask_QC)
    for q, rows in enumerate(batch.exclude):
        mask[q] = torch.from_numpy(np.isin(batch.candidates_QC[q].numpy(), rows))
    return mask


def search_margin(num_excluded: int) -> int:
    """How many items more than its keep the first stage searches for, so that enough are left. The few sizes there are
    make requests of the same margin searches of the same width, alone and together: a graph looks further around for
    more items, and finds others."""
    if num_excluded <= 0:
        return 0
    return next((size for size in MARGINS if num_excluded <= size), 1 << (num_excluded - 1).bit_length())


def without_excluded(found: Candidates, exclude: tuple[np.ndarray, ...], keep: int) -> Candidates:
    """The first `keep` of each request that it does not exclude."""
    if not exclude:
        return Candidates(found.rows_QK[:, :keep], found.scores_QK[:, :keep])
    request_E = np.repeat(np.arange(len(exclude)), [len(rows) for rows in exclude])
    span = int(found.rows_QK.max(initial=0)) + 1
    excluded = np.concatenate([*exclude, np.zeros(0, np.int64)])
    banned = (request_E * span + excluded)[excluded < span]
    pair_QK = np.arange(len(found.rows_QK))[:, None] * span + found.rows_QK
    drop_QK = np.isin(pair_QK, banned) | (found.rows_QK == PADDING)
    order_QK = np.argsort(drop_QK, axis=1, kind="stable")[:, :keep]
    dropped_QK = np.take_along_axis(drop_QK, order_QK, 1)
    rows_QK = np.where(dropped_QK, PADDING, np.take_along_axis(found.rows_QK, order_QK, 1))
    scores_QK = np.where(dropped_QK, np.float32(-np.inf), np.take_along_axis(found.scores_QK, order_QK, 1))
    return Candidates(rows_QK, scores_QK)

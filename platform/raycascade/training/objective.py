"""From a batch to one number: the joint loss of the cascade, plus the own losses of the stages that name one."""

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from raycascade import plugins
from raycascade.batch import Batch
from raycascade.cascade import Cascade
from raycascade.config import Config
from raycascade.errors import ConfigError
from raycascade.losses import LossOutput
from raycascade.training.sampling import Catalogue, shared_items, with_item_shares, with_retrieved


@dataclass(frozen=True)
class Term:
    """One loss over one or more stages."""

    loss: nn.Module
    names: tuple[str, ...]
    quotas: tuple[int, ...]
    tasks: tuple[str, ...] = ()  # of a single stage: the labels its logits are for


class Objective(nn.Module):
    """All losses of a config. Stages share no parameters, so their sum and one backward pass train each stage exactly
    as if it were alone."""

    def __init__(self, config: Config, cascade: Cascade) -> None:
        super().__init__()
        quotas = dict(zip(cascade.names, cascade.quotas, strict=True))
        own = {stage.name: stage.loss for stage in config.stages if stage.loss}
        joint = tuple(name for name in cascade.names if name not in own)
        joint = joint if set(joint) - set(cascade.fitted) else ()  # without gradients there is nothing to train
        specs = [((name,), spec, f"stage {name!r}: loss") for name, spec in own.items()]
        specs += [(joint, config.loss, "loss")] if joint else []
        self.negatives = config.train.negatives
        self.terms: list[Term] = []
        self.losses = nn.ModuleList()
        for names, spec, where in specs:
            plugin, options = plugins.options("losses", spec, where)
            loss = plugin(options, names)
            if _catalogue_of(loss) and (names != cascade.names[:1] or not hasattr(cascade.retriever, "score_items")):
                raise ConfigError(f"{where}: over {loss.config.over!r} is for the first stage and a model with item "
                                  "vectors, such as two_tower; use over: list with train.negatives for other stages")
            if _catalogue_of(loss) and "item_shares" in getattr(cascade.models[names[0]], "training_needs", ()):
                raise ConfigError(f"{where}: over {loss.config.over!r} and the model's in_batch_weight both bring "
                                  "negatives; set in_batch_weight: 0, or over: list")
            self.losses.append(loss)
            tasks = cascade.stages[names[0]].tasks if len(names) == 1 else ()
            self.terms.append(Term(loss, names, tuple(quotas[name] for name in names), tasks))
        if self.negatives.source == "retriever" and not self.negatives.per_request:
            raise ConfigError("train.negatives.source retriever: per_request is 0, so nothing would be drawn; set it")
        if self.negatives.source == "retriever" and not self._catalogue_loss(cascade):
            raise ConfigError("train.negatives.source retriever: the first stage must have a loss of its own over the "
                              "catalogue, such as {name: softmax, over: catalogue}")
        _refuse_uneven_epochs(config, self.terms, frozen=set(cascade.fitted))

    def _catalogue_loss(self, cascade: Cascade) -> nn.Module | None:
        return next((t.loss for t in self.terms if t.names == cascade.names[:1] and _catalogue_of(t.loss)), None)

    def forward(
        self, cascade: Cascade, batch: Batch, catalogue: Catalogue, rng: np.random.Generator, *,
        active: tuple[str, ...] | None = None, epoch: int = 0,
    ) -> LossOutput:
        """The total and its parts for one batch. Scores are float32 from here on, whatever autocast made of them.

        Stages that are not `active` (default: all are) are left out, and losses that need them. The weights of tasks
        are those of `epoch`; of the first one where totals of several epochs are compared, as on the validation split.
        """
        assert batch.targets is not None, "training needs logged candidates"
        active = cascade.names if active is None else active
        terms, outputs = [term for term in self.terms if set(term.names) <= set(active)], []
        scores: dict[str, Tensor] = {}
        logits: dict[str, Tensor] = {}
        auxiliary: dict[str, Tensor] = {}
        later, before_QC = batch, None
        loss, first_learns = self._catalogue_loss(cascade), cascade.names[0] in active
        if loss is not None and (first_learns or self.negatives.source == "retriever"):
            alone = first_learns and len(active) == 1
            output, later, before_QC = self._retrieval(loss, cascade, batch, catalogue, rng, alone=alone)
            outputs += [output] if first_learns else []
            terms = [term for term in terms if term.loss is not loss]
        needed = [name for name in cascade.names if any(name in term.names for term in terms)]
        last = cascade.names.index(needed[-1]) + 1 if needed else 0
        later = with_item_shares(later, catalogue) if "item_shares" in cascade.training_needs else later
        for name in cascade.names[1 if before_QC is not None else 0:last]:
            model = cascade.model(name)
            logits[name], extra = model.train_outputs(later)
            before_QC = scores[name] = cascade.with_prior(name, cascade.fused(name, logits[name]), before_QC)
            learns = name in active and isinstance(model, nn.Module) and model.training
            auxiliary |= {f"{part}/{name}": value.float() for part, value in extra.items() if learns}
        assert later.targets is not None
        for term in terms:
            targets = replace(later.targets, keep=term.quotas)
            if term.tasks:
                logits_QCT = logits[term.names[0]].float()
                outputs.append(cast(Any, term.loss).over_tasks(logits_QCT, term.tasks, targets, epoch=epoch))
            else:
                outputs.append(term.loss({name: scores[name] for name in term.names}, targets))
        total = torch.stack([*(output.total for output in outputs), *auxiliary.values()]).sum()
        parts = {name: value.detach() for name, value in auxiliary.items()}
        for output in outputs:
            parts |= output.parts
        return LossOutput(total, parts)

    def _retrieval(
        self, loss: nn.Module, cascade: Cascade, batch: Batch, catalogue: Catalogue, rng: np.random.Generator, *,
        alone: bool,
    ) -> tuple[LossOutput, Batch, Tensor]:
        """The first stage against the catalogue; the batch that the later stages get, and the first one's scores on it.

        The user side is computed once for the logged list and the catalogue.
        """
        assert batch.targets is not None
        name, config, tower = cascade.names[0], cast(Any, loss).config, cast(Any, cascade.retriever)
        state = tower.encode_request(batch)
        scores_QC = tower.score_candidates(state, batch)[:, :, 0].float()
        shared = shared_items(batch, lambda item: tower.score_items(state, item).float(), catalogue,
                              num_sampled=config.num_sampled if config.over == "sampled" else None,
                              source=config.sample_from, rng=rng)
        targets = replace(batch.targets, keep=cascade.quotas[:1], log_q_QC=shared.log_q_QC)
        output = loss({name: scores_QC}, targets, shared.negatives)
        if self.negatives.source != "retriever" or alone:
            return output, batch, scores_QC
        later, before_QC = with_retrieved(batch, scores_QC, shared, catalogue, count=self.negatives.per_request,
                                          keeps=(cascade.keeps[0], cascade.keeps[1]), rng=rng)
        return output, later, before_QC


def _refuse_uneven_epochs(config: Config, terms: list[Term], *, frozen: set[str]) -> None:
    """A loss trains all of its stages or none, and in every epoch something must train. Frozen stages never do."""
    last = {stage.name: min(stage.epochs or config.train.epochs, config.train.epochs) for stage in config.stages
            if stage.name not in frozen}
    for term in terms:
        if len({last[name] for name in term.names if name in last}) > 1:
            raise ConfigError(f"stages {list(term.names)}: one loss trains them together, so they need the same "
                              "`epochs`; give them the same, or a `loss` of their own to a stage that ends earlier")
    if max(last.values()) < config.train.epochs:
        raise ConfigError(f"train.epochs {config.train.epochs}: every stage ends after {max(last.values())} at most; "
                          "lower it, or leave `epochs` out of a stage")


def _catalogue_of(loss: nn.Module) -> str:
    over = getattr(getattr(loss, "config", None), "over", "list")
    return "" if over == "list" else over


def finite(output: LossOutput) -> bool:
    """Whether the total is a number; training stops with a clear message where it is not."""
    return bool(torch.isfinite(output.total))

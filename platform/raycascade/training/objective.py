"""From a batch to one number: the joint loss of the cascade, plus the own losses of the stages that name one."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raycascade import plugins
from raycascade.batch import Batch
from raycascade.cascade import Cascade
from raycascade.config import Config
from raycascade.errors import ConfigError
from raycascade.losses import LossOutput
from raycascade.training.sampling import Catalogue, shared_list


@dataclass(frozen=True)
class Term:
    """One loss over one or more stages."""

    loss: nn.Module
    names: tuple[str, ...]
    quotas: tuple[int, ...]


class Objective(nn.Module):
    """All losses of a config. Stages share no parameters, so their sum and one backward pass train each stage exactly
    as if it were alone."""

    def __init__(self, config: Config, cascade: Cascade) -> None:
        super().__init__()
        quotas = dict(zip(cascade.names, cascade.quotas, strict=True))
        own = {stage.name: stage.loss for stage in config.stages if stage.loss}
        joint = tuple(name for name in cascade.names if name not in own)
        specs = [((name,), spec, f"stage {name!r}: loss") for name, spec in own.items()]
        specs += [(joint, config.loss, "loss")] if joint else []
        self.terms: list[Term] = []
        self.losses = nn.ModuleList()
        for names, spec, where in specs:
            plugin, options = plugins.options("losses", spec, where)
            loss = plugin(options, names)
            if _catalogue_of(loss) and not all(hasattr(cascade.models[name], "score_items") for name in names):
                raise ConfigError(f"{where}: over {loss.config.over!r} needs a model with item vectors, such as two_tower"
                                  "; use over: list with train.negatives for other models")
            self.losses.append(loss)
            self.terms.append(Term(loss, names, tuple(quotas[name] for name in names)))

    def forward(self, cascade: Cascade, batch: Batch, catalogue: Catalogue, rng: np.random.Generator) -> LossOutput:
        """The total and its parts for one batch. Scores are float32 from here on, whatever autocast made of them."""
        assert batch.targets is not None, "training needs logged candidates"
        scores, parts, states = {}, {}, {}
        total: Tensor | None = None
        shared = {term.names[0] for term in self.terms if _catalogue_of(term.loss)}
        for name in cascade.names:
            if name in shared:  # the user side serves the logged list and the catalogue
                tower: Any = cascade.models[name]
                states[name] = tower.encode_request(batch)
                scores[name] = tower.score_candidates(states[name], batch)[:, :, 0].float()
                continue
            logits_QCT, auxiliary = cascade.model(name).train_outputs(batch)
            scores[name] = logits_QCT[:, :, 0].float()
            for part, value in auxiliary.items():
                parts[f"{part}/{name}"] = value.detach()
                total = value.float() if total is None else total + value.float()
        for term in self.terms:
            output = self._term(term, scores, states, cascade, batch, catalogue, rng)
            total = output.total if total is None else total + output.total
            parts |= output.parts
        assert total is not None
        return LossOutput(total, parts)

    def _term(
        self, term: Term, scores: dict[str, Tensor], states: dict[str, Tensor], cascade: Cascade, batch: Batch,
        catalogue: Catalogue, rng: np.random.Generator,
    ) -> LossOutput:
        assert batch.targets is not None
        targets = replace(batch.targets, keep=term.quotas)
        if over := _catalogue_of(term.loss):
            config: Any = term.loss.config
            assert len(term.names) == 1, "a catalogue loss belongs to one stage"
            name = term.names[0]
            tower: Any = cascade.models[name]
            extended, targets = shared_list(
                batch, scores[name], lambda item: tower.score_items(states[name], item).float(), catalogue,
                num_sampled=config.num_sampled if over == "sampled" else None, source=config.sample_from, rng=rng)
            return term.loss({name: extended}, replace(targets, keep=term.quotas))
        return term.loss({name: scores[name] for name in term.names}, targets)


def _catalogue_of(loss: nn.Module) -> str:
    over = getattr(getattr(loss, "config", None), "over", "list")
    return "" if over == "list" else over


def finite(output: LossOutput) -> bool:
    """Whether the total is a number; training stops with a clear message where it is not."""
    return bool(torch.isfinite(output.total))

"""Training the RQ-VAE: plain PyTorch, the same on one worker or many, resumable to the exact step.

Every worker holds the same items and draws the same global batch, of which it takes its share; gradients are averaged,
uses of codes are added up, and what only one worker may decide (first codebooks, replaced codes) is broadcast from
rank 0. Randomness needs no saving: every step seeds its generator from (seed, step).
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed
from torch import Tensor

from raycascade.errors import ConfigError, DataError
from raycascade.semantic_ids.kmeans import residual_codebooks
from raycascade.semantic_ids.rqvae import RQVAE, Output

CURVE_POINTS = 200  # points a curve keeps
START, DRAW, RESET = range(3)  # what a random generator is for
MOMENTS = ("exp_avg", "exp_avg_sq")


class RQVAETraining:
    """A model with its optimiser and items, from construction to the frozen model.

    `vectors_NV`: raw content vectors of the TRAINING items, `impressions_N`: how often each was shown in the training
    period (drawn in proportion to sqrt(impressions) + 1). Items that were not shown in that period must not be here.
    Where torch.distributed is initialised, all its workers must be constructed with the same arguments.

    ConfigError: fewer items than codes, a batch that the workers cannot share, a loss that is not finite.
    """

    def __init__(
        self, config: RQVAE.Config, vectors_NV: np.ndarray, impressions_N: np.ndarray, *, device: str = "cpu"
    ) -> None:
        distributed = torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if distributed else 0
        self.world_size = torch.distributed.get_world_size() if distributed else 1
        self.config, self.curves = config, dict[str, list[tuple[int, float]]]()
        self._refuse_the_impossible(len(vectors_NV), vectors_NV.shape[-1])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = RQVAE(config, vectors_NV.shape[-1])
        self.model.fit_scale(vectors_NV)
        self.model.to(device)
        self.rows_NV = self.model.standardised(vectors_NV)
        self._rising_N = np.cumsum(np.sqrt(impressions_N.astype(np.float64)) + 1.0)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=config.lr, weight_decay=0.0)

    def _refuse_the_impossible(self, num_items: int, width: int) -> None:
        config = self.config
        if num_items == 0 or width == 0:
            raise DataError("semantic ids: no item with a content vector was shown in the training period; check the "
                            "column of the vectors and splits")
        if config.kmeans_init and num_items < config.codes:
            raise ConfigError(f"rqvae: {num_items} items with content cannot start {config.codes} codes; lower codes, "
                              "or set kmeans_init: false")
        if config.batch % self.world_size:
            raise ConfigError(f"rqvae: batch {config.batch} must be a multiple of the {self.world_size} workers")

    @property
    def step_number(self) -> int:
        """Steps done."""
        return int(self.model.step)

    def run(self, after_step: "Callable[[RQVAETraining], None] | None" = None) -> RQVAE:
        """From where it stands to the last step; the frozen model. `after_step` is called on every worker, as often."""
        self.model.train()
        self.start()
        while self.step_number < self.config.steps:
            self.train_step()
            if after_step is not None:
                after_step(self)
        return self.model.freeze()

    @torch.no_grad()
    def start(self) -> None:
        """First codebooks by k-means of encoded items; nothing where they have been made already."""
        model, config = self.model, self.config
        if bool(model.kmeans_done) or not config.kmeans_init:
            return
        if self.rank == 0:
            rng = self._rng(START)
            count = min(len(self.rows_NV), config.kmeans_rows or 10 * config.codes)
            chosen = torch.from_numpy(rng.choice(len(self.rows_NV), count, replace=False))
            latent_NZ = model.encoder(self.rows_NV[chosen.to(self.rows_NV.device)])
            model.codebooks_LKZ.copy_(residual_codebooks(
                latent_NZ, levels=config.levels, codes=config.codes, iterations=config.kmeans_iters, rng=rng))
        self._broadcast(model.codebooks_LKZ)
        model.kmeans_done.fill_(True)

    def train_step(self) -> Output:
        """One step on this worker's share of the global batch."""
        model = self.model
        output: Output = model(self.rows_NV[self._draw()])
        if not bool(torch.isfinite(output.total)):
            raise ConfigError(f"rqvae: the loss is not finite at step {self.step_number}; lower lr")
        self.optimiser.zero_grad()
        output.total.backward()
        self._average_gradients()
        self.optimiser.step()
        model.usage_LK += self._summed(uses(output.quantised.codes_NL, self.config.codes))
        model.step += 1
        if self.step_number % self.config.reset_every == 0:
            self._replace_unused(output.quantised.residuals_LNZ)
        if (self.step_number - 1) % max(1, self.config.steps // CURVE_POINTS) == 0:
            self._record(output)
        return output

    def _draw(self) -> Tensor:
        """This worker's rows of the step's global batch."""
        drawn = self._rng(DRAW).random(self.config.batch) * self._rising_N[-1]
        rows = np.minimum(np.searchsorted(self._rising_N, drawn, side="right"), len(self._rising_N) - 1)
        return torch.from_numpy(rows[self.rank::self.world_size]).to(self.rows_NV.device)

    def _rng(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, purpose, self.step_number])

    @torch.no_grad()
    def _replace_unused(self, residuals_LNZ: Tensor) -> None:
        """Codes without a use since the last check become residuals of random rows of the batch, without a momentum;
        codes stay as they are in the last `reset_every` steps. The counters start again."""
        model, config = self.model, self.config
        unused_LK = model.usage_LK == 0
        model.usage_LK.zero_()
        if self.step_number > config.steps - config.reset_every or not bool(unused_LK.any()):
            return
        rng = self._rng(RESET)
        for level, unused_K in enumerate(unused_LK):
            count, rows = int(unused_K.sum()), residuals_LNZ.shape[1]
            picked = torch.from_numpy(rng.choice(rows, count, replace=count > rows)).to(residuals_LNZ.device)
            model.codebooks_LKZ[level, unused_K] = residuals_LNZ[level, picked].to(model.codebooks_LKZ.dtype)
        self._broadcast(model.codebooks_LKZ)
        state = self.optimiser.state[model.codebooks_LKZ]
        for moment in MOMENTS:
            state[moment][unused_LK] = 0.0

    def _average_gradients(self) -> None:
        """Means over all workers, as one flat tensor."""
        if self.world_size == 1:
            return
        parameters = list(self.model.parameters())
        flat = self._summed(torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None]))
        flat /= self.world_size
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def _summed(self, tensor: Tensor) -> Tensor:
        """The tensor, after the same ones of all other workers were added to it."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def _broadcast(self, tensor: Tensor) -> None:
        if self.world_size > 1:
            torch.distributed.broadcast(tensor.data, src=0)

    def _record(self, output: Output) -> None:
        """Adds the parts of the loss, of the global batch, to the curves."""
        values = self._summed(torch.stack(list(output.parts.values()))) / self.world_size
        for name, value in zip(output.parts, values.tolist(), strict=True):
            self.curves.setdefault(name, []).append((self.step_number, value))

    # ---- files
    def save(self, folder: str) -> None:
        """Writes a checkpoint into an empty local folder. All workers hold the same state, so that one of them is
        enough."""
        safetensors.torch.save_file(_plain(self.model.state_dict()), f"{folder}/rqvae.safetensors")
        state = {f"{name}/{moment}": self.optimiser.state[parameter][moment]
                 for name, parameter in self.model.named_parameters() if parameter in self.optimiser.state
                 for moment in (*MOMENTS, "step")}
        safetensors.torch.save_file(_plain(state), f"{folder}/optimiser.safetensors")
        Path(folder, "curves.json").write_text(json.dumps(self.curves))

    def load(self, folder: str) -> None:
        """Goes on where `save` was called: the following steps are those of a run that was never interrupted."""
        self.model.load_state_dict(safetensors.torch.load_file(f"{folder}/rqvae.safetensors"))
        held = safetensors.torch.load_file(f"{folder}/optimiser.safetensors")
        for name, parameter in self.model.named_parameters():
            if f"{name}/step" in held:
                self.optimiser.state[parameter] = {
                    "step": held[f"{name}/step"], **{m: held[f"{name}/{m}"].to(parameter.device) for m in MOMENTS}}
        self.curves = _curves(folder)


def trained_model(config: RQVAE.Config, width: int, folder: str) -> tuple[RQVAE, dict[str, list[tuple[int, float]]]]:
    """The frozen model of a checkpoint that `RQVAETraining.save` wrote, on the CPU, and the curves."""
    model = RQVAE(config, width)
    model.load_state_dict(safetensors.torch.load_file(f"{folder}/rqvae.safetensors"))
    return model.freeze(), _curves(folder)


def _curves(folder: str) -> dict[str, list[tuple[int, float]]]:
    return {name: [(step, value) for step, value in points]
            for name, points in json.loads(Path(folder, "curves.json").read_text()).items()}


def uses(codes_NL: Tensor, codes: int) -> Tensor:
    """How often each code of each level stands in the rows: int64 [L, K]."""
    return torch.stack([torch.bincount(codes_N, minlength=codes) for codes_N in codes_NL.T])


def _plain(tensors: "dict[str, Tensor]") -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

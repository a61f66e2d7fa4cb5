"""RQ-VAE: an autoencoder whose latent vector is a sum of one code per level; the chosen codes describe an item.

Zeghidour et al., SoundStream (2021) and Lee et al., "Autoregressive Image Generation using Residual Quantization"
(2022), as used by Singh et al., "Better Generalization with Semantic IDs" (RecSys 2024), section 3.

Shapes: N rows, V numbers of a content vector, Z of a latent vector, L levels, K codes of a level.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field as Option, model_validator
from torch import Tensor, nn

from raycascade.errors import ConfigError, DataError
from raycascade.plugins import PluginConfig

ENCODE_ROWS = 128  # rows of every call of the frozen encoder: one size, so that no batch size changes a bit
SCALE_ROWS = 1 << 16
CHUNK_ELEMENTS = 1 << 24  # distances held at a time
PRESETS: Mapping[str, Mapping[str, Any]] = {"youtube": {"levels": 8, "codes": 2048, "hidden": (), "dim": 256}}
_PRECISION = threading.Lock()  # the precision of float32 products belongs to the process, not to the thread


@dataclass(frozen=True)
class Quantised:
    """Codes of latent vectors. `residuals_LNZ`: what each level was given, without its graph; `sum_NZ`: the sum of the
    chosen codes, detached; `commitment` and `codebook`: 0-dim, sums over levels and dimensions, means over rows."""

    codes_NL: Tensor
    residuals_LNZ: Tensor
    sum_NZ: Tensor
    commitment: Tensor
    codebook: Tensor


@dataclass(frozen=True)
class Output:
    """What a training batch gives: `total` with its graph, `parts` by name (0-dim, detached), the quantised rows."""

    total: Tensor
    parts: Mapping[str, Tensor]
    restored_NV: Tensor
    quantised: Quantised


class RQVAE(nn.Module):
    """Encoder, L codebooks of K codes, decoder. Rows are standardised content vectors; `encode` takes raw ones.

    All state is a parameter or a buffer, also whether the codebooks have been initialised: a model that is loaded again
    keeps its codes. DataError for vectors of another width, or with NaN or infinity.
    """

    class Config(PluginConfig):
        """`codes` per level; `hidden`: layers of the encoder before its last one, of `dim` numbers; the decoder mirrors
        them. `kmeans_rows` (None: 10 per code) items start the codebooks; a code unused for `reset_every` steps is
        replaced. `preset: youtube` sets levels 8, codes 2048 and an encoder of one layer of 256, as in the paper."""

        preset: Literal["youtube"] | None = None
        levels: int = Option(default=4, ge=1)
        codes: int = Option(default=256, ge=2)
        hidden: tuple[int, ...] = (256,)
        dim: int = Option(default=32, ge=1)
        beta: float = Option(default=0.25, ge=0)
        lr: float = Option(default=1e-3, gt=0)
        batch: int = Option(default=2048, ge=1)
        steps: int = Option(default=2000, ge=1)
        kmeans_init: bool = True
        kmeans_rows: int | None = Option(default=None, ge=1)
        kmeans_iters: int = Option(default=10, ge=0)
        reset_every: int = Option(default=100, ge=1)
        seed: int = 7

        @model_validator(mode="before")
        @classmethod
        def _with_preset(cls, given: Any) -> Any:
            preset = PRESETS.get(given.get("preset") or "") if isinstance(given, dict) else None
            return given if preset is None else {**preset, **given}

        @model_validator(mode="after")
        def _rows_for_codes(self) -> "RQVAE.Config":
            if self.kmeans_init and self.kmeans_rows is not None and self.kmeans_rows < self.codes:
                raise ConfigError(f"rqvae: kmeans_rows {self.kmeans_rows} cannot start {self.codes} codes; "
                                  "give at least one row per code")
            return self

    mean_V: Tensor
    std_V: Tensor
    kmeans_done: Tensor
    usage_LK: Tensor
    step: Tensor

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config, self.width = config, width
        sizes = (width, *config.hidden, config.dim)
        self.encoder, self.decoder = _mlp(sizes), _mlp(sizes[::-1])
        self.codebooks_LKZ = nn.Parameter(torch.randn(config.levels, config.codes, config.dim) / config.dim**0.5)
        self.register_buffer("mean_V", torch.zeros(width))
        self.register_buffer("std_V", torch.ones(width))
        self.register_buffer("kmeans_done", torch.tensor(False))
        self.register_buffer("usage_LK", torch.zeros(config.levels, config.codes, dtype=torch.long))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    # ---- training
    def forward(self, rows_NV: Tensor) -> Output:
        """Losses of standardised rows: ||x - x^||^2 + sum over levels of beta commitment + codebook, a mean over rows.

        The residual is lessened by the detached code, and one straight-through step stands at the end, so that every
        level's commitment reaches the encoder, and the error of the decoder reaches it once.
        """
        latent_NZ = _wide(self.encoder(rows_NV))
        found = quantise(latent_NZ, self.codebooks_LKZ)
        restored_NV = _wide(self.decoder(latent_NZ + (found.sum_NZ - latent_NZ).detach()))
        error = (rows_NV - restored_NV).square().sum(dim=1).mean()
        total = error + self.config.beta * found.commitment + found.codebook
        parts = {"loss": total, "reconstruction": error, "commitment": found.commitment, "codebook": found.codebook}
        return Output(total, {name: part.detach() for name, part in parts.items()}, restored_NV, found)

    def fit_scale(self, vectors_NV: np.ndarray) -> None:
        """Mean and deviation of the L2-normalised vectors, which are those of the training items and of no other."""
        self._checked(vectors_NV)
        pieces = range(0, len(vectors_NV), SCALE_ROWS)

        def units() -> Iterator[np.ndarray]:
            return (unit_rows(vectors_NV[start:start + SCALE_ROWS]).astype(np.float64) for start in pieces)

        mean_V = sum((part.sum(axis=0) for part in units()), start=np.zeros(self.width)) / len(vectors_NV)
        squares_V = sum((np.square(part - mean_V).sum(axis=0) for part in units()), start=np.zeros(self.width))
        spread_V = np.sqrt(squares_V / len(vectors_NV))
        self.mean_V.copy_(torch.from_numpy(mean_V))
        self.std_V.copy_(torch.from_numpy(np.where(spread_V > 1e-6, spread_V, 1.0)))

    # ---- frozen
    def freeze(self) -> "RQVAE":
        """Evaluation mode without trainable parameters, for ever; returns itself."""
        return self.eval().requires_grad_(False)

    def standardised(self, vectors_NV: np.ndarray) -> Tensor:
        """Raw vectors as rows of the encoder, float32 on the model's device: L2-normalised, then by mean and deviation
        of the training items."""
        unit = torch.from_numpy(unit_rows(self._checked(vectors_NV))).to(self.mean_V.device)
        return (unit - self.mean_V) / self.std_V

    @torch.no_grad()
    def encode(self, vectors_NV: np.ndarray) -> np.ndarray:
        """Codes int64 [N, L] of raw content vectors [N, V], in float32 whatever autocast is on around the call.

        The same rows give the same codes in batches of any size.
        """
        codes = [codes_NL for _, codes_NL, _ in self._pieces(vectors_NV)]
        return np.concatenate(codes) if codes else np.zeros((0, self.config.levels), np.int64)

    @torch.no_grad()
    def errors(self, vectors_NV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """||x - x^||^2 and ||x||^2 of every raw vector, standardised: two float64 arrays [N]."""
        lost, whole = [np.zeros(0)], [np.zeros(0)]
        for rows_NV, _, sum_NZ in self._pieces(vectors_NV):
            with exact_float32(rows_NV.device.type):
                restored_NV = self.decoder(sum_NZ)
            lost.append((rows_NV - restored_NV).double().square().sum(dim=1).cpu().numpy())
            whole.append(rows_NV.double().square().sum(dim=1).cpu().numpy())
        return np.concatenate(lost), np.concatenate(whole)

    def _pieces(self, vectors_NV: np.ndarray) -> Iterator[tuple[Tensor, np.ndarray, Tensor]]:
        """Standardised rows, their codes and the sums of these, ENCODE_ROWS at a time; the encoder sees the last piece
        filled up with zeros."""
        self._checked(vectors_NV)
        for start in range(0, len(vectors_NV), ENCODE_ROWS):
            rows_NV = self.standardised(vectors_NV[start:start + ENCODE_ROWS])
            real, filled_NV = len(rows_NV), nn.functional.pad(rows_NV, (0, 0, 0, ENCODE_ROWS - len(rows_NV)))
            with exact_float32(rows_NV.device.type):
                latent_NZ = self.encoder(filled_NV)
            found = quantise(latent_NZ, self.codebooks_LKZ)
            yield rows_NV, found.codes_NL[:real].cpu().numpy(), found.sum_NZ[:real]

    def _checked(self, vectors_NV: np.ndarray) -> np.ndarray:
        if vectors_NV.ndim != 2 or vectors_NV.shape[1] != self.width:
            raise DataError(f"content vectors: expected {self.width} numbers each, got an array of shape "
                            f"{list(vectors_NV.shape)}; semantic ids need the vectors they were trained on")
        bad_N = ~np.isfinite(vectors_NV).all(axis=1)
        if bad_N.any():
            raise DataError(f"content vectors: NaN or infinity in row {int(np.argmax(bad_N))} ({int(bad_N.sum())} such "
                            "rows); give null where there is no content")
        return vectors_NV


def quantise(latent_NZ: Tensor, codebooks_LKZ: "Tensor | Sequence[Tensor]") -> Quantised:
    """Residual quantisation, exact and in at least float32: each level takes the nearest code (ties: the lowest) and
    hands on what is left of the DETACHED code."""
    residual_NZ, codes, residuals = latent_NZ, [], []
    sum_NZ, commitment, codebook = torch.zeros_like(latent_NZ), latent_NZ.new_zeros(()), latent_NZ.new_zeros(())
    with exact_float32(latent_NZ.device.type):
        for codebook_KZ in codebooks_LKZ:
            codes_N = nearest(residual_NZ.detach(), codebook_KZ.detach())
            chosen_NZ = codebook_KZ[codes_N]
            commitment = commitment + (residual_NZ - chosen_NZ.detach()).square().sum(dim=1).mean()
            codebook = codebook + (residual_NZ.detach() - chosen_NZ).square().sum(dim=1).mean()
            codes.append(codes_N)
            residuals.append(residual_NZ.detach())
            residual_NZ = residual_NZ - chosen_NZ.detach()
            sum_NZ = sum_NZ + chosen_NZ.detach()
    return Quantised(torch.stack(codes, dim=1), torch.stack(residuals), sum_NZ, commitment, codebook)


def nearest(points_NZ: Tensor, codes_KZ: Tensor) -> Tensor:
    """The code at the least squared distance from each point, by ||e||^2 - 2 r.e; ties: the lowest. int64 [N]."""
    squares_K = codes_KZ.square().sum(dim=1)
    rows = max(1, CHUNK_ELEMENTS // len(codes_KZ))
    return torch.cat([(squares_K - 2.0 * (part @ codes_KZ.T)).argmin(dim=1) for part in points_NZ.split(rows)])


def unit_rows(vectors_NV: np.ndarray) -> np.ndarray:
    """Rows of length 1 in float32; a zero row stays zero."""
    vectors_NV = np.ascontiguousarray(vectors_NV, np.float32)
    return vectors_NV / np.maximum(np.linalg.norm(vectors_NV, axis=1, keepdims=True), np.float32(1e-12))


@contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """No autocast, and no TF32 or bfloat16 inside products of float32."""
    with torch.autocast(device_type, enabled=False), _PRECISION:
        before = torch.get_float32_matmul_precision()
        if before != "highest":
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if before != "highest":
                torch.set_float32_matmul_precision(before)


def _wide(values: Tensor) -> Tensor:
    """What autocast made narrow, as float32."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])

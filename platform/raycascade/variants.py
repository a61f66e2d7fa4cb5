"""The variants of trained stages that are served: in fewer bits, compiled, or both.

A bundle holds float32 weights alone; whoever loads it makes the variants that its config names, always here, so that
batch scoring, serving and the guard of a training mean the same by them. Training knows nothing of variants.
"""

import copy
import importlib.util
import logging
import os
import shutil
import sysconfig
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from raycascade.batch import Batch
from raycascade.cascade import Cascade
from raycascade.config import Stage
from raycascade.errors import ConfigError
from raycascade.items import ItemTable
from raycascade.linears import narrow
from raycascade.models._encoded_items import ItemEncodingModel
from raycascade.models._model import TorchModel

BUCKETS = (64, 128, 256, 512, 1024)  # widths of candidates and histories that are compiled for
log = logging.getLogger(__name__)


def is_variant(stage: Stage) -> bool:
    """Whether a stage is served otherwise than it was trained."""
    return stage.precision != "fp32" or stage.compile


def with_variants(cascade: Cascade, *, history_len: int, names: Collection[str] | None = None) -> Cascade:
    """The cascade with the variants of its stages `names` (None: of all), sharing every other weight with it.

    `history_len` is the longest history there is. Nothing is compiled before the first batch (`warm_up`). ConfigError
    where a stage cannot be what its config says.
    """
    chosen = [stage for name, stage in cascade.stages.items()
              if is_variant(stage) and (names is None or name in names)]
    if not chosen:
        return cascade
    varied = copy.copy(cascade)
    varied._modules = dict(cascade._modules)  # a shallow copy would share them
    varied.models = nn.ModuleDict(dict(cascade.models.items()))
    for stage in chosen:
        try:
            varied.models[stage.name] = variant(cast(TorchModel, cascade.models[stage.name]), stage,
                                                history_len=history_len)
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name!r}: {error}") from None
    return varied


def variant(model: TorchModel, stage: Stage, *, history_len: int) -> TorchModel:
    """The model as the stage is to be served, in evaluation mode; what stays as it was is shared with the model."""
    same = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    varied = copy.deepcopy(model, same).eval()
    if stage.precision != "fp32" and not narrow(varied, stage.precision):
        log.warning("stage %r: no linear map is large enough for precision %s; it is served in fp32",
                    stage.name, stage.precision)
    if not stage.compile:
        return varied
    if missing := missing_for_compiling(next(varied.parameters()).device):
        log.warning("stage %r: not compiled, because there is no %s; it is served uncompiled", stage.name, missing)
        return varied
    return compiled(varied, history_len=history_len)


# ---------------------------------------------------------------- compiled
def compiled(model: TorchModel, *, history_len: int, backend: str | Callable[..., Any] = "inductor") -> TorchModel:
    """The model with its two halves compiled apart, each for any width, with histories and candidates padded up to
    `BUCKETS`; in place. Gradients are off."""
    half = "score_encoded" if isinstance(model, ItemEncodingModel) else "score_candidates"
    encode = torch.compile(model.encode_request, dynamic=True, backend=backend)
    score = torch.compile(getattr(model, half), dynamic=True, backend=backend)

    @torch.no_grad()
    def encode_request(batch: Batch) -> Any:
        return encode(with_padded_history(batch, most=history_len))

    @torch.no_grad()
    def score_candidates(state: Any, batch: Batch) -> Tensor:
        return score(state, with_padded_candidates(batch))[:, :batch.mask_QC.shape[1]]

    @torch.no_grad()
    def score_encoded(state: Any, encoded: Mapping[str, Tensor], batch: Batch) -> Tensor:
        width = batch.mask_QC.shape[1]
        wide = {name: _padded(values, bucket(width)) for name, values in encoded.items()}
        return score(state, wide, with_padded_candidates(batch))[:, :width]

    for name, function in {"encode_request": encode_request,
                           half: score_encoded if half == "score_encoded" else score_candidates}.items():
        setattr(model, name, function)
    return model


def bucket(width: int, *, most: int | None = None) -> int:
    """The width that is compiled for: the next bucket, beyond the last a multiple of it, but no more than `most`."""
    wide = next((size for size in BUCKETS if width <= size), -(-width // BUCKETS[-1]) * BUCKETS[-1])
    return wide if most is None else max(width, min(wide, most))


def with_padded_history(batch: Batch, *, most: int) -> Batch:
    """The same requests with histories as wide as their bucket."""
    wide, times_QL = bucket(batch.history_mask_QL.shape[1], most=most), batch.history_time_ms_QL
    return replace(batch, history={name: _padded(values, wide) for name, values in batch.history.items()},
                   history_mask_QL=_padded(batch.history_mask_QL, wide),
                   history_rows_QL=_padded(batch.history_rows_QL, wide),
                   history_time_ms_QL=None if times_QL is None else _padded(times_QL, wide), dropped_events=0,
                   targets=None, history_negatives=None, request_ids=(), exclude=())


def with_padded_candidates(batch: Batch) -> Batch:
    """The same requests with lists of candidates as wide as their bucket."""
    wide = bucket(batch.mask_QC.shape[1])
    return replace(batch, item={name: _padded(values, wide) for name, values in batch.item.items()},
                   candidates_QC=_padded(batch.candidates_QC, wide), mask_QC=_padded(batch.mask_QC, wide),
                   targets=None, history_negatives=None, request_ids=(), exclude=())


def _padded(values: Tensor, width: int) -> Tensor:
    """Axis 1 filled up with 0, the row of padding, or false."""
    more = width - values.shape[1]
    return functional.pad(values, (*(0, 0) * (values.ndim - 2), 0, more)) if more > 0 else values


def missing_for_compiling(device: torch.device) -> str:
    """What torch.compile needs on the device and this machine has not; empty if nothing."""
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    if not any(shutil.which(name) for name in compilers if name):
        return "C++ compiler"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python.h (the headers of Python)"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton"
    return ""


@torch.no_grad()
def warm_up(cascade: Cascade, requests: Batch, items: ItemTable, *, names: Collection[str] | None = None) -> None:
    """Scores something with the compiled stages `names` (None: all), so that no request waits for the compiler: once
    for a single request and once for several, as wide as what the stage before keeps."""
    widths = dict(zip(cascade.names, (cascade.keeps[0], *cascade.keeps), strict=False))
    for name, stage in cascade.stages.items():
        if not stage.compile or (names is not None and name not in names):
            continue
        rows_C = items.all_rows[:widths[name]].astype(np.int64)
        for size in range(1, min(2, requests.num_requests) + 1):
            some = requests.take(torch.arange(requests.num_requests) < size)
            rows_QC = torch.from_numpy(np.tile(rows_C, (size, 1)))
            wide = some.with_candidates(rows_QC, torch.ones_like(rows_QC, dtype=torch.bool), items)
            wide = wide.to(next(cascade.models[name].parameters()).device)
            with torch.compiler.set_stance("force_eager"):  # what a model makes once and keeps is no part of a graph
                cascade.score(name, wide)
            cascade.score(name, wide)

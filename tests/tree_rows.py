"""Trees fitted on random batches, shared by the tests of models that are fitted at once."""

from typing import Any

import numpy as np
import torch

from raycascade import plugins
from raycascade.batch import Batch
from raycascade.models.gbdt import Gbdt
from raycascade.schema import FeatureSpace
from raycascade.training.gbdt import TreeRows, fit_rows
from tests.model_cases import SPACE, random_batch

SMALL = {"rounds": 30, "depth": 3, "eta": 0.5, "min_child_weight": 0.0}


def model_of(space: FeatureSpace = SPACE, *, num_tasks: int = 1, **options: Any) -> Gbdt:
    """A model that was not fitted."""
    cls, config = plugins.options("models", {"name": "gbdt", **SMALL, **options}, "model")
    return cls(config, space, num_tasks=num_tasks)


def rows_of(model: Gbdt, batch: Batch, labels_QCT: torch.Tensor) -> TreeRows:
    """What the model reads of a batch, with the labels."""
    request_QC = torch.arange(batch.num_requests)[:, None].expand(batch.mask_QC.shape)
    return TreeRows(model.columns.table(batch), labels_QCT[batch.mask_QC].float().numpy(),
                    request_QC[batch.mask_QC].numpy())


def fitted(space: FeatureSpace = SPACE, *, num_tasks: int = 1, seed: int = 0, **options: Any) -> Gbdt:
    """Trees that learnt random labels of 60 requests by heart, so that their logits are wide."""
    model, batch = model_of(space, num_tasks=num_tasks, **options), random_batch(num_requests=60, seed=90 + seed)
    generator = torch.Generator().manual_seed(seed)
    labels_QCT = torch.randint(0, 2, (*batch.mask_QC.shape, num_tasks), generator=generator)
    fit_rows(model, rows_of(model, batch, labels_QCT), keep=3, seed=seed, threads=1)
    return model


def hand_rows(values: list[list[float]], labels: list[float], requests: list[int] | None = None) -> TreeRows:
    """Rows written down by hand."""
    return TreeRows(np.array(values, np.float32), np.array(labels, np.float32)[:, None],
                    np.array(requests if requests is not None else range(len(labels))))

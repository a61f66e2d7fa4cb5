"""Options of how a trained stage is served: in which precision, compiled or not, and what that may cost."""

from typing import Literal

from pydantic import Field as Option

from raycascade.schema import Frozen

Precision = Literal["fp32", "bf16", "int8", "fp8"]


class Guard(Frozen):
    """What a stage may cost against itself in float32 and uncompiled: the most that its AUC may change, either way, and
    the least share of what it keeps that must be the same. Measured when a training ends, on the first `requests` of
    the validation split, or of the training split where there is no other; beyond it no bundle is written."""

    max_auc_change: float = Option(default=5e-4, ge=0)
    min_overlap: float = Option(default=0.99, ge=0, le=1)
    requests: int = Option(default=2048, ge=1)

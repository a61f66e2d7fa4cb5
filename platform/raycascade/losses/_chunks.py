"""Work on C x C matrices in memory that does not grow with the number of requests.

What an objective needs of such a matrix is small, [Q, C] or [Q]. Where the matrices of all requests would be large, a
chunk of requests is reduced to it and its matrices are dropped; the backward pass makes them again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CPU_BYTES = 16 << 20  # of one C x C matrix for each request of a chunk; an objective holds a few at a time
DEVICE_BYTES = 64 << 20  # elsewhere: enough work for every launch, little of a device's memory

Compute = Callable[..., Tensor]  # scores [q, C] and constants [q, ...] of some requests -> their result [q, ...]


def in_chunks(compute: Compute, scores_QC: Tensor, *constants: Tensor, requests: int | None = None) -> Tensor:
    """`compute(scores_QC, *constants)` with `requests` of them at once; None: as many as suit the device.

    `compute` must treat requests alone. Gradients flow into the scores only, once: there is no second derivative when
    there is more than one chunk.
    """
    num_requests, width = scores_QC.shape
    if requests is None:
        matrix_bytes = max(1, width * width * scores_QC.element_size())
        requests = max(1, (CPU_BYTES if scores_QC.device.type == "cpu" else DEVICE_BYTES) // matrix_bytes)
    if requests >= num_requests:
        return compute(scores_QC, *constants)
    result = _Recomputed.apply(compute, requests, scores_QC, *constants)
    assert isinstance(result, Tensor)
    return result


class _Recomputed(torch.autograd.Function):
    """Keeps the inputs only, and computes again for the gradient."""

    @staticmethod
    def forward(ctx: Any, compute: Compute, requests: int, scores_QC: Tensor, *constants: Tensor) -> Tensor:
        """All chunks, without a graph."""
        ctx.compute, ctx.requests = compute, requests
        ctx.save_for_backward(scores_QC, *constants)
        parts = zip(*(tensor.split(requests) for tensor in (scores_QC, *constants)), strict=True)
        return torch.cat([compute(*part) for part in parts])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """One chunk after the other."""
        scores_QC, *constants = ctx.saved_tensors
        result_QC = torch.empty_like(scores_QC)
        parts = zip(*(tensor.split(ctx.requests) for tensor in (result_QC, gradients[0], scores_QC, *constants)),
                    strict=True)
        with torch.enable_grad(), torch.autocast(scores_QC.device.type, enabled=False):
            for result_qC, gradient_q, scores_qC, *rest in parts:
                leaf_qC = scores_qC.detach().requires_grad_()
                output_q = ctx.compute(leaf_qC, *rest)
                result_qC.copy_(torch.autograd.grad(output_q, leaf_qC, gradient_q)[0])
        return (None, None, result_QC, *(None for _ in constants))

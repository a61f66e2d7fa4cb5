"""The reduction rule of every objective: mean over what a term sees in a request, then over the requests it is
defined for. Nothing here copies from device to host, and a term that is defined nowhere is 0 with its graph kept."""

import torch
from torch import Tensor


def candidate_mean(values_QC: Tensor, seen_QC: Tensor) -> Tensor:
    """Mean of the values where `seen`, per request [Q]; 0 for a request without any."""
    total_Q = torch.where(seen_QC, values_QC, 0.0).sum(dim=1)
    return total_Q / seen_QC.sum(dim=1).clamp(min=1).to(total_Q.dtype)


def request_mean(values_Q: Tensor, defined_Q: Tensor) -> Tensor:
    """Mean of the values over the requests where `defined`; 0-dim, 0 if there is none."""
    total = torch.where(defined_Q, values_Q, 0.0).sum()
    return total / defined_Q.sum().clamp(min=1).to(total.dtype)

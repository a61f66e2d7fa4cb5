"""The first-order term of a model that is built without an output, for its representation."""

import torch
from torch import Tensor, nn

from raycascade.batch import Batch


class NoFirstOrder(nn.Module):
    """Adds 0, in place of `FirstOrder`: weights per value say something about logits only."""

    def silence(self) -> None:
        """It is."""

    def of_request(self, batch: Batch) -> Tensor:
        """[Q, 1]."""
        return torch.zeros(batch.num_requests, 1, device=batch.mask_QC.device)

    def forward(self, request_Q1: Tensor, batch: Batch) -> Tensor:
        """[Q, 1, 1]."""
        return request_Q1[:, None]

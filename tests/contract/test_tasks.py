"""Tasks of one model do not meet where they should not: missing labels, and parameters of their own (M20)."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycascade.batch import Batch
from tests.model_cases import CASES, build, case_id, dense_grad, random_batch, requests_at

every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=case_id)


@every_case
def test_a_request_without_a_label_teaches_that_task_nothing(name: str, options: dict[str, Any]):
    """Gradients of task 1 over a batch with missing labels are those over its labelled requests alone."""
    batch = random_batch()
    labels = torch.randint(0, 2, (8, 5), generator=torch.Generator().manual_seed(4)).double()
    labels[5:] = torch.nan

    def gradients(part: Batch, part_labels: Tensor) -> list[Tensor]:
        model = build(name, options, num_tasks=2)
        known = part_labels.isfinite() & part.mask_QC
        loss = nn.functional.binary_cross_entropy_with_logits(
            model(part)[..., 1], torch.where(known, part_labels, 0.0), reduction="none")
        torch.where(known, loss, 0.0).sum().backward()
        return [torch.zeros_like(p) if p.grad is None else dense_grad(p) for p in model.parameters()]

    whole, labelled = gradients(batch, labels), gradients(requests_at(batch, list(range(5))), labels[:5])
    for one, other in zip(whole, labelled, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


@every_case
def test_the_loss_of_one_task_leaves_the_logits_of_the_others_their_own_parameters(name: str, options: dict[str, Any]):
    """Some parameter serves each task alone."""
    def touched(task: int) -> Tensor:
        model = build(name, options, num_tasks=2)
        model(random_batch())[..., task].sum().backward()
        return torch.cat([(torch.zeros_like(p) if p.grad is None else dense_grad(p)).flatten() != 0
                          for p in model.parameters()])

    first, second = touched(0), touched(1)
    assert (first & ~second).any()
    assert (second & ~first).any()

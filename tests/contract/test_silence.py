"""A silenced model gives all candidates of a request the same logit, and training gives it a voice."""

from typing import Any

import pytest
import torch

from tests.model_cases import CASES, build, case_id, dense_grad, random_batch


@pytest.mark.parametrize(("name", "options"), CASES, ids=case_id)
def test_a_silenced_model_starts_with_equal_logits_and_learns_to_differ(name: str, options: dict[str, Any]):
    """The first step moves the last layer alone, the second what it reads."""
    model, batch = build(name, options, generic=False), random_batch()
    model.silence()
    # A direction has no zero.
    directions = name in ("two_tower", "gesr") and options.get("similarity", "cosine") == "cosine"
    before = model(batch)[batch.mask_QC].detach()
    if not directions:
        torch.testing.assert_close(before, torch.zeros_like(before), rtol=0, atol=1e-7)
    weights = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=before.dtype)[:, None]
    for _ in range(2):
        model.zero_grad()
        (model.train()(batch) * weights).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * dense_grad(parameter).sign()  # the first step of Adam
    moved = model.eval()(batch)[batch.mask_QC].detach() - before
    assert moved.std() > 1e-3

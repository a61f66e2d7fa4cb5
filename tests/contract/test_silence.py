"""A silenced model gives all candidates of a request the same logit, and one step of training gives it a voice."""

from typing import Any

import pytest
import torch

from tests.model_cases import CASES, build, case_id, random_batch


@pytest.mark.parametrize(("name", "options"), CASES, ids=case_id)
def test_a_silenced_model_starts_with_equal_logits_and_learns_to_differ(name: str, options: dict[str, Any]):
    model, batch = build(name, options, generic=False), random_batch()
    model.silence()
    # A direction has no zero.
    directions = name in ("two_tower", "gesr") and options.get("similarity", "cosine") == "cosine"
    if not directions:
        logits = model(batch)[batch.mask_QC]
        torch.testing.assert_close(logits, torch.zeros_like(logits), rtol=0, atol=1e-7)
    logits_QCT = model.train()(batch)
    weights = torch.randn(logits_QCT.shape, generator=torch.Generator().manual_seed(0), dtype=logits_QCT.dtype)
    (logits_QCT * weights).sum().backward()
    before = model.eval()(batch)[batch.mask_QC].detach()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    moved = model(batch)[batch.mask_QC].detach() - before
    assert moved.std() > 1e-9

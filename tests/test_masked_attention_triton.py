"""What only the Triton kernels of masked attention promise."""

from __future__ import annotations

import importlib.util

import conformance
import pytest
import torch

from restore_kernels import masked_attention

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("queries", [5, 200])
def test_keys_of_mask_0_are_never_read(queries):
    """NaN there shows nowhere: neither in tiles without a key, which are skipped, nor beside keys."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, rows, 8, generator=generator) for rows in (queries, 300, 300))
    mask = torch.rand(1, 2, 300, generator=generator)
    mask[..., 100:200] = 0
    mask[..., ::3] = 0
    for x in (k, v):
        x[mask == 0] = float("nan")
    leaves = [x.to(conformance.DEVICE).requires_grad_() for x in (q, k, v, mask)]
    out = masked_attention(*leaves, layout="token", backend="triton")
    grads = torch.autograd.grad(out.square().sum(), leaves)
    for x in (out, *grads):
        assert x.isfinite().all()
    for grad in grads[1:]:
        assert (grad[mask.to(grad.device) == 0] == 0).all()

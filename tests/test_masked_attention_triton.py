"""The Triton kernels of masked attention: compiled for GPUs, and what only they promise."""

from __future__ import annotations

import importlib.util

import aot
import conformance
import pytest
import torch

from restore_kernels import masked_attention

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# The full table, every dtype and case, is `python tests/aot.py`; these are its extremes.
CASES = ("masked channel heads=1 gated", "masked token 16x65536 D=48")


@pytest.fixture(scope="module")
def rows() -> list[aot.Row]:
    return aot.compile_apart(CASES, ("float32", "bfloat16"))


def test_every_architecture_and_dtype_is_compiled(rows):
    compiled = {(row.architecture, row.dtype, row.case) for row in rows}
    assert len(compiled) == len(aot.ARCHITECTURES) * 2 * len(CASES)


def test_no_spills_and_within_limits(rows):
    aot.assert_fits(rows)


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_run_on_the_matrix_units(rows, architecture, dtype):
    assert aot.on_matrix_units(rows, architecture, dtype) == set(CASES)


def test_keys_are_split_where_queries_are_few(rows):
    """Programs for 16 queries alone would leave most of a GPU idle."""
    kernels = {row.kernel for row in rows if row.case == "masked token 16x65536 D=48"}
    assert {"masked_combine_kernel", "sum_gradient_kernel"} <= kernels


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

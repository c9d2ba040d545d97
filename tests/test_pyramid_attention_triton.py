"""What only the Triton kernels of pyramid attention have.

Conformance walks the cases of every backend; here are those that take the kernels' own ways.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from unittest.mock import patch

import conformance
import pytest
import torch
from attention_problems import drawing
from conformance import assert_conforms
from pyramid_attention_problems import Case, Levels, build, pyramid
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from restore_kernels import pyramid_attention
from restore_kernels.pyramid_attention.ops import overload

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


WAYS = {
    "keys split among programs": Case((1, 2, 3, 2, 3), ((15, 20), (1, 2))),
    "queries split among programs": Case((1, 2, 3, 15, 20), ((2, 3),)),
    "sums in two parts": Case((1, 16, 17, 2, 3), ((3, 2),)),
    "patches kept in two pieces": Case((1, 6, 5, 3, 4), ((2, 5),), dtype=torch.bfloat16),
    "patches too long to keep": Case((1, 40, 3, 2, 2), ((2, 2),), dtype=torch.bfloat16),
    "gradients in float32": Case((1, 6, 5, 3, 4), ((2, 5),), dtype=torch.float16),
    "numbers too few for the matrix units": Case((2, 1, 1, 3, 2), ((2, 2), (1, 4)), patch_size=1),
}


@pytest.mark.parametrize("case", WAYS.values(), ids=WAYS)
def test_ways_through_the_kernels(case):
    assert_conforms(build(case), "triton")


def test_the_first_of_equal_keys_among_programs():
    """All scores are 0; two programs share the 300 keys of the first level."""
    randn = drawing(seed=0)
    query, *values = (randn(1, 2, *size).to(conformance.DEVICE) for size in ((2, 3), (15, 20), (1, 2)))
    call = (query, [torch.zeros_like(x) for x in values], values)
    _, index = overload("pyramid_attention_hard", "triton")(*call, 3, 10.0, 1e-4, 1.0)
    assert (index == 0).all()
    fused, eager = (pyramid_attention(*call, hard=True, backend=name) for name in ("triton", "eager"))
    torch.testing.assert_close(fused, eager)


class Allocations(TorchDispatchMode):
    """Numbers in all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += sum(x.numel() for x in (out if isinstance(out, Sequence) else [out]))
        return out


def allocated(height: int, width: int) -> int:
    """Numbers that a forward and backward pass allocates, views counted too; nothing is computed."""
    from restore_kernels.pyramid_attention import triton_launch as launchers

    def images(channels: int, sizes: Levels) -> list[Tensor]:
        return [torch.empty(1, channels, *size, device="meta") for size in sizes]

    (query, grad), levels = (images(c, ((height, width),))[0] for c in (32, 64)), pyramid(height, width)
    call = (query, images(32, levels), images(64, levels))
    with patch.object(launchers, "launch", lambda *args, **constants: None), Allocations() as allocations:
        _, log_sum_exp = launchers.pyramid_attention(*call, 3, 10.0, 1e-4, 0.25)
        launchers.pyramid_attention_backward(grad, *call, log_sum_exp, 3, 10.0, 1e-4, 0.25)
    return allocations.count


def test_memory_grows_with_the_pixels():
    """Four times the pixels have sixteen times the pairs, of which none is stored."""
    assert allocated(512, 512) < 4.1 * allocated(256, 256)

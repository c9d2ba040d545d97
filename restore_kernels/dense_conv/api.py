"""The public function: semantic checks, backend choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from restore_kernels import checks, coverage
from restore_kernels.backends import Backend, Call, choose
from restore_kernels.dense_conv import autograd, reference
from restore_kernels.functions import eager
from restore_kernels.tensors import memory_format

# With fewer tiles of 2x2 pixels the transforms of the weight, as many for any image, take longer than they
# save.
FEWEST_TILES = 16
# With fewer channels the products save less than the transforms of the pixels and the call itself take: so
# many at MANY_TILES, twice as many at a quarter of them, half as many at twice as many.
FEWEST_CHANNELS, MANY_TILES = 16, 256


def dense_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """3x3 convolution of an image, every output channel from every input channel.

    ``torch.nn.functional.conv2d`` with a kernel of 3x3, stride 1 and zero padding of 1. On the CPU, in
    float32 and float64, by Winograd's minimal filtering: F(2x2, 3x3), 16 multiplications where the
    definition has 36, with errors like its own; or, in float32 where it is quicker, F(4x4, 3x3), 36 where
    the definition has 144, with errors 3 to 4 times its own (1e-6 of the result's size). Everything else runs
    as PyTorch's convolution, which is quicker there.

    Source: "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308), section 4.1.

    Args:
        x: (B, C, H, W). float32, bfloat16, float16 or float64; any strides, channels_last among them. Under
            autocast x, weight and bias are cast as for a convolution.
        weight: (C_out, C, 3, 3), same dtype and device as x.
        bias: (C_out), or None.
        backend: ``auto``, ``eager`` or ``cpu``; or several of them, best first. ``auto`` is ``eager`` for
            images of few pixels, the fewer the more channels they have, and in channels_last. Triton and
            CUDA C++ have no kernels for it.

    Returns:
        (B, C_out, H, W), channels_last where x is.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: no backend asked for by name can run this call; the message says why.
    """
    x, weight, bias = checks.autocast(x, weight, bias)
    _check(x, weight, bias)
    chosen = choose(_call(x, weight, bias), backend)
    if chosen != "eager":
        return autograd.dense_conv(x, weight, bias, chosen)
    return eager("dense_conv", reference.dense_conv, x, weight, bias)


def _check(x: Any, weight: Any, bias: Any) -> None:
    """Every semantic check of a call."""
    checks.floating_tensor("x", x, ("B", "C", "H", "W"))
    checks.floating_tensor("weight", weight, ("C_out", "C", "3", "3"))
    checks.like("weight", weight, x, (weight.shape[0], x.shape[1], 3, 3), "x")
    if bias is not None:
        checks.like("bias", bias, x, (weight.shape[0],), "x")


def _call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Call:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    refusals = {"triton": coverage.NO_KERNELS, **coverage.NO_CUDA}
    if x.dtype not in (torch.float32, torch.float64):
        refusals["cpu"] = f"it computes float32 and float64, got {str(x.dtype).removeprefix('torch.')}"
    slower = _why_slower(x)
    return Call("dense_conv2d", "3x3", tensors, refusals, {} if slower is None else {"cpu": slower})


def _why_slower(x: Tensor) -> str | None:
    """Why PyTorch's convolution is quicker than that of backend cpu, if it is."""
    batch, channels, height, width = x.shape
    tiles = batch * ((height + 1) // 2) * ((width + 1) // 2)
    if tiles < FEWEST_TILES:
        return f"fewer than {FEWEST_TILES} tiles of 2x2 pixels, got {tiles}"
    if tiles * channels * max(channels, FEWEST_CHANNELS) < MANY_TILES * FEWEST_CHANNELS**2:
        return f"too little to multiply: {channels} channels, {tiles} tiles of 2x2 pixels"
    if memory_format(x) == torch.channels_last:
        return "x is in channels_last"
    return None


def _plan(x, weight, bias=None, *, backend="auto"):
    x, weight, bias = checks.autocast(x, weight, bias)
    _check(x, weight, bias)
    return _call(x, weight, bias)


dense_conv2d.plan = _plan  # type: ignore[attr-defined]

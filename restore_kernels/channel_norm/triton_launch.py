"""Launches the Triton kernels of channel normalisation: outputs, scratch, grids and block sizes.

One function per operator of ``ops.py``, with the arguments and results of its schema. Scratch: 2 C numbers
per program of the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from restore_kernels.channel_norm.triton_kernels import differentiate_kernel, normalize_kernel
from restore_kernels.tensors import empty_image
from restore_kernels.triton_common.launching import launch, on_device, split

TILE = 4096  # elements


def channel_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, channels, height, width = x.shape
    out = empty_image(x, channels, (height, width))
    mean = weight.new_empty((batch, height, width))
    rstd = torch.empty_like(mean)
    programs, sizes, blocks = _division(x)
    shift = weight if bias is None else bias
    with on_device(x):
        launch(
            normalize_kernel, programs, x, weight, shift, out, mean, rstd,
            x.stride(), out.stride(), weight.stride(0), shift.stride(0), *sizes[:4], eps, *sizes[4:],
            BIASED=bias is not None, **blocks,
        )  # fmt: skip
    return out, mean, rstd


def channel_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, biased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[1]
    grad_x = empty_image(x, channels, x.shape[2:])
    programs, sizes, blocks = _division(x)
    partials = weight.new_empty((2, programs, channels))
    with on_device(x):
        launch(
            differentiate_kernel, programs, grad_out, x, weight, mean.contiguous(), rstd.contiguous(),
            grad_x, partials, grad_out.stride(), x.stride(), grad_x.stride(), weight.stride(0), *sizes,
            BIASED=biased, **blocks,
        )  # fmt: skip
    grad_bias = partials[1].sum(0) if biased else weight.new_empty(0)
    return grad_x, partials[0].sum(0), grad_bias


def _division(x: Tensor) -> tuple[int, tuple[int, ...], dict[str, Any]]:
    """Programs; pixels, channels, height, width, blocks and blocks per program; block sizes and warps."""
    batch, channels, height, width = x.shape
    block_c = triton.next_power_of_2(channels)
    block_n = max(16, TILE // max(block_c, 32))
    pixels = batch * height * width
    count = triton.cdiv(pixels, block_n)
    run, programs = split(count, 1, x.device) if count else (1, 0)
    warps = 4 if block_c * block_n <= TILE else 8
    sizes = (pixels, channels, height, width, count, run)
    return programs, sizes, {"BLOCK_C": block_c, "BLOCK_N": block_n, "num_warps": warps}

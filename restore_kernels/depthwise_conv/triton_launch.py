"""Launches the Triton kernels of depthwise convolution: outputs, scratch, grids and block sizes.

One function per operator of ``ops.py``, with the arguments and results of its schema. Scratch is the
shares that programs have of the gradients of weight and bias.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from restore_kernels.depthwise_conv.triton_kernels import convolve_kernel, tap_products_kernel
from restore_kernels.tensors import empty_image, memory_format
from restore_kernels.triton_common.launching import NO_SPILLS, launch, on_device, split

TILE = 256  # elements
CHANNELS = 32  # side by side in a tile of a channels_last image


def _tile(x: Tensor, channels: int, elements: int) -> tuple[int, int]:
    """Pixels and channels of a tile, whose longer side runs along memory."""
    is_last = memory_format(x) == torch.channels_last
    across = min(CHANNELS, triton.next_power_of_2(channels)) if is_last else 1
    return max(1, elements // across), across


def _convolve(
    x: Tensor, rectified: Tensor | None, weight: Tensor, bias: Tensor | None, out: Tensor, dilation: int,
    relu: bool, gradient: bool,
) -> None:  # fmt: skip
    batch, channels, height, width = out.shape
    pixels, across = _tile(x, channels, TILE)
    pixel_tiles, channel_tiles = triton.cdiv(height * width, pixels), triton.cdiv(channels, across)
    kept = x if rectified is None else rectified
    with on_device(x):
        launch(
            convolve_kernel, batch * pixel_tiles * channel_tiles, x, kept, weight.float().contiguous(),
            weight if bias is None else bias, out, x.stride(), kept.stride(), out.stride(),
            channels, height, width, pixel_tiles, channel_tiles,
            SIZE=weight.shape[2], DILATION=dilation, INPUTS=weight.shape[1], BIAS=bias is not None,
            GRADIENT=gradient, RELU=relu, PIXELS=pixels, CHANNELS=across, **NO_SPILLS,
        )  # fmt: skip


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, relu: bool) -> Tensor:
    out = empty_image(x, weight.shape[0], x.shape[2:])
    _convolve(
        x, None, weight, None if bias is None else bias.contiguous(), out, dilation, relu, gradient=False
    )
    return out


def depthwise_conv_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, out: Tensor | None, dilation: int
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = empty_image(x, x.shape[1], x.shape[2:])
    _convolve(grad_out, out, weight, None, grad_x, dilation, out is not None, gradient=True)

    batch, channels, height, width = grad_out.shape
    inputs, size = weight.shape[1:3]
    taps = triton.next_power_of_2(size * size)
    pixels, across = _tile(x, channels, max(CHANNELS, 16 * TILE // taps))
    channel_tiles = triton.cdiv(channels, across)
    tiles = triton.cdiv(batch * height * width, pixels)
    tiles_per_split, splits = split(tiles, inputs * channel_tiles, x.device)
    of_weight = torch.empty((splits, *weight.shape), dtype=torch.float32, device=x.device)
    of_bias = torch.empty((splits, channels), dtype=torch.float32, device=x.device)
    kept = grad_out if out is None else out
    with on_device(x):
        launch(
            tap_products_kernel, splits * inputs * channel_tiles, grad_out, kept, x, of_weight, of_bias,
            grad_out.stride(), kept.stride(), x.stride(),
            batch, channels, height, width, channel_tiles, tiles_per_split,
            SIZE=size, DILATION=dilation, INPUTS=inputs, RELU=out is not None,
            TAPS=taps, PIXELS=pixels, CHANNELS=across,
        )  # fmt: skip
    return grad_x, of_weight.sum(0).to(weight.dtype), of_bias.sum(0).to(weight.dtype)

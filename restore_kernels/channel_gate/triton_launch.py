"""Launches the Triton kernels of the channel gate: outputs, scratch, grids and block sizes.

One function per operator of ``ops.py``, with the arguments and results of its schema. Scratch: C numbers per
run of blocks of pixels and image.
"""

from __future__ import annotations

import triton
from torch import Tensor

from restore_kernels.channel_gate.triton_kernels import (
    outer_kernel,
    scale_kernel,
    squeeze_kernel,
    sum_kernel,
    unsqueeze_kernel,
)
from restore_kernels.tensors import empty_image
from restore_kernels.triton_common.launching import image_strides, is_whole, launch, on_device, split

TILE = 2048  # elements of an image
LAYER_TILE = 4096  # of a layer's weight
PIXEL_MAJOR_CHANNELS = 64  # of a tile whose pixels are channels side by side


def channel_gate(
    x: Tensor, down: Tensor, up: Tensor, down_bias: Tensor | None, up_bias: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, channels, height, width = x.shape
    out = empty_image(x, channels, (height, width))
    mean, hidden, gate = (down.new_empty((batch, size)) for size in (channels, down.shape[0], channels))
    with on_device(x):
        partials = _sums(x, None, down)
        launch(
            squeeze_kernel, batch, partials, down.contiguous(), up.contiguous(),
            *(down if bias is None else bias.contiguous() for bias in (down_bias, up_bias)),
            mean, hidden, gate, *_sizes(x, down, partials),
            DOWN_BIAS=down_bias is not None, UP_BIAS=up_bias is not None, **_layer_blocks(down),
        )  # fmt: skip
        _scale(x, gate, residual, None, out)
    return out, mean, hidden, gate


def channel_gate_backward(
    grad_out: Tensor, x: Tensor, down: Tensor, up: Tensor, mean: Tensor, hidden: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x = empty_image(x, x.shape[1], x.shape[2:])
    mean, hidden, gate = mean.contiguous(), hidden.contiguous(), gate.contiguous()
    grad_total, shift, grad_hidden = (
        gate.new_empty(gate.shape),
        gate.new_empty(gate.shape),
        hidden.new_empty(hidden.shape),
    )
    with on_device(x):
        partials = _sums(x, grad_out, down)
        launch(
            unsqueeze_kernel, x.shape[0], partials, down.contiguous(), up.contiguous(), hidden, gate,
            grad_total, grad_hidden, shift, *_sizes(x, down, partials), **_layer_blocks(down),
        )  # fmt: skip
        grad_down, grad_down_bias = _layer_gradients(grad_hidden, mean)
        grad_up, grad_up_bias = _layer_gradients(grad_total, hidden)
        _scale(grad_out, gate, None, shift, grad_x)
    return grad_x, grad_down, grad_up, grad_down_bias, grad_up_bias


def _sums(x: Tensor, factor: Tensor | None, like: Tensor) -> Tensor:
    """Partial sums (runs, B, C) of x, or of x * factor."""
    batch, channels, height, width = x.shape
    block_c, block_n = _blocks(x)
    blocks = triton.cdiv(channels, block_c)
    run, runs = split(triton.cdiv(height * width, block_n), batch * blocks, x.device)
    partials = like.new_empty((runs, batch, channels))
    other = x if factor is None else factor
    whole = is_whole(x) and is_whole(other)
    launch(
        sum_kernel, batch * runs * blocks, x, other, partials,
        image_strides(x, whole), image_strides(other, whole),
        batch, channels, height * width, width, runs, run,
        PRODUCTS=factor is not None, WHOLE=whole, BLOCK_C=block_c, BLOCK_N=block_n,
    )  # fmt: skip
    return partials


def _scale(x: Tensor, factor: Tensor, residual: Tensor | None, shift: Tensor | None, out: Tensor) -> None:
    """out = x * factor + residual + shift, with factor and shift (B, C); a block of pixels per program."""
    batch, channels, height, width = x.shape
    block_c, block_n = _blocks(out)
    runs = triton.cdiv(height * width, block_n)
    other = x if residual is None else residual
    whole = all(map(is_whole, (x, other, out)))
    launch(
        scale_kernel, batch * runs * triton.cdiv(channels, block_c), x, factor, other,
        factor if shift is None else shift, out, *(image_strides(image, whole) for image in (x, other, out)),
        channels, height * width, width, runs, 1,
        RESIDUAL=residual is not None, SHIFT=shift is not None, WHOLE=whole, BLOCK_C=block_c, BLOCK_N=block_n,
    )  # fmt: skip


def _layer_gradients(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of a layer's weight (rows, columns, 1, 1) and bias, from grad (B, rows) and x (B, columns)."""
    (batch, rows), columns = grad.shape, x.shape[1]
    grad_weight, grad_bias = grad.new_empty((rows, columns, 1, 1)), grad.new_empty(rows)
    block_c = triton.next_power_of_2(columns)
    block_r = min(triton.next_power_of_2(rows), max(1, LAYER_TILE // block_c))
    launch(
        outer_kernel, triton.cdiv(rows, block_r), grad, x, grad_weight, grad_bias, batch, rows, columns,
        BLOCK_R=block_r, BLOCK_C=block_c,
    )  # fmt: skip
    return grad_weight, grad_bias


def _blocks(x: Tensor) -> tuple[int, int]:
    """Channels and pixels of a tile that lies together in memory."""
    block_c, block_n = (triton.next_power_of_2(size) for size in (x.shape[1], x.shape[2] * x.shape[3]))
    if x.stride(1) == 1 and x.stride(3) > 1:
        block_c = min(block_c, PIXEL_MAJOR_CHANNELS)
        return block_c, min(block_n, TILE // block_c)
    block_n = min(block_n, TILE)
    return min(block_c, TILE // block_n), block_n


def _sizes(x: Tensor, down: Tensor, partials: Tensor) -> tuple[int, ...]:
    """Batch, channels, hidden numbers, pixels and runs, as the small kernels take them."""
    return x.shape[0], x.shape[1], down.shape[0], x.shape[2] * x.shape[3], partials.shape[0]


def _layer_blocks(down: Tensor) -> dict[str, int]:
    hidden, channels = down.shape[:2]
    block_c = triton.next_power_of_2(channels)
    return {"BLOCK_C": block_c, "BLOCK_R": min(triton.next_power_of_2(hidden), max(1, LAYER_TILE // block_c))}

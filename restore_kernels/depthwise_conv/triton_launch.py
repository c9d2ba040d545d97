"""Launches the Triton kernels of depthwise convolution: outputs, scratch, grids and block sizes.

One function per operator of ``ops.py``, with the arguments and results of its schema. Images that are joined
are launched apart, and so is a group of inputs from two of them. Scratch is the gradient of the sums in
float32 where there is an activation or a gate, and the shares that programs have of the gradients of weight,
bias and slope.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
from torch import Tensor

from restore_kernels.depthwise_conv import triton_kernels as kernels
from restore_kernels.tensors import empty_image, memory_format
from restore_kernels.triton_common.launching import NO_SPILLS, launch, on_device, split

TILE = 256  # elements
CHANNELS = 32  # side by side in a tile of a channels_last image


def _tile(x: Tensor, channels: int, elements: int) -> tuple[int, int]:
    """Pixels and channels of a tile, whose longer side runs along memory."""
    is_last = memory_format(x) == torch.channels_last
    across = min(CHANNELS, triton.next_power_of_2(channels)) if is_last else 1
    return max(1, elements // across), across


def _tiles(x: Tensor, channels: int) -> tuple[int, int, int, int]:
    """Tiles of pixels and of channels that cover x, and pixels and channels of one."""
    pixels, across = _tile(x, channels, TILE)
    return triton.cdiv(x.shape[2] * x.shape[3], pixels), triton.cdiv(channels, across), pixels, across


def _runs(images: Sequence[Tensor], inputs: int) -> Iterator[tuple[int, int, list[Tensor]]]:
    """Groups whose inputs lie side by side: the first, how many, and images that begin with its inputs."""
    channels = [(image, i) for image in images for i in range(image.shape[1])]
    first = 0
    while first < len(channels) // inputs:
        starts = [image[:, i:] for image, i in channels[first * inputs :][:inputs]]
        count = min(triton.cdiv(start.shape[1], inputs) for start in starts)
        yield first, count, starts
        first += count


def _small(x: Tensor | None, like: Tensor) -> Tensor:
    """A number per channel in float32; what stands for none is never read."""
    return like if x is None else x.float().expand(like.shape[0]).contiguous()


def _none(weight: Tensor) -> Tensor:
    """What stands for a gradient that nobody wants."""
    return weight.new_empty((0,))


def depthwise_conv(
    x: Sequence[Tensor], weight: Tensor, bias: Tensor | None, slope: Tensor | None, gate: Tensor | None,
    dilation: int, activation: str | None,
) -> Tensor:  # fmt: skip
    out = empty_image(x[0], weight.shape[0], x[0].shape[2:])
    size, inputs = weight.shape[2], weight.shape[1]
    weights, biases, slopes = weight.float().contiguous(), _small(bias, weight), _small(slope, weight)
    for first, count, starts in _runs(x, inputs):
        own = slice(first, first + count)
        gates = out[:, own] if gate is None else gate[:, own]
        pixel_tiles, channel_tiles, pixels, across = _tiles(starts[0], count)
        with on_device(out):
            launch(
                kernels.convolve_kernel, out.shape[0] * pixel_tiles * channel_tiles,
                starts[0], starts[-1], gates, weights[own], biases[own], slopes[own], out[:, own],
                starts[0].stride(), starts[-1].stride(), gates.stride(), out.stride(),
                count, *out.shape[2:], pixel_tiles, channel_tiles,
                SIZE=size, DILATION=dilation, INPUTS=inputs, BIAS=bias is not None, ACTIVATION=activation,
                GATE=gate is not None, PIXELS=pixels, CHANNELS=across, **NO_SPILLS,
            )  # fmt: skip
    return out


def depthwise_conv_backward(
    grad_out: Tensor, x: Sequence[Tensor], weight: Tensor, bias: Tensor | None, slope: Tensor | None,
    gate: Tensor | None, out: Tensor | None, dilation: int, activation: str | None, wanted: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    *of_x, of_parameters, of_gate = wanted
    grad, grad_slope, grad_gate = grad_out, _none(weight), _none(weight)
    if out is None and (activation is not None or gate is not None):
        grad, grad_slope, grad_gate = _gradient_of_sums(
            grad_out, x, weight, bias, slope, gate, dilation, activation, of_gate
        )
    grad_x = [
        empty_image(image, image.shape[1], image.shape[2:]) if is_wanted else _none(weight)
        for image, is_wanted in zip(x, of_x, strict=True)
    ]
    first = 0
    for image, of_image in zip(x, grad_x, strict=True):
        if of_image.dim() == 4:
            _gradient(grad, out, weight, of_image, first, dilation)
        first += image.shape[1]
    if not of_parameters:
        return grad_x, _none(weight), _none(weight), _none(weight), grad_gate
    return grad_x, *_tap_products(grad, out, x, weight, dilation), grad_slope, grad_gate


def _gradient_of_sums(
    grad_out: Tensor, x: Sequence[Tensor], weight: Tensor, bias: Tensor | None, slope: Tensor | None,
    gate: Tensor | None, dilation: int, activation: str | None, of_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the sums, in float32, of the slope and, if wanted, of the gate."""
    batch, channels, height, width = grad_out.shape
    size, inputs = weight.shape[2], weight.shape[1]
    weights, biases, slopes = weight.float().contiguous(), _small(bias, weight), _small(slope, weight)
    grad = torch.empty_like(grad_out, dtype=torch.float32, memory_format=memory_format(x[0]))
    grad_gate = empty_image(gate, channels, (height, width)) if gate is not None and of_gate else None
    most_tiles = max(_tiles(starts[0], count)[0] for _, count, starts in _runs(x, inputs))
    of_slope = grad.new_zeros((batch * most_tiles if slope is not None else 0, channels))
    for first, count, starts in _runs(x, inputs):
        own = slice(first, first + count)
        gates = grad[:, own] if gate is None else gate[:, own]
        to_gate = grad[:, own] if grad_gate is None else grad_gate[:, own]
        pixel_tiles, channel_tiles, pixels, across = _tiles(starts[0], count)
        with on_device(grad):
            launch(
                kernels.sum_gradient_kernel, batch * pixel_tiles * channel_tiles,
                grad_out[:, own], starts[0], starts[-1], gates, weights[own], biases[own], slopes[own],
                grad[:, own], to_gate, of_slope[:, own],
                grad_out.stride(), starts[0].stride(), starts[-1].stride(), gates.stride(), grad.stride(),
                to_gate.stride(), of_slope.stride(0),
                count, height, width, pixel_tiles, channel_tiles,
                SIZE=size, DILATION=dilation, INPUTS=inputs, BIAS=bias is not None, ACTIVATION=activation,
                GATE=gate is not None, OF_GATE=grad_gate is not None, PIXELS=pixels, CHANNELS=across,
                **NO_SPILLS,
            )  # fmt: skip
    grad_slope = _none(weight) if slope is None else of_slope.sum(0).sum_to_size(slope.shape).to(slope.dtype)
    return grad, grad_slope, _none(weight) if grad_gate is None else grad_gate


def _gradient(
    grad: Tensor, out: Tensor | None, weight: Tensor, to: Tensor, first: int, dilation: int
) -> None:
    """Writes the gradient of an image whose first channel is channel ``first`` of all."""
    kept = grad if out is None else out
    pixel_tiles, channel_tiles, pixels, across = _tiles(to, to.shape[1])
    with on_device(to):
        launch(
            kernels.gradient_kernel, to.shape[0] * pixel_tiles * channel_tiles, grad, kept,
            weight.float().contiguous(), to, grad.stride(), kept.stride(), to.stride(),
            first, *to.shape[1:], pixel_tiles, channel_tiles,
            SIZE=weight.shape[2], DILATION=dilation, INPUTS=weight.shape[1], RELU=out is not None,
            PIXELS=pixels, CHANNELS=across, **NO_SPILLS,
        )  # fmt: skip


def _tap_products(
    grad: Tensor, out: Tensor | None, x: Sequence[Tensor], weight: Tensor, dilation: int
) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias."""
    batch, channels, height, width = grad.shape
    inputs, size = weight.shape[1:3]
    taps = triton.next_power_of_2(size * size)
    runs = []
    for first, count, starts in _runs(x, inputs):
        pixels, across = _tile(starts[0], count, max(CHANNELS, 16 * TILE // taps))
        channel_tiles = triton.cdiv(count, across)
        tiles = triton.cdiv(batch * height * width, pixels)
        tiles_per_split, splits = split(tiles, inputs * channel_tiles, grad.device)
        runs.append(
            (slice(first, first + count), starts, pixels, across, channel_tiles, tiles_per_split, splits)
        )
    most_splits = max(run[-1] for run in runs)
    of_weight = torch.zeros((most_splits, *weight.shape), dtype=torch.float32, device=grad.device)
    of_bias = torch.zeros((most_splits, channels), dtype=torch.float32, device=grad.device)
    kept = grad if out is None else out
    for own, starts, pixels, across, channel_tiles, tiles_per_split, splits in runs:
        for m, start in enumerate(starts):
            with on_device(grad):
                launch(
                    kernels.tap_products_kernel, splits * channel_tiles, grad[:, own], kept[:, own], start,
                    of_weight[:, own, m], of_bias[:, own], grad.stride(), kept.stride(), start.stride(),
                    of_weight.stride(0), of_bias.stride(0),
                    batch, own.stop - own.start, height, width, channel_tiles, tiles_per_split,
                    SIZE=size, DILATION=dilation, INPUTS=inputs, RELU=out is not None, BIAS=m == 0,
                    TAPS=taps, PIXELS=pixels, CHANNELS=across,
                )  # fmt: skip
    return of_weight.sum(0).to(weight.dtype), of_bias.sum(0).to(weight.dtype)

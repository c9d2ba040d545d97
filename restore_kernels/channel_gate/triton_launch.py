"""Launches the Triton kernels of the channel gate: outputs, scratch, grids and block sizes.

One function per operator of ``ops.py``, with the arguments and results of its schema. Scratch: C numbers per
run of blocks of pixels and image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor

from restore_kernels.channel_gate.triton_kernels import (
    scale_kernel,
    squeeze_kernel,
    sum_kernel,
    unsqueeze_kernel,
)
from restore_kernels.tensors import empty_image
from restore_kernels.triton_common.launching import launch, on_device, split

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
    division = _Division.of(x)
    with on_device(x):
        partials = _sums(x, None, division, down)
        launch(
            squeeze_kernel, batch, partials, down.contiguous(), up.contiguous(),
            *(down if bias is None else bias.contiguous() for bias in (down_bias, up_bias)),
            mean, hidden, gate, *_sizes(x, down, division),
            DOWN_BIAS=down_bias is not None, UP_BIAS=up_bias is not None, **_layer_blocks(down),
        )  # fmt: skip
        _scale(x, gate, residual, None, out, division)
    return out, mean, hidden, gate


def channel_gate_backward(
    grad_out: Tensor, x: Tensor, down: Tensor, up: Tensor, mean: Tensor, hidden: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x = empty_image(x, x.shape[1], x.shape[2:])
    grad_total, shift = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    grad_hidden = hidden.new_empty(hidden.shape)
    division = _Division.of(x)
    with on_device(x):
        partials = _sums(x, grad_out, division, down)
        launch(
            unsqueeze_kernel, x.shape[0], partials, down.contiguous(), up.contiguous(), hidden.contiguous(),
            gate.contiguous(), grad_total, grad_hidden, shift, *_sizes(x, down, division),
            **_layer_blocks(down),
        )  # fmt: skip
        _scale(grad_out, gate.contiguous(), None, shift, grad_x, division)
    grad_down, grad_up = grad_hidden.mT @ mean, grad_total.mT @ hidden
    return grad_x, grad_down.view(down.shape), grad_up.view(up.shape), grad_hidden.sum(0), grad_total.sum(0)


@dataclass(frozen=True)
class _Division:
    """Of the images into programs: runs of blocks of pixels, blocks of a run, and the sides of a block."""

    runs: int
    run: int
    channels: int
    pixels: int

    @classmethod
    def of(cls, x: Tensor) -> _Division:
        batch, channels, height, width = x.shape
        block_c, block_n = (triton.next_power_of_2(size) for size in (channels, height * width))
        if x.stride(1) == 1 and x.stride(3) > 1:
            block_c = min(block_c, PIXEL_MAJOR_CHANNELS)
            block_n = min(block_n, TILE // block_c)
        else:
            block_n = min(block_n, TILE)
            block_c = min(block_c, TILE // block_n)
        blocks = triton.cdiv(height * width, block_n)
        run, runs = split(blocks, batch * triton.cdiv(channels, block_c), x.device)
        return cls(runs, run, block_c, block_n)

    def programs(self, x: Tensor) -> int:
        return x.shape[0] * self.runs * triton.cdiv(x.shape[1], self.channels)

    def sizes(self, x: Tensor) -> tuple[int, ...]:
        """Channels, pixels, width, runs and blocks of a run, as the kernels take them."""
        return x.shape[1], x.shape[2] * x.shape[3], x.shape[3], self.runs, self.run

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_C": self.channels, "BLOCK_N": self.pixels}


def _sums(x: Tensor, factor: Tensor | None, division: _Division, like: Tensor) -> Tensor:
    partials = like.new_empty((division.runs, *x.shape[:2]))
    other = x if factor is None else factor
    launch(
        sum_kernel, division.programs(x), x, other, partials, x.stride(), other.stride(), x.shape[0],
        *division.sizes(x), PRODUCTS=factor is not None, **division.blocks,
    )  # fmt: skip
    return partials


def _scale(
    x: Tensor, factor: Tensor, residual: Tensor | None, shift: Tensor | None, out: Tensor, division: _Division
) -> None:
    other = x if residual is None else residual
    launch(
        scale_kernel, division.programs(x), x, factor, other, factor if shift is None else shift, out,
        x.stride(), other.stride(), out.stride(), *division.sizes(x),
        RESIDUAL=residual is not None, SHIFT=shift is not None, **division.blocks,
    )  # fmt: skip


def _sizes(x: Tensor, down: Tensor, division: _Division) -> tuple[int, ...]:
    """Batch, channels, hidden numbers, pixels and runs, as the small kernels take them."""
    return x.shape[0], x.shape[1], down.shape[0], x.shape[2] * x.shape[3], division.runs


def _layer_blocks(down: Tensor) -> dict[str, Any]:
    hidden, channels = down.shape[:2]
    block_c = triton.next_power_of_2(channels)
    return {"BLOCK_C": block_c, "BLOCK_R": min(triton.next_power_of_2(hidden), max(1, LAYER_TILE // block_c))}

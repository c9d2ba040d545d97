"""Launches the Triton kernels of pyramid attention: outputs, scratch, grids and block sizes.

One function per operator of ``ops.py``, with the arguments and results of its schema. Scratch is
proportional to the pixels: zero-padded, pixel-major copies of the inputs, a few numbers per pixel, and
the patches that a kernel sums (patch_size² times the channels, in float32) of one image at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from restore_kernels.pyramid_attention import triton_patch_backward_kernels as backward_kernels
from restore_kernels.pyramid_attention import triton_patch_kernels as kernels
from restore_kernels.pyramid_attention.triton_tiles import Tile, padded_channels, pieces, tiles_for
from restore_kernels.tensors import empty_image
from restore_kernels.triton_common.launching import (
    block,
    computed_operand,
    launch,
    on_device,
    operand,
    precision,
    split,
    triton_dtype,
)


@dataclass(frozen=True)
class Padded:
    """An image as the kernels read it: pixel by pixel, within borders of zeros half a patch wide."""

    data: Tensor  # (B, padded height, padded width, channels and zeros up to a multiple of 8)
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def channels(self) -> int:
        return self.data.shape[3]

    @property
    def stride(self) -> int:
        """Of the batch."""
        return self.data.stride(0)


@dataclass(frozen=True)
class Level:
    """Keys and values of a level."""

    keys: Padded
    values: Padded
    norms: Tensor  # (B, h * w), of the key patches
    scales: Tensor  # (B, h * w): softmax_scale / max(norm, eps)
    first_key: int  # how many keys are in the levels before

    @property
    def pixels(self) -> int:
        return self.keys.pixels


class Call:
    """What the passes of one call share: padded images, precisions, tiles and grids."""

    def __init__(self, x: Tensor, depth: int, patch_size: int) -> None:
        """x: any of the inputs; depth: channels of query and keys."""
        self.batch, self.device, self.patch_size = x.shape[0], x.device, patch_size
        length = depth * patch_size**2
        self.dtype = operand(x.dtype, length)
        self.precision = precision(x.dtype, length)
        self.gradient_dtype, self.gradient_precision = computed_operand(x.dtype, length)
        self.tiles = tiles_for(x, self.dtype, patch_size**2 * padded_channels(depth))
        if self.gradient_dtype != self.dtype:  # whose operands take twice the registers
            self.tiles["gradient"] = replace(self.tiles["gradient"], owned=64, chunk=32, keeps=False)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((self.batch, *shape), dtype=dtype, device=self.device)

    def padded(self, x: Tensor) -> Padded:
        batch, channels, height, width = x.shape
        border = self.patch_size // 2
        size = (height + 2 * border, width + 2 * border, padded_channels(channels))
        data = torch.zeros((batch, *size), dtype=self.dtype, device=x.device)
        data[:, border : border + height, border : border + width, :channels] = x.permute(0, 2, 3, 1)
        return Padded(data, height, width)

    def levels(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], softmax_scale: float, eps: float
    ) -> list[Level]:
        levels: list[Level] = []
        first_key = 0
        for key, value in zip(map(self.padded, keys), map(self.padded, values), strict=True):
            norms, scales = self.empty(key.pixels), self.empty(key.pixels)
            launch(
                kernels.key_norms_kernel, self.batch * triton.cdiv(key.pixels, 64),
                key.data, norms, scales, key.stride, key.width, key.pixels, softmax_scale, eps,
                CHANNELS=key.channels, PATCH=self.patch_size, BLOCK_M=64, BLOCK_C=64,
            )  # fmt: skip
            levels.append(Level(key, value, norms, scales, first_key))
            first_key += key.pixels
        return levels

    def products(self, tile: Tile, depth: int, width: int = 0) -> dict[str, Any]:
        """Constants of a kernel whose program multiplies patches of so many channels of two images."""
        area = self.patch_size**2
        constants: dict[str, Any] = {"DEPTH": depth, "PATCH": self.patch_size, "PRECISION": self.precision}
        for name, channels, is_kept in (("D", depth, tile.keeps), ("E", width, False)):
            if channels:
                numbers = pieces(area * channels) if is_kept else (block(area * channels, tile.chunk), 0)
                constants[f"LARGE_{name}"], constants[f"SMALL_{name}"] = numbers
        return constants | tile.options()

    def sums(self, tile: Tile, channels: int) -> tuple[int, dict[str, Any]]:
        """Parts in which a kernel sums patches of so many channels, and constants."""
        length = self.patch_size**2 * channels
        large, small = tile.sums if length > sum(tile.sums) else pieces(length)
        return triton.cdiv(length, large + small), {"LARGE": large, "SMALL": small}

    def gradient(self) -> dict[str, Any]:
        return {"GRADIENT": triton_dtype(self.gradient_dtype), "GRADIENT_PRECISION": self.gradient_precision}

    def grid(self, tile: Tile, owned: int, streamed: int, parts: int = 1) -> tuple[int, int, int]:
        """Programs for so many owned rows, splits of the streamed ones, tiles of these per split."""
        programs = self.batch * parts * triton.cdiv(owned, tile.owned)
        tiles_per_split, splits = split(triton.cdiv(streamed, tile.streamed), programs, self.device)
        return programs * splits, splits, tiles_per_split

    def fold(
        self, sums: Tensor, out: Tensor, factor: float, *, total: Tensor | None = None, first: bool = True,
        last: bool = True, radial: Tensor | None = None, keys: Padded | None = None,
    ) -> None:  # fmt: skip
        """out from the patches of sums (B, splits, pixels, numbers), added in total until the last.

        radial (B, splits, pixels): multiples of the patches of keys to subtract.
        """
        channels, height, width = out.shape[1:]
        block_c = block(channels, 64)
        launch(
            kernels.fold_patches_kernel,
            self.batch * triton.cdiv(height * width, 64) * triton.cdiv(channels, block_c),
            sums, total, radial, keys and keys.data, out, keys.stride if keys else 0, out.stride(),
            height, width, channels, sums.shape[1], factor,
            FIRST=first, LAST=last, RADIAL=radial is not None,
            CHANNELS=sums.shape[3] // self.patch_size**2, PATCH=self.patch_size, BLOCK_N=64, BLOCK_C=block_c,
        )  # fmt: skip


def pyramid_attention(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], patch_size: int, softmax_scale: float,
    eps: float, out_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = Call(query, query.shape[1], patch_size)
    with on_device(query):
        q, levels = call.padded(query), call.levels(keys, values, softmax_scale, eps)
        parts = [result for _, result in _statistics(call, q, levels, False)]
        log_sum_exp = torch.cat(parts, dim=1).logsumexp(dim=1)
        out = _mixture(call, query, q, levels, log_sum_exp, values[0].shape[1], out_scale)
    return out, log_sum_exp.unflatten(1, query.shape[2:])


def pyramid_attention_hard(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], patch_size: int, softmax_scale: float,
    eps: float, out_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = Call(query, query.shape[1], patch_size)
    with on_device(query):
        q, levels = call.padded(query), call.levels(keys, values, softmax_scale, eps)
        found = _statistics(call, q, levels, True)
        largest, first = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        missed = largest < largest.amax(dim=1, keepdim=True)
        index = first.masked_fill(missed, torch.iinfo(first.dtype).max).amin(dim=1)
        out = _mixture(call, query, q, levels, index, values[0].shape[1], out_scale)
    return out, index.unflatten(1, query.shape[2:])


def _statistics(call: Call, q: Padded, levels: Sequence[Level], hard: bool) -> list[tuple[Tensor, Tensor]]:
    """Of every level (B, splits, H * W): largest scores and their keys with hard, else log_sum_exp."""
    tile, statistics = call.tiles["statistics"], []
    for level in levels:
        programs, splits, tiles_per_split = call.grid(tile, q.pixels, level.pixels)
        result = call.empty(splits, q.pixels, dtype=torch.int64 if hard else torch.float32)
        largest = call.empty(splits if hard else 0, q.pixels)
        launch(
            kernels.pyramid_statistics_kernel, programs,
            q.data, level.keys.data, level.scales, largest, result, q.stride, level.keys.stride,
            q.width, q.pixels, level.keys.width, level.pixels, level.first_key, splits, tiles_per_split,
            HARD=hard, **call.products(tile, q.channels),
        )  # fmt: skip
        statistics.append((largest, result))
    return statistics


def _mixture(
    call: Call, query: Tensor, q: Padded, levels: Sequence[Level], selector: Tensor, channels: int,
    out_scale: float,
) -> Tensor:  # fmt: skip
    """The output; the selector (B, H * W) is log_sum_exp or, if integer, the index of the only key."""
    out = empty_image(query, channels, query.shape[2:])
    hard = not selector.is_floating_point()
    tile, width = call.tiles["selection" if hard else "mixture"], levels[0].values.channels
    parts, constants = call.sums(tile, width)
    total = call.empty(q.pixels if len(levels) > 1 else 0, width)
    for i, level in enumerate(levels):
        programs, splits, tiles_per_split = call.grid(tile, q.pixels, level.pixels, parts)
        sums = call.empty(splits, q.pixels, call.patch_size**2 * width)
        launch(
            kernels.pyramid_mixture_kernel, programs,
            q.data, level.keys.data, level.values.data, level.scales, selector, sums,
            q.stride, level.keys.stride, level.values.stride, q.width, q.pixels, level.keys.width,
            level.pixels, level.first_key, splits, tiles_per_split, parts,
            HARD=hard, WIDTH=width, **constants,
            **call.products(tile, q.channels),
        )  # fmt: skip
        call.fold(sums, out, out_scale, total=total, first=i == 0, last=i == len(levels) - 1)
    return out


def pyramid_attention_backward(
    grad_out: Tensor, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], log_sum_exp: Tensor,
    patch_size: int, softmax_scale: float, eps: float, out_scale: float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    call = Call(query, query.shape[1], patch_size)
    log_sum_exp = log_sum_exp.flatten(1).contiguous()
    with on_device(query):
        images = call.padded(grad_out), call.padded(query)
        levels = call.levels(keys, values, softmax_scale, eps)
        row_sums = _row_sums(call, *images, levels, log_sum_exp, out_scale)
        statistics = (log_sum_exp, row_sums)
        grad_query = _grad_query(call, query, *images, levels, *statistics, out_scale)
        grad_keys = [
            _grad_key(call, key, *images, level, *statistics, out_scale, eps)
            for key, level in zip(keys, levels, strict=True)
        ]
        grad_values = [
            _grad_value(call, value, images[0], level.first_key, log_sum_exp, out_scale, (images[1], level))
            for value, level in zip(values, levels, strict=True)
        ]
    return grad_query, grad_keys, grad_values


def _row_sums(
    call: Call, grad: Padded, q: Padded, levels: Sequence[Level], log_sum_exp: Tensor, out_scale: float
) -> Tensor:
    """r of every query (B, H * W)."""
    tile, row_sums = call.tiles["row_sums"], []
    for level in levels:
        programs, splits, tiles_per_split = call.grid(tile, q.pixels, level.pixels)
        row_sums.append(call.empty(splits, q.pixels))
        launch(
            backward_kernels.pyramid_row_sums_kernel, programs,
            *_inputs(grad, q, level), log_sum_exp, row_sums[-1],
            *_sizes(grad, q, level), splits, tiles_per_split, out_scale,
            WIDTH=grad.channels, **call.products(tile, q.channels, grad.channels),
        )  # fmt: skip
    return torch.cat(row_sums, dim=1).sum(dim=1)


def _grad_query(
    call: Call, query: Tensor, grad: Padded, q: Padded, levels: Sequence[Level], log_sum_exp: Tensor,
    row_sums: Tensor, out_scale: float,
) -> Tensor:  # fmt: skip
    out = empty_image(query, query.shape[1], query.shape[2:])
    tile = call.tiles["gradient"]
    parts, constants = call.sums(tile, q.channels)
    total = call.empty(q.pixels if len(levels) > 1 else 0, q.channels)
    for i, level in enumerate(levels):
        programs, splits, tiles_per_split = call.grid(tile, q.pixels, level.pixels, parts)
        sums = call.empty(splits, q.pixels, call.patch_size**2 * q.channels)
        launch(
            backward_kernels.pyramid_grad_query_kernel, programs,
            *_inputs(grad, q, level), log_sum_exp, row_sums, sums,
            *_sizes(grad, q, level), splits, tiles_per_split, out_scale, parts,
            WIDTH=grad.channels, **constants, **call.gradient(),
            **call.products(tile, q.channels, grad.channels),
        )  # fmt: skip
        call.fold(sums, out, 1.0, total=total, first=i == 0, last=i == len(levels) - 1)
    return out


def _grad_key(
    call: Call, key: Tensor, grad: Padded, q: Padded, level: Level, log_sum_exp: Tensor, row_sums: Tensor,
    out_scale: float, eps: float,
) -> Tensor:  # fmt: skip
    out = empty_image(key, key.shape[1], key.shape[2:])
    tile = call.tiles["gradient"]
    parts, constants = call.sums(tile, q.channels)
    programs, splits, tiles_per_split = call.grid(tile, level.pixels, q.pixels, parts)
    sums = call.empty(splits, level.pixels, call.patch_size**2 * q.channels)
    radial = call.empty(splits, level.pixels)
    launch(
        backward_kernels.pyramid_grad_key_kernel, programs,
        *_inputs(grad, q, level), level.norms, log_sum_exp, row_sums, sums, radial,
        *_sizes(grad, q, level), splits, tiles_per_split, out_scale, eps, parts,
        WIDTH=grad.channels, **constants, **call.gradient(), **call.products(tile, q.channels, grad.channels),
    )  # fmt: skip
    call.fold(sums, out, 1.0, radial=radial, keys=level.keys)
    return out


def _inputs(grad: Padded, q: Padded, level: Level) -> tuple[Tensor, ...]:
    return grad.data, q.data, level.keys.data, level.values.data, level.scales


def _sizes(grad: Padded, q: Padded, level: Level) -> tuple[int, ...]:
    """Batch strides of the images, widths and pixels of the query and of the level."""
    strides = (grad.stride, q.stride, level.keys.stride, level.values.stride)
    return *strides, q.width, q.pixels, level.keys.width, level.pixels


def pyramid_attention_hard_backward(
    grad_out: Tensor, values: Sequence[Tensor], index: Tensor, patch_size: int, out_scale: float
) -> list[Tensor]:
    call = Call(grad_out, grad_out.shape[1], patch_size)
    index = index.flatten(1).contiguous()
    grad_values, first_key = [], 0
    with on_device(grad_out):
        grad = call.padded(grad_out)
        for value in values:
            grad_values.append(_grad_value(call, value, grad, first_key, index, out_scale))
            first_key += value.shape[2] * value.shape[3]
    return grad_values


def _grad_value(
    call: Call, value: Tensor, grad: Padded, first_key: int, selector: Tensor, out_scale: float,
    scored: tuple[Padded, Level] | None = None,
) -> Tensor:  # fmt: skip
    """Of a level; the selector is log_sum_exp of the scores of query and level, else every query's index."""
    out = empty_image(value, value.shape[1], value.shape[2:])
    height, width = value.shape[2:]
    tile = call.tiles["selection" if scored is None else "mixture"]
    parts, constants = call.sums(tile, grad.channels)
    programs, splits, tiles_per_split = call.grid(tile, height * width, grad.pixels, parts)
    sums = call.empty(splits, height * width, call.patch_size**2 * grad.channels)
    q, k, scales, depth, strides = None, None, None, 8, (0, 0)
    if scored is not None:
        query, level = scored
        q, k, scales, depth = query.data, level.keys.data, level.scales, query.channels
        strides = (query.stride, level.keys.stride)
    launch(
        backward_kernels.pyramid_grad_value_kernel, programs,
        grad.data, q, k, scales, selector, sums, grad.stride, *strides,
        grad.width, grad.pixels, width, height * width, first_key, splits, tiles_per_split, parts,
        HARD=scored is None, WIDTH=grad.channels, **constants, **call.products(tile, depth),
    )  # fmt: skip
    call.fold(sums, out, out_scale)
    return out

"""Launches the Triton kernels of pointwise convolution: outputs, scratch, grids and block sizes.

One function per operator of ``ops.py``, with the arguments and results of its schema. All images of a call
are arguments of one launch, so that sums over them stay in registers and are rounded once. Scratch is the
shares that programs have of the gradients of weight and bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from restore_kernels.pointwise_conv.triton_kernels import projection_kernel, weight_product_kernel
from restore_kernels.tensors import empty_image
from restore_kernels.triton_common.launching import (
    NO_SPILLS,
    block,
    image_strides,
    is_whole,
    launch,
    on_device,
    precision,
    split,
)


def _weight_strides(weight: Tensor) -> tuple[int, int, int]:
    """Of image, output and input."""
    return weight.stride(0) if weight.dim() == 5 else 0, weight.stride(-4), weight.stride(-3)


def _warps(dtype: torch.dtype) -> int:
    """Of a program: the three parts of a float32 product take twice the registers."""
    return 8 if dtype == torch.float32 else 4


def _project(
    images: Sequence[Tensor], weight: Tensor, weight_stride: tuple[int, int, int], bias: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    batch, outputs, height, width = out.shape
    channels = tuple(image.shape[1] for image in images)
    whole = all(map(is_whole, (*images, out)))
    block_r, block_k, block_n = block(outputs, 64), block(max(channels), 32), block(height * width, 128)
    programs = batch * triton.cdiv(outputs, block_r) * triton.cdiv(height * width, block_n)
    launch(
        projection_kernel, programs, tuple(images), weight, bias, out,
        tuple(image_strides(image, whole) for image in images), weight_stride, image_strides(out, whole),
        channels, outputs, width, height * width,
        INPUTS=len(images), WHOLE=whole, PRECISION=precision(out.dtype, sum(channels)),
        BLOCK_R=block_r, BLOCK_K=block_k, BLOCK_N=block_n, num_warps=_warps(out.dtype), **NO_SPILLS,
    )  # fmt: skip


def pointwise_conv(x: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    out = empty_image(x[0], weight.shape[-4], x[0].shape[2:])
    with on_device(out):
        _project(x, weight, _weight_strides(weight), None if bias is None else bias.contiguous(), out)
    return out


def pointwise_conv_backward(
    grad_out: Tensor, x: list[Tensor], weight: Tensor, wanted: list[bool]
) -> tuple[list[Tensor], Tensor, Tensor]:
    *of_images, of_weight, of_bias = wanted
    image_stride, row, column = _weight_strides(weight)
    grad_x, first = [], 0
    with on_device(grad_out):
        for image, want in zip(x, of_images, strict=True):
            channels = image.shape[1]
            grad = empty_image(image, channels, image.shape[2:]) if want else image.new_empty((0,))
            if want:
                part = weight.narrow(-3, first, channels)
                _project([grad_out], part, (image_stride, column, row), None, grad)
            grad_x.append(grad)
            first += channels
        grad_weight, grad_bias = _parameter_gradients(grad_out, x, weight, of_weight, of_bias)
    return grad_x, grad_weight, grad_bias


def _parameter_gradients(
    grad_out: Tensor, x: list[Tensor], weight: Tensor, of_weight: bool, of_bias: bool
) -> tuple[Tensor, Tensor]:
    batch, outputs, height, width = grad_out.shape
    channels = weight.shape[-3]
    weights = batch if weight.dim() == 5 else 1
    grad_weight, grad_bias = weight.new_empty((0,)), weight.new_empty((0,))
    if of_bias and not of_weight:
        return grad_weight, grad_out.sum((0, 2, 3), dtype=torch.float32).to(weight.dtype)
    if not of_weight:
        return grad_weight, grad_bias
    pixels = height * width
    block_r, block_c = (block(size, 64) for size in (outputs, max(image.shape[1] for image in x)))
    block_n = block(pixels, 32 if weight.dtype == torch.float32 else 64)
    tiles = triton.cdiv(pixels, block_n) * (batch // weights if weights else 0)
    matrices = weights * triton.cdiv(outputs, block_r) * triton.cdiv(channels, block_c)
    tiles_per_split, splits = split(tiles, matrices, grad_out.device)
    shares = torch.empty((splits, weights, outputs, channels), dtype=torch.float32, device=grad_out.device)
    of_sums = (splits, weights, outputs)
    sums = torch.empty(of_sums, dtype=torch.float32, device=grad_out.device) if of_bias else None
    first = 0
    for i, image in enumerate(x):
        whole = is_whole(grad_out) and is_whole(image)
        tiles_of_image = triton.cdiv(outputs, block_r) * triton.cdiv(image.shape[1], block_c)
        of_image = shares.narrow(-1, first, image.shape[1])
        launch(
            weight_product_kernel, weights * splits * tiles_of_image, grad_out, image, of_image,
            sums if i == 0 else None,
            image_strides(grad_out, whole), image_strides(image, whole), of_image.stride(),
            None if sums is None else sums.stride(), outputs, image.shape[1], width, pixels,
            tiles, splits, tiles_per_split,
            WHOLE=whole, PRECISION=precision(weight.dtype, pixels),
            BLOCK_R=block_r, BLOCK_C=block_c, BLOCK_N=block_n, num_warps=_warps(weight.dtype), **NO_SPILLS,
        )  # fmt: skip
        first += image.shape[1]
    grad_weight = shares.sum(0).to(weight.dtype).view(weight.shape)
    return grad_weight, grad_bias if sums is None else sums.sum((0, 1)).to(weight.dtype)

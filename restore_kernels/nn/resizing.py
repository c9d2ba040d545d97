"""Bicubic resizing that stays whole under torch.compile.

Inductor takes it apart into 16 gathers, and its gradient into as many scattered sums. Of several resized
images of one source, as a pyramid has them, PyTorch 2.13 then adds the gradients up wrongly on a CPU, without
a word, and compiling takes minutes. As operators that nothing looks into, PyTorch's own kernels are right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from restore_kernels.tensors import empty_image, memory_format

_ALIGN_CORNERS = False


def resize_bicubic(x: Tensor, factors: Sequence[float]) -> Tensor:
    """As ``F.interpolate(x, scale_factor=factors, mode="bicubic")``.

    Args:
        x: (B, C, H, W).
        factors: of height and width.

    Returns:
        (B, C, floor(factors[0] * H), floor(factors[1] * W)).
    """
    if not torch.compiler.is_compiling():
        return F.interpolate(x, scale_factor=list(factors), mode="bicubic")
    size = [math.floor(side * factor) for side, factor in zip(x.shape[2:], factors, strict=True)]
    return _resize(x, size, factors)


@torch.library.custom_op(
    "restore_kernels::resize_bicubic", mutates_args=(),
    schema="(Tensor x, SymInt[] size, float[] factors) -> Tensor",
)  # fmt: skip
def _resize(x: Tensor, size: Sequence[int], factors: Sequence[float]) -> Tensor:
    out = torch.ops.aten.upsample_bicubic2d.default(x, size, _ALIGN_CORNERS, *factors)
    return out.contiguous(memory_format=memory_format(x))


@_resize.register_fake
def _(x: Tensor, size: Sequence[int], factors: Sequence[float]) -> Tensor:
    return empty_image(x, x.shape[1], size)


@torch.library.custom_op(
    "restore_kernels::resize_bicubic_backward", mutates_args=(),
    schema="(Tensor grad_out, SymInt[] shape, float[] factors) -> Tensor",
)  # fmt: skip
def _resize_backward(grad_out: Tensor, shape: Sequence[int], factors: Sequence[float]) -> Tensor:
    size = grad_out.shape[2:]
    grad = torch.ops.aten.upsample_bicubic2d_backward.default(grad_out, size, shape, _ALIGN_CORNERS, *factors)
    return grad.contiguous(memory_format=memory_format(grad_out))


@_resize_backward.register_fake
def _(grad_out: Tensor, shape: Sequence[int], factors: Sequence[float]) -> Tensor:
    return empty_image(grad_out, shape[1], shape[2:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, ctx.factors = inputs
    ctx.shape = x.shape


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
    return _resize_backward(grad_out, ctx.shape, ctx.factors), None, None


_resize.register_autograd(_backward, setup_context=_setup_context)

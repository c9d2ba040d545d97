"""Launches the Triton kernels of bilinear resizing: outputs and grids.

One function per operator of ``ops.py``, with the arguments and results of its schema.
"""

from __future__ import annotations

import triton
from torch import Tensor

from restore_kernels.bilinear_resize.triton_kernels import (
    double_kernel,
    gather_kernel,
    halve_kernel,
    spread_kernel,
)
from restore_kernels.tensors import empty_image
from restore_kernels.triton_common.launching import launch, on_device

BLOCK = 512  # elements: 16 loads at a time for each of 1024 would fill the registers


def bilinear_resize(x: Tensor, residual: Tensor | None, doubles: bool, height: int, width: int) -> Tensor:
    out = empty_image(x, x.shape[1], (height, width))
    with on_device(x):
        launch(
            double_kernel if doubles else halve_kernel, triton.cdiv(out.numel(), BLOCK), x, residual, out,
            x.stride(), None if residual is None else residual.stride(), out.stride(),
            out.numel(), *out.shape[1:], *x.shape[2:], BLOCK=BLOCK,
        )  # fmt: skip
    return out


def bilinear_resize_backward(grad_out: Tensor, doubles: bool, height: int, width: int) -> Tensor:
    grad = empty_image(grad_out, grad_out.shape[1], (height, width))
    strides, sizes = (grad_out.stride(), grad.stride()), (grad.numel(), *grad.shape[1:])
    programs = triton.cdiv(grad.numel(), BLOCK)
    with on_device(grad_out):
        if doubles:
            launch(
                gather_kernel, programs, grad_out, grad, *strides, *sizes, *grad_out.shape[2:], BLOCK=BLOCK
            )
        else:
            launch(spread_kernel, programs, grad_out, grad, *strides, *sizes, BLOCK=BLOCK)
    return grad

"""The public function: semantic checks, backend choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from restore_kernels import checks, coverage
from restore_kernels.backends import Backend, Call, choose
from restore_kernels.bilinear_resize import autograd, reference
from restore_kernels.functions import eager
from restore_kernels.tensors import memory_format


def bilinear_resize(
    x: Tensor, scale_factor: float, residual: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """An image at twice or half of its size, by bilinear interpolation, and a residual added.

    ``torch.nn.functional.interpolate`` with ``mode="bilinear"`` and without corner alignment. Twice the size,
    a pixel is 9/16 its nearest, 3/16 each of the two beside that and 1/16 the one between them; at the border
    the outermost count again. Half of the size, it is the average of 2x2, and of an odd side the last pixels
    are averaged alone, as ``avg_pool2d`` does with ``ceil_mode=True``.

    Source: the lateral connections of feature pyramid networks (arXiv 1612.03144), with bilinear weights.

    Args:
        x: (B, C, H, W). float32, bfloat16, float16 or float64; any strides.
        scale_factor: 2 or 0.5.
        residual: (B, C, 2 H, 2 W), or a row or a column less, which cuts off the result's; for 0.5
            (B, C, ceil(H / 2), ceil(W / 2)). x's dtype and device. None: nothing is added.
        backend: ``auto``, ``eager``, ``cpu`` or ``triton``; or several of them, best first. ``auto`` is
            ``eager`` for images in channels_last on the CPU.

    Returns:
        Of the residual's size, without one (B, C, 2 H, 2 W) or (B, C, ceil(H / 2), ceil(W / 2)), in x's
        dtype, under autocast too, channels_last where x is. Arithmetic is in float32 (float64 for float64),
        rounded once.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: no backend asked for by name can run this call; the message says why.
    """
    size = _check(x, scale_factor, residual)
    chosen = choose(_call(x, residual), backend)
    if chosen != "eager":
        return autograd.bilinear_resize(x, residual, scale_factor == 2, *size, chosen)
    return eager("bilinear_resize", reference.bilinear_resize, x, residual, scale_factor == 2, *size)


def _check(x: Any, scale_factor: Any, residual: Any) -> tuple[int, int]:
    """Every semantic check of a call; height and width of its result."""
    checks.floating_tensor("x", x, ("B", "C", "H", "W"))
    if not isinstance(scale_factor, (int, float)) or scale_factor not in (2, 0.5):
        raise ValueError(f"scale_factor must be 2 or 0.5; got {scale_factor!r}")
    batch, channels, height, width = x.shape
    if scale_factor == 2:
        height, width = 2 * height, 2 * width
        if isinstance(residual, Tensor) and residual.dim() == 4:  # which may be smaller by one
            height = height - 1 if residual.shape[2] == height - 1 else height
            width = width - 1 if residual.shape[3] == width - 1 else width
    else:
        height, width = (height + 1) // 2, (width + 1) // 2
    if residual is not None:
        checks.like("residual", residual, x, (batch, channels, height, width), "x")
    return height, width


def _call(x: Tensor, residual: Tensor | None) -> Call:
    slower = {"cpu": "x is in channels_last"} if memory_format(x) == torch.channels_last else {}
    tensors = (x,) if residual is None else (x, residual)
    return Call("bilinear_resize", "2x", tensors, coverage.NO_CUDA, slower)


def _plan(x, scale_factor, residual=None, *, backend="auto"):
    _check(x, scale_factor, residual)
    return _call(x, residual)


bilinear_resize.plan = _plan  # type: ignore[attr-defined]

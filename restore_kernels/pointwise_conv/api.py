"""The public function: semantic checks, backend choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from restore_kernels import checks, coverage
from restore_kernels.backends import Backend, Call, choose
from restore_kernels.functions import plain_calls
from restore_kernels.pointwise_conv import autograd, reference


def pointwise_conv2d(
    x: Tensor | Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """Convolution with kernels of size 1: at every pixel a matrix times its channels.

    ``torch.nn.functional.conv2d`` of size 1 and stride 1. Several images count as concatenated along their
    channels, as by ``torch.cat``, but are not written together.

    Source: the pointwise half of separable convolutions (MobileNets, arXiv 1704.04861), and the projections
    of attention between channels (Restormer, arXiv 2111.09881).

    Args:
        x: (B, C, H, W), or 1 to 8 such images with channels of their own. float32, bfloat16, float16 or
            float64, all of one dtype; any strides, channels_last among them. Under autocast x, weight and
            bias are cast as for a convolution.
        weight: (C_out, C, 1, 1), or one per image of the batch, (B, C_out, C, 1, 1), with C the channels of
            all images of x together; same dtype and device as x.
        bias: (C_out), or None.
        backend: ``auto``, ``eager``, ``cpu`` or ``triton``; or several of them, best first.

    Returns:
        (B, C_out, H, W), channels_last where the first image of x is.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: no backend asked for by name can run this call; the message says why.
    """
    if (calls := plain_calls(backend)) and (out := calls.pointwise_conv2d_call(x, weight, bias)) is not None:
        return out
    images, weight, bias = _prepare(x, weight, bias)
    chosen = choose(_call(images, weight, bias), backend)
    if chosen != "eager":
        return autograd.pointwise_conv(images, weight, bias, chosen)
    with checks.no_autocast(images[0].device.type):
        return reference.pointwise_conv(images, weight, bias)


def _prepare(x: Any, weight: Any, bias: Any) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
    """Every semantic check of a call; its images and the rest, cast where autocast is on."""
    images = checks.as_images(x)
    *images, weight, bias = checks.autocast(*images, weight, bias)
    channels = checks.joined_images("x", images)
    per_image = isinstance(weight, Tensor) and weight.dim() == 5
    checks.floating_tensor("weight", weight, ("B",) * per_image + ("C_out", "C", "1", "1"))
    outputs, first = weight.shape[-4], images[0]
    checks.like("weight", weight, first, (first.shape[0],) * per_image + (outputs, channels, 1, 1), "x")
    if bias is not None:
        checks.like("bias", bias, first, (outputs,), "x")
    return tuple(images), weight, bias


def _call(images: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> Call:
    tensors = (*images, weight) if bias is None else (*images, weight, bias)
    return Call("pointwise_conv2d", "1x1", tensors, coverage.NO_CUDA)


def _plan(x, weight, bias=None, *, backend="auto"):
    return _call(*_prepare(x, weight, bias))


pointwise_conv2d.plan = _plan  # type: ignore[attr-defined]

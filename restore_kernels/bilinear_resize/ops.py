"""Operator schemas of bilinear resizing and their fake (meta) kernels.

x (B, C, H, W), residual and out (B, C, height, width), any strides. ``doubles`` says which way. Backward
makes the gradient of x, of height x width, from that of out; that of the residual is out's itself.
"""

from __future__ import annotations

from restore_kernels.registry import register
from restore_kernels.tensors import empty_image

_SCHEMAS = {
    "bilinear_resize": (
        "(Tensor x, Tensor? residual, bool doubles, SymInt height, SymInt width) -> Tensor out"
    ),
    "bilinear_resize_backward": (
        "(Tensor grad_out, bool doubles, SymInt height, SymInt width) -> Tensor grad_x"
    ),
}


def _fake(x, residual, doubles, height, width):
    return empty_image(x, x.shape[1], (height, width))


def _backward_fake(grad_out, doubles, height, width):
    return empty_image(grad_out, grad_out.shape[1], (height, width))


_FAKES = {"bilinear_resize": _fake, "bilinear_resize_backward": _backward_fake}

overload = register(_SCHEMAS, _FAKES, "restore_kernels.bilinear_resize.triton_launch")

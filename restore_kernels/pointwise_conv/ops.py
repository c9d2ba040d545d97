"""Operator schemas of pointwise convolution and their fake (meta) kernels.

x[i] (B, C_i, H, W), weight (C_out, C, 1, 1) or (B, C_out, C, 1, 1) with C the sum of all C_i, bias (C_out),
out (B, C_out, H, W), any strides. ``wanted`` says of every image, then of weight and bias, whether backward
makes its gradient; those that it does not make are empty.
"""

from __future__ import annotations

from restore_kernels.registry import register
from restore_kernels.tensors import empty_image

_SCHEMAS = {
    "pointwise_conv": "(Tensor[] x, Tensor weight, Tensor? bias) -> Tensor out",
    "pointwise_conv_backward": (
        "(Tensor grad_out, Tensor[] x, Tensor weight, bool[] wanted) -> "
        "(Tensor[] grad_x, Tensor grad_weight, Tensor grad_bias)"
    ),
}


def _fake(x, weight, bias):
    return empty_image(x[0], weight.shape[-4], x[0].shape[2:])


def _backward_fake(grad_out, x, weight, wanted):
    *of_images, of_weight, of_bias = wanted
    grad_x = [
        empty_image(image, image.shape[1], image.shape[2:]) if want else image.new_empty((0,))
        for image, want in zip(x, of_images, strict=True)
    ]
    grad_weight = weight.new_empty(weight.shape if of_weight else (0,))
    return grad_x, grad_weight, weight.new_empty((weight.shape[-4] if of_bias else 0,))


_FAKES = {"pointwise_conv": _fake, "pointwise_conv_backward": _backward_fake}

overload = register(_SCHEMAS, _FAKES, "restore_kernels.pointwise_conv.triton_launch")

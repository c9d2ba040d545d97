"""Operator schemas of dense convolution and their fake (meta) kernels.

x (B, C, H, W), weight (C_out, C, 3, 3), bias (C_out), out (B, C_out, H, W), any strides. ``wanted`` says of
x, weight and bias whether backward makes their gradient; those that it does not make are empty.
"""

from __future__ import annotations

from restore_kernels.registry import register
from restore_kernels.tensors import empty_image

_SCHEMAS = {
    "dense_conv": "(Tensor x, Tensor weight, Tensor? bias) -> Tensor out",
    "dense_conv_backward": (
        "(Tensor grad_out, Tensor x, Tensor weight, bool[] wanted) -> "
        "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
    ),
}


def _fake(x, weight, bias):
    return empty_image(x, weight.shape[0], x.shape[2:])


def _backward_fake(grad_out, x, weight, wanted):
    of_x, of_weight, of_bias = wanted
    grad_x = empty_image(x, x.shape[1], x.shape[2:]) if of_x else x.new_empty((0,))
    grad_weight = weight.new_empty(weight.shape if of_weight else (0,))
    return grad_x, grad_weight, weight.new_empty((weight.shape[0] if of_bias else 0,))


_FAKES = {"dense_conv": _fake, "dense_conv_backward": _backward_fake}

overload = register(_SCHEMAS, _FAKES, triton_module=None)

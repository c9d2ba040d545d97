"""Operator schemas of depthwise convolution and their fake (meta) kernels.

x (B, M * C, H, W), weight (C, M, k, k), bias (C), out (B, C, H, W), any strides: group c computes output
channel c of the M input channels from M * c on. Backward takes ``out`` where it was rectified: where it is
zero, so is the derivative.
"""

from __future__ import annotations

from restore_kernels.registry import register
from restore_kernels.tensors import empty_image

_SCHEMAS = {
    "depthwise_conv": "(Tensor x, Tensor weight, Tensor? bias, int dilation, bool relu) -> Tensor out",
    "depthwise_conv_backward": (
        "(Tensor grad_out, Tensor x, Tensor weight, Tensor? out, int dilation) -> "
        "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
    ),
}


def _fake(x, weight, bias, dilation, relu):
    return empty_image(x, weight.shape[0], x.shape[2:])


def _backward_fake(grad_out, x, weight, out, dilation):
    grad_weight = weight.new_empty(weight.shape)
    return empty_image(x, x.shape[1], x.shape[2:]), grad_weight, weight.new_empty((weight.shape[0],))


_FAKES = {"depthwise_conv": _fake, "depthwise_conv_backward": _backward_fake}

overload = register(_SCHEMAS, _FAKES, "restore_kernels.depthwise_conv.triton_launch")

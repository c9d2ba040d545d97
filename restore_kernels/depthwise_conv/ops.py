"""Operator schemas of depthwise convolution and their fake (meta) kernels.

x: images (B, C_i, H, W) of M * C channels together, weight (C, M, k, k), bias (C), slope (1) or (C), gate and
out (B, C, H, W), any strides: group c computes output channel c of the M input channels from M * c on.

Backward takes ``out`` where it was rectified and not gated: where it is zero, so is the derivative. Otherwise
it computes the convolution again. ``wanted`` says which gradients there are, of every image of x, then of
weight, bias and slope together, then of the gate; the others are empty.
"""

from __future__ import annotations

from restore_kernels.registry import register
from restore_kernels.tensors import empty_image

_SCHEMAS = {
    "depthwise_conv": (
        "(Tensor[] x, Tensor weight, Tensor? bias, Tensor? slope, Tensor? gate, int dilation, "
        "str? activation) -> Tensor out"
    ),
    "depthwise_conv_backward": (
        "(Tensor grad_out, Tensor[] x, Tensor weight, Tensor? bias, Tensor? slope, Tensor? gate, "
        "Tensor? out, int dilation, str? activation, bool[] wanted) -> "
        "(Tensor[] grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_slope, Tensor grad_gate)"
    ),
}


def _fake(x, weight, bias, slope, gate, dilation, activation):
    return empty_image(x[0], weight.shape[0], x[0].shape[2:])


def _backward_fake(grad_out, x, weight, bias, slope, gate, out, dilation, activation, wanted):
    *of_x, of_parameters, of_gate = wanted

    def image(x, is_wanted):
        return empty_image(x, x.shape[1], x.shape[2:]) if is_wanted else grad_out.new_empty((0,))

    shapes = (weight.shape, weight.shape[:1], (0,) if slope is None else slope.shape)
    parameters = [weight.new_empty(shape if of_parameters else (0,)) for shape in shapes]
    return [image(*pair) for pair in zip(x, of_x, strict=True)], *parameters, image(gate, of_gate)


_FAKES = {"depthwise_conv": _fake, "depthwise_conv_backward": _backward_fake}

overload = register(_SCHEMAS, _FAKES, "restore_kernels.depthwise_conv.triton_launch")

"""Operator schemas of the channel gate and their fake (meta) kernels.

x and residual (B, C, H, W), any strides; down (R, C, 1, 1), up (C, R, 1, 1) and the biases (R,) and (C,) in
the accumulation dtype (float64 for float64 images, else float32). Saved for backward, in that dtype:
    mean (B, C): of every channel's pixels.
    hidden (B, R): after the rectifier.
    gate (B, C): what the channels are multiplied by.
The gradient of the residual is grad_out itself. Those of the biases are made whether or not there are any.
"""

from __future__ import annotations

from restore_kernels.registry import register
from restore_kernels.tensors import empty_image

_SCHEMAS = {
    "channel_gate": (
        "(Tensor x, Tensor down, Tensor up, Tensor? down_bias, Tensor? up_bias, Tensor? residual) -> "
        "(Tensor out, Tensor mean, Tensor hidden, Tensor gate)"
    ),
    "channel_gate_backward": (
        "(Tensor grad_out, Tensor x, Tensor down, Tensor up, Tensor mean, Tensor hidden, Tensor gate) -> "
        "(Tensor grad_x, Tensor grad_down, Tensor grad_up, Tensor grad_down_bias, Tensor grad_up_bias)"
    ),
}


def _forward_fake(x, down, up, down_bias, up_bias, residual):
    (batch, channels), hidden = x.shape[:2], down.shape[0]
    saved = (down.new_empty((batch, size)) for size in (channels, hidden, channels))
    return empty_image(x, channels, x.shape[2:]), *saved


def _backward_fake(grad_out, x, down, up, mean, hidden, gate):
    grads = (down.new_empty(size) for size in (down.shape, up.shape, down.shape[:1], up.shape[:1]))
    return empty_image(x, x.shape[1], x.shape[2:]), *grads


_FAKES = {"channel_gate": _forward_fake, "channel_gate_backward": _backward_fake}

overload = register(_SCHEMAS, _FAKES, "restore_kernels.channel_gate.triton_launch")

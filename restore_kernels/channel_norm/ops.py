"""Operator schemas of channel normalisation and their fake (meta) kernels.

x (B, C, H, W), any strides; weight and bias (C,) in the accumulation dtype (float64 for float64 images,
else float32). Saved for backward, in that dtype:
    mean (B, H, W): of every pixel's channels, also where it is not subtracted.
    rstd (B, H, W): 1 / sqrt(variance + eps).
Without a bias grad_bias is empty.
"""

from __future__ import annotations

from restore_kernels.registry import register
from restore_kernels.tensors import empty_image

_SCHEMAS = {
    "channel_norm": (
        "(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor out, Tensor mean, Tensor rstd)"
    ),
    "channel_norm_backward": (
        "(Tensor grad_out, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool biased) -> "
        "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
    ),
}


def _forward_fake(x, weight, bias, eps):
    batch, channels, *size = x.shape
    mean, rstd = (weight.new_empty((batch, *size)) for _ in range(2))
    return empty_image(x, channels, size), mean, rstd


def _backward_fake(grad_out, x, weight, mean, rstd, biased):
    channels = x.shape[1]
    grad_x = empty_image(x, channels, x.shape[2:])
    return grad_x, weight.new_empty(channels), weight.new_empty(channels if biased else 0)


_FAKES = {"channel_norm": _forward_fake, "channel_norm_backward": _backward_fake}

overload = register(_SCHEMAS, _FAKES, "restore_kernels.channel_norm.triton_launch")

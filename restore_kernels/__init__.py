"""Fused operators for image restoration, with autograd.

Importing this package loads neither Triton nor CUDA nor the compiled library: each is loaded by
the first call that needs it, and everything works (slower) where none of them exists.
"""

from restore_kernels.backends import explain, use_backend
from restore_kernels.bilinear_resize import bilinear_resize
from restore_kernels.channel_gate import channel_gate
from restore_kernels.channel_norm import channel_norm
from restore_kernels.dense_conv import dense_conv2d
from restore_kernels.depthwise_conv import depthwise_conv2d
from restore_kernels.info import info
from restore_kernels.masked_attention import masked_attention
from restore_kernels.patching import patch
from restore_kernels.pointwise_conv import pointwise_conv2d
from restore_kernels.pyramid_attention import pyramid_attention
from restore_kernels.recording import record
from restore_kernels.topk_attention import topk_attention
from restore_kernels.version import __version__

__all__ = [
    "__version__",
    "bilinear_resize",
    "channel_gate",
    "channel_norm",
    "dense_conv2d",
    "depthwise_conv2d",
    "explain",
    "info",
    "masked_attention",
    "patch",
    "pointwise_conv2d",
    "pyramid_attention",
    "record",
    "topk_attention",
    "use_backend",
]

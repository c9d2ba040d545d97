"""Dense 3x3 convolution."""

from restore_kernels.dense_conv.api import dense_conv2d

__all__ = ["dense_conv2d"]

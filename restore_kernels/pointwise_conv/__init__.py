"""Pointwise (1x1) convolution of an image, or of several as if they were concatenated."""

from restore_kernels.pointwise_conv.api import pointwise_conv2d

__all__ = ["pointwise_conv2d"]

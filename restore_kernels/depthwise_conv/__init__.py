"""Depthwise convolution, and its grouped variant of two inputs to one output."""

from restore_kernels.depthwise_conv.api import depthwise_conv2d

__all__ = ["depthwise_conv2d"]

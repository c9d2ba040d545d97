"""Layer normalisation of every pixel of an image over its channels."""

from restore_kernels.channel_norm.api import channel_norm

__all__ = ["channel_norm"]

"""Attention between the patches of an image and those of all levels of a pyramid."""

from restore_kernels.pyramid_attention.api import pyramid_attention

__all__ = ["pyramid_attention"]

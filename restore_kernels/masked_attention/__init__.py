"""Attention whose queries come from one source and whose keys and values from another, masked one."""

from restore_kernels.masked_attention.api import masked_attention

__all__ = ["masked_attention"]

"""Attention that keeps the k largest similarities of every row, in several branches at once."""

from restore_kernels.topk_attention.api import topk_attention

__all__ = ["topk_attention"]

"""Swaps the eager modules of an existing network for fused ones."""

from restore_kernels.patching.api import Patched, patch

__all__ = ["Patched", "patch"]

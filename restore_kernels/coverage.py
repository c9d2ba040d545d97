"""Which calls the CUDA C++ kernels do not cover, whatever the device."""

from __future__ import annotations

from torch import Tensor

MOST_CHANNELS, MOST_BRANCHES = 256, 32  # csrc/cuda/channel_rows.cuh


def cuda_channels(q: Tensor, branches: int = 1) -> str | None:
    """Why they do not cover attention between the channels of q in so many branches, or None."""
    if q.shape[2] > MOST_CHANNELS:
        return f"its channel kernels take heads of at most {MOST_CHANNELS} channels, got {q.shape[2]}"
    if branches > MOST_BRANCHES:
        return f"its channel kernels take at most {MOST_BRANCHES} branches, got {branches}"
    return None

"""What the results of the operators look like: their dtypes and where they lie in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_like_rows(x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Uninitialised (B, *rows, N) output that follows the memory format of x (B, H, C, N).

    Pixel-major (each pixel's channels adjacent, as channels_last images are) where x is, so that
    a network in channels_last stays there; otherwise contiguous.
    """
    batch, pixels = x.shape[0], x.shape[-1]
    if x.stride(-2) == 1 and x.stride(-1) > 1:
        return x.new_empty((batch, pixels, *rows)).movedim(1, -1)
    return x.new_empty((batch, *rows, pixels))


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where the pixels of the image x (B, C, H, W) are channels side by side."""
    return torch.channels_last if x.stride(1) == 1 and x.stride(3) > 1 else torch.contiguous_format


def empty_image(x: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """Uninitialised (B, channels, *size) in the dtype and memory format of the image x."""
    shape = (x.shape[0], channels, *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))

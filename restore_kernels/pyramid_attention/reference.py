"""Pyramid attention as mathematics: the definition every backend is measured against.

Plain differentiable PyTorch, with every score stored. float16 and bfloat16 inputs are computed in
float32 and rounded once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from restore_kernels.tensors import accumulate_dtype, memory_format


def patches(x: Tensor, size: int) -> Tensor:
    """The zero-padded size x size patches around all pixels of x: (B, C * size * size, H * W)."""
    return F.unfold(x, size, padding=size // 2)


def scores(query: Tensor, keys: Sequence[Tensor], size: int, scale: float, eps: float) -> Tensor:
    """Of every patch of query against every patch of all levels: (B, H * W, sum of h_i * w_i)."""
    queries = patches(query, size).mT
    levels = []
    for key in keys:
        key_patches = patches(key, size)
        norms = torch.linalg.vector_norm(key_patches, dim=1, keepdim=True).clamp(min=eps)
        levels.append(scale * (queries @ (key_patches / norms)))
    return torch.cat(levels, dim=2)


def overlap_add(probabilities: Tensor, values: Sequence[Tensor], size: int, shape: Sequence[int]) -> Tensor:
    """Every pixel's mixture of value patches, added around the pixel: (B, Cv, *shape)."""
    value_patches = torch.cat([patches(value, size) for value in values], dim=2)
    return F.fold(value_patches @ probabilities.mT, tuple(shape), size, padding=size // 2)


def pyramid_attention(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], patch_size: int, softmax_scale: float,
    eps: float, out_scale: float, hard: bool,
) -> Tensor:  # fmt: skip
    """query (B, Cq, H, W); keys[i] (B, Cq, h_i, w_i); values[i] (B, Cv, h_i, w_i)."""
    dtype = accumulate_dtype(query.dtype)
    query_, keys_ = query.to(dtype), [key.to(dtype) for key in keys]
    values_ = [value.to(dtype) for value in values]
    if hard:
        best = scores(query_.detach(), [key.detach() for key in keys_], patch_size, softmax_scale, eps)
        probabilities = torch.zeros_like(best).scatter_(2, best.argmax(dim=2, keepdim=True), 1)
    else:
        probabilities = scores(query_, keys_, patch_size, softmax_scale, eps).softmax(dim=2)
    out = overlap_add(probabilities, values_, patch_size, query.shape[2:]) * out_scale
    return out.to(query.dtype, memory_format=memory_format(query))

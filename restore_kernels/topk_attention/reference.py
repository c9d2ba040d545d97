"""Top-k sparse attention as mathematics: the definition every backend is measured against.

Plain differentiable PyTorch. float16 and bfloat16 inputs are computed in float32 and rounded once,
at the end; a branch is a softmax over the entries it keeps, and the branches' weighted sum is one
matrix, applied to v once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from restore_kernels.tensors import accumulate_dtype


def branch_mixture(scores: Tensor, weights: Tensor, topk: Sequence[int]) -> Tensor:
    """sum_j weights[..., j] * softmax(the topk[j] largest entries of each row of scores).

    Equal entries are kept in order of their index. The selection is a constant to autograd.

    Args:
        scores: (B, H, R, L).
        weights: (B, H, J).
    """
    order = scores.detach().argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)  # (B, H, R, L): 0 for the largest entry of a row
    mixture = torch.zeros_like(scores)
    for j, kept in enumerate(topk):
        branch = scores.masked_fill(rank >= kept, float("-inf")).softmax(dim=-1)
        mixture = mixture + weights[:, :, j, None, None] * branch
    return mixture


def channel(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, weights: Tensor, out_proj: Tensor | None,
    topk: Sequence[int], normalize: bool,
) -> Tensor:  # fmt: skip
    """q, k, v (B, H, C, N); out_proj (C_out, H * C); see ``topk_attention`` for the others."""
    dtype = accumulate_dtype(q.dtype)
    q_, k_, v_ = q.to(dtype), k.to(dtype), v.to(dtype)
    if normalize:
        q_, k_ = F.normalize(q_, dim=-1), F.normalize(k_, dim=-1)
    weights = weights.to(dtype).expand(*q.shape[:2], len(topk))
    scores = temperature.to(dtype) * (q_ @ k_.transpose(-2, -1))  # (B, H, C, C)
    out = branch_mixture(scores, weights, topk) @ v_
    if out_proj is not None:
        out = out_proj.to(dtype) @ out.flatten(1, 2)  # (B, C_out, N)
    return out.to(v.dtype)


def token(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, weights: Tensor,
    topk: Sequence[int], normalize: bool,
) -> Tensor:  # fmt: skip
    """q (B, H, N, D); k (B, H, M, D); v (B, H, M, E); see ``topk_attention`` for the others."""
    dtype = accumulate_dtype(q.dtype)
    q_, k_, v_ = q.to(dtype), k.to(dtype), v.to(dtype)
    if normalize:
        q_, k_ = F.normalize(q_, dim=-1), F.normalize(k_, dim=-1)
    weights = weights.to(dtype).expand(*q.shape[:2], len(topk))
    scores = temperature.to(dtype) * (q_ @ k_.transpose(-2, -1))  # (B, H, N, M)
    return (branch_mixture(scores, weights, topk) @ v_).to(v.dtype)

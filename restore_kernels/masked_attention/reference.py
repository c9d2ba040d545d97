"""Masked multi-input attention as mathematics: the definition every backend is measured against.

Plain differentiable PyTorch. float16 and bfloat16 inputs are computed in float32 and rounded once,
at the end.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from restore_kernels.tensors import accumulate_dtype


def weighted_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """mask * exp(scores) over its sum along the rows; zero where mask is not positive.

    Args:
        scores: (B, H, N, M).
        mask: (B, H, M).
    """
    kept = mask > 0
    log_mask = mask.masked_fill(~kept, 1).log()  # no gradient to what is not positive
    logits = (scores + log_mask.unsqueeze(-2)).masked_fill(~kept.unsqueeze(-2), float("-inf"))
    nothing_kept = ~kept.any(-1)[..., None, None]  # softmax knows no empty sum
    return logits.masked_fill(nothing_kept, 0).softmax(dim=-1).masked_fill(nothing_kept, 0)


def channel(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, temperature: Tensor, out_proj: Tensor | None,
    normalize: bool,
) -> Tensor:  # fmt: skip
    """q, k, v (B, H, C, N); mask (B, H, 1 or C, N); temperature broadcastable to
    (B, H, 1, 1); out_proj (C_out, H * C)."""
    dtype = accumulate_dtype(q.dtype)
    q_, k_, v_ = q.to(dtype), k.to(dtype), v.to(dtype)
    if mask is not None:
        k_, v_ = k_ * mask, v_ * mask
    if normalize:
        q_, k_ = F.normalize(q_, dim=-1), F.normalize(k_, dim=-1)
    scores = temperature.to(dtype) * (q_ @ k_.mT)  # (B, H, C, C)
    out = scores.softmax(dim=-1) @ v_
    if out_proj is not None:
        out = out_proj.to(dtype) @ out.flatten(1, 2)  # (B, C_out, N)
    return out.to(v.dtype)


def token(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, temperature: Tensor, normalize: bool
) -> Tensor:
    """q (B, H, N, D); k (B, H, M, D); v (B, H, M, E); mask (B, H, M); temperature
    broadcastable to (B, H, 1, 1)."""
    dtype = accumulate_dtype(q.dtype)
    q_, k_, v_ = q.to(dtype), k.to(dtype), v.to(dtype)
    if normalize:
        q_, k_ = F.normalize(q_, dim=-1), F.normalize(k_, dim=-1)
    scores = temperature.to(dtype) * (q_ @ k_.mT)  # (B, H, N, M)
    probabilities = scores.softmax(dim=-1) if mask is None else weighted_softmax(scores, mask)
    return (probabilities @ v_).to(v.dtype)

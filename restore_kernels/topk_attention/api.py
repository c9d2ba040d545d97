"""The public function: semantic checks, backend choice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from restore_kernels import checks, coverage
from restore_kernels.backends import Backend, Call, choose
from restore_kernels.functions import call_temperature, eager, plain_calls
from restore_kernels.tensors import accumulate_dtype
from restore_kernels.topk_attention import autograd, reference

TopK = Sequence["int | None"]


def topk_attention(
    q: Tensor, k: Tensor, v: Tensor, topk: TopK, *,
    weights: Tensor | None = None, temperature: Tensor | float | None = None,
    normalize: bool = True, layout: str = "channel", out_proj: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Attention over the largest similarities of every row, in one or more branches.

    ``S = temperature * q̂ k̂ᵀ``; branch j keeps the ``topk[j]`` largest entries of every row of S
    (equal entries: lower index first) and applies softmax to them; the result is
    ``(Σ_j weights[j] softmax_j(S)) v``. The selection is a constant to autograd. With
    ``layout="channel"`` channels attend to channels (S is C x C, the products run over the N
    pixels), with ``layout="token"`` tokens attend to tokens (S is N x M, never stored).

    Source: top-k sparse attention of DRSformer (Chen et al., CVPR 2023) and the dual
    dense and sparse attention of DDSA (arXiv 2308.07781); L2-normalised channel attention is
    Restormer's (arXiv 2111.09881).

    Args:
        q: channel (B, H, C, N), token (B, H, N, D). float32, bfloat16, float16 or float64; any
            strides. Under autocast q, k, v and out_proj are cast as for a matrix product.
        k: channel (B, H, C, N), token (B, H, M, D); same dtype and device as q.
        v: channel (B, H, C, N), token (B, H, M, E); same dtype and device as q.
        topk: one entry per branch: how many entries of a row it keeps, ``None`` for all. A row has
            C entries in the channel layout and M in the token layout.
        weights: broadcastable to (B, H, J) for J branches; default 1/J each.
        temperature: a number or a tensor broadcastable to (B, H, 1, 1), which multiplies S. Default
            1 when normalised, otherwise the length of the products to the power -0.5.
        normalize: divide the rows of q and k by their L2 norm (clamped at 1e-12): along N in the
            channel layout, along D in the token layout.
        layout: ``"channel"`` or ``"token"``.
        out_proj: channel layout only: (C_out, H * C) weight of a 1x1 output projection that is
            folded into the product with v. Its bias, if any, is the caller's.
        backend: ``auto``, ``eager``, ``cpu``, ``triton`` or ``cuda``; or several of them, best first.

    Returns:
        Channel: (B, H, C, N), or (B, C_out, N) with ``out_proj``. Token: (B, H, N, E).

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: no backend asked for by name can run this call; the message says why.
    """
    if calls := plain_calls(backend):
        out = calls.topk_attention_call(q, k, v, topk, weights, temperature, normalize, layout, out_proj)
        if out is not None:
            return out
    q, k, v, out_proj = checks.autocast(q, k, v, out_proj)
    counts = _check(q, k, v, topk, weights, temperature, layout, out_proj)
    chosen = choose(_call(q, k, v, layout, len(counts)), backend)

    dtype = accumulate_dtype(q.dtype)
    batch, heads = q.shape[:2]
    if weights is None:
        weights = torch.full((1,), 1 / len(counts), dtype=dtype, device=q.device)
    if torch._C._are_functorch_transforms_active():
        weights = weights.expand(batch, heads, len(counts))
    temperature = call_temperature(temperature, q, normalize)

    if layout == "channel":
        channel_inputs = (q, k, v, temperature, weights, out_proj, counts, normalize)
        if chosen != "eager":
            return autograd.channel(*channel_inputs, chosen)
        return eager("topk_attention_channel", reference.channel, *channel_inputs)
    token_inputs = (q, k, v, temperature, weights, counts, normalize)
    if chosen != "eager":
        return autograd.token(*token_inputs, chosen)
    return eager("topk_attention_token", reference.token, *token_inputs)


def _check(q, k, v, topk, weights, temperature, layout, out_proj) -> list[int]:
    """Every semantic check of a call; returns topk with ``None`` replaced by the row length."""
    row = checks.attention_inputs(q, k, v, layout)
    counts = _check_topk(topk, row)
    if weights is not None:
        checks.broadcastable("weights", weights, q, (*q.shape[:2], len(counts)))
    checks.temperature(temperature, q)
    checks.out_proj(out_proj, q, layout)
    return counts


def _check_topk(topk: TopK, row: int) -> list[int]:
    if isinstance(topk, (str, bytes)) or not isinstance(topk, Sequence):
        raise TypeError(f"topk must be a sequence with one entry per branch; got {type(topk).__name__}")
    if not topk:
        raise ValueError("topk must name at least one branch; got an empty sequence")
    counts = []
    for j, kept in enumerate(topk):
        if isinstance(kept, bool) or not (kept is None or isinstance(kept, (int, torch.SymInt))):
            raise TypeError(f"topk[{j}] must be an int or None; got {kept!r}")
        if kept is not None and not 1 <= kept <= row:
            raise ValueError(f"topk[{j}] must be between 1 and {row}, the length of a row; got {kept}")
        counts.append(row if kept is None else kept)
    return counts


def _call(q: Tensor, k: Tensor, v: Tensor, layout: str, branches: int) -> Call:
    refusals = coverage.channels(q, branches) if layout == "channel" else coverage.tokens(q, v, branches)
    return Call("topk_attention", layout, (q, k, v), refusals)


def _plan(q, k, v, topk, *, weights=None, temperature=None, normalize=True, layout="channel",
          out_proj=None, backend="auto"):  # fmt: skip
    q, k, v, out_proj = checks.autocast(q, k, v, out_proj)
    counts = _check(q, k, v, topk, weights, temperature, layout, out_proj)
    return _call(q, k, v, layout, len(counts))


topk_attention.plan = _plan  # type: ignore[attr-defined]

"""The public function: semantic checks, backend choice."""

from __future__ import annotations

import torch
from torch import Tensor

from restore_kernels import checks, coverage
from restore_kernels.backends import Backend, Call, choose
from restore_kernels.functions import call_temperature, eager, plain_calls
from restore_kernels.masked_attention import autograd, reference
from restore_kernels.tensors import accumulate_dtype


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *,
    temperature: Tensor | float | None = None, normalize: bool = True, layout: str = "channel",
    out_proj: Tensor | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Attention from one source to another one under a mask, which says how much of it may pass.

    With ``layout="channel"`` channels attend to channels over the pixels that the mask lets through:
    k and v are gated, k' = mask * k and v' = mask * v, and the result is
    ``softmax(temperature * q̂ k̂'ᵀ) v'``. With ``layout="token"`` the mask weighs the keys:
    ``P_nm = mask_m exp(S_nm) / Σ_l mask_l exp(S_nl)`` with ``S = temperature * q̂ k̂ᵀ`` (N x M, never
    stored), and the result is ``P v``; where all keys are masked it is 0, with gradients of 0.

    Source: the multi-input attention module of association learning (arXiv 2311.05147); L2-normalised
    channel attention is Restormer's (arXiv 2111.09881).

    Args:
        q: channel (B, H, C, N), token (B, H, N, D). float32, bfloat16, float16 or float64; any
            strides. Under autocast q, k, v and out_proj are cast as for a matrix product.
        k: channel (B, H, C, N), token (B, H, M, D); same dtype and device as q.
        v: channel (B, H, C, N), token (B, H, M, E); same dtype and device as q.
        mask: broadcastable to (B, H, C, N) in the channel layout, to (B, H, M) in the token layout;
            bool or any of the floating dtypes, computed with in float32 (float64 if q is). Meant to
            be in [0, 1]; the values are not checked. Others do what the formulas say: above 1
            amplifies, below 0 changes the sign of a pixel (channel). A key with a mask of 0 or less
            is left out (token): its weight and all gradients to it, the mask's too, are exactly 0.
        temperature: a number or a tensor broadcastable to (B, H, 1, 1), which multiplies S. Default
            1 when normalised, otherwise the length of the products to the power -0.5.
        normalize: divide the rows of q and k (gated, in the channel layout) by their L2 norm (clamped
            at 1e-12): along N in the channel layout, along D in the token layout.
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
        out = calls.masked_attention_call(q, k, v, mask, temperature, normalize, layout, out_proj)
        if out is not None:
            return out
    q, k, v, out_proj = checks.autocast(q, k, v, out_proj)
    _check(q, k, v, mask, temperature, layout, out_proj)
    chosen = choose(_call(q, k, v, layout), backend)

    dtype = accumulate_dtype(q.dtype)
    batch, heads = q.shape[:2]
    temperature = call_temperature(temperature, q, normalize)
    if layout == "channel":
        if mask is not None:
            rows = mask.shape[-2] if mask.dim() > 1 else 1
            mask = mask.to(dtype).expand(batch, heads, rows, q.shape[3])
        channel_inputs = (q, k, v, mask, temperature, out_proj, normalize)
        if chosen != "eager":
            return autograd.channel(*channel_inputs, chosen)
        return eager("masked_attention_channel", reference.channel, *channel_inputs)
    if mask is not None:
        mask = mask.to(dtype).expand(batch, heads, k.shape[2])
    token_inputs = (q, k, v, mask, temperature, normalize)
    if chosen != "eager":
        return autograd.token(*token_inputs, chosen)
    return eager("masked_attention_token", reference.token, *token_inputs)


def _check(q, k, v, mask, temperature, layout, out_proj) -> None:
    """Every semantic check of a call."""
    keys = checks.attention_inputs(q, k, v, layout)
    if mask is not None:
        shape = tuple(q.shape) if layout == "channel" else (*q.shape[:2], keys)
        checks.broadcastable("mask", mask, q, shape, dtypes=(*checks.FLOATING, torch.bool))
    checks.temperature(temperature, q)
    checks.out_proj(out_proj, q, layout)


def _call(q: Tensor, k: Tensor, v: Tensor, layout: str) -> Call:
    refusals = coverage.channels(q) if layout == "channel" else coverage.tokens(q, v)
    return Call("masked_attention", layout, (q, k, v), refusals)


def _plan(q, k, v, mask=None, *, temperature=None, normalize=True, layout="channel", out_proj=None,
          backend="auto"):  # fmt: skip
    q, k, v, out_proj = checks.autocast(q, k, v, out_proj)
    _check(q, k, v, mask, temperature, layout, out_proj)
    return _call(q, k, v, layout)


masked_attention.plan = _plan  # type: ignore[attr-defined]

"""Operator schemas of masked multi-input attention and their fake (meta) kernels.

Common arguments, B batch, H heads:
    temperature (B, H): in the accumulation dtype (float64 for float64 inputs, else float32), any strides.
    mask: in the accumulation dtype, any strides (0 where it is broadcast); None for no mask.

Channel layout: q, k, v (B, H, C, N), mask (B, H, 1 or C, N). Saved for backward, both in the
accumulation dtype, as for top-k attention:
    similarity (B, H, C, C): the normalised products of q and the gated k, before the temperature.
    norms (B, H, 2, C): the norms of q's and the gated k's rows, clamped at 1e-12; ones without normalize.

Token layout: q (B, H, N, D), k (B, H, M, D), v (B, H, M, E), mask (B, H, M). Saved for backward, both
in the accumulation dtype:
    log_sum_exp (B, H, N): of the scores plus the logarithm of the mask; -inf where all keys are masked.
    wide_out (B, H, N, E): the output before it was rounded, (0,) where it was not rounded.
The backward pass takes it, or the output itself, as ``out``.
"""

from __future__ import annotations

from restore_kernels.registry import register
from restore_kernels.tensors import accumulate_dtype, empty_like_rows

_SCHEMAS = {
    "masked_attention_channel": (
        "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor temperature, Tensor? out_proj, "
        "bool normalize) -> (Tensor out, Tensor similarity, Tensor norms)"
    ),
    "masked_attention_channel_backward": (
        "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor temperature, "
        "Tensor? out_proj, Tensor similarity, Tensor norms, bool normalize) -> "
        "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_mask, Tensor grad_temperature, "
        "Tensor grad_out_proj)"
    ),
    "masked_attention_token": (
        "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor temperature, bool normalize) -> "
        "(Tensor out, Tensor log_sum_exp, Tensor wide_out)"
    ),
    "masked_attention_token_backward": (
        "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor temperature, Tensor out, "
        "Tensor log_sum_exp, bool normalize) -> "
        "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_mask, Tensor grad_temperature)"
    ),
}


def _channel_fake(q, k, v, mask, temperature, out_proj, normalize):
    batch, heads, channels, _ = q.shape
    dtype = accumulate_dtype(q.dtype)
    rows = (heads, channels) if out_proj is None else (out_proj.shape[0],)
    return (
        empty_like_rows(v, rows),
        q.new_empty((batch, heads, channels, channels), dtype=dtype),
        q.new_empty((batch, heads, 2, channels), dtype=dtype),
    )


def _channel_backward_fake(grad_out, q, k, v, mask, temperature, out_proj, similarity, norms, normalize):
    rows = tuple(q.shape[1:3])
    return (
        empty_like_rows(q, rows),
        empty_like_rows(k, rows),
        empty_like_rows(v, rows),
        similarity.new_empty((0,) if mask is None else mask.shape),
        similarity.new_empty(temperature.shape),
        similarity.new_empty((0,) if out_proj is None else out_proj.shape),
    )


def _token_fake(q, k, v, mask, temperature, normalize):
    shape = (*q.shape[:3], v.shape[3])
    dtype = accumulate_dtype(q.dtype)
    return (
        v.new_empty(shape),
        q.new_empty(q.shape[:3], dtype=dtype),
        q.new_empty((0,) if dtype == q.dtype else shape, dtype=dtype),
    )


def _token_backward_fake(grad_out, q, k, v, mask, temperature, out, log_sum_exp, normalize):
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        log_sum_exp.new_empty((0,) if mask is None else mask.shape),
        log_sum_exp.new_empty(temperature.shape),
    )


_FAKES = {
    "masked_attention_channel": _channel_fake,
    "masked_attention_channel_backward": _channel_backward_fake,
    "masked_attention_token": _token_fake,
    "masked_attention_token_backward": _token_backward_fake,
}

overload = register(_SCHEMAS, _FAKES, "restore_kernels.masked_attention.triton_launch")

"""Operator schemas of top-k attention and their fake (meta) kernels.

Common arguments, B batch, H heads, J branches:
    temperature (B, H) and weights (B, H, J): in the accumulation dtype (float64 for float64 inputs,
    else float32), any strides.
    topk: J counts, each between 1 and the length of a row; that length means dense. Symbolic, so that a
    graph compiled for dynamic shapes serves every row length.

Channel layout: q, k, v (B, H, C, N). Saved for backward, both in the accumulation dtype:
    similarity (B, H, C, C): the normalised products of q and k, before the temperature.
    norms (B, H, 2, C): the norms of q's and k's rows, clamped at 1e-12; ones without normalize.

Token layout: q (B, H, N, D), k (B, H, M, D), v (B, H, M, E). Saved for backward, for every row and
branch, so that backward repeats the selection by comparing instead of sorting:
    threshold (B, H, N, J): the smallest kept score; last_tie (B, H, N, J), int32: the last kept
    index among scores equal to it (a dense branch: any pair that keeps the whole row);
    log_sum_exp (B, H, N, J): of the kept scores. Scores compare bit for bit with those that the same
    backend computes again.
"""

from __future__ import annotations

import torch

from restore_kernels.registry import register
from restore_kernels.tensors import accumulate_dtype, empty_like_rows

_SCHEMAS = {
    "topk_attention_channel": (
        "(Tensor q, Tensor k, Tensor v, Tensor temperature, Tensor weights, Tensor? out_proj, "
        "SymInt[] topk, bool normalize) -> (Tensor out, Tensor similarity, Tensor norms)"
    ),
    "topk_attention_channel_backward": (
        "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor temperature, Tensor weights, "
        "Tensor? out_proj, Tensor similarity, Tensor norms, SymInt[] topk, bool normalize) -> "
        "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_temperature, "
        "Tensor grad_weights, Tensor grad_out_proj)"
    ),
    "topk_attention_token": (
        "(Tensor q, Tensor k, Tensor v, Tensor temperature, Tensor weights, SymInt[] topk, "
        "bool normalize) -> (Tensor out, Tensor threshold, Tensor last_tie, Tensor log_sum_exp)"
    ),
    "topk_attention_token_backward": (
        "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor temperature, Tensor weights, "
        "Tensor threshold, Tensor last_tie, Tensor log_sum_exp, SymInt[] topk, bool normalize) -> "
        "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_temperature, "
        "Tensor grad_weights)"
    ),
}


def _channel_fake(q, k, v, temperature, weights, out_proj, topk, normalize):
    batch, heads, channels, _ = q.shape
    dtype = accumulate_dtype(q.dtype)
    rows = (heads, channels) if out_proj is None else (out_proj.shape[0],)
    return (
        empty_like_rows(v, rows),
        q.new_empty((batch, heads, channels, channels), dtype=dtype),
        q.new_empty((batch, heads, 2, channels), dtype=dtype),
    )


def _channel_backward_fake(
    grad_out, q, k, v, temperature, weights, out_proj, similarity, norms, topk, normalize
):
    rows = tuple(q.shape[1:3])
    return (
        empty_like_rows(q, rows),
        empty_like_rows(k, rows),
        empty_like_rows(v, rows),
        similarity.new_empty(temperature.shape),
        similarity.new_empty(weights.shape),
        similarity.new_empty((0,) if out_proj is None else out_proj.shape),
    )


def _token_fake(q, k, v, temperature, weights, topk, normalize):
    batch, heads, queries, _ = q.shape
    rows = (batch, heads, queries, len(topk))
    dtype = accumulate_dtype(q.dtype)
    return (
        v.new_empty((batch, heads, queries, v.shape[3])),
        q.new_empty(rows, dtype=dtype),
        q.new_empty(rows, dtype=torch.int32),
        q.new_empty(rows, dtype=dtype),
    )


def _token_backward_fake(
    grad_out, q, k, v, temperature, weights, threshold, last_tie, log_sum_exp, topk, normalize
):
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        threshold.new_empty(temperature.shape),
        threshold.new_empty(weights.shape),
    )


_FAKES = {
    "topk_attention_channel": _channel_fake,
    "topk_attention_channel_backward": _channel_backward_fake,
    "topk_attention_token": _token_fake,
    "topk_attention_token_backward": _token_backward_fake,
}


overload = register(_SCHEMAS, _FAKES, "restore_kernels.topk_attention.triton_launch")

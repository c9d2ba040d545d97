"""Operator schemas of top-k attention and their fake (meta) kernels.

Each pass is one operator with one overload per backend, for example
``torch.ops.restore_kernels.topk_attention_channel.cpu``. The compiled libraries register theirs
when they are loaded; Triton's are Python and import their kernels on the first call.

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
from torch import Tensor

from restore_kernels import native
from restore_kernels.topk_attention.reference import accumulate_dtype

BACKENDS = ("cpu", "triton")

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


def empty_like_rows(x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Uninitialised (B, *rows, N) output that follows the memory format of x (B, H, C, N).

    Pixel-major (each pixel's channels adjacent, as channels_last images are) where x is, so that
    a network in channels_last stays there; otherwise contiguous.
    """
    batch, pixels = x.shape[0], x.shape[-1]
    if x.stride(-2) == 1 and x.stride(-1) > 1:
        return x.new_empty((batch, pixels, *rows)).movedim(1, -1)
    return x.new_empty((batch, *rows, pixels))


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


def _triton(name: str):
    """The Triton implementation of an operator, imported by its first call."""

    def call(*args):
        from restore_kernels.topk_attention import triton_launch

        return getattr(triton_launch, name)(*args)

    return call


# The libraries stay registered for as long as this object lives.
_library = torch.library.Library("restore_kernels", "FRAGMENT")

for _name, _schema in _SCHEMAS.items():
    for _backend in BACKENDS:
        _overload = f"{_name}.{_backend}"
        _library.define(
            _overload + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
        )
        torch.library.register_fake(f"restore_kernels::{_overload}", _FAKES[_name], lib=_library)
    _library.impl(f"{_name}.triton", _triton(_name), "CompositeExplicitAutograd")


# {(name, backend): operator}. Looking an overload up by name takes longer than calling it.
_OVERLOADS = {
    (name, backend): getattr(getattr(torch.ops.restore_kernels, name), backend)
    for name in _SCHEMAS
    for backend in BACKENDS
}


def overload(name: str, backend: str) -> torch._ops.OpOverload:
    """The operator ``restore_kernels::name`` of a backend, its library loaded."""
    if backend == "cpu":
        native.why_no_cpu_library()
    return _OVERLOADS[name, backend]

"""Operator schemas of pyramid attention and their fake (meta) kernels.

query (B, Cq, H, W), keys[i] (B, Cq, h_i, w_i), values[i] (B, Cv, h_i, w_i), any strides.

Saved for backward:
    log_sum_exp (B, H, W): of a query's scores over all positions of all levels, in the accumulation
        dtype (float64 for float64 inputs, else float32).
    index (B, H, W): hard only; the position of the largest score, int64, counted through the levels
        one after another, each row by row.
"""

from __future__ import annotations

import torch

from restore_kernels.registry import register
from restore_kernels.tensors import accumulate_dtype, empty_image

_SCHEMAS = {
    "pyramid_attention": (
        "(Tensor query, Tensor[] keys, Tensor[] values, int patch_size, float softmax_scale, float eps, "
        "float out_scale) -> (Tensor out, Tensor log_sum_exp)"
    ),
    "pyramid_attention_backward": (
        "(Tensor grad_out, Tensor query, Tensor[] keys, Tensor[] values, Tensor log_sum_exp, "
        "int patch_size, float softmax_scale, float eps, float out_scale) -> "
        "(Tensor grad_query, Tensor[] grad_keys, Tensor[] grad_values)"
    ),
    "pyramid_attention_hard": (
        "(Tensor query, Tensor[] keys, Tensor[] values, int patch_size, float softmax_scale, float eps, "
        "float out_scale) -> (Tensor out, Tensor index)"
    ),
    "pyramid_attention_hard_backward": (
        "(Tensor grad_out, Tensor[] values, Tensor index, int patch_size, float out_scale) -> "
        "(Tensor[] grad_values)"
    ),
}


def _like(x):
    return empty_image(x, x.shape[1], x.shape[2:])


def _forward_fake(query, keys, values, patch_size, softmax_scale, eps, out_scale):
    batch, _, height, width = query.shape
    statistics = query.new_empty((batch, height, width), dtype=accumulate_dtype(query.dtype))
    return empty_image(query, values[0].shape[1], (height, width)), statistics


def _backward_fake(
    grad_out, query, keys, values, log_sum_exp, patch_size, softmax_scale, eps, out_scale
):  # fmt: skip
    return _like(query), [_like(key) for key in keys], [_like(value) for value in values]


def _hard_fake(query, keys, values, patch_size, softmax_scale, eps, out_scale):
    out, statistics = _forward_fake(query, keys, values, patch_size, softmax_scale, eps, out_scale)
    return out, statistics.new_empty(statistics.shape, dtype=torch.int64)


def _hard_backward_fake(grad_out, values, index, patch_size, out_scale):
    return [_like(value) for value in values]


_FAKES = {
    "pyramid_attention": _forward_fake,
    "pyramid_attention_backward": _backward_fake,
    "pyramid_attention_hard": _hard_fake,
    "pyramid_attention_hard_backward": _hard_backward_fake,
}

overload = register(_SCHEMAS, _FAKES, "restore_kernels.pyramid_attention.triton_launch")

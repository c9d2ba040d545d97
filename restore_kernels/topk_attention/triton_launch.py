"""Launches the Triton kernels of top-k attention: outputs, scratch, grids and block sizes.

One function per operator of ``ops.py``, with the arguments and results of its schema. Scratch is
small: the channel layout allocates per head and split of the pixels a C x C matrix, the token layout
a few numbers per row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from restore_kernels.topk_attention import triton_token_kernels as token_kernels
from restore_kernels.topk_attention.triton_token_selection import token_norms_kernel, token_select_kernel
from restore_kernels.triton_common.channel_launch import channel_backward, channel_forward
from restore_kernels.triton_common.launching import (
    NO_SPILLS,
    UNBOUNDED,
    block,
    computed_operand,
    launch,
    on_device,
    triton_dtype,
)
from restore_kernels.triton_common.token_launch import TokenTiles

NORM_ROWS = 128  # of a program of token_norms_kernel: one a thread


def topk_attention_channel(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, weights: Tensor, out_proj: Tensor | None,
    topk: Sequence[int], normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return channel_forward(q, k, v, None, temperature, weights, out_proj, topk, normalize)


def topk_attention_channel_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, weights: Tensor,
    out_proj: Tensor | None, similarity: Tensor, norms: Tensor, topk: Sequence[int], normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_q, grad_k, grad_v, _, grad_temperature, grad_weights, grad_out_proj = channel_backward(
        grad_out, q, k, v, None, temperature, weights, out_proj, similarity, norms, topk, normalize
    )
    return grad_q, grad_k, grad_v, grad_temperature, grad_weights, grad_out_proj


def topk_attention_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    weights: Tensor,
    topk: Sequence[int],
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, queries, depth = q.shape
    keys, width = v.shape[2:]
    branches = len(topk)
    out = v.new_empty((batch, heads, queries, width))
    threshold = torch.empty((batch, heads, queries, branches), dtype=torch.float32, device=q.device)
    last_tie = torch.empty_like(threshold, dtype=torch.int32)
    log_sum_exp = torch.empty_like(threshold)
    selection = (threshold, last_tie, log_sum_exp)
    tiles = TokenTiles.of(q, k, v, normalize, selects=True)
    block_e = block(width, UNBOUNDED)
    sizes = (heads, queries, keys, depth, width)
    norms = _norms(q, k, normalize)
    inputs = (q, k, v, *norms, temperature, weights, *selection, out)
    strides = tuple(x.stride() for x in (q, k, v, out, temperature, weights))
    with on_device(q):
        if keys <= tiles.constants["BLOCK_M"]:
            launch(
                token_kernels.token_window_kernel, tiles.row_tiles, *inputs, *strides, tuple(topk), *sizes,
                BRANCHES=branches, BLOCK_E=block_e, **tiles.constants, **NO_SPILLS,
            )  # fmt: skip
            return out, *selection
        for branch, kept in enumerate(topk):
            launch(
                token_select_kernel, tiles.row_tiles, q, k, *norms, temperature, *selection,
                q.stride(), k.stride(), temperature.stride(), kept, branch, branches, *sizes[:4],
                **tiles.constants, **NO_SPILLS,
            )  # fmt: skip
        launch(
            token_kernels.token_output_kernel, tiles.row_tiles, *inputs, *strides, *sizes,
            BRANCHES=branches, BLOCK_E=block_e, **tiles.constants, **NO_SPILLS,
        )  # fmt: skip
    return out, *selection


def _norms(q: Tensor, k: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Of the rows of both, (B, H, N) and (B, H, M); nothing without ``normalize``."""

    def of(x: Tensor) -> Tensor:
        norms = torch.empty(x.shape[:3] if normalize else (0,), dtype=torch.float32, device=x.device)
        if not normalize:
            return norms
        batch, heads, rows, depth = x.shape
        programs = batch * heads * triton.cdiv(rows, NORM_ROWS)
        launch(token_norms_kernel, programs, x, norms, x.stride(), heads, rows, depth, BLOCK_R=NORM_ROWS)
        return norms

    with on_device(q):
        return of(q), of(k)


def topk_attention_token_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, weights: Tensor,
    threshold: Tensor, last_tie: Tensor, log_sum_exp: Tensor, topk: Sequence[int], normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, heads, queries, depth = q.shape
    keys, width = v.shape[2:]
    branches = len(topk)
    grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    row_sums = torch.empty_like(log_sum_exp)
    temperature_terms = log_sum_exp.new_empty((batch, heads, queries))
    tiles = TokenTiles.of(q, k, v, normalize, selects=True)
    dtype, mode = computed_operand(q.dtype, depth)
    constants = tiles.constants | {"BRANCHES": branches, "BLOCK_E": block(width, UNBOUNDED)}
    gradient = {"GRADIENT": triton_dtype(dtype), "GRADIENT_PRECISION": mode}
    sizes = (heads, queries, keys, depth, width)
    saved = (threshold, last_tie, log_sum_exp, row_sums)
    strides = tuple(x.stride() for x in (grad_out, q, k, v))
    small_strides = (temperature.stride(), weights.stride())
    norms = _norms(q, k, normalize)
    with on_device(q):
        launch(
            token_kernels.token_row_sums_kernel, tiles.row_tiles,
            grad_out, q, k, v, *norms, temperature, *saved, *strides, temperature.stride(), *sizes,
            BLOCK_J=triton.next_power_of_2(branches), **constants,
        )  # fmt: skip
        launch(
            token_kernels.token_grad_q_kernel, tiles.row_tiles,
            grad_out, q, k, v, *norms, temperature, weights, *saved, grad_q, temperature_terms,
            *strides, grad_q.stride(), *small_strides, *sizes, **constants, **gradient, **NO_SPILLS,
        )  # fmt: skip
        launch(
            token_kernels.token_grad_kv_kernel, tiles.key_tiles,
            grad_out, q, k, v, *norms, temperature, weights, *saved, grad_k, grad_v,
            *strides, grad_k.stride(), grad_v.stride(), *small_strides, *sizes,
            **constants, **gradient, **NO_SPILLS,
        )  # fmt: skip
    return grad_q, grad_k, grad_v, temperature_terms.sum(2), row_sums.sum(2)

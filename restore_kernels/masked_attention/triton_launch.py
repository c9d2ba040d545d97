"""Launches the Triton kernels of masked attention: outputs, scratch, grids and block sizes.

One function per operator of ``ops.py``, with the arguments and results of its schema. Scratch of the
token layout: a few numbers per row, and partial sums where rows alone would not occupy the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from restore_kernels.masked_attention import triton_token_backward_kernels as backward_kernels
from restore_kernels.masked_attention import triton_token_kernels as token_kernels
from restore_kernels.triton_common.channel_launch import channel_backward, channel_forward
from restore_kernels.triton_common.launching import (
    NO_SPILLS,
    SHORT,
    UNBOUNDED,
    block,
    computed_operand,
    launch,
    on_device,
    split,
    triton_dtype,
)
from restore_kernels.triton_common.token_launch import TokenTiles, takes_64_rows


def _one_branch(q: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Weights (B, H, 1) and kept entries of attention to all channels."""
    one = torch.ones((1, 1, 1), dtype=torch.float32, device=q.device)
    return one.expand(*q.shape[:2], 1), (q.shape[2],)


def masked_attention_channel(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, temperature: Tensor, out_proj: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    weights, topk = _one_branch(q)
    return channel_forward(q, k, v, mask, temperature, weights, out_proj, topk, normalize)


def masked_attention_channel_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, temperature: Tensor,
    out_proj: Tensor | None, similarity: Tensor, norms: Tensor, normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    weights, topk = _one_branch(q)
    grad_q, grad_k, grad_v, grad_mask, grad_temperature, _, grad_out_proj = channel_backward(
        grad_out, q, k, v, mask, temperature, weights, out_proj, similarity, norms, topk, normalize
    )
    return grad_q, grad_k, grad_v, grad_mask, grad_temperature, grad_out_proj


def masked_attention_token(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, temperature: Tensor, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, heads, queries, depth), (keys, width) = q.shape, v.shape[2:]
    small: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    is_rounded = q.dtype != torch.float32
    out = v.new_empty((batch, heads, queries, width))
    wide_out = torch.empty(out.shape if is_rounded else (0,), **small)
    log_sum_exp = torch.empty((batch, heads, queries), **small)
    tiles = TokenTiles.of(q, k, v, normalize)
    block_e = block(width, UNBOUNDED)
    tiles_per_split, splits = _split(keys, tiles.constants["BLOCK_M"], tiles.row_tiles, q)
    is_split = splits > 1
    partial = torch.empty((batch, heads, splits, queries, width) if is_split else (0,), **small)
    statistics = torch.empty((batch, heads, splits, 2, queries) if is_split else (0,), **small)
    bias = None if mask is None else mask.log()
    with on_device(q):
        launch(
            token_kernels.masked_output_kernel, tiles.row_tiles * splits,
            q, k, v, bias, temperature, out, wide_out, log_sum_exp, partial, statistics,
            q.stride(), k.stride(), v.stride(), _strides(bias), temperature.stride(), out.stride(),
            heads, queries, keys, depth, width, splits, tiles_per_split,
            MASKED=mask is not None, SPLIT=is_split, ROUNDED=is_rounded, BLOCK_E=block_e,
            **tiles.constants, **NO_SPILLS,
        )  # fmt: skip
        if is_split:
            launch(
                token_kernels.masked_combine_kernel, batch * heads * queries,
                partial, statistics, out, wide_out, log_sum_exp, out.stride(), heads, queries, width, splits,
                ROUNDED=is_rounded, BLOCK_S=_block_splits(block_e), BLOCK_E=block_e,
            )  # fmt: skip
    return out, log_sum_exp, wide_out


def masked_attention_token_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, temperature: Tensor,
    out: Tensor, log_sum_exp: Tensor, normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, heads, queries, depth), (keys, width) = q.shape, v.shape[2:]
    grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    tiles = TokenTiles.of(q, k, v, normalize)
    block_n, block_m = tiles.constants["BLOCK_N"], tiles.constants["BLOCK_M"]
    key_tiles_per_split, key_splits = _split(keys, block_m, tiles.row_tiles, q)
    # Beside both gradients of 64 keys, tiles of 64 queries do not fit into registers.
    block_queries, block_keys = min(block_n, 32), min(block_m, 64 if takes_64_rows(q) else 32)
    key_tiles = batch * heads * triton.cdiv(keys, block_keys)
    query_tiles_per_split, query_splits = _split(queries, block_queries, key_tiles, q)
    dtype, mode = computed_operand(q.dtype, depth)
    constants = tiles.constants | {"MASKED": mask is not None, "BLOCK_E": block(width, UNBOUNDED)}
    gradient = {"GRADIENT": triton_dtype(dtype), "GRADIENT_PRECISION": mode}
    bias = None if mask is None else mask.log()
    inputs = (grad_out, q, k, v, bias, temperature, log_sum_exp)
    strides = (*(x.stride() for x in (grad_out, q, k, v)), _strides(bias), temperature.stride())
    sizes = (heads, queries, keys, depth, width)

    def parts(splits: int, x: Tensor) -> Tensor:
        """Where a gradient of x goes that is a sum over splits."""
        return log_sum_exp.new_empty((*x.shape[:2], splits, *x.shape[2:]) if splits > 1 else (0,))

    partial_q, partial_k, partial_v = parts(key_splits, q), parts(query_splits, k), parts(query_splits, v)
    temperature_terms = log_sum_exp.new_empty((batch, heads, key_splits, queries))
    mask_terms = log_sum_exp.new_empty((0,) if mask is None else (batch, heads, query_splits, keys))
    with on_device(q):
        row_sums = _row_sums(inputs, strides, sizes, out, tiles, constants, key_tiles_per_split, key_splits)
        launch(
            backward_kernels.masked_grad_q_kernel, tiles.row_tiles * key_splits,
            *inputs, row_sums, grad_q, partial_q, temperature_terms, *strides, grad_q.stride(), *sizes,
            key_splits, key_tiles_per_split,
            SPLIT=key_splits > 1, ONE_TILE=keys <= block_m, **constants, **gradient, **NO_SPILLS,
        )  # fmt: skip
        launch(
            backward_kernels.masked_grad_kv_kernel, key_tiles * query_splits,
            *inputs, row_sums, mask, grad_k, grad_v, partial_k, partial_v, mask_terms,
            *strides, _strides(mask), grad_k.stride(), grad_v.stride(), *sizes,
            query_splits, query_tiles_per_split, SPLIT=query_splits > 1,
            **constants | gradient | {"BLOCK_N": block_queries, "BLOCK_M": block_keys},
        )  # fmt: skip
        if key_splits > 1:
            _sum_gradient(partial_q, q, grad_q, normalize)
        if query_splits > 1:
            _sum_gradient(partial_k, k, grad_k, normalize)
            _sum_gradient(partial_v, v, grad_v, False)
    if mask is not None:
        mask_terms = mask_terms.sum(2) if query_splits > 1 else mask_terms.squeeze(2)
    return grad_q, grad_k, grad_v, mask_terms, temperature_terms.sum((2, 3))


def _row_sums(
    inputs: tuple[Any, ...], strides: tuple[Any, ...], sizes: tuple[int, ...], out: Tensor,
    tiles: TokenTiles, constants: dict[str, Any], tiles_per_split: int, splits: int,
) -> Tensor:  # fmt: skip
    """r of every row, (B, H, N); left to masked_grad_q_kernel where the keys are one tile."""
    grad_out, q, *_, log_sum_exp = inputs
    heads, queries, keys, _, width = sizes
    row_sums = torch.empty_like(log_sum_exp)
    if keys <= constants["BLOCK_M"]:
        return row_sums
    if q.dtype == torch.float32:
        launch(
            backward_kernels.masked_output_sums_kernel, tiles.row_tiles, grad_out, out, row_sums,
            grad_out.stride(), out.stride(), heads, queries, width,
            BLOCK_N=constants["BLOCK_N"], BLOCK_E=constants["BLOCK_E"],
        )  # fmt: skip
        return row_sums
    terms = log_sum_exp.new_empty((*q.shape[:2], splits, queries)) if splits > 1 else row_sums
    launch(
        backward_kernels.masked_row_sums_kernel, tiles.row_tiles * splits, *inputs, terms, *strides, *sizes,
        splits, tiles_per_split, **constants,
    )  # fmt: skip
    return terms.sum(2) if splits > 1 else terms


def _sum_gradient(partial: Tensor, x: Tensor, grad: Tensor, normalize: bool) -> None:
    """grad of x from the parts of its splits (B, H, splits, rows, length)."""
    batch, heads, rows, length = x.shape
    block_l = block(length, UNBOUNDED)
    launch(
        backward_kernels.sum_gradient_kernel, batch * heads * rows,
        partial, x, grad, x.stride(), grad.stride(), heads, rows, length, partial.shape[2],
        NORMALIZE=normalize, PRECISE=length < SHORT, BLOCK_S=_block_splits(block_l), BLOCK_L=block_l,
    )  # fmt: skip


def _split(rows: int, block_rows: int, programs: int, x: Tensor) -> tuple[int, int]:
    """Tiles per split and splits of a sum over so many rows."""
    return split(triton.cdiv(rows, block_rows), programs, x.device)


def _block_splits(length: int) -> int:
    """Parts that a program adds up at a time: 4096 numbers are 32 per lane of four warps."""
    return max(1, min(64, 4096 // length))


def _strides(mask: Tensor | None) -> tuple[int, ...] | None:
    return None if mask is None else mask.stride()

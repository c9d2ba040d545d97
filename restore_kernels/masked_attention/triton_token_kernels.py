"""Masked token attention in Triton: streams over score tiles that are never stored. Here the forward.

Shapes: q (B, H, N, D), k (B, H, M, D), v (B, H, M, E), mask (B, H, M);
S = temperature * q̂ k̂ᵀ + log mask (N, M), P = softmax(S). L = log_sum_exp (B, H, N).

masked_output_kernel    out = P v with an online softmax: reads q once, k and v once per tile of
                        queries; 2 (D + E) operations and one exponential per score.
masked_row_sums_kernel  r = rowsum(P dP): 2 (D + E) operations per score.
masked_grad_q_kernel    dq and the terms of dtemperature, from q, k, v, do, L and r: 2 (2 D + E).
masked_grad_kv_kernel   dk, dv and dmask, one pass over the queries per tile of keys: 4 (D + E).

A program owns a tile of rows (the last kernel: of keys) of one head, and one split of what it sums
over. There is one split where the tiles alone occupy the GPU. Otherwise (few queries x many keys, or
the reverse) programs write partial sums, which masked_combine_kernel (the output, whose parts have
different references) and sum_gradient_kernel (dq, dk, dv) add up in order.

With 16 queries and 65,536 keys of D = E = 48 in bfloat16, k and v are 12.6 MB, 2.9 us at 4.3 TB/s on
an H200, and bound the output: 0.2 GFLOP take no time beside it. With many queries the exponentials
bound it, as for the dense branch of top-k attention.

The launcher takes the logarithm of the mask; here every lane would, for all columns of its tile. A key
of mask 0 is left out exactly: its k and v are not even loaded, and a tile of none but such keys is
skipped. A row without keys has L = -inf, which makes its P zero in the backward pass.

dP = do vᵀ, dS = P (dP - r), dq = D_q (T dS k̂ - c q̂) where c = rowsum(T dS A), zero where the norm is
clamped; dk is its mirror image, dmask_m = sum_n dS_nm / mask_m. With float32 r is rowsum(do out). With
the other dtypes P is rounded to multiply v, and dP - r would show it: there r sums the unrounded
products. Where the keys are one tile, masked_grad_q_kernel finds r itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from restore_kernels.triton_common.tiles import batch_and_head, load_tile
from restore_kernels.triton_common.token_tiles import (
    LARGEST,
    load_keys,
    load_queries,
    score_tile,
    store_rows,
    weighted_values,
)


@triton.jit
def at_head(ptr, stride, batch, head):
    """Where a tensor's (batch, head) begins."""
    return ptr + batch * stride[0] + head * stride[1]


@triton.jit
def load_bias(bias_ptr, bias_stride, offs_m, keys, MASKED: tl.constexpr):
    """Which keys count, and the logarithm of the mask there, 0 elsewhere. -> [BLOCK_M], [BLOCK_M]"""
    is_key = offs_m < keys
    bias = tl.zeros([offs_m.shape[0]], dtype=tl.float32)
    if MASKED:
        pointers = bias_ptr + offs_m.to(tl.int64) * bias_stride[2]
        bias = tl.load(pointers, mask=is_key, other=float("-inf"))
        is_key = bias > float("-inf")  # not so for 0 and, NaN being the logarithm, for what is below
        bias = tl.where(is_key, bias, 0.0)
    return is_key, bias


@triton.jit
def load_values(v_ptr, v_stride, offs_m, is_key, offs_e, width):
    """Rows of v, zero where is_key is not. -> [BLOCK_M, BLOCK_E]"""
    return load_tile(v_ptr, offs_m.to(tl.int64) * v_stride[2], is_key, offs_e, width, v_stride[3])


@triton.jit
def masked_scores(
    q, row_scale, k, k_scale, is_key, bias, MASKED: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``score_tile`` plus the logarithm of the mask."""
    scores, products = score_tile(q, row_scale, k, k_scale, is_key, NORMALIZE, PRECISE, PRECISION)
    if MASKED:
        scores += bias[None, :]
    return scores, products


@triton.jit
def masked_output_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, temperature_ptr, out_ptr, wide_out_ptr, log_sum_exp_ptr,
    partial_ptr, statistics_ptr, q_stride, k_stride, v_stride, bias_stride, temperature_stride, out_stride,
    heads, queries, keys, depth, width, splits, tiles_per_split,
    MASKED: tl.constexpr, SPLIT: tl.constexpr, ROUNDED: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N rows of one head and one split of the keys.

    With SPLIT it writes its sums to partial (B, H, splits, N, E) and the largest score and the sum of
    exponentials to statistics (B, H, splits, 2, N); otherwise the results.
    """
    tiles = tl.cdiv(queries, BLOCK_N)
    split = tl.program_id(0) // tiles % splits
    batch, head, matrix = batch_and_head(tl.program_id(0) // (tiles * splits), heads)
    offs_n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d, offs_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q_ptr = at_head(q_ptr, q_stride, batch, head)
    k_ptr = at_head(k_ptr, k_stride, batch, head)
    v_ptr = at_head(v_ptr, v_stride, batch, head)
    if MASKED:
        bias_ptr = at_head(bias_ptr, bias_stride, batch, head)
    temperature = tl.load(at_head(temperature_ptr, temperature_stride, batch, head))
    q, row_scale, q_scale, norms = load_queries(
        q_ptr, q_stride, temperature, offs_n, queries, offs_d, depth, NORMALIZE, PRECISE
    )

    out = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.float32)
    # From a finite number on, so that a row without keys so far has exponentials of 0, not of NaN.
    largest = tl.full([BLOCK_N], -LARGEST, tl.float32)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    first = split * tiles_per_split * BLOCK_M
    for start in range(first, tl.minimum(first + tiles_per_split * BLOCK_M, keys), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        is_key, bias = load_bias(bias_ptr, bias_stride, offs_m, keys, MASKED)
        has_key = True
        if MASKED:
            has_key = tl.max(is_key.to(tl.int32), axis=0) > 0
        if has_key:
            k, k_scale, k_norms = load_keys(
                k_ptr, k_stride, offs_m, is_key, offs_d, depth, NORMALIZE, PRECISE
            )
            scores, products = masked_scores(
                q, row_scale, k, k_scale, is_key, bias, MASKED, NORMALIZE, PRECISE, PRECISION
            )
            larger = tl.maximum(largest, tl.max(scores, axis=1))
            exponentials = tl.exp(scores - larger[:, None])
            shrink = tl.exp(largest - larger)
            v = load_values(v_ptr, v_stride, offs_m, is_key, offs_e, width)
            out = weighted_values(exponentials, v, out * shrink[:, None], PRECISE, PRECISION)
            total = total * shrink + tl.sum(exponentials, axis=1)
            largest = larger

    in_rows = offs_n < queries
    if SPLIT:
        part = matrix * splits + split
        partial_ptr += part * queries * width
        statistics_ptr += part * 2 * queries + offs_n
        store_rows(partial_ptr, (0, 0, width, 1), out, offs_n, queries, offs_e, width)
        tl.store(statistics_ptr, largest, mask=in_rows)
        tl.store(statistics_ptr + queries, total, mask=in_rows)
    else:
        divisor = tl.where(total == 0, 1.0, total)  # a row without keys has out = 0
        out = out / divisor[:, None]
        out_ptr = at_head(out_ptr, out_stride, batch, head)
        store_rows(out_ptr, out_stride, out, offs_n, queries, offs_e, width)
        if ROUNDED:
            wide_out_ptr += matrix * queries * width
            store_rows(wide_out_ptr, (0, 0, width, 1), out, offs_n, queries, offs_e, width)
        log_sum_exp = tl.where(total == 0, float("-inf"), largest + tl.log(divisor))
        tl.store(log_sum_exp_ptr + matrix * queries + offs_n, log_sum_exp, mask=in_rows)


@triton.jit
def masked_combine_kernel(
    partial_ptr, statistics_ptr, out_ptr, wide_out_ptr, log_sum_exp_ptr, out_stride,
    heads, queries, width, splits,
    ROUNDED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A program owns one row of one head: the output from its parts, BLOCK_S at a time."""
    row = tl.program_id(0) % queries
    batch, head, matrix = batch_and_head(tl.program_id(0) // queries, heads)
    offs_e = tl.arange(0, BLOCK_E)
    in_width = offs_e < width
    partial_ptr += (matrix * splits * queries + row) * width
    statistics_ptr += matrix * splits * 2 * queries + row

    maxima = tl.full([BLOCK_S], -LARGEST, tl.float32)
    for start in range(0, splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        pointers = statistics_ptr + offs_s.to(tl.int64) * 2 * queries
        maxima = tl.maximum(maxima, tl.load(pointers, mask=offs_s < splits, other=-LARGEST))
    largest = tl.max(maxima, axis=0)
    totals = tl.zeros([BLOCK_S], dtype=tl.float32)
    sums = tl.zeros([BLOCK_S, BLOCK_E], dtype=tl.float32)
    for start in range(0, splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        in_splits = offs_s < splits
        pointers = statistics_ptr + offs_s.to(tl.int64) * 2 * queries
        factors = tl.exp(tl.load(pointers, mask=in_splits, other=-LARGEST) - largest)
        totals += factors * tl.load(pointers + queries, mask=in_splits, other=0.0)
        rows = offs_s.to(tl.int64) * queries * width
        sums += factors[:, None] * load_tile(partial_ptr, rows, in_splits, offs_e, width, 1)

    total = tl.sum(totals, axis=0)
    divisor = tl.where(total == 0, 1.0, total)  # a row without keys has sums of 0
    out = tl.sum(sums, axis=0) / divisor
    row_ptr = at_head(out_ptr, out_stride, batch, head) + row.to(tl.int64) * out_stride[2]
    pointers = row_ptr + offs_e.to(tl.int64) * out_stride[3]
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=in_width)
    if ROUNDED:
        tl.store(wide_out_ptr + (matrix * queries + row) * width + offs_e, out, mask=in_width)
    log_sum_exp = tl.where(total == 0, float("-inf"), largest + tl.log(divisor))
    tl.store(log_sum_exp_ptr + matrix * queries + row, log_sum_exp)

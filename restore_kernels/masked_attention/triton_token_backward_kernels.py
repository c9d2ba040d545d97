"""Masked token attention in Triton, backward; ``triton_token_kernels`` has the formulas and the schedule."""

from __future__ import annotations

import triton
import triton.language as tl

from restore_kernels.masked_attention.triton_token_kernels import (
    at_head,
    load_bias,
    load_values,
    masked_scores,
)
from restore_kernels.triton_common.tiles import batch_and_head, load_tile, to_operand
from restore_kernels.triton_common.token_tiles import (
    load_keys,
    load_queries,
    load_rows,
    normalized,
    store_rows,
    through_norm,
    weighted_values,
)


@triton.jit
def load_reference(log_sum_exp_ptr, rows, mask):
    """What to subtract from the scores of these rows: infinity makes exponentials zero. -> [BLOCK_N]"""
    reference = tl.load(log_sum_exp_ptr + rows, mask=mask, other=float("inf"))
    return tl.where(reference == float("-inf"), float("inf"), reference)


@triton.jit
def masked_output_sums_kernel(
    grad_out_ptr, out_ptr, row_sums_ptr, grad_out_stride, out_stride, heads, queries, width,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N rows of one head: r = rowsum(do out)."""
    tiles = tl.cdiv(queries, BLOCK_N)
    batch, head, matrix = batch_and_head(tl.program_id(0) // tiles, heads)
    offs_n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_e = tl.arange(0, BLOCK_E)
    grad_out_ptr = at_head(grad_out_ptr, grad_out_stride, batch, head)
    out_ptr = at_head(out_ptr, out_stride, batch, head)
    grad_out = load_rows(grad_out_ptr, grad_out_stride, offs_n, queries, offs_e, width)
    out = load_rows(out_ptr, out_stride, offs_n, queries, offs_e, width)
    row_sums = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(row_sums_ptr + matrix * queries + offs_n, row_sums, mask=offs_n < queries)


@triton.jit
def masked_row_sums_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, temperature_ptr, log_sum_exp_ptr, row_sums_ptr,
    grad_out_stride, q_stride, k_stride, v_stride, bias_stride, temperature_stride,
    heads, queries, keys, depth, width, splits, tiles_per_split,
    MASKED: tl.constexpr, NORMALIZE: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N rows of one head and one split of the keys: r = rowsum(P dP).

    row_sums (B, H, splits, N).
    """
    tiles = tl.cdiv(queries, BLOCK_N)
    split = tl.program_id(0) // tiles % splits
    batch, head, matrix = batch_and_head(tl.program_id(0) // (tiles * splits), heads)
    offs_n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d, offs_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    grad_out_ptr = at_head(grad_out_ptr, grad_out_stride, batch, head)
    q_ptr = at_head(q_ptr, q_stride, batch, head)
    k_ptr = at_head(k_ptr, k_stride, batch, head)
    v_ptr = at_head(v_ptr, v_stride, batch, head)
    if MASKED:
        bias_ptr = at_head(bias_ptr, bias_stride, batch, head)
    temperature = tl.load(at_head(temperature_ptr, temperature_stride, batch, head))
    q, row_scale, q_scale, norms = load_queries(
        q_ptr, q_stride, temperature, offs_n, queries, offs_d, depth, NORMALIZE, PRECISE
    )
    grad_out = load_rows(grad_out_ptr, grad_out_stride, offs_n, queries, offs_e, width)  # [BLOCK_N, BLOCK_E]
    reference = load_reference(log_sum_exp_ptr, matrix * queries + offs_n, offs_n < queries)

    row_sums = tl.zeros([BLOCK_N], dtype=tl.float32)
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
            v = load_values(v_ptr, v_stride, offs_m, is_key, offs_e, width)
            grad_p = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
            row_sums += tl.sum(tl.exp(scores - reference[:, None]) * grad_p, axis=1)
    row_sums_ptr += (matrix * splits + split) * queries
    tl.store(row_sums_ptr + offs_n, row_sums, mask=offs_n < queries)


@triton.jit
def masked_grad_q_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, temperature_ptr, log_sum_exp_ptr, row_sums_ptr,
    grad_q_ptr, partial_ptr, temperature_terms_ptr,
    grad_out_stride, q_stride, k_stride, v_stride, bias_stride, temperature_stride, grad_q_stride,
    heads, queries, keys, depth, width, splits, tiles_per_split,
    MASKED: tl.constexpr, SPLIT: tl.constexpr, ONE_TILE: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr,
    GRADIENT: tl.constexpr, GRADIENT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N rows of one head and one split of the keys: dq, the terms of dtemperature.

    With SPLIT it writes its share of the gradient of q̂ to partial (B, H, splits, N, D), otherwise dq.
    With ONE_TILE of keys it also finds the row sums and writes them.
    temperature_terms (B, H, splits, N).
    """
    tiles = tl.cdiv(queries, BLOCK_N)
    split = tl.program_id(0) // tiles % splits
    batch, head, matrix = batch_and_head(tl.program_id(0) // (tiles * splits), heads)
    offs_n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d, offs_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    grad_out_ptr = at_head(grad_out_ptr, grad_out_stride, batch, head)
    q_ptr = at_head(q_ptr, q_stride, batch, head)
    k_ptr = at_head(k_ptr, k_stride, batch, head)
    v_ptr = at_head(v_ptr, v_stride, batch, head)
    if MASKED:
        bias_ptr = at_head(bias_ptr, bias_stride, batch, head)
    temperature = tl.load(at_head(temperature_ptr, temperature_stride, batch, head))
    q, row_scale, q_scale, norms = load_queries(
        q_ptr, q_stride, temperature, offs_n, queries, offs_d, depth, NORMALIZE, PRECISE
    )
    grad_out = load_rows(grad_out_ptr, grad_out_stride, offs_n, queries, offs_e, width)  # [BLOCK_N, BLOCK_E]
    rows, in_rows = matrix * queries + offs_n, offs_n < queries
    reference = load_reference(log_sum_exp_ptr, rows, in_rows)
    if not ONE_TILE:
        row_sums = tl.load(row_sums_ptr + rows, mask=in_rows, other=0.0)

    grad_q = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    similarity_terms = tl.zeros([BLOCK_N], dtype=tl.float32)  # of dS A before q_scale
    first = split * tiles_per_split * BLOCK_M
    for start in range(first, tl.minimum(first + tiles_per_split * BLOCK_M, keys), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        is_key, bias = load_bias(bias_ptr, bias_stride, offs_m, keys, MASKED)
        has_key = True
        if MASKED and not ONE_TILE:
            has_key = tl.max(is_key.to(tl.int32), axis=0) > 0
        if has_key:
            k, k_scale, k_norms = load_keys(
                k_ptr, k_stride, offs_m, is_key, offs_d, depth, NORMALIZE, PRECISE
            )
            scores, products = masked_scores(
                q, row_scale, k, k_scale, is_key, bias, MASKED, NORMALIZE, PRECISE, PRECISION
            )
            v = load_values(v_ptr, v_stride, offs_m, is_key, offs_e, width)
            grad_p = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)  # dP [BLOCK_N, BLOCK_M]
            probabilities = tl.exp(scores - reference[:, None])
            if ONE_TILE:
                row_sums = tl.sum(probabilities * grad_p, axis=1)
                tl.store(row_sums_ptr + rows, row_sums, mask=in_rows)
            grad_scores = probabilities * (grad_p - row_sums[:, None])
            similarity_terms += tl.sum(grad_scores * products, axis=1)
            coefficients = to_operand(grad_scores * k_scale[None, :], GRADIENT, GRADIENT_PRECISION)
            grad_q = tl.dot(coefficients, k.to(GRADIENT), grad_q, input_precision=GRADIENT_PRECISION)

    part = matrix * splits + split
    tl.store(temperature_terms_ptr + part * queries + offs_n, similarity_terms * q_scale, mask=in_rows)
    grad_q *= temperature
    if SPLIT:
        partial_ptr += part * queries * depth
        store_rows(partial_ptr, (0, 0, depth, 1), grad_q, offs_n, queries, offs_d, depth)
    else:
        grad_q = through_norm(grad_q, q, q_scale, norms, NORMALIZE)
        grad_q_ptr = at_head(grad_q_ptr, grad_q_stride, batch, head)
        store_rows(grad_q_ptr, grad_q_stride, grad_q, offs_n, queries, offs_d, depth)


@triton.jit
def masked_grad_kv_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, temperature_ptr, log_sum_exp_ptr, row_sums_ptr,
    mask_ptr, grad_k_ptr, grad_v_ptr, partial_k_ptr, partial_v_ptr, grad_mask_ptr,
    grad_out_stride, q_stride, k_stride, v_stride, bias_stride, temperature_stride,
    mask_stride, grad_k_stride, grad_v_stride, heads, queries, keys, depth, width, splits, tiles_per_split,
    MASKED: tl.constexpr, SPLIT: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr,
    GRADIENT: tl.constexpr, GRADIENT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M keys of one head and one split of the queries: dk, dv and dmask.

    With SPLIT it writes its shares of the gradients of k̂ and v to partial_k (B, H, splits, M, D) and
    partial_v (B, H, splits, M, E). grad_mask (B, H, splits, M) in any case.
    """
    tiles = tl.cdiv(keys, BLOCK_M)
    split = tl.program_id(0) // tiles % splits
    batch, head, matrix = batch_and_head(tl.program_id(0) // (tiles * splits), heads)
    offs_m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d, offs_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    grad_out_ptr = at_head(grad_out_ptr, grad_out_stride, batch, head)
    q_ptr = at_head(q_ptr, q_stride, batch, head)
    k_ptr = at_head(k_ptr, k_stride, batch, head)
    v_ptr = at_head(v_ptr, v_stride, batch, head)
    if MASKED:
        bias_ptr = at_head(bias_ptr, bias_stride, batch, head)
    temperature = tl.load(at_head(temperature_ptr, temperature_stride, batch, head))
    is_key, bias = load_bias(bias_ptr, bias_stride, offs_m, keys, MASKED)
    k, k_scale, norms = load_keys(k_ptr, k_stride, offs_m, is_key, offs_d, depth, NORMALIZE, PRECISE)
    v = load_values(v_ptr, v_stride, offs_m, is_key, offs_e, width)  # [BLOCK_M, BLOCK_E]

    grad_k = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    grad_v = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    grad_bias = tl.zeros([BLOCK_M], dtype=tl.float32)  # of the logarithm of the mask
    first = split * tiles_per_split * BLOCK_N
    last = tl.minimum(first + tiles_per_split * BLOCK_N, queries)
    if MASKED:
        last = tl.where(tl.max(is_key.to(tl.int32), axis=0) > 0, last, first)
    for start in range(first, last, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        rows, in_rows = matrix * queries + offs_n, offs_n < queries
        q, row_scale, q_scale, q_norms = load_queries(
            q_ptr, q_stride, temperature, offs_n, queries, offs_d, depth, NORMALIZE, PRECISE
        )
        scores, products = masked_scores(
            q, row_scale, k, k_scale, is_key, bias, MASKED, NORMALIZE, PRECISE, PRECISION
        )
        reference = load_reference(log_sum_exp_ptr, rows, in_rows)
        probabilities = tl.exp(scores - reference[:, None])  # P [BLOCK_N, BLOCK_M]
        grad_out = load_rows(grad_out_ptr, grad_out_stride, offs_n, queries, offs_e, width)
        grad_v = weighted_values(tl.trans(probabilities), grad_out, grad_v, PRECISE, PRECISION)
        grad_p = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)  # dP [BLOCK_N, BLOCK_M]
        row_sums = tl.load(row_sums_ptr + rows, mask=in_rows, other=0.0)
        grad_scores = probabilities * (grad_p - row_sums[:, None])
        if MASKED:
            grad_bias += tl.sum(grad_scores, axis=0)
        coefficients = to_operand(grad_scores * row_scale[:, None], GRADIENT, GRADIENT_PRECISION)
        grad_k = tl.dot(tl.trans(coefficients), q.to(GRADIENT), grad_k, input_precision=GRADIENT_PRECISION)

    part = matrix * splits + split
    if MASKED:
        mask_ptr = at_head(mask_ptr, mask_stride, batch, head) + offs_m.to(tl.int64) * mask_stride[2]
        grad_mask = grad_bias / tl.load(mask_ptr, mask=is_key, other=1.0)
        tl.store(grad_mask_ptr + part * keys + offs_m, grad_mask, mask=offs_m < keys)
    if SPLIT:
        partial_k_ptr += part * keys * depth
        partial_v_ptr += part * keys * width
        store_rows(partial_k_ptr, (0, 0, depth, 1), grad_k, offs_m, keys, offs_d, depth)
        store_rows(partial_v_ptr, (0, 0, width, 1), grad_v, offs_m, keys, offs_e, width)
    else:
        grad_k = through_norm(grad_k, k, k_scale, norms, NORMALIZE)
        grad_k_ptr = at_head(grad_k_ptr, grad_k_stride, batch, head)
        grad_v_ptr = at_head(grad_v_ptr, grad_v_stride, batch, head)
        store_rows(grad_k_ptr, grad_k_stride, grad_k, offs_m, keys, offs_d, depth)
        store_rows(grad_v_ptr, grad_v_stride, grad_v, offs_m, keys, offs_e, width)


@triton.jit
def sum_gradient_kernel(
    partial_ptr, x_ptr, grad_ptr, x_stride, grad_stride, heads, rows, length, splits,
    NORMALIZE: tl.constexpr, PRECISE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """A program owns one row of x, which is q, k or v: its gradient from the splits' parts of it."""
    offs_row = tl.program_id(0) % rows + tl.arange(0, 1)
    batch, head, matrix = batch_and_head(tl.program_id(0) // rows, heads)
    offs_l = tl.arange(0, BLOCK_L)
    partial_ptr += (matrix * splits * rows + tl.program_id(0) % rows) * length
    sums = tl.zeros([BLOCK_S, BLOCK_L], dtype=tl.float32)
    for start in range(0, splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        parts = offs_s.to(tl.int64) * rows * length
        sums += load_tile(partial_ptr, parts, offs_s < splits, offs_l, length, 1)
    grad = tl.sum(sums, axis=0)[None, :]  # [1, BLOCK_L]
    if NORMALIZE:
        x = load_rows(at_head(x_ptr, x_stride, batch, head), x_stride, offs_row, rows, offs_l, length)
        x, scale, norms = normalized(x, NORMALIZE, PRECISE)
        grad = through_norm(grad, x, scale, norms, NORMALIZE)
    grad_ptr = at_head(grad_ptr, grad_stride, batch, head)
    store_rows(grad_ptr, grad_stride, grad, offs_row, rows, offs_l, length)

"""Token attention in Triton: streams over score tiles that are never stored.

Shapes: q (B, H, N, D), k (B, H, M, D), v (B, H, M, E), J branches; S = temperature * q̂ k̂ᵀ (N, M).
A score takes 2 D operations to compute and 4 bytes to store or load; tiles are recomputed instead.

token_norms_kernel     norms of the rows of q and of k, forward and backward: reads each once
                       (``triton_token_selection``).
token_select_kernel    per branch: threshold, last_tie and log_sum_exp of every row (there, too).
token_output_kernel    out = P v for known selections: reads q once, k and v once per tile of queries,
                       writes out; 2 (D + E) operations per score.
token_window_kernel    both at once, all branches, for rows that fit one tile (windows): reads q, k, v
                       once, writes out once.
token_row_sums_kernel  per row the sums r_j = rowsum(p_j dP): 2 (D + E) operations per score.
token_grad_q_kernel    dq, and per row the terms of dtemperature: 2 (2 D + E) operations per score.
token_grad_kv_kernel   dk and dv: one pass over the queries per tile of keys; 4 (D + E) per score.

At D = E = 32 and in bfloat16 the output's 128 operations per score are 123 cycles of an H200's
multiprocessor per 64 x 64 tile; its exponentials are 256 and bound it. In windows of M = N = 64 the
output moves 4 x 64 x 32 elements per head, 3.8 ns at 4.3 TB/s, and computes some 3000 cycles (9 steps
of the search in registers), 13 ns over 132 multiprocessors: computation bounds it.

Backward repeats the selection by comparing scores with the threshold, so the scores must be the same
to the bit: every kernel computes a tile by the same function, of the same shape, on as many warps, and
takes the norms from memory (``token_norms_kernel``).

P mixes the branches with one exponential per score: w_j p_j = exp(s - r) w_j exp(r - log_sum_exp_j)
where r is the largest of the branches' log_sum_exp; the second exponent is at most log M.
With dP = do vᵀ: dS = sum_j w_j p_j (dP - r_j), dq = D_q (T dS k̂ - c q̂) where c = rowsum(T dS A), zero
where the norm is clamped; dk is its mirror image. Sums over rows go through memory, in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from restore_kernels.topk_attention.triton_token_selection import (
    count_reaching,
    find_tie,
    is_open,
    keys_over_norms,
    load_norms,
    narrow,
    queries_over_norms,
    range_of,
    scores_of_keys,
    selected_range,
    smallest_kept,
    sum_of_kept,
    to_key,
)
from restore_kernels.triton_common.tiles import batch_and_head, to_operand
from restore_kernels.triton_common.token_tiles import (
    load_rows,
    scale_of,
    score_tile,
    store_rows,
    through_norm,
    weighted_values,
)


@triton.jit
def largest_log_sum_exp(log_sum_exp_ptr, offsets, mask, BRANCHES: tl.constexpr):
    """Of the branches, per row: the common reference of their exponentials."""
    largest = tl.load(log_sum_exp_ptr + offsets, mask=mask, other=0.0)
    for branch in tl.static_range(1, BRANCHES):
        largest = tl.maximum(largest, tl.load(log_sum_exp_ptr + offsets + branch, mask=mask, other=0.0))
    return largest


@triton.jit
def is_kept(scores, threshold_ptr, last_tie_ptr, rows, mask, offs_m):
    """Repeats the selection of the branch whose rows these are."""
    threshold = tl.load(threshold_ptr + rows, mask=mask, other=float("inf"))[:, None]
    last_tie = tl.load(last_tie_ptr + rows, mask=mask, other=-1)[:, None]
    return (scores > threshold) | ((scores == threshold) & (offs_m[None, :] <= last_tie))


@triton.jit
def factor_of(weight_ptr, log_sum_exp_ptr, rows, mask, reference):
    """w_j exp(r - log_sum_exp_j) of the branch whose weight and rows these are. -> [BLOCK_N]"""
    log_sum_exp = tl.load(log_sum_exp_ptr + rows, mask=mask, other=0.0)
    return tl.load(weight_ptr) * tl.exp(reference - log_sum_exp)


@triton.jit
def token_output_kernel(
    q_ptr, k_ptr, v_ptr, q_norms_ptr, k_norms_ptr, temperature_ptr, weights_ptr,
    threshold_ptr, last_tie_ptr, log_sum_exp_ptr, out_ptr,
    q_stride, k_stride, v_stride, out_stride, temperature_stride, weights_stride,
    heads, queries, keys, depth, width,
    BRANCHES: tl.constexpr, NORMALIZE: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N rows of one head, all branches."""
    tiles = tl.cdiv(queries, BLOCK_N)
    batch, head, matrix = batch_and_head(tl.program_id(0) // tiles, heads)
    offs_n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d, offs_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q_ptr += batch * q_stride[0] + head * q_stride[1]
    k_ptr += batch * k_stride[0] + head * k_stride[1]
    q_norms_ptr += matrix * queries
    k_norms_ptr += matrix * keys
    v_ptr += batch * v_stride[0] + head * v_stride[1]
    out_ptr += batch * out_stride[0] + head * out_stride[1]
    weights_ptr += batch * weights_stride[0] + head * weights_stride[1]
    temperature = tl.load(temperature_ptr + batch * temperature_stride[0] + head * temperature_stride[1])
    q, row_scale = queries_over_norms(
        q_ptr, q_stride, q_norms_ptr, temperature, offs_n, queries, offs_d, depth, NORMALIZE, PRECISE
    )
    mask = offs_n < queries
    rows = (matrix * queries + offs_n) * BRANCHES
    reference = largest_log_sum_exp(log_sum_exp_ptr, rows, mask, BRANCHES)  # [BLOCK_N]

    out = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.float32)
    for start in range(0, keys, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        scores = scores_of_keys(
            q, row_scale, k_ptr, k_stride, k_norms_ptr, offs_m, keys, offs_d, depth,
            NORMALIZE, PRECISE, PRECISION,
        )  # fmt: skip
        factors = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for branch in tl.static_range(BRANCHES):
            kept = is_kept(scores, threshold_ptr, last_tie_ptr, rows + branch, mask, offs_m)
            weight_ptr = weights_ptr + branch * weights_stride[2]
            factor = factor_of(weight_ptr, log_sum_exp_ptr, rows + branch, mask, reference)
            factors += tl.where(kept, factor[:, None], 0.0)
        mixture = tl.exp(scores - reference[:, None]) * factors  # P
        v = load_rows(v_ptr, v_stride, offs_m, keys, offs_e, width)  # [BLOCK_M, BLOCK_E]
        out = weighted_values(mixture, v, out, PRECISE, PRECISION)
    store_rows(out_ptr, out_stride, out, offs_n, queries, offs_e, width)


@triton.jit
def token_window_kernel(
    q_ptr, k_ptr, v_ptr, q_norms_ptr, k_norms_ptr, temperature_ptr, weights_ptr,
    threshold_ptr, last_tie_ptr, log_sum_exp_ptr, out_ptr,
    q_stride, k_stride, v_stride, out_stride, temperature_stride, weights_stride, topk,
    heads, queries, keys, depth, width,
    BRANCHES: tl.constexpr, NORMALIZE: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N rows of one head, all branches, and holds their scores in registers."""
    tiles = tl.cdiv(queries, BLOCK_N)
    batch, head, matrix = batch_and_head(tl.program_id(0) // tiles, heads)
    offs_n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d, offs_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q_ptr += batch * q_stride[0] + head * q_stride[1]
    k_ptr += batch * k_stride[0] + head * k_stride[1]
    q_norms_ptr += matrix * queries
    k_norms_ptr += matrix * keys
    v_ptr += batch * v_stride[0] + head * v_stride[1]
    out_ptr += batch * out_stride[0] + head * out_stride[1]
    weights_ptr += batch * weights_stride[0] + head * weights_stride[1]
    temperature = tl.load(temperature_ptr + batch * temperature_stride[0] + head * temperature_stride[1])
    q, row_scale = queries_over_norms(
        q_ptr, q_stride, q_norms_ptr, temperature, offs_n, queries, offs_d, depth, NORMALIZE, PRECISE
    )
    scores = scores_of_keys(
        q, row_scale, k_ptr, k_stride, k_norms_ptr, offs_m, keys, offs_d, depth,
        NORMALIZE, PRECISE, PRECISION,
    )  # fmt: skip
    row_min, row_max = range_of(scores, offs_m, keys)
    exponentials = tl.exp(scores - row_max[:, None])

    rows = (matrix * queries + offs_n) * BRANCHES
    factors = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for branch in tl.static_range(BRANCHES):
        kept = topk[branch]
        low, high = to_key(row_min), to_key(row_max) + 1
        at_low = tl.zeros([BLOCK_N], tl.int32) + keys
        at_high = tl.zeros([BLOCK_N], tl.int32)
        while is_open(low, high, at_low, kept):
            counts = count_reaching(scores, low, high)
            low, high, at_low, at_high = narrow(
                low, high, at_low, at_high, counts & 1023, (counts >> 10) & 1023, counts >> 20, kept
            )
        low_score, bound, straddled, total = selected_range(low, high, at_low, at_high, row_max, kept)
        total += sum_of_kept(scores, bound, row_max)
        threshold, last_tie = smallest_kept(scores, low_score, offs_m)
        if tl.max(straddled.to(tl.int32), axis=0) > 0:
            tie, seen = find_tie(scores, low_score, offs_m, tl.zeros([BLOCK_N], tl.int32), kept - at_high)
            last_tie = tl.where(straddled, tie, last_tie)
        factor = tl.load(weights_ptr + branch * weights_stride[2]) / total
        tied = (scores == threshold[:, None]) & (offs_m[None, :] <= last_tie[:, None])
        factors += tl.where((scores > threshold[:, None]) | tied, factor[:, None], 0.0)
        tl.store(threshold_ptr + rows + branch, threshold, mask=offs_n < queries)
        tl.store(last_tie_ptr + rows + branch, last_tie, mask=offs_n < queries)
        tl.store(log_sum_exp_ptr + rows + branch, row_max + tl.log(total), mask=offs_n < queries)

    v = load_rows(v_ptr, v_stride, offs_m, keys, offs_e, width)  # [BLOCK_M, BLOCK_E]
    out = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.float32)
    out = weighted_values(exponentials * factors, v, out, PRECISE, PRECISION)
    store_rows(out_ptr, out_stride, out, offs_n, queries, offs_e, width)


@triton.jit
def token_row_sums_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, q_norms_ptr, k_norms_ptr, temperature_ptr,
    threshold_ptr, last_tie_ptr, log_sum_exp_ptr, row_sums_ptr,
    grad_out_stride, q_stride, k_stride, v_stride, temperature_stride, heads, queries, keys, depth, width,
    BRANCHES: tl.constexpr, NORMALIZE: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N rows of one head: their r_j = rowsum(p_j dP) of every branch."""
    tiles = tl.cdiv(queries, BLOCK_N)
    batch, head, matrix = batch_and_head(tl.program_id(0) // tiles, heads)
    offs_n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d, offs_e, offs_j = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_J)
    grad_out_ptr += batch * grad_out_stride[0] + head * grad_out_stride[1]
    q_ptr += batch * q_stride[0] + head * q_stride[1]
    k_ptr += batch * k_stride[0] + head * k_stride[1]
    q_norms_ptr += matrix * queries
    k_norms_ptr += matrix * keys
    v_ptr += batch * v_stride[0] + head * v_stride[1]
    temperature = tl.load(temperature_ptr + batch * temperature_stride[0] + head * temperature_stride[1])
    q, row_scale = queries_over_norms(
        q_ptr, q_stride, q_norms_ptr, temperature, offs_n, queries, offs_d, depth, NORMALIZE, PRECISE
    )
    grad_out = load_rows(grad_out_ptr, grad_out_stride, offs_n, queries, offs_e, width)  # [BLOCK_N, BLOCK_E]
    mask = offs_n < queries
    rows = (matrix * queries + offs_n) * BRANCHES

    row_sums = tl.zeros([BLOCK_N, BLOCK_J], dtype=tl.float32)
    for start in range(0, keys, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        scores = scores_of_keys(
            q, row_scale, k_ptr, k_stride, k_norms_ptr, offs_m, keys, offs_d, depth,
            NORMALIZE, PRECISE, PRECISION,
        )  # fmt: skip
        v = load_rows(v_ptr, v_stride, offs_m, keys, offs_e, width)  # [BLOCK_M, BLOCK_E]
        grad_mixture = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)  # dP [BLOCK_N, BLOCK_M]
        for branch in tl.static_range(BRANCHES):
            kept = is_kept(scores, threshold_ptr, last_tie_ptr, rows + branch, mask, offs_m)
            log_sum_exp = tl.load(log_sum_exp_ptr + rows + branch, mask=mask, other=0.0)
            terms = tl.where(kept, tl.exp(scores - log_sum_exp[:, None]) * grad_mixture, 0.0)
            row_sums += tl.where(offs_j[None, :] == branch, tl.sum(terms, axis=1)[:, None], 0.0)
    sums_mask = mask[:, None] & (offs_j[None, :] < BRANCHES)
    tl.store(row_sums_ptr + rows[:, None] + offs_j[None, :], row_sums, mask=sums_mask)


@triton.jit
def token_grad_q_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, q_norms_ptr, k_norms_ptr, temperature_ptr, weights_ptr,
    threshold_ptr, last_tie_ptr, log_sum_exp_ptr, row_sums_ptr, grad_q_ptr, temperature_terms_ptr,
    grad_out_stride, q_stride, k_stride, v_stride, grad_q_stride, temperature_stride, weights_stride,
    heads, queries, keys, depth, width,
    BRANCHES: tl.constexpr, NORMALIZE: tl.constexpr, PRECISE: tl.constexpr,
    PRECISION: tl.constexpr, GRADIENT: tl.constexpr, GRADIENT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N rows of one head: dq and the terms of dtemperature."""
    tiles = tl.cdiv(queries, BLOCK_N)
    batch, head, matrix = batch_and_head(tl.program_id(0) // tiles, heads)
    offs_n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d, offs_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    grad_out_ptr += batch * grad_out_stride[0] + head * grad_out_stride[1]
    q_ptr += batch * q_stride[0] + head * q_stride[1]
    k_ptr += batch * k_stride[0] + head * k_stride[1]
    q_norms_ptr += matrix * queries
    k_norms_ptr += matrix * keys
    v_ptr += batch * v_stride[0] + head * v_stride[1]
    grad_q_ptr += batch * grad_q_stride[0] + head * grad_q_stride[1]
    weights_ptr += batch * weights_stride[0] + head * weights_stride[1]
    temperature = tl.load(temperature_ptr + batch * temperature_stride[0] + head * temperature_stride[1])
    q, row_scale = queries_over_norms(
        q_ptr, q_stride, q_norms_ptr, temperature, offs_n, queries, offs_d, depth, NORMALIZE, PRECISE
    )
    grad_out = load_rows(grad_out_ptr, grad_out_stride, offs_n, queries, offs_e, width)  # [BLOCK_N, BLOCK_E]
    mask = offs_n < queries
    rows = (matrix * queries + offs_n) * BRANCHES
    reference = largest_log_sum_exp(log_sum_exp_ptr, rows, mask, BRANCHES)  # [BLOCK_N]

    grad_q = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    similarity_terms = tl.zeros([BLOCK_N], dtype=tl.float32)  # of dS A before q_scale
    for start in range(0, keys, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        is_key = offs_m < keys
        k, k_scale = keys_over_norms(
            k_ptr, k_stride, k_norms_ptr, offs_m, keys, offs_d, depth, NORMALIZE, PRECISE
        )
        scores, products = score_tile(q, row_scale, k, k_scale, is_key, NORMALIZE, PRECISE, PRECISION)
        v = load_rows(v_ptr, v_stride, offs_m, keys, offs_e, width)  # [BLOCK_M, BLOCK_E]
        grad_mixture = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)  # dP [BLOCK_N, BLOCK_M]
        grad_scores = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for branch in tl.static_range(BRANCHES):
            kept = is_kept(scores, threshold_ptr, last_tie_ptr, rows + branch, mask, offs_m)
            weight_ptr = weights_ptr + branch * weights_stride[2]
            factor = factor_of(weight_ptr, log_sum_exp_ptr, rows + branch, mask, reference)
            row_sum = tl.load(row_sums_ptr + rows + branch, mask=mask, other=0.0)
            grad_scores += tl.where(kept, factor[:, None] * (grad_mixture - row_sum[:, None]), 0.0)
        grad_scores *= tl.exp(scores - reference[:, None])
        similarity_terms += tl.sum(grad_scores * products, axis=1)
        coefficients = to_operand(grad_scores * k_scale[None, :], GRADIENT, GRADIENT_PRECISION)
        grad_q = tl.dot(coefficients, k.to(GRADIENT), grad_q, input_precision=GRADIENT_PRECISION)

    norms = load_norms(q_norms_ptr, offs_n, queries, NORMALIZE)  # again: they were not held all along
    q_scale = scale_of(norms, PRECISE)
    grad_q = through_norm(grad_q * temperature, q, q_scale, norms, NORMALIZE)
    store_rows(grad_q_ptr, grad_q_stride, grad_q, offs_n, queries, offs_d, depth)
    tl.store(temperature_terms_ptr + matrix * queries + offs_n, similarity_terms * q_scale, mask=mask)


@triton.jit
def token_grad_kv_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, q_norms_ptr, k_norms_ptr, temperature_ptr, weights_ptr,
    threshold_ptr, last_tie_ptr, log_sum_exp_ptr, row_sums_ptr, grad_k_ptr, grad_v_ptr,
    grad_out_stride, q_stride, k_stride, v_stride, grad_k_stride, grad_v_stride,
    temperature_stride, weights_stride, heads, queries, keys, depth, width,
    BRANCHES: tl.constexpr, NORMALIZE: tl.constexpr, PRECISE: tl.constexpr,
    PRECISION: tl.constexpr, GRADIENT: tl.constexpr, GRADIENT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M keys of one head: their dk and dv."""
    tiles = tl.cdiv(keys, BLOCK_M)
    batch, head, matrix = batch_and_head(tl.program_id(0) // tiles, heads)
    offs_m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d, offs_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    grad_out_ptr += batch * grad_out_stride[0] + head * grad_out_stride[1]
    q_ptr += batch * q_stride[0] + head * q_stride[1]
    k_ptr += batch * k_stride[0] + head * k_stride[1]
    q_norms_ptr += matrix * queries
    k_norms_ptr += matrix * keys
    v_ptr += batch * v_stride[0] + head * v_stride[1]
    grad_k_ptr += batch * grad_k_stride[0] + head * grad_k_stride[1]
    grad_v_ptr += batch * grad_v_stride[0] + head * grad_v_stride[1]
    weights_ptr += batch * weights_stride[0] + head * weights_stride[1]
    temperature = tl.load(temperature_ptr + batch * temperature_stride[0] + head * temperature_stride[1])
    is_key = offs_m < keys
    k, k_scale = keys_over_norms(
        k_ptr, k_stride, k_norms_ptr, offs_m, keys, offs_d, depth, NORMALIZE, PRECISE
    )
    v = load_rows(v_ptr, v_stride, offs_m, keys, offs_e, width)  # [BLOCK_M, BLOCK_E]

    grad_k = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    grad_v = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    for start in range(0, queries, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = offs_n < queries
        rows = (matrix * queries + offs_n) * BRANCHES
        q, row_scale = queries_over_norms(
            q_ptr, q_stride, q_norms_ptr, temperature, offs_n, queries, offs_d, depth, NORMALIZE, PRECISE
        )
        scores, products = score_tile(q, row_scale, k, k_scale, is_key, NORMALIZE, PRECISE, PRECISION)
        reference = largest_log_sum_exp(log_sum_exp_ptr, rows, mask, BRANCHES)  # [BLOCK_N]
        # Which branches keep a score, as bits: fewer registers than the terms of dS until dP is there.
        members = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.int32)
        factors = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for branch in tl.static_range(BRANCHES):
            kept = is_kept(scores, threshold_ptr, last_tie_ptr, rows + branch, mask, offs_m)
            weight_ptr = weights_ptr + branch * weights_stride[2]
            factor = factor_of(weight_ptr, log_sum_exp_ptr, rows + branch, mask, reference)
            factors += tl.where(kept, factor[:, None], 0.0)
            members |= kept.to(tl.int32) << branch
        exponentials = tl.exp(scores - reference[:, None])
        grad_out = load_rows(grad_out_ptr, grad_out_stride, offs_n, queries, offs_e, width)
        transposed = tl.trans(exponentials * factors)  # Pᵀ [BLOCK_M, BLOCK_N]
        grad_v = weighted_values(transposed, grad_out, grad_v, PRECISE, PRECISION)
        grad_mixture = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)  # dP [BLOCK_N, BLOCK_M]
        grad_scores = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for branch in tl.static_range(BRANCHES):
            weight_ptr = weights_ptr + branch * weights_stride[2]
            factor = factor_of(weight_ptr, log_sum_exp_ptr, rows + branch, mask, reference)
            row_sum = tl.load(row_sums_ptr + rows + branch, mask=mask, other=0.0)
            kept = ((members >> branch) & 1) != 0
            grad_scores += tl.where(kept, factor[:, None] * (grad_mixture - row_sum[:, None]), 0.0)
        grad_scores *= exponentials
        coefficients = to_operand(grad_scores * row_scale[:, None], GRADIENT, GRADIENT_PRECISION)
        grad_k = tl.dot(tl.trans(coefficients), q.to(GRADIENT), grad_k, input_precision=GRADIENT_PRECISION)

    norms = load_norms(k_norms_ptr, offs_m, keys, NORMALIZE)
    grad_k = through_norm(grad_k, k, k_scale, norms, NORMALIZE)
    store_rows(grad_k_ptr, grad_k_stride, grad_k, offs_m, keys, offs_d, depth)
    store_rows(grad_v_ptr, grad_v_stride, grad_v, offs_m, keys, offs_e, width)

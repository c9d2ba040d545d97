"""Channel attention in Triton, what lies between the streams of ``channel_kernels``: C x C matrices.

All of it is bound by latency: a row is C numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from restore_kernels.triton_common.tiles import (
    NORM_CLAMP,
    batch_and_head,
    load_tile,
    store_tile,
    to_operand,
)


@triton.jit
def sum_splits(ptr, columns, mask, splits, split_stride, BLOCK_SPLITS: tl.constexpr):
    """The sum over the splits of the values at ptr + columns. -> [len(columns)]"""
    total = tl.zeros([BLOCK_SPLITS, columns.shape[0]], dtype=tl.float32)
    for start in range(0, splits, BLOCK_SPLITS):
        index = start + tl.arange(0, BLOCK_SPLITS)
        pointers = ptr + index[:, None].to(tl.int64) * split_stride + columns[None, :]
        total += tl.load(pointers, mask=(index[:, None] < splits) & mask[None, :], other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def rank_of(scores, columns):
    """How many entries of a row come before each one: larger ones, and equal ones to its left."""
    larger = scores[:, None] > scores[None, :]
    tied = (scores[:, None] == scores[None, :]) & (columns[:, None] < columns[None, :])
    return tl.sum((larger | tied).to(tl.int32), axis=0)


@triton.jit
def softmax_of_kept(scores, rank, kept):
    """Softmax over the entries of rank less than kept, zero elsewhere."""
    masked = tl.where(rank < kept, scores, float("-inf"))
    exponentials = tl.exp(masked - tl.max(masked, axis=0))
    return exponentials / tl.sum(exponentials, axis=0)


@triton.jit
def channel_mixture_kernel(
    product_ptr, squares_ptr, temperature_ptr, weights_ptr, similarity_ptr, norms_ptr, mixture_ptr,
    temperature_stride, weights_stride, topk, heads, channels, splits,
    BRANCHES: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """A program owns one row of one head: similarity, norms, and the row of P.

    Reads the row's partial products and the squares of all splits; ranks the row by counting, once
    for all branches. Latency-bound: the row is C numbers.
    """
    row = tl.program_id(0) % channels
    batch, head, matrix = batch_and_head(tl.program_id(0) // channels, heads)
    columns = tl.arange(0, BLOCK_C)
    mask = columns < channels

    product_ptr += (matrix * splits * channels + row) * channels
    similarity = sum_splits(product_ptr, columns, mask, splits, channels * channels, BLOCK_SPLITS)
    norms_ptr += matrix * 2 * channels
    if NORMALIZE:
        squares_ptr += matrix * splits * 2 * channels
        squares_q = sum_splits(squares_ptr, columns, mask, splits, 2 * channels, BLOCK_SPLITS)
        squares_k = sum_splits(squares_ptr + channels, columns, mask, splits, 2 * channels, BLOCK_SPLITS)
        norms_q = tl.maximum(tl.sqrt_rn(squares_q), NORM_CLAMP)
        norms_k = tl.maximum(tl.sqrt_rn(squares_k), NORM_CLAMP)
        norms = tl.sum(tl.where(columns == row, norms_q, 0.0), axis=0) * norms_k
        # Exactly ±1 for parallel rows of one pixel. Squares that overflow make a norm infinite.
        similarity = tl.where(norms == float("inf"), 0.0, tl.div_rn(similarity, norms))
    else:
        norms_q = tl.full([BLOCK_C], 1.0, tl.float32)
        norms_k = norms_q
    if row == 0:
        tl.store(norms_ptr + columns, norms_q, mask=mask)
        tl.store(norms_ptr + channels + columns, norms_k, mask=mask)
    row_ptr = (matrix * channels + row) * channels + columns
    tl.store(similarity_ptr + row_ptr, similarity, mask=mask)

    temperature = tl.load(temperature_ptr + batch * temperature_stride[0] + head * temperature_stride[1])
    scores = tl.where(mask, temperature * similarity, float("-inf"))  # [BLOCK_C]
    rank = rank_of(scores, columns)
    weights_ptr += batch * weights_stride[0] + head * weights_stride[1]
    mixture = tl.zeros([BLOCK_C], dtype=tl.float32)
    for branch in tl.static_range(BRANCHES):
        weight = tl.load(weights_ptr + branch * weights_stride[2])
        mixture += weight * softmax_of_kept(scores, rank, topk[branch])
    tl.store(mixture_ptr + row_ptr, mixture.to(mixture_ptr.dtype.element_ty), mask=mask)


@triton.jit
def channel_backward_kernel(
    grad_mixture_ptr, similarity_ptr, norms_ptr, temperature_ptr, weights_ptr,
    mixture_ptr, coefficients_ptr, radial_ptr, partials_ptr,
    temperature_stride, weights_stride, topk, heads, channels, splits,
    BRANCHES: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """A program owns one row of one head: from dP's partials to the rows of P, X and y_q.

    partials (B, H, C, C + J + 1) receives the row's terms of sums over rows: dA A for y_k, then the
    branches' terms of dweights, then that of dtemperature. radial (B, H, 2, C) is y_q, y_k.
    """
    row = tl.program_id(0) % channels
    batch, head, matrix = batch_and_head(tl.program_id(0) // channels, heads)
    columns = tl.arange(0, BLOCK_C)
    mask = columns < channels
    row_ptr = (matrix * channels + row) * channels + columns

    grad_mixture_ptr += (matrix * splits * channels + row) * channels
    grad_mixture = sum_splits(grad_mixture_ptr, columns, mask, splits, channels * channels, BLOCK_SPLITS)
    similarity = tl.load(similarity_ptr + row_ptr, mask=mask, other=0.0)
    temperature = tl.load(temperature_ptr + batch * temperature_stride[0] + head * temperature_stride[1])
    scores = tl.where(mask, temperature * similarity, float("-inf"))  # [BLOCK_C]
    rank = rank_of(scores, columns)

    partials_ptr += (matrix * channels + row) * (channels + BRANCHES + 1)
    weights_ptr += batch * weights_stride[0] + head * weights_stride[1]
    mixture = tl.zeros([BLOCK_C], dtype=tl.float32)
    grad_scores = tl.zeros([BLOCK_C], dtype=tl.float32)
    for branch in tl.static_range(BRANCHES):
        weight = tl.load(weights_ptr + branch * weights_stride[2])
        probabilities = softmax_of_kept(scores, rank, topk[branch])
        row_sum = tl.sum(probabilities * grad_mixture, axis=0)
        mixture += weight * probabilities
        grad_scores += weight * probabilities * (grad_mixture - row_sum)
        tl.store(partials_ptr + channels + branch, row_sum)
    tl.store(partials_ptr + channels + BRANCHES, tl.sum(grad_scores * similarity, axis=0))
    tl.store(mixture_ptr + row_ptr, mixture.to(mixture_ptr.dtype.element_ty), mask=mask)

    coefficients = temperature * grad_scores  # dA
    if NORMALIZE:
        radial = coefficients * similarity
        tl.store(partials_ptr + columns, radial, mask=mask)
        norm_q = tl.load(norms_ptr + matrix * 2 * channels + row)
        norms_k = tl.load(norms_ptr + (matrix * 2 + 1) * channels + columns, mask=mask, other=1.0)
        radial_q = tl.where(norm_q <= NORM_CLAMP, 0.0, tl.sum(radial, axis=0) / norm_q / norm_q)
        tl.store(radial_ptr + matrix * 2 * channels + row, radial_q)
        coefficients = coefficients / norm_q / norms_k
    dtype = coefficients_ptr.dtype.element_ty
    tl.store(coefficients_ptr + row_ptr, to_operand(coefficients, dtype, PRECISION), mask=mask)


@triton.jit
def channel_row_sums_kernel(
    partials_ptr, norms_ptr, radial_ptr, grad_temperature_ptr, grad_weights_ptr, channels,
    BRANCHES: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SUMS: tl.constexpr,
):  # fmt: skip
    """A program owns one head and adds up its rows' partials, in order."""
    matrix = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_SUMS)
    width = channels + BRANCHES + 1
    partials_ptr += matrix * channels * width
    # Without normalisation the partials of the radial terms are not written, hence not read.
    mask = columns < width if NORMALIZE else (columns >= channels) & (columns < width)
    total = sum_splits(partials_ptr, columns, mask, channels, width, BLOCK_ROWS)  # [BLOCK_SUMS]
    if NORMALIZE:
        is_channel = columns < channels
        norms_k = tl.load(norms_ptr + (matrix * 2 + 1) * channels + columns, mask=is_channel, other=1.0)
        radial_k = tl.where(norms_k <= NORM_CLAMP, 0.0, total / norms_k / norms_k)
        tl.store(radial_ptr + (matrix * 2 + 1) * channels + columns, radial_k, mask=is_channel)
    branch = columns - channels
    is_branch = (branch >= 0) & (branch < BRANCHES)
    tl.store(grad_weights_ptr + matrix * BRANCHES + branch, total, mask=is_branch)
    tl.store(grad_temperature_ptr + matrix + branch - BRANCHES, total, mask=branch == BRANCHES)


@triton.jit
def matrix_product_kernel(
    a_ptr, b_ptr, out_ptr, a_stride, b_stride, out_stride, heads, terms, rows, columns, inner,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[b, h] = sum over terms t of a[b + t, h] b[b + t, h], all small; for the output projection.

    A program owns one BLOCK_R x BLOCK_R tile of one (b, h). The operands are multiplied as float32.
    """
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_R), tl.cdiv(columns, BLOCK_R)
    index = tl.program_id(0)
    offs_c = index % column_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_r = index // column_tiles % row_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    batch, head, _matrix = batch_and_head(index // (column_tiles * row_tiles), heads)

    total = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.float32)
    for term in range(terms):
        a_term = a_ptr + (batch + term) * a_stride[0] + head * a_stride[1]
        b_term = b_ptr + (batch + term) * b_stride[0] + head * b_stride[1]
        for start in range(0, inner, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            a = load_tile(
                a_term, offs_r.to(tl.int64) * a_stride[2], offs_r < rows, offs_k, inner, a_stride[3]
            )
            b = load_tile(
                b_term, offs_k.to(tl.int64) * b_stride[2], offs_k < inner, offs_c, columns, b_stride[3]
            )
            total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    out_ptr += batch * out_stride[0] + head * out_stride[1]
    store_tile(
        out_ptr, total, offs_r.to(tl.int64) * out_stride[2], offs_r < rows, offs_c, columns, out_stride[3]
    )

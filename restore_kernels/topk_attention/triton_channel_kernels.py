"""Channel attention in Triton: a few streams over the pixels and small matrices in between.

Shapes: q, k, v (B, H, C, N), N pixels; J branches; S = temperature * A with A = q̂ k̂ᵀ (C, C). P is
the branches' mixture of softmaxes, M = W P with an output projection W (C_out, H * C), else M = P.
T is the bytes of one (B, H, C, N) tensor.

Forward                      reads             writes    operations per pixel and head
  pixel_product_kernel       q, k              A         2 C^2 (and 4 C for the norms)
  channel_mixture_kernel     A                 A, P      C^2 comparisons per row: all branches at once
  matrix_product_kernel      W, P              M = W P   only with W
  channel_apply_kernel       v                 out       2 C^2, with W 2 C_out C
Backward
  pixel_product_kernel       do, v             dM        2 C^2, with W 2 C_out C
  matrix_product_kernel      W, dM, P          dP, dW, M only with W
  channel_backward_kernel    A, dP             P, X, y   the softmax backward of one row
  channel_row_sums_kernel    rows' partials    y, dtemperature, dweights
  channel_apply_kernel       do                dv        2 C^2, with W 2 C_out C
  channel_grad_qk_kernel     q, k              dq, dk    4 C^2

Each kernel of the first and last line of a pass streams its tensors once; what lies between is of
size C^2. The forward moves 4 T, the backward 8 T: at 4.3 TB/s on an H200 that is its floor,
0.93 ps and 1.9 ps per byte of T. With C = 48 and bfloat16 the products are 21 to 64 operations per
byte where the machine balances at 184, so memory bounds every stream. With W and H * C = 384 the
product with M is 192 operations per byte moved, and matrix instructions bound it as much. float32
multiplies in three tf32 products (float32's own error, from tensor cores).

Normalisation never touches the pixels: A = D_q (q kᵀ) D_k with D = diag(1 / norm), and with dA the
gradient of A: dq = X k - y_q q, dk = Xᵀ q - y_k k, X = D_q dA D_k, y_q = rowsum(dA A) / norm_q^2,
y_k = colsum(dA A) / norm_k^2 (zero where the norm is clamped).

Every sum has a fixed order: a program of pixel_product_kernel owns a run of pixels and writes its
partial products, which the next kernel adds up in order. Grids are one-dimensional, so that no size
meets the limits of the other grid axes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from restore_kernels.topk_attention.triton_kernels import (
    NORM_CLAMP,
    batch_and_head,
    load_tile,
    row_offsets,
    store_tile,
    to_operand,
)


@triton.jit
def pixel_product_kernel(
    a_ptr, b_ptr, product_ptr, squares_ptr, a_stride, b_stride,
    groups, a_channels, b_channels, a_rows, b_rows, pixels, splits, tiles_per_split,
    NORMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """product[b, g, split] = a[b, g] b[b, g]ᵀ over the pixels of one split.

    A group is one head, or all heads as one matrix of a_rows (b_rows) rows. A program owns a
    BLOCK_R x BLOCK_R tile of one group's product and one split: tiles_per_split tiles of BLOCK_N
    pixels. With NORMS it also sums the squares of both sides' rows, per lane first and across lanes
    once, at the end.

    product (B, groups, splits, a_rows, b_rows), squares (B, groups, splits, 2, a_rows).
    """
    a_tiles, b_tiles = tl.cdiv(a_rows, BLOCK_R), tl.cdiv(b_rows, BLOCK_R)
    index = tl.program_id(0)
    b_tile = index % b_tiles
    a_tile = index // b_tiles % a_tiles
    split = index // (b_tiles * a_tiles) % splits
    batch, group, matrix = batch_and_head(index // (b_tiles * a_tiles * splits), groups)

    rows_a = a_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    rows_b = b_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_a, mask_b = rows_a < a_rows, rows_b < b_rows
    a_ptr += batch * a_stride[0] + group * a_stride[1]
    b_ptr += batch * b_stride[0] + group * b_stride[1]
    offsets_a = row_offsets(rows_a, a_channels, a_stride)
    offsets_b = row_offsets(rows_b, b_channels, b_stride)

    product = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.float32)
    a_squares = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    b_squares = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    for tile in range(tiles_per_split):
        columns = (split * tiles_per_split + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        a = load_tile(a_ptr, offsets_a, mask_a, columns, pixels, a_stride[3])  # [BLOCK_R, BLOCK_N]
        b = load_tile(b_ptr, offsets_b, mask_b, columns, pixels, b_stride[3])  # [BLOCK_R, BLOCK_N]
        product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
        if NORMS:
            a_squares += a.to(tl.float32) * a.to(tl.float32)
            b_squares += b.to(tl.float32) * b.to(tl.float32)

    partial = matrix * splits + split
    product_ptr += partial * a_rows * b_rows
    store_tile(product_ptr, product, rows_a.to(tl.int64) * b_rows, mask_a, rows_b, b_rows, 1)
    if NORMS:
        squares_ptr += partial * 2 * a_rows
        if b_tile == 0:
            tl.store(squares_ptr + rows_a, tl.sum(a_squares, axis=1), mask=mask_a)
        if a_tile == 0:
            tl.store(squares_ptr + a_rows + rows_b, tl.sum(b_squares, axis=1), mask=mask_b)


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


@triton.jit
def channel_apply_kernel(
    matrix_ptr, x_ptr, out_ptr, matrix_stride, x_stride, out_stride,
    groups, x_channels, out_channels, rows, inner, pixels,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[b, g] = matrix[b, g] x[b, g]: P v or M v in the forward, Pᵀ do or Mᵀ do in the backward.

    A program owns BLOCK_R rows times BLOCK_N pixels of one group. The row tiles of one pixel tile
    are neighbours in the grid, so that all but the first find x in the L2 cache.
    """
    row_tiles, pixel_tiles = tl.cdiv(rows, BLOCK_R), tl.cdiv(pixels, BLOCK_N)
    index = tl.program_id(0)
    offs_r = index % row_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_n = index // row_tiles % pixel_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    batch, group, _matrix = batch_and_head(index // (row_tiles * pixel_tiles), groups)
    matrix_ptr += batch * matrix_stride[0] + group * matrix_stride[1]
    x_ptr += batch * x_stride[0] + group * x_stride[1]
    out_ptr += batch * out_stride[0] + group * out_stride[1]

    out = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    offsets_r = offs_r.to(tl.int64) * matrix_stride[2]
    for start in range(0, inner, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        matrix = load_tile(matrix_ptr, offsets_r, offs_r < rows, offs_k, inner, matrix_stride[3])
        offsets_k = row_offsets(offs_k, x_channels, x_stride)
        x = load_tile(x_ptr, offsets_k, offs_k < inner, offs_n, pixels, x_stride[3])  # [BLOCK_K, BLOCK_N]
        out = tl.dot(matrix, x.to(matrix.dtype), out, input_precision=PRECISION)
    offsets_out = row_offsets(offs_r, out_channels, out_stride)
    store_tile(out_ptr, out, offsets_out, offs_r < rows, offs_n, pixels, out_stride[3])


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
def channel_grad_qk_kernel(
    q_ptr, k_ptr, coefficients_ptr, radial_ptr, grad_q_ptr, grad_k_ptr,
    q_stride, k_stride, grad_q_stride, grad_k_stride, heads, channels, pixels,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq = X k - y_q q and dk = Xᵀ q - y_k k.

    A program owns BLOCK_C rows times BLOCK_N pixels of both gradients of one head and reads all rows
    of q and k: with C <= BLOCK_C (C = 48 in the networks) every element once.
    """
    row_tiles, pixel_tiles = tl.cdiv(channels, BLOCK_C), tl.cdiv(pixels, BLOCK_N)
    index = tl.program_id(0)
    row_start = index % row_tiles * BLOCK_C
    rows = row_start + tl.arange(0, BLOCK_C)
    offs_n = index // row_tiles % pixel_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    batch, head, matrix = batch_and_head(index // (row_tiles * pixel_tiles), heads)
    q_ptr += batch * q_stride[0] + head * q_stride[1]
    k_ptr += batch * k_stride[0] + head * k_stride[1]
    coefficients_ptr += matrix * channels * channels
    radial_ptr += matrix * 2 * channels
    radial_q = tl.load(radial_ptr + rows, mask=rows < channels, other=0.0)  # [BLOCK_C]
    radial_k = tl.load(radial_ptr + channels + rows, mask=rows < channels, other=0.0)
    dtype = coefficients_ptr.dtype.element_ty

    grad_q = tl.zeros([BLOCK_C, BLOCK_N], dtype=tl.float32)
    grad_k = tl.zeros([BLOCK_C, BLOCK_N], dtype=tl.float32)
    for start in range(0, channels, BLOCK_C):
        inner = start + tl.arange(0, BLOCK_C)
        mask = inner < channels
        q = load_tile(q_ptr, inner.to(tl.int64) * q_stride[2], mask, offs_n, pixels, q_stride[3])
        k = load_tile(k_ptr, inner.to(tl.int64) * k_stride[2], mask, offs_n, pixels, k_stride[3])
        forth = load_tile(coefficients_ptr, rows * channels, rows < channels, inner, channels, 1)
        back = load_tile(coefficients_ptr, inner * channels, mask, rows, channels, 1)
        grad_q = tl.dot(forth, k.to(dtype), grad_q, input_precision=PRECISION)
        grad_k = tl.dot(tl.trans(back), q.to(dtype), grad_k, input_precision=PRECISION)
        if NORMALIZE:
            own = (start == row_start).to(tl.float32)  # these are the rows that the program owns
            grad_q -= (own * radial_q)[:, None] * q.to(tl.float32)
            grad_k -= (own * radial_k)[:, None] * k.to(tl.float32)

    grad_q_ptr += batch * grad_q_stride[0] + head * grad_q_stride[1]
    grad_k_ptr += batch * grad_k_stride[0] + head * grad_k_stride[1]
    offsets = rows.to(tl.int64)
    store_tile(
        grad_q_ptr, grad_q, offsets * grad_q_stride[2], rows < channels, offs_n, pixels, grad_q_stride[3]
    )
    store_tile(
        grad_k_ptr, grad_k, offsets * grad_k_stride[2], rows < channels, offs_n, pixels, grad_k_stride[3]
    )

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
size C^2 (``channel_matrix_kernels``). The forward moves 4 T, the backward 8 T: at 4.3 TB/s on an H200
that is its floor, 0.93 ps and 1.9 ps per byte of T. With C = 48 and bfloat16 the products are 21 to 64
operations per byte where the machine balances at 184, so memory bounds every stream. With W and
H * C = 384 the product with M is 192 operations per byte moved, and matrix instructions bound it as
much. float32 multiplies in three tf32 products (float32's own error, from tensor cores).

A gate g (B, H, 1 or C, N) of float32 makes k' = g k and v' = g v where k and v are loaded. Backward:
dk = g dk', dv = g dv' and dg = dk' k + dv' v, of which channel_apply_kernel (which reads v for it, one
T more) has one part and channel_grad_qk_kernel the other. A gate of one row per head costs 4 bytes
per pixel and pass, a full one up to 2 T with bfloat16. dg and dtemperature are float32 in any dtype,
so gated products of bfloat16 and float16 are computed as those of float32, but for the output's.

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

from restore_kernels.triton_common.tiles import (
    batch_and_head,
    load_tile,
    row_offsets,
    store_tile,
    to_operand,
)


@triton.jit
def load_gate(ptr, stride, rows, mask, channels, columns, pixels, GATE: tl.constexpr):
    """Factors of gated rows: [1, len(columns)] if GATE is "pixel", [len(rows), len(columns)] if "element"."""
    if GATE == "pixel":
        return tl.load(ptr + columns.to(tl.int64) * stride[3], mask=columns < pixels, other=0.0)[None, :]
    else:
        return load_tile(ptr, row_offsets(rows, channels, stride), mask, columns, pixels, stride[3])


@triton.jit
def store_gate_terms(
    ptr, terms, matrix, part, parts, rows, channels, columns, pixels,
    GATE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The gate's gradient of a tile of one head from what each element adds to it.

    With "pixel" the sum over the tile's rows goes to part ``part`` of (B, H, parts, N); with
    "element" every term goes to (B, H, C, N), with ADD on top of what is there.
    """
    if GATE == "pixel":
        pointers = ptr + (matrix * parts + part) * pixels + columns
        tl.store(pointers, tl.sum(terms, axis=0), mask=columns < pixels)
    else:
        offsets, mask = (matrix * channels + rows) * pixels, rows < channels
        if ADD:
            terms += load_tile(ptr, offsets, mask, columns, pixels, 1)
        store_tile(ptr, terms, offsets, mask, columns, pixels, 1)


@triton.jit
def pixel_product_kernel(
    a_ptr, b_ptr, gate_ptr, product_ptr, squares_ptr, a_stride, b_stride, gate_stride,
    groups, a_channels, b_channels, a_rows, b_rows, pixels, splits, tiles_per_split,
    NORMS: tl.constexpr, GATE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """product[b, g, split] = a[b, g] (gate b)[b, g]ᵀ over the pixels of one split.

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
    if GATE != "none":
        gate_ptr += batch * gate_stride[0] + group * gate_stride[1]

    product = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.float32)
    a_squares = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    b_squares = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    for tile in range(tiles_per_split):
        columns = (split * tiles_per_split + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        a = load_tile(a_ptr, offsets_a, mask_a, columns, pixels, a_stride[3])  # [BLOCK_R, BLOCK_N]
        b = load_tile(b_ptr, offsets_b, mask_b, columns, pixels, b_stride[3])  # [BLOCK_R, BLOCK_N]
        if GATE != "none":
            gate = load_gate(gate_ptr, gate_stride, rows_b, mask_b, b_channels, columns, pixels, GATE)
            b = b.to(tl.float32) * gate
        transposed = tl.trans(to_operand(b, OPERAND, PRECISION))
        product = tl.dot(a.to(OPERAND), transposed, product, input_precision=PRECISION)
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
def channel_apply_kernel(
    matrix_ptr, x_ptr, gate_ptr, out_ptr, v_ptr, gate_terms_ptr,
    matrix_stride, x_stride, gate_stride, out_stride, v_stride,
    groups, x_channels, out_channels, rows, inner, pixels, gate_parts,
    GATE_X: tl.constexpr, GATE_OUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[b, g] = matrix[b, g] x[b, g]: P v or M v in the forward, Pᵀ do or Mᵀ do in the backward.

    GATE_X gates x, as in the forward. GATE_OUT gates out, as in the backward, where out is dv and its
    groups are heads, and writes what v adds to the gate's gradient.

    A program owns BLOCK_R rows times BLOCK_N pixels of one group. The row tiles of one pixel tile
    are neighbours in the grid, so that all but the first find x in the L2 cache.
    """
    row_tiles, pixel_tiles = tl.cdiv(rows, BLOCK_R), tl.cdiv(pixels, BLOCK_N)
    index = tl.program_id(0)
    offs_r = index % row_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_n = index // row_tiles % pixel_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    batch, group, number = batch_and_head(index // (row_tiles * pixel_tiles), groups)
    matrix_ptr += batch * matrix_stride[0] + group * matrix_stride[1]
    x_ptr += batch * x_stride[0] + group * x_stride[1]
    out_ptr += batch * out_stride[0] + group * out_stride[1]

    out = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    offsets_r = offs_r.to(tl.int64) * matrix_stride[2]
    if GATE_X != "none" or GATE_OUT != "none":
        gate_ptr += batch * gate_stride[0] + group * gate_stride[1]
    for start in range(0, inner, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        matrix = load_tile(matrix_ptr, offsets_r, offs_r < rows, offs_k, inner, matrix_stride[3])
        offsets_k = row_offsets(offs_k, x_channels, x_stride)
        x = load_tile(x_ptr, offsets_k, offs_k < inner, offs_n, pixels, x_stride[3])  # [BLOCK_K, BLOCK_N]
        if GATE_X != "none":
            gate = load_gate(
                gate_ptr, gate_stride, offs_k, offs_k < inner, x_channels, offs_n, pixels, GATE_X
            )
            x = to_operand(x.to(tl.float32) * gate, matrix.dtype, PRECISION)
        matrix = to_operand(matrix, matrix.dtype, PRECISION)
        out = tl.dot(matrix, x.to(matrix.dtype), out, input_precision=PRECISION)
    if GATE_OUT != "none":
        v_ptr += batch * v_stride[0] + group * v_stride[1]
        v = load_tile(v_ptr, offs_r.to(tl.int64) * v_stride[2], offs_r < rows, offs_n, pixels, v_stride[3])
        store_gate_terms(
            gate_terms_ptr, out * v.to(tl.float32), number, index % row_tiles, gate_parts,
            offs_r, rows, offs_n, pixels, GATE_OUT, ADD=False,
        )  # fmt: skip
        out *= load_gate(gate_ptr, gate_stride, offs_r, offs_r < rows, rows, offs_n, pixels, GATE_OUT)
    offsets_out = row_offsets(offs_r, out_channels, out_stride)
    store_tile(out_ptr, out, offsets_out, offs_r < rows, offs_n, pixels, out_stride[3])


@triton.jit
def channel_grad_qk_kernel(
    q_ptr, k_ptr, gate_ptr, coefficients_ptr, radial_ptr, grad_q_ptr, grad_k_ptr, gate_terms_ptr,
    q_stride, k_stride, gate_stride, grad_q_stride, grad_k_stride,
    heads, channels, pixels, first_part, gate_parts,
    NORMALIZE: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq = X k' - y_q q and dk' = Xᵀ q - y_k k', where k' = k without a gate.

    With one it writes dk = gate dk' and completes the gate's gradient with what k adds to it.

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
    if GATE != "none":
        gate_ptr += batch * gate_stride[0] + head * gate_stride[1]
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
        if GATE != "none":
            k = k.to(tl.float32) * load_gate(
                gate_ptr, gate_stride, inner, mask, channels, offs_n, pixels, GATE
            )
        forth = load_tile(coefficients_ptr, rows * channels, rows < channels, inner, channels, 1)
        back = load_tile(coefficients_ptr, inner * channels, mask, rows, channels, 1)
        operand = k.to(dtype) if GATE == "none" else to_operand(k, dtype, PRECISION)
        grad_q = tl.dot(forth, operand, grad_q, input_precision=PRECISION)
        grad_k = tl.dot(tl.trans(back), q.to(dtype), grad_k, input_precision=PRECISION)
        if NORMALIZE:
            own = (start == row_start).to(tl.float32)  # these are the rows that the program owns
            grad_q -= (own * radial_q)[:, None] * q.to(tl.float32)
            grad_k -= (own * radial_k)[:, None] * k.to(tl.float32)

    if GATE != "none":
        k = load_tile(k_ptr, rows.to(tl.int64) * k_stride[2], rows < channels, offs_n, pixels, k_stride[3])
        store_gate_terms(
            gate_terms_ptr, grad_k * k.to(tl.float32), matrix, first_part + index % row_tiles, gate_parts,
            rows, channels, offs_n, pixels, GATE, ADD=True,
        )  # fmt: skip
        grad_k *= load_gate(gate_ptr, gate_stride, rows, rows < channels, channels, offs_n, pixels, GATE)
    grad_q_ptr += batch * grad_q_stride[0] + head * grad_q_stride[1]
    grad_k_ptr += batch * grad_k_stride[0] + head * grad_k_stride[1]
    offsets = rows.to(tl.int64)
    store_tile(
        grad_q_ptr, grad_q, offsets * grad_q_stride[2], rows < channels, offs_n, pixels, grad_q_stride[3]
    )
    store_tile(
        grad_k_ptr, grad_k, offsets * grad_k_stride[2], rows < channels, offs_n, pixels, grad_k_stride[3]
    )

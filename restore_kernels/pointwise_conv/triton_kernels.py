"""Pointwise convolution in Triton: matrix products over the pixels, which lie where they are.

x[i] (B, C_i, H, W), weight (C_out, C) or (B, C_out, C), out (B, C_out, H, W); N = H * W pixels are numbered
through their image.

projection_kernel      out = weight x + bias. A program owns BLOCK_R channels times BLOCK_N pixels of the
                       result: it goes through the images of x, whose sums stay in its registers. Programs of
                       the same pixels are neighbours in the grid: all but the first find x in the L2 cache.
                       With the output's gradient as x and the weight transposed: an image's gradient.
weight_product_kernel  grad_out xᵀ over the pixels. A program owns a BLOCK_R x BLOCK_C tile of it and a share
                       of the pixels of all images of a weight. Shares are added afterwards, in their order.

Where a tile covers all channels every tensor comes from memory once per kernel: (C + C_out) N elements per
image forward, twice that backward. 2 C C_out N operations forward, twice that backward: with bfloat16 and
C = C_out they are C / 2 per byte, so that on an H200, which balances at 184, memory bounds them up to some
370 channels and the matrix units beyond. float32 multiplies in three tf32 products. No GPU has been measured.
"""

from __future__ import annotations

import triton
import triton.language as tl

from restore_kernels.triton_common.image_tiles import load_pixels, pixel_offsets


@triton.jit
def projection_kernel(
    x_ptrs, weight_ptr, bias_ptr, out_ptr, x_strides, weight_stride, out_stride,
    channels, outputs, width, pixels,
    INPUTS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_tiles, pixel_tiles = tl.cdiv(outputs, BLOCK_R), tl.cdiv(pixels, BLOCK_N)
    program = tl.program_id(0)
    rows = program % row_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = program // row_tiles % pixel_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    image = (program // (row_tiles * pixel_tiles)).to(tl.int64)
    is_row, is_pixel = rows < outputs, columns < pixels
    weight_rows = weight_ptr + image * weight_stride[0] + rows.to(tl.int64)[:, None] * weight_stride[1]

    total = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    for i in tl.static_range(INPUTS):
        x_ptr = x_ptrs[i] + image * x_strides[i][0]
        offsets = pixel_offsets(columns, width, x_strides[i], WHOLE)
        for start in range(0, channels[i], BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            x = load_pixels(
                x_ptr, inner, channels[i], x_strides[i][1], offsets, is_pixel
            )  # [BLOCK_K, BLOCK_N]
            weight = tl.load(
                weight_rows + inner.to(tl.int64)[None, :] * weight_stride[2],
                mask=is_row[:, None] & (inner < channels[i])[None, :], other=0.0,
            )  # fmt: skip
            total = tl.dot(weight, x, total, input_precision=PRECISION)
        weight_rows += channels[i] * weight_stride[2]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + rows, mask=is_row, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + image * out_stride[0] + pixel_offsets(columns, width, out_stride, WHOLE)[None, :]
    out += rows.to(tl.int64)[:, None] * out_stride[1]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_pixel[None, :])


@triton.jit
def weight_product_kernel(
    grad_ptr, x_ptr, product_ptr, bias_ptr, grad_stride, x_stride, product_stride, bias_stride,
    outputs, channels, width, pixels, tiles, splits, tiles_per_split,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """product (splits, weights, C_out, C), bias (splits, weights, C_out) or None; a weight has ``tiles``."""
    row_tiles, column_tiles = tl.cdiv(outputs, BLOCK_R), tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    rows = program % row_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    first_column = program // row_tiles % column_tiles * BLOCK_C
    columns = first_column + tl.arange(0, BLOCK_C)
    split = program // (row_tiles * column_tiles) % splits
    weight = program // (row_tiles * column_tiles * splits)
    tiles_per_image = tl.cdiv(pixels, BLOCK_N)

    product = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    sums = tl.zeros([BLOCK_R], dtype=tl.float32)
    for tile in range(split * tiles_per_split, min((split + 1) * tiles_per_split, tiles)):
        image = ((weight * tiles + tile) // tiles_per_image).to(tl.int64)
        places = (weight * tiles + tile) % tiles_per_image * BLOCK_N + tl.arange(0, BLOCK_N)
        offsets = pixel_offsets(places, width, grad_stride, WHOLE)
        is_pixel = places < pixels
        grad = load_pixels(
            grad_ptr + image * grad_stride[0], rows, outputs, grad_stride[1], offsets, is_pixel
        )
        offsets = pixel_offsets(places, width, x_stride, WHOLE)
        x = load_pixels(x_ptr + image * x_stride[0], columns, channels, x_stride[1], offsets, is_pixel)
        product = tl.dot(grad, tl.trans(x), product, input_precision=PRECISION)
        if bias_ptr is not None:
            sums += tl.sum(grad.to(tl.float32), axis=1)

    share = split.to(tl.int64) * product_stride[0] + weight.to(tl.int64) * product_stride[1]
    pointers = product_ptr + share + rows.to(tl.int64)[:, None] * product_stride[2] + columns[None, :]
    tl.store(pointers, product, mask=(rows < outputs)[:, None] & (columns < channels)[None, :])
    if bias_ptr is not None and first_column == 0:
        share = split.to(tl.int64) * bias_stride[0] + weight.to(tl.int64) * bias_stride[1]
        tl.store(bias_ptr + share + rows, sums, mask=rows < outputs)

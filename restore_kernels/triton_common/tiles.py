"""Device functions that the Triton kernels of both layouts share.

Strides come as tuples in the order of the tensor's dimensions, offsets are 64-bit, and lanes outside
a tensor load zeros. Numbers are float32 except for the operands of a matrix product, which keep the
dtype of the inputs where its tensor cores multiply it (bfloat16, float16).
"""

from __future__ import annotations

import triton
import triton.language as tl

NORM_CLAMP: tl.constexpr = tl.constexpr(1e-12)


@triton.jit
def batch_and_head(matrix, heads):
    """Both of one (B, H) matrix, and its number, as 64-bit factors of offsets."""
    return (matrix // heads).to(tl.int64), (matrix % heads).to(tl.int64), matrix.to(tl.int64)


@triton.jit
def row_offsets(rows, channels, stride):
    """Offsets of rows numbered through the heads of a (B, H, C, N) tensor, whatever its strides."""
    return (rows // channels).to(tl.int64) * stride[1] + (rows % channels).to(tl.int64) * stride[2]


@triton.jit
def load_tile(ptr, offsets, offsets_mask, columns, column_count, column_stride):
    """Rows at these offsets times these columns, zero outside. -> [len(offsets), len(columns)]"""
    pointers = ptr + offsets[:, None] + columns[None, :].to(tl.int64) * column_stride
    return tl.load(pointers, mask=offsets_mask[:, None] & (columns[None, :] < column_count), other=0.0)


@triton.jit
def store_tile(ptr, tile, offsets, offsets_mask, columns, column_count, column_stride):
    """Writes what ``load_tile`` with the same arguments reads, in the dtype of ptr."""
    pointers = ptr + offsets[:, None] + columns[None, :].to(tl.int64) * column_stride
    mask = offsets_mask[:, None] & (columns[None, :] < column_count)
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def to_operand(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """x as an operand of a matrix product in this dtype.

    The tensor cores cut float32 off to tf32; where one tf32 product is all there is, rounding to
    nearest first halves the error and takes away its bias.
    """
    if PRECISION == "tf32":
        x = x.to(tl.float32)
        is_number = x == x  # the NaN that a GPU computes has all bits set: rounded, it would be -0
        bits = tl.where(is_number, x.to(tl.int32, bitcast=True), 0)
        bits = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
        return tl.where(is_number, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)

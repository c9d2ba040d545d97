"""Device functions of token attention: tiles of queries, keys and their scores."""

from __future__ import annotations

import triton
import triton.language as tl

from restore_kernels.triton_common.tiles import NORM_CLAMP, load_tile, store_tile

LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)


@triton.jit
def load_rows(ptr, stride, rows, row_count, columns, column_count):
    """Rows of one head's (rows, columns) matrix, zero outside."""
    return load_tile(ptr, rows.to(tl.int64) * stride[2], rows < row_count, columns, column_count, stride[3])


@triton.jit
def store_rows(ptr, stride, tile, rows, row_count, columns, column_count):
    """Writes what ``load_rows`` with the same arguments reads."""
    store_tile(ptr, tile, rows.to(tl.int64) * stride[2], rows < row_count, columns, column_count, stride[3])


@triton.jit
def norm_of(squares):
    """The L2 norm of a row from the sum of its squares, clamped from below."""
    return tl.maximum(tl.sqrt_rn(squares), NORM_CLAMP, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def scale_of(norms, PRECISE: tl.constexpr):
    """What to multiply products with ``over_norms``'s operand with, per row."""
    return tl.full([norms.shape[0]], 1.0, tl.float32) if PRECISE else 1.0 / norms


@triton.jit
def over_norms(x, norms, PRECISE: tl.constexpr):
    """Operand of the score product, and its scale, per row of x.

    The norm divides the product and leaves the operand in its dtype, or with PRECISE the operand.
    """
    if PRECISE:
        x = tl.div_rn(x.to(tl.float32), norms[:, None])
    return x, scale_of(norms, PRECISE)


@triton.jit
def normalized(x, NORMALIZE: tl.constexpr, PRECISE: tl.constexpr):
    """``over_norms`` and the norms themselves, which are summed up here: in an order that the compiler
    chooses in every kernel anew."""
    norms = tl.full([x.shape[0]], 1.0, tl.float32)
    if NORMALIZE:
        wide = x.to(tl.float32)
        norms = norm_of(tl.sum(wide * wide, axis=1))
    x, scale = over_norms(x, norms, PRECISE)
    return x, scale, norms


@triton.jit
def load_queries(
    q_ptr,
    q_stride,
    temperature,
    offs_n,
    queries,
    offs_d,
    depth,
    NORMALIZE: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """A tile of queries: operand [BLOCK_N, BLOCK_D], scale of its scores, its own scale and norms."""
    q = load_rows(q_ptr, q_stride, offs_n, queries, offs_d, depth)
    q, q_scale, norms = normalized(q, NORMALIZE, PRECISE)
    return q, temperature * q_scale, q_scale, norms


@triton.jit
def load_keys(k_ptr, k_stride, offs_m, is_key, offs_d, depth, NORMALIZE: tl.constexpr, PRECISE: tl.constexpr):
    """A tile of keys, zero where is_key is not: operand [BLOCK_M, BLOCK_D], its scale and norms."""
    k = load_tile(k_ptr, offs_m.to(tl.int64) * k_stride[2], is_key, offs_d, depth, k_stride[3])
    return normalized(k, NORMALIZE, PRECISE)


@triton.jit
def score_tile(
    q, row_scale, k, k_scale, is_key,
    NORMALIZE: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_N, BLOCK_M], -inf where is_key is not, and the scores before row_scale."""
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if NORMALIZE and not PRECISE:
        # What overflows belongs to an infinite norm, whose scale is 0. Norms carry NaN of the inputs.
        products = tl.minimum(tl.maximum(products, -LARGEST), LARGEST)
    products = products * k_scale[None, :]
    scores = tl.where(is_key[None, :], products * row_scale[:, None], float("-inf"))
    return scores, products


@triton.jit
def through_norm(grad, x, scale, norms, NORMALIZE: tl.constexpr):
    """The gradient of rows from that of the rows over their norms; x and scale are ``over_norms``'s."""
    if NORMALIZE:
        unit = x.to(tl.float32) * scale[:, None]
        radial = tl.where(norms <= NORM_CLAMP, 0.0, tl.sum(grad * unit, axis=1))
        grad = (grad - radial[:, None] * unit) * (1.0 / norms)[:, None]
    return grad


@triton.jit
def weighted_values(mixture, v, out, PRECISE: tl.constexpr, PRECISION: tl.constexpr):
    """out + P v, with PRECISE in float32."""
    dtype: tl.constexpr = tl.float32 if PRECISE else v.dtype
    return tl.dot(mixture.to(dtype), v.to(dtype), out, input_precision=PRECISION)

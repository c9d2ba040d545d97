"""Pyramid attention in Triton, backward; ``triton_patch_kernels`` has the formulas and the schedule."""

from __future__ import annotations

import triton
import triton.language as tl

from restore_kernels.pyramid_attention.triton_patch_kernels import (
    SIZES,
    add_mixture,
    owned_patches,
    owned_rows,
    patch_corners,
    patch_products,
    scores_of,
    store_sums,
)
from restore_kernels.triton_common.tiles import to_operand


@triton.jit(do_not_specialize=SIZES)
def pyramid_row_sums_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, scales_ptr, log_sum_exp_ptr, row_sums_ptr,
    grad_stride, q_stride, k_stride, v_stride, width, queries, key_width, keys,
    splits, tiles_per_split, out_scale,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, PATCH: tl.constexpr,
    LARGE_D: tl.constexpr, SMALL_D: tl.constexpr, LARGE_E: tl.constexpr, SMALL_E: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N queries and a split of a level's keys: r = rowsum(P dP), (B, splits, H * W)."""
    batch, split, part, offs_n, corners = owned_rows(queries, width, splits, 1, BLOCK_N, PATCH)
    q = owned_patches(q_ptr + batch * q_stride, corners, width, DEPTH, PATCH, LARGE_D, SMALL_D)
    grad = owned_patches(grad_ptr + batch * grad_stride, corners, width, WIDTH, PATCH, LARGE_E, SMALL_E)
    k_ptr += batch * k_stride
    v_ptr += batch * v_stride
    scales_ptr += batch * keys
    log_sum_exp = tl.load(log_sum_exp_ptr + batch * queries + tl.minimum(offs_n, queries - 1))
    row_sums = tl.zeros([BLOCK_N], dtype=tl.float32)
    begin = split * tiles_per_split * BLOCK_M
    for start in range(begin, tl.minimum(begin + tiles_per_split * BLOCK_M, keys), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        key = tl.minimum(offs_m, keys - 1)
        key_corners = patch_corners(key, key_width, PATCH)
        products = patch_products(
            q, k_ptr, key_corners, key_width, BLOCK_N, DEPTH, PATCH, LARGE_D, SMALL_D, PRECISION
        )
        scores = scores_of(products, tl.load(scales_ptr + key), offs_m < keys)
        grad_p = patch_products(
            grad, v_ptr, key_corners, key_width, BLOCK_N, WIDTH, PATCH, LARGE_E, SMALL_E, PRECISION
        )
        row_sums += tl.sum(tl.exp(scores - log_sum_exp[:, None]) * (out_scale * grad_p), axis=1)
    offsets = (batch * splits + split) * queries + offs_n
    tl.store(row_sums_ptr + offsets, row_sums, mask=offs_n < queries)


@triton.jit(do_not_specialize=SIZES)
def pyramid_grad_query_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, scales_ptr, log_sum_exp_ptr, row_sums_ptr, sums_ptr,
    grad_stride, q_stride, k_stride, v_stride, width, queries, key_width, keys,
    splits, tiles_per_split, out_scale, parts,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, PATCH: tl.constexpr,
    LARGE_D: tl.constexpr, SMALL_D: tl.constexpr, LARGE_E: tl.constexpr, SMALL_E: tl.constexpr,
    LARGE: tl.constexpr, SMALL: tl.constexpr, PRECISION: tl.constexpr,
    GRADIENT: tl.constexpr, GRADIENT_PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N queries, LARGE + SMALL numbers of their patches and a split of the keys.

    It writes a level's share of the gradient of the patches to sums (B, splits, H * W, PATCH² * DEPTH).
    """
    LENGTH: tl.constexpr = PATCH * PATCH * DEPTH
    EXACT: tl.constexpr = LENGTH % (LARGE + SMALL) == 0
    batch, split, part, offs_n, corners = owned_rows(queries, width, splits, parts, BLOCK_N, PATCH)
    first = part * (LARGE + SMALL)
    q = owned_patches(q_ptr + batch * q_stride, corners, width, DEPTH, PATCH, LARGE_D, SMALL_D)
    grad = owned_patches(grad_ptr + batch * grad_stride, corners, width, WIDTH, PATCH, LARGE_E, SMALL_E)
    k_ptr += batch * k_stride
    v_ptr += batch * v_stride
    scales_ptr += batch * keys
    pixels = batch * queries + tl.minimum(offs_n, queries - 1)
    log_sum_exp, row_sums = tl.load(log_sum_exp_ptr + pixels), tl.load(row_sums_ptr + pixels)
    sums_ptr += (batch * splits + split) * queries * LENGTH
    large = tl.zeros([BLOCK_N, LARGE], dtype=tl.float32)
    if SMALL > 0:
        small = tl.zeros([BLOCK_N, SMALL], dtype=tl.float32)
    begin = split * tiles_per_split * BLOCK_M
    for start in range(begin, tl.minimum(begin + tiles_per_split * BLOCK_M, keys), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        key = tl.minimum(offs_m, keys - 1)
        key_corners = patch_corners(key, key_width, PATCH)
        products = patch_products(
            q, k_ptr, key_corners, key_width, BLOCK_N, DEPTH, PATCH, LARGE_D, SMALL_D, PRECISION
        )
        scales = tl.load(scales_ptr + key)
        scores = scores_of(products, scales, offs_m < keys)
        weights = tl.exp(scores - log_sum_exp[:, None])
        grad_p = patch_products(
            grad, v_ptr, key_corners, key_width, BLOCK_N, WIDTH, PATCH, LARGE_E, SMALL_E, PRECISION
        )
        weights = to_operand(
            weights * (out_scale * grad_p - row_sums[:, None]) * scales[None, :], GRADIENT, GRADIENT_PRECISION
        )
        large = add_mixture(
            large, weights, k_ptr, key_corners, key_width, first, DEPTH, PATCH, EXACT, GRADIENT_PRECISION
        )
        if SMALL > 0:
            small = add_mixture(
                small, weights, k_ptr, key_corners, key_width, first + LARGE, DEPTH, PATCH, EXACT,
                GRADIENT_PRECISION,
            )  # fmt: skip
    store_sums(sums_ptr, large, offs_n, queries, first, LENGTH)
    if SMALL > 0:
        store_sums(sums_ptr, small, offs_n, queries, first + LARGE, LENGTH)


@triton.jit(do_not_specialize=SIZES)
def pyramid_grad_key_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, scales_ptr, norms_ptr, log_sum_exp_ptr, row_sums_ptr,
    sums_ptr, radial_ptr, grad_stride, q_stride, k_stride, v_stride, width, queries, key_width, keys,
    splits, tiles_per_split, out_scale, eps, parts,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, PATCH: tl.constexpr,
    LARGE_D: tl.constexpr, SMALL_D: tl.constexpr, LARGE_E: tl.constexpr, SMALL_E: tl.constexpr,
    LARGE: tl.constexpr, SMALL: tl.constexpr, PRECISION: tl.constexpr,
    GRADIENT: tl.constexpr, GRADIENT_PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N keys of a level, LARGE + SMALL numbers of their patches, a split of the queries.

    It writes the gradient of the patches but for their norms to sums (B, splits, h * w, PATCH² * DEPTH), and
    to radial (B, splits, h * w) how much of the patches themselves the norms take away.
    """
    LENGTH: tl.constexpr = PATCH * PATCH * DEPTH
    EXACT: tl.constexpr = LENGTH % (LARGE + SMALL) == 0
    batch, split, part, offs_n, corners = owned_rows(keys, key_width, splits, parts, BLOCK_N, PATCH)
    first = part * (LARGE + SMALL)
    k = owned_patches(k_ptr + batch * k_stride, corners, key_width, DEPTH, PATCH, LARGE_D, SMALL_D)
    v = owned_patches(v_ptr + batch * v_stride, corners, key_width, WIDTH, PATCH, LARGE_E, SMALL_E)
    q_ptr += batch * q_stride
    grad_ptr += batch * grad_stride
    log_sum_exp_ptr += batch * queries
    row_sums_ptr += batch * queries
    key = tl.minimum(offs_n, keys - 1)
    scales = tl.load(scales_ptr + batch * keys + key)
    sums_ptr += (batch * splits + split) * keys * LENGTH
    radial = tl.zeros([BLOCK_N], dtype=tl.float32)
    large = tl.zeros([BLOCK_N, LARGE], dtype=tl.float32)
    if SMALL > 0:
        small = tl.zeros([BLOCK_N, SMALL], dtype=tl.float32)
    begin = split * tiles_per_split * BLOCK_M
    for start in range(begin, tl.minimum(begin + tiles_per_split * BLOCK_M, queries), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        query = tl.minimum(offs_m, queries - 1)
        query_corners = patch_corners(query, width, PATCH)
        products = patch_products(
            k, q_ptr, query_corners, width, BLOCK_N, DEPTH, PATCH, LARGE_D, SMALL_D, PRECISION
        )
        scores = tl.where(scales[:, None] == 0, 0.0, products * scales[:, None])  # as in scores_of
        weights = tl.exp(scores - tl.load(log_sum_exp_ptr + query)[None, :])
        weights = tl.where((offs_m < queries)[None, :], weights, 0.0)
        grad_p = patch_products(
            v, grad_ptr, query_corners, width, BLOCK_N, WIDTH, PATCH, LARGE_E, SMALL_E, PRECISION
        )
        weights *= out_scale * grad_p - tl.load(row_sums_ptr + query)[None, :]
        radial += tl.sum(weights * scores, axis=1)
        weights = to_operand(weights, GRADIENT, GRADIENT_PRECISION)
        large = add_mixture(
            large, weights, q_ptr, query_corners, width, first, DEPTH, PATCH, EXACT, GRADIENT_PRECISION
        )
        if SMALL > 0:
            small = add_mixture(
                small, weights, q_ptr, query_corners, width, first + LARGE, DEPTH, PATCH, EXACT,
                GRADIENT_PRECISION,
            )  # fmt: skip
    store_sums(sums_ptr, large * scales[:, None], offs_n, keys, first, LENGTH)
    if SMALL > 0:
        store_sums(sums_ptr, small * scales[:, None], offs_n, keys, first + LARGE, LENGTH)
    norms = tl.load(norms_ptr + batch * keys + key)
    radial = tl.where(norms < eps, 0.0, radial / norms / norms)
    in_rows = offs_n < tl.where(part == 0, keys, 0)
    tl.store(radial_ptr + (batch * splits + split) * keys + offs_n, radial, mask=in_rows)


@triton.jit(do_not_specialize=SIZES)
def pyramid_grad_value_kernel(
    grad_ptr, q_ptr, k_ptr, scales_ptr, selector_ptr, sums_ptr,
    grad_stride, q_stride, k_stride, width, queries, key_width, keys,
    first_key, splits, tiles_per_split, parts,
    HARD: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, PATCH: tl.constexpr,
    LARGE_D: tl.constexpr, SMALL_D: tl.constexpr, LARGE: tl.constexpr, SMALL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N keys of a level, LARGE + SMALL numbers of the patches of their values, a split.

    It writes the gradient of the patches to sums (B, splits, h * w, PATCH² * WIDTH). The selector is
    log_sum_exp or, with HARD, the index of every query.
    """
    LENGTH: tl.constexpr = PATCH * PATCH * WIDTH
    EXACT: tl.constexpr = LENGTH % (LARGE + SMALL) == 0
    batch, split, part, offs_n, corners = owned_rows(keys, key_width, splits, parts, BLOCK_N, PATCH)
    first = part * (LARGE + SMALL)
    if not HARD:
        k = owned_patches(k_ptr + batch * k_stride, corners, key_width, DEPTH, PATCH, LARGE_D, SMALL_D)
        q_ptr += batch * q_stride
        scales = tl.load(scales_ptr + batch * keys + tl.minimum(offs_n, keys - 1))
    grad_ptr += batch * grad_stride
    selector_ptr += batch * queries
    sums_ptr += (batch * splits + split) * keys * LENGTH
    large = tl.zeros([BLOCK_N, LARGE], dtype=tl.float32)
    if SMALL > 0:
        small = tl.zeros([BLOCK_N, SMALL], dtype=tl.float32)
    begin = split * tiles_per_split * BLOCK_M
    for start in range(begin, tl.minimum(begin + tiles_per_split * BLOCK_M, queries), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        query = tl.minimum(offs_m, queries - 1)
        query_corners = patch_corners(query, width, PATCH)
        selector = tl.load(selector_ptr + query)[None, :]
        if HARD:
            weights = tl.where((selector - first_key).to(tl.int32) == offs_n[:, None], 1.0, 0.0)
        else:
            products = patch_products(
                k, q_ptr, query_corners, width, BLOCK_N, DEPTH, PATCH, LARGE_D, SMALL_D, PRECISION
            )
            scores = tl.where(scales[:, None] == 0, 0.0, products * scales[:, None])
            weights = tl.exp(scores - selector)
        weights = tl.where((offs_m < queries)[None, :], weights, 0.0)
        is_used = True
        if HARD:
            is_used = tl.max(tl.max(weights, axis=1), axis=0) > 0
        weights = weights.to(grad_ptr.dtype.element_ty)
        if is_used:
            large = add_mixture(
                large, weights, grad_ptr, query_corners, width, first, WIDTH, PATCH, EXACT, PRECISION
            )
            if SMALL > 0:
                small = add_mixture(
                    small, weights, grad_ptr, query_corners, width, first + LARGE, WIDTH, PATCH, EXACT,
                    PRECISION,
                )  # fmt: skip
    store_sums(sums_ptr, large, offs_n, keys, first, LENGTH)
    if SMALL > 0:
        store_sums(sums_ptr, small, offs_n, keys, first + LARGE, LENGTH)

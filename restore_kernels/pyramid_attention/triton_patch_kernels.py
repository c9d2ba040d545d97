"""Pyramid attention in Triton: patches as rows of matrices that are never stored. Here the forward.

Shapes, level by level: query (B, Cq, H, W), keys (B, Cq, h, w), values (B, Cv, h, w); n of the H * W
pixels of the query, l of the h * w of the level, d of the patch_size² shifts of a patch.

    S_nl = scale_l <Q_n, K_l>     Q_n, K_l: the patches, rows of d-major numbers; scale_l = softmax_scale /
                                  max(|K_l|, eps)
    P_nl = exp(S_nl - L_n)        L: log_sum_exp over all levels
    out  = out_scale fold(P V)    V_l: the patches of values; fold adds every patch around its pixel

An image lies pixel by pixel, channels adjacent, within borders of zeros. A tile of patches is then a tile
of pointers, row + offset of the column (``patch_columns``): neighbours overlap, which the first-level
cache knows and nobody stores. What follows is attention with rows of patch_size² times the channels:

pyramid_statistics_kernel  L, a level's share; with HARD the largest score and its first key.
pyramid_mixture_kernel     P V, a level's share, as patches of float32.
fold_patches_kernel        adds the patches that cover a pixel: a gather, so nothing is atomic.
pyramid_row_sums_kernel    r = rowsum(P dP) where dP_nl = out_scale <do_n, V_l>, do_n patches of grad_out.
pyramid_grad_query_kernel  dQ = dS diag(scale) K where dS = P (dP - r).
pyramid_grad_key_kernel    dK = diag(scale) dSᵀ Q - diag(radial) K where radial_l = sum_n dS_nl S_nl / |K_l|²,
                           zero below eps. A pixel has the same key in every patch: folding subtracts it.
pyramid_grad_value_kernel  dV = out_scale Pᵀ do, with HARD from the index alone.

A program owns a tile of queries (the last two: of keys), streams a level's keys (queries) and writes its
sums once; splits of what it streams fill the GPU where tiles are few. One launch per level keeps a program
to one loop, which the compiler pipelines. Every sum has one order.

Why not box filters over products of pixels, 2 (2 Cq + Cv) operations per pair of pixels? At patch size 3,
Cq = 32 and Cv = 64, that is 256, nothing beside the three filters around them, which shift tiles
diagonally. Triton can only do that through shared memory: 2 stages x (4 B written + 8 B read) x 3 filters
are 72 B per pair, 2.4 ps at the 30 TB/s of an H200's shared memory, and about twice that with the halos of
its tiles. Patches cost 576 operations per pair for L and 2 x 576 + 1152 for P V, twice because half of the
sums fit into registers: 2880, 3.6 ps at 790 TFLOP/s in bfloat16. In float32 (three tf32 products) patches
take about 20 ps, and filters would be several times faster in a language that can shift.

What bounds the kernels on an H200, in cycles of a multiprocessor per pair: at 4096 operations per cycle the
products of the mixture are 0.56, as are its 72 B of shared memory at 128 B per cycle; those of the statistics
0.14 and 0.17. The row sums (0.42 and 0.66) and the gradients of queries and keys (0.56 and 1.1) load do or
the values anew for every tile, having no room for both patches: shared memory bounds them. So the 8.9e8
pairs of 128 x 128 pixels and five levels (1, 0.9, ... 0.6) take at least 3 ms forward and 13 ms backward;
an A100, whose smaller tiles take 3456 and 12672 operations per pair at 312 TFLOP/s, 10 and 36 ms. The keys
and values of all levels are 11 MB and stay in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from restore_kernels.triton_common.tiles import load_tile, store_tile
from restore_kernels.triton_common.token_tiles import LARGEST

# Levels come in all sizes: no kernel is compiled anew for one that is 1 or a multiple of 16.
SIZES = ("height", "width", "queries", "key_width", "keys", "first_key", "splits", "tiles_per_split")


@triton.jit
def patch_corners(pixels, width, PATCH: tl.constexpr):
    """The padded pixels at which the patches around these pixels of an image begin."""
    return (pixels + pixels // width * (PATCH - 1)).to(tl.int64)


@triton.jit
def patch_columns(
    ptr, corners, width, first, CHANNELS: tl.constexpr, PATCH: tl.constexpr, BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Numbers first to first + BLOCK of the patches at corners of a padded image: [len(corners), BLOCK].

    Zero beyond the patch, where EXACT does not say that there is none.
    """
    columns = first + tl.arange(0, BLOCK)
    if not EXACT:
        in_patch = columns < PATCH * PATCH * CHANNELS
        columns = tl.where(in_patch, columns, 0)
    shift = columns // CHANNELS
    pixel = shift // PATCH * (width + PATCH - 1) + shift % PATCH
    pointers = ptr + corners[:, None] * CHANNELS + (pixel * CHANNELS + columns % CHANNELS)[None, :]
    # Neighbouring patches share most of their numbers: the first-level cache is to keep them.
    if EXACT:
        return tl.load(pointers, cache_modifier=".ca")
    else:
        return tl.load(pointers, mask=in_patch[None, :], other=0.0, cache_modifier=".ca")


@triton.jit
def owned_patches(
    ptr, corners, width, CHANNELS: tl.constexpr, PATCH: tl.constexpr, LARGE: tl.constexpr, SMALL: tl.constexpr
):
    """The patches at corners, to be loaded once for all of a program's products; see patch_products."""
    LENGTH: tl.constexpr = PATCH * PATCH * CHANNELS
    EXACT: tl.constexpr = LENGTH == LARGE + SMALL
    if LENGTH > LARGE + SMALL:
        return (ptr, corners, width)
    elif SMALL == 0:
        return (patch_columns(ptr, corners, width, 0, CHANNELS, PATCH, LARGE, EXACT),)
    else:
        return (
            patch_columns(ptr, corners, width, 0, CHANNELS, PATCH, LARGE, True),
            patch_columns(ptr, corners, width, LARGE, CHANNELS, PATCH, SMALL, EXACT),
        )


@triton.jit
def patch_products(
    owned, ptr, corners, width, OWNED: tl.constexpr, CHANNELS: tl.constexpr, PATCH: tl.constexpr,
    LARGE: tl.constexpr, SMALL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of all owned patches with all at corners: [OWNED, len(corners)].

    In two parts, of LARGE and SMALL numbers; patches longer than that are loaded, the owned ones too,
    LARGE numbers at a time.
    """
    LENGTH: tl.constexpr = PATCH * PATCH * CHANNELS
    EXACT: tl.constexpr = LENGTH == LARGE + SMALL
    products = tl.zeros([OWNED, corners.shape[0]], dtype=tl.float32)
    if LENGTH > LARGE + SMALL:
        for first in range(0, LENGTH, LARGE):
            a = patch_columns(
                owned[0], owned[1], owned[2], first, CHANNELS, PATCH, LARGE, LENGTH % LARGE == 0
            )
            b = patch_columns(ptr, corners, width, first, CHANNELS, PATCH, LARGE, LENGTH % LARGE == 0)
            products = tl.dot(a, tl.trans(b), products, input_precision=PRECISION)
    elif SMALL == 0:
        b = patch_columns(ptr, corners, width, 0, CHANNELS, PATCH, LARGE, EXACT)
        products = tl.dot(owned[0], tl.trans(b), products, input_precision=PRECISION)
    else:
        b = patch_columns(ptr, corners, width, 0, CHANNELS, PATCH, LARGE, True)
        products = tl.dot(owned[0], tl.trans(b), products, input_precision=PRECISION)
        b = patch_columns(ptr, corners, width, LARGE, CHANNELS, PATCH, SMALL, EXACT)
        products = tl.dot(owned[1], tl.trans(b), products, input_precision=PRECISION)
    return products


@triton.jit
def scores_of(products, scales, is_key):
    """Scores of the products: -inf where there is no key, 0 where its norm overflows, as they may have."""
    otherwise = tl.where(is_key, 0.0, float("-inf"))[None, :]
    scales = tl.where(is_key, scales, 0.0)[None, :]
    return tl.where(scales == 0, otherwise, products * scales)


@triton.jit
def add_mixture(
    sums, weights, ptr, corners, width, first,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums + weights [N, M] times a block of the numbers of M patches, as wide as sums."""
    x = patch_columns(ptr, corners, width, first, CHANNELS, PATCH, sums.shape[1], EXACT)
    return tl.dot(weights, x.to(weights.dtype), sums, input_precision=PRECISION)


@triton.jit
def store_sums(ptr, sums, offs_n, rows, first, LENGTH: tl.constexpr):
    """Writes the owned rows' sums of numbers from first on; offsets within a tile are 32-bit."""
    start = tl.program_id(0) % tl.cdiv(rows, sums.shape[0]) * sums.shape[0]  # offs_n[0], see owned_rows
    columns = first + tl.arange(0, sums.shape[1])
    mask = (offs_n < rows)[:, None] & (columns < LENGTH)[None, :]
    offsets = tl.arange(0, sums.shape[0])[:, None] * LENGTH + columns[None, :]
    tl.store(ptr + start.to(tl.int64) * LENGTH + offsets, sums, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def key_norms_kernel(
    k_ptr, norms_ptr, scales_ptr, k_stride, key_width, keys, softmax_scale, eps,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M key patches of a level: their norms and what multiplies their products."""
    tiles = tl.cdiv(keys, BLOCK_M)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    offs_m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    corners = patch_corners(tl.minimum(offs_m, keys - 1), key_width, PATCH)
    squares = tl.zeros([BLOCK_M], dtype=tl.float32)
    for first in range(0, PATCH * PATCH * CHANNELS, BLOCK_C):
        k = patch_columns(
            k_ptr + batch * k_stride, corners, key_width, first, CHANNELS, PATCH, BLOCK_C, False
        )
        squares += tl.sum(k.to(tl.float32) * k.to(tl.float32), axis=1)
    norms = tl.sqrt_rn(squares)
    is_key = offs_m < keys
    tl.store(norms_ptr + batch * keys + offs_m, norms, mask=is_key)
    scales = tl.div_rn(softmax_scale, tl.maximum(norms, eps))
    tl.store(scales_ptr + batch * keys + offs_m, scales, mask=is_key)


@triton.jit
def owned_rows(rows, width, splits, parts, BLOCK_N: tl.constexpr, PATCH: tl.constexpr):
    """What a program owns: batch, split, part of the patches, BLOCK_N rows and their corners."""
    tiles = tl.cdiv(rows, BLOCK_N)
    program = tl.program_id(0) // tiles
    offs_n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    corners = patch_corners(tl.minimum(offs_n, rows - 1), width, PATCH)
    return (
        (program // (parts * splits)).to(tl.int64),
        program // parts % splits,
        program % parts,
        offs_n,
        corners,
    )


@triton.jit(do_not_specialize=SIZES)
def pyramid_statistics_kernel(
    q_ptr, k_ptr, scales_ptr, largest_ptr, result_ptr,
    q_stride, k_stride, width, queries, key_width, keys, first_key, splits, tiles_per_split,
    HARD: tl.constexpr, DEPTH: tl.constexpr, PATCH: tl.constexpr,
    LARGE_D: tl.constexpr, SMALL_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N queries and one split of a level's keys: their log_sum_exp.

    With HARD the largest score and, as result, the first key that has it.
    """
    batch, split, part, offs_n, corners = owned_rows(queries, width, splits, 1, BLOCK_N, PATCH)
    q = owned_patches(q_ptr + batch * q_stride, corners, width, DEPTH, PATCH, LARGE_D, SMALL_D)
    k_ptr += batch * k_stride
    scales_ptr += batch * keys
    largest = tl.full([BLOCK_N], float("-inf") if HARD else -LARGEST, tl.float32)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    index = tl.zeros([BLOCK_N], dtype=tl.int32)
    begin = split * tiles_per_split * BLOCK_M
    for start in range(begin, tl.minimum(begin + tiles_per_split * BLOCK_M, keys), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        key = tl.minimum(offs_m, keys - 1)
        key_corners = patch_corners(key, key_width, PATCH)
        products = patch_products(
            q, k_ptr, key_corners, key_width, BLOCK_N, DEPTH, PATCH, LARGE_D, SMALL_D, PRECISION
        )
        scores = scores_of(products, tl.load(scales_ptr + key), offs_m < keys)
        highest = tl.max(scores, axis=1)
        if HARD:
            at = tl.min(tl.where(scores == highest[:, None], offs_m[None, :], keys), axis=1)
            index = tl.where(highest > largest, at, index)
            largest = tl.maximum(largest, highest)
        else:
            larger = tl.maximum(largest, highest)
            total = total * tl.exp(largest - larger) + tl.sum(tl.exp(scores - larger[:, None]), axis=1)
            largest = larger
    offsets = (batch * splits + split) * queries + offs_n
    in_rows = offs_n < queries
    if HARD:
        tl.store(largest_ptr + offsets, largest, mask=in_rows)
        tl.store(result_ptr + offsets, first_key + index.to(tl.int64), mask=in_rows)
    else:
        tl.store(result_ptr + offsets, largest + tl.log(total), mask=in_rows)


@triton.jit(do_not_specialize=SIZES)
def pyramid_mixture_kernel(
    q_ptr, k_ptr, v_ptr, scales_ptr, selector_ptr, sums_ptr,
    q_stride, k_stride, v_stride, width, queries, key_width, keys, first_key, splits, tiles_per_split, parts,
    HARD: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, PATCH: tl.constexpr,
    LARGE_D: tl.constexpr, SMALL_D: tl.constexpr, LARGE: tl.constexpr, SMALL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N queries, LARGE + SMALL numbers of their patches and a split of the keys.

    It writes a level's share to sums (B, splits, H * W, PATCH² * WIDTH). The selector is
    log_sum_exp or, with HARD, the index of every query.
    """
    LENGTH: tl.constexpr = PATCH * PATCH * WIDTH
    EXACT: tl.constexpr = LENGTH % (LARGE + SMALL) == 0
    batch, split, part, offs_n, corners = owned_rows(queries, width, splits, parts, BLOCK_N, PATCH)
    first = part * (LARGE + SMALL)
    q = owned_patches(q_ptr + batch * q_stride, corners, width, DEPTH, PATCH, LARGE_D, SMALL_D)
    k_ptr += batch * k_stride
    v_ptr += batch * v_stride
    scales_ptr += batch * keys
    selector = tl.load(selector_ptr + batch * queries + tl.minimum(offs_n, queries - 1))
    if HARD:
        selector = (selector - first_key).to(tl.int32)
    sums_ptr += (batch * splits + split) * queries * LENGTH
    large = tl.zeros([BLOCK_N, LARGE], dtype=tl.float32)
    if SMALL > 0:
        small = tl.zeros([BLOCK_N, SMALL], dtype=tl.float32)
    begin = split * tiles_per_split * BLOCK_M
    for start in range(begin, tl.minimum(begin + tiles_per_split * BLOCK_M, keys), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        key = tl.minimum(offs_m, keys - 1)
        key_corners = patch_corners(key, key_width, PATCH)
        if HARD:
            is_selected = (selector[:, None] == offs_m[None, :]) & (offs_m < keys)[None, :]
            weights = tl.where(is_selected, 1.0, 0.0)
            is_used = tl.max(tl.max(weights, axis=1), axis=0) > 0
        else:
            products = patch_products(
                q, k_ptr, key_corners, key_width, BLOCK_N, DEPTH, PATCH, LARGE_D, SMALL_D, PRECISION
            )
            scores = scores_of(products, tl.load(scales_ptr + key), offs_m < keys)
            weights = tl.exp(scores - selector[:, None])
            is_used = True
        weights = weights.to(v_ptr.dtype.element_ty)
        if is_used:
            large = add_mixture(
                large, weights, v_ptr, key_corners, key_width, first, WIDTH, PATCH, EXACT, PRECISION
            )
            if SMALL > 0:
                small = add_mixture(
                    small, weights, v_ptr, key_corners, key_width, first + LARGE, WIDTH, PATCH, EXACT,
                    PRECISION,
                )  # fmt: skip
    store_sums(sums_ptr, large, offs_n, queries, first, LENGTH)
    if SMALL > 0:
        store_sums(sums_ptr, small, offs_n, queries, first + LARGE, LENGTH)


@triton.jit(do_not_specialize=SIZES)
def fold_patches_kernel(
    sums_ptr, total_ptr, radial_ptr, k_ptr, out_ptr, k_stride, out_stride,
    height, width, channels, splits, factor,
    FIRST: tl.constexpr, LAST: tl.constexpr, RADIAL: tl.constexpr,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N pixels and BLOCK_C channels of an image: the patches that cover them, added.

    To what the levels before (unless FIRST) left in total (B, height * width, CHANNELS); what the LAST
    makes of it times the factor is the result. With RADIAL a multiple of the keys, which have these
    channels, is subtracted: whichever patch covers a pixel, the pixel's own key is what it has there.
    """
    pixels = height * width
    tiles, parts = tl.cdiv(pixels, BLOCK_N), tl.cdiv(channels, BLOCK_C)
    offs_n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(0) // tiles % parts * BLOCK_C + tl.arange(0, BLOCK_C)
    batch = (tl.program_id(0) // (tiles * parts)).to(tl.int64)
    y, x = offs_n // width, offs_n % width
    in_image, in_channels = offs_n < pixels, offs_c < channels
    if not (FIRST and LAST):
        total_ptrs = total_ptr + (batch * pixels + offs_n)[:, None] * CHANNELS + offs_c[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32)
    if not FIRST:
        total = tl.load(total_ptrs, mask=in_image[:, None] & in_channels[None, :], other=0.0)
    radial = tl.zeros([BLOCK_N], dtype=tl.float32)
    for split in range(splits):
        for shift in range(PATCH * PATCH):
            from_y, from_x = y + PATCH // 2 - shift // PATCH, x + PATCH // 2 - shift % PATCH
            inside = in_image & (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
            rows = (batch * splits + split) * pixels + from_y * width + from_x
            pointers = sums_ptr + (rows * (PATCH * PATCH) + shift)[:, None] * CHANNELS + offs_c[None, :]
            total += tl.load(pointers, mask=inside[:, None] & in_channels[None, :], other=0.0)
            if RADIAL:
                radial += tl.load(radial_ptr + rows, mask=inside, other=0.0)
    if RADIAL:
        center = (y + PATCH // 2) * (width + PATCH - 1) + x + PATCH // 2
        rows = batch * k_stride + center.to(tl.int64) * CHANNELS
        total -= radial[:, None] * load_tile(k_ptr, rows, in_image, offs_c, channels, 1).to(tl.float32)
    if LAST:
        pixel = batch * out_stride[0] + y.to(tl.int64) * out_stride[2] + x.to(tl.int64) * out_stride[3]
        store_tile(out_ptr, total * factor, pixel, in_image, offs_c, channels, out_stride[1])
    else:
        tl.store(total_ptrs, total, mask=in_image[:, None] & in_channels[None, :])

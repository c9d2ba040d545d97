"""Scores of token attention, and the search for the largest of every row.

The search is exact. It quarters a range of float32 numbers per pass, in the order of their bit
patterns (monotonic as integers once negative ones are flipped): one pass counts the scores at or
above the three quartiles of the range. It ends when as many scores as are kept lie at or above the
lower end, after 8 to 11 passes on continuous data, or when the range holds one number, after at most
16: then equal scores straddle the limit, and a running count finds the last one kept.

token_select_kernel streams tiles of keys for that. It reads q once and k in every pass, from the L2
cache (a head's k is small). Per score and pass that is 2 D operations on the tensor cores and about
a dozen instructions elsewhere, which bound it: a 64 x 64 tile costs some 400 cycles of a
multiprocessor, so N = M = 4096 takes some 90 us per head and branch in 12 passes on the 132
multiprocessors of an H200.
"""

from __future__ import annotations

import triton
import triton.language as tl

from restore_kernels.triton_common.tiles import batch_and_head
from restore_kernels.triton_common.token_tiles import load_rows, norm_of, over_norms, score_tile

# --- scores, the same bits in every kernel --------------------------------------------------------


@triton.jit
def token_norms_kernel(x_ptr, norms_ptr, stride, heads, rows, depth, BLOCK_R: tl.constexpr):
    """norms (B, H, rows) of x (B, H, rows, depth): a thread adds up its rows, column by column.

    So the order of a sum does not depend on how a tile lies in registers, which the compiler decides by
    all else in a kernel, and a norm is the same bits whenever it is computed.
    """
    tiles = tl.cdiv(rows, BLOCK_R)
    batch, head, matrix = batch_and_head(tl.program_id(0) // tiles, heads)
    offs = tl.program_id(0) % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    pointers = x_ptr + batch * stride[0] + head * stride[1] + offs.to(tl.int64) * stride[2]
    squares = tl.zeros([BLOCK_R], dtype=tl.float32)
    for _ in range(depth):
        x = tl.load(pointers, mask=offs < rows, other=0.0).to(tl.float32)
        squares = tl.fma(x, x, squares)
        pointers += stride[3]
    tl.store(norms_ptr + matrix * rows + offs, norm_of(squares), mask=offs < rows)


@triton.jit
def load_norms(norms_ptr, rows, row_count, NORMALIZE: tl.constexpr):
    """Of rows of one head; ones without NORMALIZE."""
    if NORMALIZE:
        return tl.load(norms_ptr + rows, mask=rows < row_count, other=1.0)
    else:
        return tl.full([rows.shape[0]], 1.0, tl.float32)


@triton.jit
def queries_over_norms(
    q_ptr, q_stride, norms_ptr, temperature, offs_n, queries, offs_d, depth,
    NORMALIZE: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """A tile of queries: operand [BLOCK_N, BLOCK_D] and scale of its scores."""
    norms = load_norms(norms_ptr, offs_n, queries, NORMALIZE)
    q, scale = over_norms(load_rows(q_ptr, q_stride, offs_n, queries, offs_d, depth), norms, PRECISE)
    return q, temperature * scale


@triton.jit
def keys_over_norms(
    k_ptr, k_stride, norms_ptr, offs_m, keys, offs_d, depth, NORMALIZE: tl.constexpr, PRECISE: tl.constexpr
):
    """A tile of keys: operand [BLOCK_M, BLOCK_D] and its scale."""
    norms = load_norms(norms_ptr, offs_m, keys, NORMALIZE)
    return over_norms(load_rows(k_ptr, k_stride, offs_m, keys, offs_d, depth), norms, PRECISE)


@triton.jit
def scores_of_keys(
    q, row_scale, k_ptr, k_stride, k_norms_ptr, offs_m, keys, offs_d, depth,
    NORMALIZE: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    is_key = offs_m < keys
    k, k_scale = keys_over_norms(
        k_ptr, k_stride, k_norms_ptr, offs_m, keys, offs_d, depth, NORMALIZE, PRECISE
    )
    scores, products = score_tile(q, row_scale, k, k_scale, is_key, NORMALIZE, PRECISE, PRECISION)
    return scores


# --- search -------------------------------------------------------------------------------------


@triton.jit
def to_key(x):
    """The integer whose order among int32 is that of the float32 x; -0 counts as 0, which it equals."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_key(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def middle(low, high):
    """floor((low + high) / 2) without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def count_reaching(scores, low, high):
    """Per row how many scores reach the quartiles of [low, high): three 10-bit counts in one int32."""
    second = middle(low, high)
    first, third = from_key(middle(low, second)), from_key(middle(second, high))
    second = from_key(second)
    counts = tl.where(scores >= first[:, None], 1, 0)
    counts += tl.where(scores >= second[:, None], 1 << 10, 0)
    counts += tl.where(scores >= third[:, None], 1 << 20, 0)
    return tl.sum(counts, axis=1)


@triton.jit
def raise_or_lower(low, high, at_low, at_high, edge, count, kept):
    """One end of the range moves to edge, of which count scores are at or above."""
    reached = count >= kept
    low, at_low = tl.where(reached, edge, low), tl.where(reached, count, at_low)
    falls = (count < kept) & (edge < high)
    return low, tl.where(falls, edge, high), at_low, tl.where(falls, count, at_high)


@triton.jit
def narrow(low, high, at_low, at_high, first_count, second_count, third_count, kept):
    """The quarter of [low, high) that holds the smallest kept score; counts at both of its ends."""
    second = middle(low, high)
    first, third = middle(low, second), middle(second, high)
    low, high, at_low, at_high = raise_or_lower(low, high, at_low, at_high, first, first_count, kept)
    low, high, at_low, at_high = raise_or_lower(low, high, at_low, at_high, second, second_count, kept)
    return raise_or_lower(low, high, at_low, at_high, third, third_count, kept)


@triton.jit
def is_open(low, high, at_low, kept):
    """Whether any row's search goes on."""
    return tl.max(((at_low != kept) & (high > low + 1)).to(tl.int32), axis=0) > 0


@triton.jit
def range_of(scores, offs_m, keys):
    """Smallest and largest score of each row."""
    valid = tl.where(offs_m[None, :] < keys, scores, float("inf"))
    return tl.min(valid, axis=1), tl.max(scores, axis=1)


@triton.jit
def selected_range(low, high, at_low, at_high, row_max, kept):
    """What a finished search says, per row.

    Returns: the lower end as a score; the score from which on everything is kept; whether equal
    scores straddle the limit, so that only the first of them are kept; and the exponentials of those.
    """
    low_score = from_key(low)
    straddled = at_low != kept
    ties = (kept - at_high).to(tl.float32) * tl.exp(low_score - row_max)
    bound = tl.where(straddled, from_key(high), low_score)
    return low_score, bound, straddled, tl.where(straddled, ties, 0.0)


@triton.jit
def sum_of_kept(scores, bound, row_max):
    """Sum of the exponentials of the scores from bound on; NaN if a score is NaN."""
    exponentials = tl.exp(scores - row_max[:, None])
    return tl.sum(tl.where(scores < bound[:, None], 0.0, exponentials), axis=1)


@triton.jit
def smallest_kept(scores, low_score, offs_m):
    """Of the scores at or above low_score the smallest (inf if none), and its last index."""
    smallest = tl.min(tl.where(scores >= low_score[:, None], scores, float("inf")), axis=1)
    return smallest, tl.max(tl.where(scores == smallest[:, None], offs_m[None, :], -1), axis=1)


@triton.jit
def find_tie(scores, low_score, offs_m, seen, needed):
    """Index of the needed-th score equal to low_score, -1 if not here; seen grows by those here."""
    equal = (scores == low_score[:, None]).to(tl.int32)
    is_it = (tl.cumsum(equal, axis=1) + seen[:, None] == needed[:, None]) & (equal > 0)
    return tl.max(tl.where(is_it, offs_m[None, :], -1), axis=1), seen + tl.sum(equal, axis=1)


@triton.jit(do_not_specialize=["kept", "branch"])
def token_select_kernel(
    q_ptr, k_ptr, q_norms_ptr, k_norms_ptr, temperature_ptr, threshold_ptr, last_tie_ptr, log_sum_exp_ptr,
    q_stride, k_stride, temperature_stride, kept, branch, branches, heads, queries, keys, depth,
    NORMALIZE: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N rows of one head, in one branch, which keeps ``kept`` scores of a row."""
    tiles = tl.cdiv(queries, BLOCK_N)
    batch, head, matrix = batch_and_head(tl.program_id(0) // tiles, heads)
    offs_n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    q_ptr += batch * q_stride[0] + head * q_stride[1]
    k_ptr += batch * k_stride[0] + head * k_stride[1]
    q_norms_ptr += matrix * queries
    k_norms_ptr += matrix * keys
    temperature = tl.load(temperature_ptr + batch * temperature_stride[0] + head * temperature_stride[1])
    q, row_scale = queries_over_norms(
        q_ptr, q_stride, q_norms_ptr, temperature, offs_n, queries, offs_d, depth, NORMALIZE, PRECISE
    )

    row_max = tl.full([BLOCK_N], float("-inf"), tl.float32)
    row_min = tl.full([BLOCK_N], float("inf"), tl.float32)
    for start in range(0, keys, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        scores = scores_of_keys(
            q, row_scale, k_ptr, k_stride, k_norms_ptr, offs_m, keys, offs_d, depth,
            NORMALIZE, PRECISE, PRECISION,
        )  # fmt: skip
        tile_min, tile_max = range_of(scores, offs_m, keys)
        row_min, row_max = tl.minimum(row_min, tile_min), tl.maximum(row_max, tile_max)

    low, high = to_key(row_min), to_key(row_max) + 1
    at_low = tl.zeros([BLOCK_N], tl.int32) + keys
    at_high = tl.zeros([BLOCK_N], tl.int32)
    while is_open(low, high, at_low, kept):
        first = tl.zeros([BLOCK_N], tl.int32)
        second = tl.zeros([BLOCK_N], tl.int32)
        third = tl.zeros([BLOCK_N], tl.int32)
        for start in range(0, keys, BLOCK_M):
            offs_m = start + tl.arange(0, BLOCK_M)
            scores = scores_of_keys(
                q, row_scale, k_ptr, k_stride, k_norms_ptr, offs_m, keys, offs_d, depth,
                NORMALIZE, PRECISE, PRECISION,
            )  # fmt: skip
            counts = count_reaching(scores, low, high)
            first += counts & 1023
            second += (counts >> 10) & 1023
            third += counts >> 20
        low, high, at_low, at_high = narrow(low, high, at_low, at_high, first, second, third, kept)

    low_score, bound, straddled, total = selected_range(low, high, at_low, at_high, row_max, kept)
    threshold = tl.full([BLOCK_N], float("inf"), tl.float32)
    last_tie = tl.full([BLOCK_N], -1, tl.int32)
    for start in range(0, keys, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        scores = scores_of_keys(
            q, row_scale, k_ptr, k_stride, k_norms_ptr, offs_m, keys, offs_d, depth,
            NORMALIZE, PRECISE, PRECISION,
        )  # fmt: skip
        total += sum_of_kept(scores, bound, row_max)
        smallest, last = smallest_kept(scores, low_score, offs_m)
        last_tie = tl.where(smallest <= threshold, last, last_tie)
        threshold = tl.minimum(threshold, smallest)
    if tl.max(straddled.to(tl.int32), axis=0) > 0:
        seen = tl.zeros([BLOCK_N], tl.int32)
        for start in range(0, keys, BLOCK_M):
            offs_m = start + tl.arange(0, BLOCK_M)
            scores = scores_of_keys(
                q, row_scale, k_ptr, k_stride, k_norms_ptr, offs_m, keys, offs_d, depth,
                NORMALIZE, PRECISE, PRECISION,
            )  # fmt: skip
            tie, seen = find_tie(scores, low_score, offs_m, seen, kept - at_high)
            last_tie = tl.where(straddled & (tie >= 0), tie, last_tie)

    offsets = (matrix * queries + offs_n) * branches + branch
    mask = offs_n < queries
    tl.store(threshold_ptr + offsets, threshold, mask=mask)
    tl.store(last_tie_ptr + offsets, last_tie, mask=mask)
    tl.store(log_sum_exp_ptr + offsets, row_max + tl.log(total), mask=mask)

"""Launches the Triton kernels of top-k attention: outputs, scratch, grids and block sizes.

One function per operator of ``ops.py``, with the arguments and results of its schema. Scratch is
small: the channel layout allocates per head and split of the pixels a C x C matrix, the token layout
a few numbers per row.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from restore_kernels.tensors import empty_like_rows
from restore_kernels.topk_attention import triton_channel_kernels as channel_kernels
from restore_kernels.topk_attention import triton_token_kernels as token_kernels
from restore_kernels.topk_attention.triton_token_selection import token_select_kernel

Strides = tuple[int, ...]

# Rows shorter than this are multiplied in float32 throughout. The gradients of normalised rows are
# what is left of larger terms that cancel, all but a share 1 / length of them in the mean, and the
# similarities of the shortest rows are equal often enough (±1 at length 1) to be wanted exactly.
SHORT = 16
UNBOUNDED = 1 << 30


def _device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes x's GPU the current one: Triton launches there. The interpreter has no devices."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def launch(kernel: Any, programs: int, *args: Any, num_warps: int = 4, **constants: Any) -> None:
    """Runs the kernel on a one-dimensional grid; an empty grid is nothing to do."""
    if programs > 0:
        # Fused multiply-add is the rule of these kernels; the default differs between versions.
        kernel[(programs,)](*args, **constants, num_warps=num_warps, enable_fp_fusion=True)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Of the GPU; for the interpreter a small number, so that small problems are split too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def _capability(device: torch.device) -> int:
    """Major compute capability of the GPU; the interpreter stands in for a Hopper."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def _block(size: int, largest: int) -> int:
    """The power of two from 16 (the least a matrix instruction takes) to largest that covers size."""
    return min(max(16, triton.next_power_of_2(size)), largest)


def _operand(dtype: torch.dtype, length: int) -> torch.dtype:
    """dtype of the small matrices that multiply rows of this length and dtype."""
    return torch.float32 if length < SHORT else dtype


def _precision(dtype: torch.dtype, length: int) -> str:
    """Of products with rows of this length: three tf32 products on the tensor cores instead of
    float32 multiply-adds, which are as accurate. Products of the other dtypes are exact."""
    return "tf32x3" if dtype == torch.float32 and length >= SHORT else "ieee"


def _gradient_operand(dtype: torch.dtype, length: int) -> tuple[torch.dtype, str]:
    """dtype and precision of products with gradient coefficients.

    float16 has not the range of gradients over norms; its own values are exact in tf32.
    """
    if dtype == torch.float16 and length >= SHORT:
        return torch.float32, "tf32"
    return _operand(dtype, length), _precision(dtype, length)


def _rows(x: Tensor) -> Strides:
    """Strides of (B, H, C, N) of a tensor that is it or lacks the heads (B, C, N)."""
    return x.stride() if x.dim() == 4 else (x.stride(0), 0, x.stride(1), x.stride(2))


# --- channel layout -----------------------------------------------------------------------------


def _pixel_product(a: Tensor, b: Tensor, groups: int, norms: bool) -> tuple[Tensor, Tensor]:
    """a bᵀ over the pixels, in parts: (B, groups, splits, a rows, b rows), and the rows' squares."""
    batch, pixels = a.shape[0], a.shape[-1]
    a_rows = a.shape[1:-1].numel() // groups
    b_rows = b.shape[1:-1].numel() // groups
    wide = a.dtype == torch.float32
    block, block_n = _block(max(a_rows, b_rows), 64 if wide else 128), 32 if wide else 64
    tiles = triton.cdiv(pixels, block_n)
    matrices = batch * groups * triton.cdiv(a_rows, block) * triton.cdiv(b_rows, block)
    wanted = triton.cdiv(2 * _multiprocessors(a.device), max(1, matrices))
    tiles_per_split = max(4, triton.cdiv(tiles, wanted))  # fewer would write more than they read
    splits = max(1, triton.cdiv(tiles, tiles_per_split))
    product = torch.empty((batch, groups, splits, a_rows, b_rows), dtype=torch.float32, device=a.device)
    squares = torch.empty(
        (batch, groups, splits, 2, a_rows) if norms else (1,), dtype=torch.float32, device=a.device
    )
    launch(
        channel_kernels.pixel_product_kernel, matrices * splits, a, b, product, squares, _rows(a), _rows(b),
        groups, a.shape[-2], b.shape[-2], a_rows, b_rows, pixels, splits, tiles_per_split,
        NORMS=norms, PRECISION=_precision(a.dtype, pixels), BLOCK_R=block, BLOCK_N=block_n,
        num_warps=8,
    )  # fmt: skip
    return product, squares


def _matrix_product(a: Tensor, b: Tensor, out: Tensor, terms: int = 1) -> None:
    """out[b, h] = a[b, h] b[b, h], or the sum of it over the terms of the batch."""
    batch, heads, rows, columns = out.shape
    inner = a.shape[-1]
    block = _block(max(rows, columns), 32)
    programs = batch * heads * triton.cdiv(rows, block) * triton.cdiv(columns, block)
    launch(
        channel_kernels.matrix_product_kernel, programs, a, b, out, a.stride(), b.stride(), out.stride(),
        heads, terms, rows, columns, inner, PRECISION="tf32x3", BLOCK_R=block, BLOCK_K=32, num_warps=2,
    )  # fmt: skip


def _apply(matrix: Tensor, x: Tensor, out: Tensor) -> None:
    """out = matrix x over the pixels. matrix (B, groups, rows, inner); x, out (B, [H,] C, N)."""
    batch, groups, rows, inner = matrix.shape
    pixels = x.shape[-1]
    wide = matrix.dtype == torch.float32
    block = _block(rows, 128)
    block_k = _block(inner, 32 if wide else 64)
    block_n = 64 if wide else 128
    programs = batch * groups * triton.cdiv(rows, block) * triton.cdiv(pixels, block_n)
    launch(
        channel_kernels.channel_apply_kernel, programs, matrix, x, out, matrix.stride(), _rows(x), _rows(out),
        groups, x.shape[-2], out.shape[-2], rows, inner, pixels,
        PRECISION=_precision(x.dtype, pixels), BLOCK_R=block, BLOCK_K=block_k, BLOCK_N=block_n,
        num_warps=8 if wide or block == 128 else 4, num_stages=2 if inner <= block_k else 3,
    )  # fmt: skip


def _row_warps(block_c: int) -> int:
    """The rank of a row compares BLOCK_C x BLOCK_C pairs: up to 128 per lane."""
    return min(max(1, block_c * block_c // 2048), 16)


def _project(out_proj: Tensor, mixture: Tensor, dtype: torch.dtype) -> Tensor:
    """M = W P of every head, side by side: (B, 1, C_out, H * C)."""
    batch, heads, channels, _ = mixture.shape
    outputs = out_proj.shape[0]
    merged = torch.empty((batch, outputs, heads, channels), dtype=dtype, device=mixture.device)
    _matrix_product(_per_head(out_proj, batch, heads), mixture, merged.transpose(1, 2))
    return merged.flatten(2).unsqueeze(1)


def _per_head(out_proj: Tensor, batch: int, heads: int) -> Tensor:
    """W as the (B, H, C_out, C) weights of each head, the same in all of the batch."""
    outputs = out_proj.shape[0]
    return out_proj.unflatten(1, (heads, -1)).transpose(0, 1).expand(batch, heads, outputs, -1)


def topk_attention_channel(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, weights: Tensor, out_proj: Tensor | None,
    topk: Sequence[int], normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, heads, channels, pixels = q.shape
    operand = _operand(v.dtype, pixels)
    rows = (heads, channels) if out_proj is None else (out_proj.shape[0],)
    small = {"dtype": torch.float32, "device": q.device}
    out = empty_like_rows(v, rows)
    similarity = torch.empty((batch, heads, channels, channels), **small)
    norms = torch.empty((batch, heads, 2, channels), **small)
    mixture = torch.empty_like(similarity, dtype=operand if out_proj is None else torch.float32)
    block = _block(channels, UNBOUNDED)
    with _device(q):
        product, squares = _pixel_product(q, k, heads, normalize)
        launch(
            channel_kernels.channel_mixture_kernel, batch * heads * channels,
            product, squares, temperature, weights, similarity, norms, mixture,
            temperature.stride(), weights.stride(), tuple(topk), heads, channels, product.shape[2],
            BRANCHES=len(topk), NORMALIZE=normalize, BLOCK_C=block, BLOCK_SPLITS=16,
            num_warps=_row_warps(block),
        )  # fmt: skip
        _apply(mixture if out_proj is None else _project(out_proj, mixture, operand), v, out)
    return out, similarity, norms


def topk_attention_channel_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, weights: Tensor,
    out_proj: Tensor | None, similarity: Tensor, norms: Tensor, topk: Sequence[int], normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, heads, channels, pixels = q.shape
    branches = len(topk)
    rows = (heads, channels)
    grad_q, grad_k, grad_v = empty_like_rows(q, rows), empty_like_rows(k, rows), empty_like_rows(v, rows)
    grad_temperature = similarity.new_empty(temperature.shape)
    grad_weights = similarity.new_empty(weights.shape)
    grad_out_proj = similarity.new_empty((0,) if out_proj is None else out_proj.shape)
    operand = _operand(v.dtype, pixels)
    dtype, precision = _gradient_operand(q.dtype, pixels)
    mixture = torch.empty_like(similarity, dtype=operand if out_proj is None else torch.float32)
    coefficients = torch.empty_like(similarity, dtype=dtype)
    radial = torch.empty_like(norms)
    partials = similarity.new_empty((batch, heads, channels, channels + branches + 1))
    block = _block(channels, UNBOUNDED)
    with _device(q):
        grad_mixture, _ = _pixel_product(grad_out, v, heads if out_proj is None else 1, norms=False)
        if out_proj is not None:
            grad_merged = grad_mixture.sum(2)[:, 0].unflatten(-1, rows).transpose(1, 2)  # (B, H, C_out, C)
            grad_mixture = torch.empty_like(similarity)
            _matrix_product(_per_head(out_proj, batch, heads).mT, grad_merged, grad_mixture)
            grad_mixture = grad_mixture.unsqueeze(2)
        launch(
            channel_kernels.channel_backward_kernel, batch * heads * channels,
            grad_mixture, similarity, norms, temperature, weights, mixture, coefficients, radial, partials,
            temperature.stride(), weights.stride(), tuple(topk), heads, channels, grad_mixture.shape[2],
            BRANCHES=branches, NORMALIZE=normalize, PRECISION=precision, BLOCK_C=block, BLOCK_SPLITS=16,
            num_warps=_row_warps(block),
        )  # fmt: skip
        launch(
            channel_kernels.channel_row_sums_kernel, batch * heads,
            partials, norms, radial, grad_temperature, grad_weights, channels,
            BRANCHES=branches, NORMALIZE=normalize, BLOCK_ROWS=16,
            BLOCK_SUMS=_block(channels + branches + 1, UNBOUNDED),
        )  # fmt: skip
        if out_proj is None:
            _apply(mixture.mT, grad_out, grad_v)
        else:
            by_head = grad_out_proj.unflatten(1, rows).transpose(0, 1).unsqueeze(0)  # (1, H, C_out, C)
            _matrix_product(grad_merged, mixture.mT, by_head, terms=batch)
            _apply(_project(out_proj, mixture, operand).mT, grad_out, grad_v)
        _grad_qk(q, k, coefficients, radial, grad_q, grad_k, normalize, precision)
    return grad_q, grad_k, grad_v, grad_temperature, grad_weights, grad_out_proj


def _grad_qk(
    q: Tensor, k: Tensor, coefficients: Tensor, radial: Tensor, grad_q: Tensor, grad_k: Tensor,
    normalize: bool, precision: str,
) -> None:  # fmt: skip
    batch, heads, channels, pixels = q.shape
    # Operands of float32 are split in two for every product, which doubles their registers.
    wide = coefficients.dtype == torch.float32
    block, block_n = _block(channels, 32 if wide else 64), 64
    programs = batch * heads * triton.cdiv(channels, block) * triton.cdiv(pixels, block_n)
    launch(
        channel_kernels.channel_grad_qk_kernel, programs, q, k, coefficients, radial, grad_q, grad_k,
        q.stride(), k.stride(), grad_q.stride(), grad_k.stride(), heads, channels, pixels,
        NORMALIZE=normalize, PRECISION=precision, BLOCK_C=block, BLOCK_N=block_n,
        num_warps=8 if wide else 4, num_stages=1 if wide else 2,
    )  # fmt: skip


# --- token layout -------------------------------------------------------------------------------


def _score_tile(q: Tensor, length: int) -> tuple[int, int, int]:
    """Queries, keys and warps of a tile whose gradients, rows of this length, stay in registers.

    The matrix instructions of Hopper and of data-center Blackwell (compute capability 9 to 11) take
    64 rows, and at least one operand from shared memory, which leaves registers for larger tiles.
    Operands of float32 are split in two for every product.
    """
    if q.dtype == torch.float32:
        return (16, 32, 4) if length <= 64 else (16, 16, 8)
    if length <= (64 if 9 <= _capability(q.device) <= 11 else 32):
        return 64, 64, 8
    return (32, 32, 8) if length <= 128 else (16, 16, 4)


@dataclass(frozen=True)
class _TokenTiles:
    """Tile shapes and precisions of every kernel of a call and of its backward.

    The kernels must agree in them: a selection is repeated by comparing recomputed scores.
    """

    constants: dict[str, Any]
    row_tiles: int
    key_tiles: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, normalize: bool) -> _TokenTiles:
        (batch, heads, queries, depth), (keys, width) = q.shape, v.shape[2:]
        block_d, block_e = _block(depth, UNBOUNDED), _block(width, UNBOUNDED)
        rows, columns, warps = _score_tile(q, max(block_d, block_e))
        block_n, block_m = _block(queries, rows), _block(keys, columns)
        constants = {
            "NORMALIZE": normalize, "PRECISE": depth < SHORT, "PRECISION": _precision(q.dtype, depth),
            "BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_D": block_d, "num_warps": warps,
        }  # fmt: skip
        matrices = batch * heads
        return cls(constants, matrices * triton.cdiv(queries, block_n), matrices * triton.cdiv(keys, block_m))


def topk_attention_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    weights: Tensor,
    topk: Sequence[int],
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, queries, depth = q.shape
    keys, width = v.shape[2:]
    branches = len(topk)
    out = v.new_empty((batch, heads, queries, width))
    threshold = torch.empty((batch, heads, queries, branches), dtype=torch.float32, device=q.device)
    last_tie = torch.empty_like(threshold, dtype=torch.int32)
    log_sum_exp = torch.empty_like(threshold)
    selection = (threshold, last_tie, log_sum_exp)
    tiles = _TokenTiles.of(q, k, v, normalize)
    block_e = _block(width, UNBOUNDED)
    sizes = (heads, queries, keys, depth, width)
    inputs = (q, k, v, temperature, weights, *selection, out)
    strides = tuple(x.stride() for x in (q, k, v, out, temperature, weights))
    with _device(q):
        if keys <= tiles.constants["BLOCK_M"]:
            launch(
                token_kernels.token_window_kernel, tiles.row_tiles, *inputs, *strides, tuple(topk), *sizes,
                BRANCHES=branches, BLOCK_E=block_e, **tiles.constants,
            )  # fmt: skip
            return out, *selection
        for branch, kept in enumerate(topk):
            launch(
                token_select_kernel, tiles.row_tiles, q, k, temperature, *selection,
                q.stride(), k.stride(), temperature.stride(), kept, branch, branches, *sizes[:4],
                **tiles.constants,
            )  # fmt: skip
        launch(
            token_kernels.token_output_kernel, tiles.row_tiles, *inputs, *strides, *sizes,
            BRANCHES=branches, BLOCK_E=block_e, **tiles.constants,
        )  # fmt: skip
    return out, *selection


def topk_attention_token_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, weights: Tensor,
    threshold: Tensor, last_tie: Tensor, log_sum_exp: Tensor, topk: Sequence[int], normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, heads, queries, depth = q.shape
    keys, width = v.shape[2:]
    branches = len(topk)
    grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    row_sums = torch.empty_like(log_sum_exp)
    temperature_terms = log_sum_exp.new_empty((batch, heads, queries))
    tiles = _TokenTiles.of(q, k, v, normalize)
    dtype, precision = _gradient_operand(q.dtype, depth)
    constants = tiles.constants | {"BRANCHES": branches, "BLOCK_E": _block(width, UNBOUNDED)}
    gradient = {"GRADIENT": getattr(tl, str(dtype).removeprefix("torch.")), "GRADIENT_PRECISION": precision}
    sizes = (heads, queries, keys, depth, width)
    saved = (threshold, last_tie, log_sum_exp, row_sums)
    strides = tuple(x.stride() for x in (grad_out, q, k, v))
    small_strides = (temperature.stride(), weights.stride())
    with _device(q):
        launch(
            token_kernels.token_row_sums_kernel, tiles.row_tiles, grad_out, q, k, v, temperature, *saved,
            *strides, temperature.stride(), *sizes, BLOCK_J=triton.next_power_of_2(branches), **constants,
        )  # fmt: skip
        launch(
            token_kernels.token_grad_q_kernel, tiles.row_tiles,
            grad_out, q, k, v, temperature, weights, *saved, grad_q, temperature_terms,
            *strides, grad_q.stride(), *small_strides, *sizes, **constants, **gradient,
        )  # fmt: skip
        launch(
            token_kernels.token_grad_kv_kernel, tiles.key_tiles,
            grad_out, q, k, v, temperature, weights, *saved, grad_k, grad_v,
            *strides, grad_k.stride(), grad_v.stride(), *small_strides, *sizes,
            **constants, **gradient,
        )  # fmt: skip
    return grad_q, grad_k, grad_v, temperature_terms.sum(2), row_sums.sum(2)

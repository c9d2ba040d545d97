"""Launches the kernels of channel attention, with or without a gate: outputs, scratch, grids, tiles.

Scratch is small: per head and split of the pixels a C x C matrix, and with a gate of one row per head
a few such rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from restore_kernels.tensors import empty_like_rows
from restore_kernels.triton_common import channel_matrix_kernels as matrix_kernels
from restore_kernels.triton_common import channel_pixel_kernels as pixel_kernels
from restore_kernels.triton_common.launching import (
    NO_SPILLS,
    UNBOUNDED,
    block,
    computed_operand,
    launch,
    on_device,
    operand,
    precision,
    split,
    triton_dtype,
)

Strides = tuple[int, ...]


def _rows(x: Tensor) -> Strides:
    """Strides of (B, H, C, N) of a tensor that is it or lacks the heads (B, C, N)."""
    return x.stride() if x.dim() == 4 else (x.stride(0), 0, x.stride(1), x.stride(2))


def _gate(gate: Tensor | None, groups: int) -> tuple[Tensor | None, Strides | None, str]:
    """Pointer, strides and mode of ``load_gate`` for groups of rows: heads, or all heads as one."""
    if gate is None:
        return None, None, "none"
    batch, head, row, pixel = gate.stride()
    if gate.shape[2] > 1:
        return gate, (batch, head, row, pixel), "element"
    is_shared = groups == gate.shape[1] or head == 0
    return gate, (batch, head, 0, pixel), "pixel" if is_shared else "element"


def _working_dtype(x: Tensor, gate: Tensor | None) -> torch.dtype:
    """dtype of the operands of products with x, or gated x, which is not rounded.

    The gradients of the gate and the temperature are float32 whatever x is, and differences of
    larger terms; an operand rounded to x's dtype would show in them.
    """
    return x.dtype if gate is None else torch.float32


def _pixel_product(
    a: Tensor, b: Tensor, gate: Tensor | None, groups: int, norms: bool
) -> tuple[Tensor, Tensor]:
    """a (gate b)ᵀ over the pixels, in parts (B, groups, splits, a rows, b rows); the rows' squares."""
    batch, pixels = a.shape[0], a.shape[-1]
    a_rows = a.shape[1:-1].numel() // groups
    b_rows = b.shape[1:-1].numel() // groups
    dtype = _working_dtype(b, gate)
    wide = dtype == torch.float32
    gate_ptr, gate_stride, gate_mode = _gate(gate, groups)
    block_r, block_n = block(max(a_rows, b_rows), 64 if wide else 128), 32 if wide else 64
    if gate_mode == "element":
        block_n = 16  # a third tile is held in registers
    matrices = batch * groups * triton.cdiv(a_rows, block_r) * triton.cdiv(b_rows, block_r)
    tiles_per_split, splits = split(triton.cdiv(pixels, block_n), matrices, a.device)
    product = torch.empty((batch, groups, splits, a_rows, b_rows), dtype=torch.float32, device=a.device)
    squares = torch.empty(
        (batch, groups, splits, 2, a_rows) if norms else (1,), dtype=torch.float32, device=a.device
    )
    launch(
        pixel_kernels.pixel_product_kernel, matrices * splits, a, b, gate_ptr, product, squares,
        _rows(a), _rows(b), gate_stride,
        groups, a.shape[-2], b.shape[-2], a_rows, b_rows, pixels, splits, tiles_per_split,
        NORMS=norms, GATE=gate_mode, OPERAND=triton_dtype(dtype), PRECISION=precision(dtype, pixels),
        BLOCK_R=block_r, BLOCK_N=block_n, num_warps=8,
    )  # fmt: skip
    return product, squares


def _matrix_product(a: Tensor, b: Tensor, out: Tensor, terms: int = 1) -> None:
    """out[b, h] = a[b, h] b[b, h], or the sum of it over the terms of the batch."""
    batch, heads, rows, columns = out.shape
    inner = a.shape[-1]
    block_r = block(max(rows, columns), 32)
    programs = batch * heads * triton.cdiv(rows, block_r) * triton.cdiv(columns, block_r)
    launch(
        matrix_kernels.matrix_product_kernel, programs, a, b, out, a.stride(), b.stride(), out.stride(),
        heads, terms, rows, columns, inner, PRECISION="tf32x3", BLOCK_R=block_r, BLOCK_K=32, num_warps=2,
        **NO_SPILLS,
    )  # fmt: skip


def _apply_block(rows: int) -> int:
    """Rows of the output of one program of channel_apply_kernel."""
    return block(rows, 128)


def _apply(
    matrix: Tensor, x: Tensor, out: Tensor, mode: str, gate_x: Tensor | None = None,
    gate_out: Tensor | None = None, v: Tensor | None = None, gate_terms: Tensor | None = None,
) -> None:  # fmt: skip
    """out = matrix x over the pixels. matrix (B, groups, rows, inner); x, out (B, [H,] C, N).

    gate_x gates x. gate_out gates out; what v adds to its gradient goes to gate_terms.
    """
    batch, groups, rows, inner = matrix.shape
    pixels = x.shape[-1]
    wide = matrix.dtype == torch.float32
    block_r = _apply_block(rows)
    block_k = block(inner, 32 if wide else 64)
    block_n = 64 if wide else 128
    programs = batch * groups * triton.cdiv(rows, block_r) * triton.cdiv(pixels, block_n)
    gate_ptr, gate_stride, gate_mode = _gate(gate_x if gate_out is None else gate_out, groups)
    launch(
        pixel_kernels.channel_apply_kernel, programs, matrix, x, gate_ptr, out, v, gate_terms,
        matrix.stride(), _rows(x), gate_stride, _rows(out), None if v is None else v.stride(),
        groups, x.shape[-2], out.shape[-2], rows, inner, pixels,
        1 if gate_terms is None else gate_terms.shape[2],
        GATE_X=gate_mode if gate_out is None else "none",
        GATE_OUT="none" if gate_out is None else gate_mode,
        PRECISION=mode, BLOCK_R=block_r, BLOCK_K=block_k, BLOCK_N=block_n,
        num_warps=8 if wide or block_r == 128 else 4, num_stages=2 if inner <= block_k else 3,
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


def channel_forward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, temperature: Tensor, weights: Tensor,
    out_proj: Tensor | None, topk: Sequence[int], normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, similarity and norms as ``topk_attention.ops`` defines them, of k and v times the gate."""
    batch, heads, channels, pixels = q.shape
    dtype, mode = operand(v.dtype, pixels), precision(v.dtype, pixels)
    if gate is not None:
        dtype, mode = computed_operand(v.dtype, pixels)
    rows = (heads, channels) if out_proj is None else (out_proj.shape[0],)
    small: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    out = empty_like_rows(v, rows)
    similarity = torch.empty((batch, heads, channels, channels), **small)
    norms = torch.empty((batch, heads, 2, channels), **small)
    mixture = torch.empty_like(similarity, dtype=dtype if out_proj is None else torch.float32)
    block_c = block(channels, UNBOUNDED)
    with on_device(q):
        product, squares = _pixel_product(q, k, gate, heads, normalize)
        launch(
            matrix_kernels.channel_mixture_kernel, batch * heads * channels,
            product, squares, temperature, weights, similarity, norms, mixture,
            temperature.stride(), weights.stride(), tuple(topk), heads, channels, product.shape[2],
            BRANCHES=len(topk), NORMALIZE=normalize, BLOCK_C=block_c, BLOCK_SPLITS=16,
            num_warps=_row_warps(block_c),
        )  # fmt: skip
        _apply(mixture if out_proj is None else _project(out_proj, mixture, dtype), v, out, mode, gate)
    return out, similarity, norms


def channel_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, temperature: Tensor,
    weights: Tensor, out_proj: Tensor | None, similarity: Tensor, norms: Tensor, topk: Sequence[int],
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, gate, temperature, weights and out_proj; (0,) for what is None."""
    batch, heads, channels, pixels = q.shape
    branches = len(topk)
    rows = (heads, channels)
    grad_q, grad_k, grad_v = empty_like_rows(q, rows), empty_like_rows(k, rows), empty_like_rows(v, rows)
    grad_temperature = similarity.new_empty(temperature.shape)
    grad_weights = similarity.new_empty(weights.shape)
    grad_out_proj = similarity.new_empty((0,) if out_proj is None else out_proj.shape)
    gate_terms = _gate_terms(similarity, gate, q)
    working = _working_dtype(q, gate)
    narrow = operand(working, pixels)
    dtype, mode = computed_operand(working, pixels)
    mixture = torch.empty_like(similarity, dtype=narrow if out_proj is None else torch.float32)
    coefficients = torch.empty_like(similarity, dtype=dtype)
    radial = torch.empty_like(norms)
    partials = similarity.new_empty((batch, heads, channels, channels + branches + 1))
    block_c = block(channels, UNBOUNDED)
    with on_device(q):
        grad_mixture, _ = _pixel_product(grad_out, v, gate, heads if out_proj is None else 1, norms=False)
        if out_proj is not None:
            grad_merged = grad_mixture.sum(2)[:, 0].unflatten(-1, rows).transpose(1, 2)  # (B, H, C_out, C)
            grad_mixture = torch.empty_like(similarity)
            _matrix_product(_per_head(out_proj, batch, heads).mT, grad_merged, grad_mixture)
            grad_mixture = grad_mixture.unsqueeze(2)
        launch(
            matrix_kernels.channel_backward_kernel, batch * heads * channels,
            grad_mixture, similarity, norms, temperature, weights, mixture, coefficients, radial, partials,
            temperature.stride(), weights.stride(), tuple(topk), heads, channels, grad_mixture.shape[2],
            BRANCHES=branches, NORMALIZE=normalize, PRECISION=mode, BLOCK_C=block_c, BLOCK_SPLITS=16,
            num_warps=_row_warps(block_c),
        )  # fmt: skip
        launch(
            matrix_kernels.channel_row_sums_kernel, batch * heads,
            partials, norms, radial, grad_temperature, grad_weights, channels,
            BRANCHES=branches, NORMALIZE=normalize, BLOCK_ROWS=16,
            BLOCK_SUMS=block(channels + branches + 1, UNBOUNDED),
        )  # fmt: skip
        matrix = mixture.mT
        if out_proj is not None:
            by_head = grad_out_proj.unflatten(1, rows).transpose(0, 1).unsqueeze(0)  # (1, H, C_out, C)
            _matrix_product(grad_merged, mixture.mT, by_head, terms=batch)
            matrix = _project(out_proj, mixture, narrow).mT
            if gate is not None:  # whose gradient is a sum over the rows of one head
                matrix = matrix[:, 0].unflatten(1, rows)
        gated = {} if gate is None else {"gate_out": gate, "v": v, "gate_terms": gate_terms}
        _apply(matrix, grad_out, grad_v, precision(working, pixels), **gated)
        _grad_qk(q, k, gate, coefficients, radial, grad_q, grad_k, gate_terms, normalize, mode)
    if gate is not None and gate.shape[2] < gate_terms.shape[2]:
        gate_terms = gate_terms.sum(2, keepdim=True)
    return grad_q, grad_k, grad_v, gate_terms, grad_temperature, grad_weights, grad_out_proj


def _grad_qk_block(coefficients_dtype: torch.dtype, channels: int) -> int:
    """Rows of both gradients of one program of channel_grad_qk_kernel.

    Operands of float32 are split in two for every product, which doubles their registers.
    """
    return block(channels, 32 if coefficients_dtype == torch.float32 else 64)


def _gate_terms(similarity: Tensor, gate: Tensor | None, q: Tensor) -> Tensor:
    """Where the kernels write the gate's gradient: itself, or for one row the parts that add up to it."""
    batch, heads, channels, pixels = q.shape
    if gate is None:
        return similarity.new_empty(0)
    if gate.shape[2] > 1:
        return similarity.new_empty(q.shape)
    blocks = _apply_block(channels), _grad_qk_block(torch.float32, channels)
    return similarity.new_empty((batch, heads, sum(triton.cdiv(channels, x) for x in blocks), pixels))


def _grad_qk(
    q: Tensor, k: Tensor, gate: Tensor | None, coefficients: Tensor, radial: Tensor,
    grad_q: Tensor, grad_k: Tensor, gate_terms: Tensor, normalize: bool, mode: str,
) -> None:  # fmt: skip
    batch, heads, channels, pixels = q.shape
    wide = coefficients.dtype == torch.float32
    block_c, block_n = _grad_qk_block(coefficients.dtype, channels), 64
    row_tiles = triton.cdiv(channels, block_c)
    gate_ptr, gate_stride, gate_mode = _gate(gate, heads)
    parts = row_tiles if gate is None else gate_terms.shape[2]
    launch(
        pixel_kernels.channel_grad_qk_kernel, batch * heads * row_tiles * triton.cdiv(pixels, block_n),
        q, k, gate_ptr, coefficients, radial, grad_q, grad_k, gate_terms,
        q.stride(), k.stride(), gate_stride, grad_q.stride(), grad_k.stride(),
        heads, channels, pixels, parts - row_tiles, parts,
        NORMALIZE=normalize, GATE=gate_mode, PRECISION=mode, BLOCK_C=block_c, BLOCK_N=block_n,
        num_warps=8 if wide else 4, num_stages=1 if wide else 2,
    )  # fmt: skip

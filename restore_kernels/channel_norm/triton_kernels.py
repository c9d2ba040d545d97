"""Channel normalisation in Triton: every program owns pixels and has all of their channels in registers.

T is the bytes of the image (B, C, H, W).

                          reads          writes
  normalize_kernel        x              out, mean, rstd      2 T and 8 bytes per pixel
  differentiate_kernel    grad_out, x    grad_x, partials     3 T and 8 bytes per pixel

A program walks a run of blocks of pixels, one by one. In the backward pass it sums what its pixels give
to the gradients of weight and bias and writes these partial sums (2 C numbers), which are then added up in
order. Ten operations per element against 4 to 12 bytes: memory bounds both.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def image_offsets(n, stride, height, width, BLOCK_C: tl.constexpr):
    """Of pixels n, numbered through the batch, into an image (B, C, H, W). -> [BLOCK_C, len(n)]"""
    b, y, x = n // (height * width), n // width % height, n % width
    of_pixels = b * stride[0] + y * stride[2] + x * stride[3]
    return tl.arange(0, BLOCK_C).to(tl.int64)[:, None] * stride[1] + of_pixels[None, :]


@triton.jit
def normalize_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, mean_ptr, rstd_ptr,
    x_stride, out_stride, weight_stride, bias_stride, pixels, channels, height, width, eps, blocks, run,
    BIASED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * run
    c = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + c * weight_stride, mask=c < channels, other=0.0)[:, None]
    if BIASED:
        bias = tl.load(bias_ptr + c * bias_stride, mask=c < channels, other=0.0)[:, None]
    for block in range(first, tl.minimum(first + run, blocks)):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (c < channels)[:, None] & (n < pixels)[None, :]
        offsets = image_offsets(n, x_stride, height, width, BLOCK_C)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_C, BLOCK_N]
        # Rounded once: what division leaves of equal channels, rstd multiplies by hundreds.
        mean = tl.div_rn(tl.sum(x, axis=0), channels * 1.0)  # [BLOCK_N]
        centred = tl.where((c < channels)[:, None], x - mean[None, :], 0.0)
        variance = tl.div_rn(tl.sum(centred * centred, axis=0), channels * 1.0)
        rstd = 1 / tl.sqrt_rn(variance + eps)
        out = centred * rstd[None, :] * weight + bias if BIASED else x * rstd[None, :] * weight
        offsets = image_offsets(n, out_stride, height, width, BLOCK_C)
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(mean_ptr + n, mean, mask=n < pixels)
        tl.store(rstd_ptr + n, rstd, mask=n < pixels)


@triton.jit
def differentiate_kernel(
    grad_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, grad_x_ptr, partial_ptr,
    grad_stride, x_stride, grad_x_stride, weight_stride, pixels, channels, height, width, blocks, run,
    BIASED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    first = program * run
    c = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + c * weight_stride, mask=c < channels, other=0.0)[:, None]
    grad_weight = tl.zeros([BLOCK_C], tl.float32)
    grad_bias = tl.zeros([BLOCK_C], tl.float32)
    for block in range(first, tl.minimum(first + run, blocks)):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (c < channels)[:, None] & (n < pixels)[None, :]
        offsets = image_offsets(n, grad_stride, height, width, BLOCK_C)
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_C, BLOCK_N]
        offsets = image_offsets(n, x_stride, height, width, BLOCK_C)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + n, mask=n < pixels, other=0.0)[None, :]
        rstd = tl.load(rstd_ptr + n, mask=n < pixels, other=0.0)[None, :]
        normal = (x - mean) * rstd
        scaled = grad * weight
        factor = normal if BIASED else x * rstd
        grad_weight += tl.sum(grad * factor, axis=1)
        centred = scaled - normal * (tl.sum(scaled * factor, axis=0) / channels)[None, :]
        if BIASED:
            grad_bias += tl.sum(grad, axis=1)
            centred -= (tl.sum(scaled, axis=0) / channels)[None, :]
        offsets = image_offsets(n, grad_x_stride, height, width, BLOCK_C)
        tl.store(grad_x_ptr + offsets, (centred * rstd).to(grad_x_ptr.dtype.element_ty), mask=mask)
    partial = partial_ptr + program * channels + c
    tl.store(partial, grad_weight, mask=c < channels)
    tl.store(partial + tl.num_programs(0).to(tl.int64) * channels, grad_bias, mask=c < channels)

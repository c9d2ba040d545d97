"""The channel gate in Triton: two passes over the pixels with the small layers between them.

T is the bytes of the image (B, C, H, W).

                       reads                writes
  sum_kernel           x, or grad_out, x    partial sums        T, or 2 T
  squeeze_kernel       partial sums         mean, hidden, gate
  unsqueeze_kernel     partial sums         gradients of them
  scale_kernel         x, residual          out                 2 T, or 3 T with a residual

Forward is sum, squeeze, scale; backward is sum of grad_out * x, unsqueeze, and scale of grad_out, with what
the averages add to every pixel of a channel as a shift. One operation or two per element: memory bounds both.

A program of the pixel kernels owns channels of one image and walks a run of blocks of its pixels; partial
sums of the runs are added up in order. A program of the small kernels owns one image.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def owned(channels, runs, BLOCK_C: tl.constexpr):
    """The image of a pixel kernel's program, its run, and its channels [BLOCK_C]."""
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_C)
    image = program // (runs * blocks)
    return image.to(tl.int64), program // blocks % runs, program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def pixel_offsets(image, c, n, stride, width):
    """Of channels c and pixels n of an image, into (B, C, H, W). -> [len(c), len(n)]"""
    pixel = n.to(tl.int64)
    of_pixels = image * stride[0] + pixel // width * stride[2] + pixel % width * stride[3]
    return c.to(tl.int64)[:, None] * stride[1] + of_pixels[None, :]


@triton.jit
def sum_kernel(
    x_ptr, factor_ptr, partial_ptr, x_stride, factor_stride, batch, channels, pixels, width, runs, run,
    PRODUCTS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    image, own_run, c = owned(channels, runs, BLOCK_C)
    sums = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    for block in range(own_run * run, (own_run + 1) * run):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (c < channels)[:, None] & (n < pixels)[None, :]
        x = tl.load(x_ptr + pixel_offsets(image, c, n, x_stride, width), mask=mask, other=0.0).to(tl.float32)
        if PRODUCTS:
            offsets = pixel_offsets(image, c, n, factor_stride, width)
            x *= tl.load(factor_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        sums += x
    partial = partial_ptr + (own_run * batch + image) * channels + c
    tl.store(partial, tl.sum(sums, axis=1), mask=c < channels)


@triton.jit
def scale_kernel(
    x_ptr, factor_ptr, residual_ptr, shift_ptr, out_ptr, x_stride, residual_stride, out_stride,
    channels, pixels, width, runs, run,
    RESIDUAL: tl.constexpr, SHIFT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    image, own_run, c = owned(channels, runs, BLOCK_C)
    factor = tl.load(factor_ptr + image * channels + c, mask=c < channels, other=0.0)[:, None]
    if SHIFT:
        shift = tl.load(shift_ptr + image * channels + c, mask=c < channels, other=0.0)[:, None]
    for block in range(own_run * run, (own_run + 1) * run):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (c < channels)[:, None] & (n < pixels)[None, :]
        x = tl.load(x_ptr + pixel_offsets(image, c, n, x_stride, width), mask=mask, other=0.0).to(tl.float32)
        out = x * factor
        if SHIFT:
            out += shift
        if RESIDUAL:
            offsets = pixel_offsets(image, c, n, residual_stride, width)
            out += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        offsets = pixel_offsets(image, c, n, out_stride, width)
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_runs(partial_ptr, batch, channels, runs, BLOCK_C: tl.constexpr):
    """The sums of this program's image. -> [BLOCK_C]"""
    c = tl.arange(0, BLOCK_C)
    image = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([BLOCK_C], tl.float32)
    for run in range(runs):
        sums += tl.load(partial_ptr + (run * batch + image) * channels + c, mask=c < channels, other=0.0)
    return sums


@triton.jit
def squeeze_kernel(
    partial_ptr, down_ptr, up_ptr, down_bias_ptr, up_bias_ptr, mean_ptr, hidden_ptr, gate_ptr,
    batch, channels, hiddens, pixels, runs,
    DOWN_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    image, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_C)
    mean = add_runs(partial_ptr, batch, channels, runs, BLOCK_C) / pixels
    tl.store(mean_ptr + image * channels + c, mean, mask=c < channels)
    total = tl.zeros([BLOCK_C], tl.float32)
    if UP_BIAS:
        total += tl.load(up_bias_ptr + c, mask=c < channels, other=0.0)
    for first in range(0, hiddens, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        mask = (r < hiddens)[:, None] & (c < channels)[None, :]
        down = tl.load(down_ptr + r[:, None] * channels + c[None, :], mask=mask, other=0.0)
        hidden = tl.sum(down * mean[None, :], axis=1)
        if DOWN_BIAS:
            hidden += tl.load(down_bias_ptr + r, mask=r < hiddens, other=0.0)
        hidden = tl.where(hidden < 0, 0.0, hidden)  # NaN stays
        tl.store(hidden_ptr + image * hiddens + r, hidden, mask=r < hiddens)
        up = tl.load(up_ptr + c[None, :] * hiddens + r[:, None], mask=mask, other=0.0)
        total += tl.sum(up * hidden[:, None], axis=0)
    tl.store(gate_ptr + image * channels + c, 1 / (1 + tl.exp(-total)), mask=c < channels)


@triton.jit
def unsqueeze_kernel(
    partial_ptr, down_ptr, up_ptr, hidden_ptr, gate_ptr, grad_total_ptr, grad_hidden_ptr, shift_ptr,
    batch, channels, hiddens, pixels, runs, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    image, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_C)
    gate = tl.load(gate_ptr + image * channels + c, mask=c < channels, other=0.0)
    grad_total = add_runs(partial_ptr, batch, channels, runs, BLOCK_C) * gate * (1 - gate)
    tl.store(grad_total_ptr + image * channels + c, grad_total, mask=c < channels)
    grad_mean = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, hiddens, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        mask = (r < hiddens)[:, None] & (c < channels)[None, :]
        up = tl.load(up_ptr + c[None, :] * hiddens + r[:, None], mask=mask, other=0.0)
        hidden = tl.load(hidden_ptr + image * hiddens + r, mask=r < hiddens, other=0.0)
        grad_hidden = tl.where(hidden <= 0, 0.0, tl.sum(up * grad_total[None, :], axis=1))
        tl.store(grad_hidden_ptr + image * hiddens + r, grad_hidden, mask=r < hiddens)
        down = tl.load(down_ptr + r[:, None] * channels + c[None, :], mask=mask, other=0.0)
        grad_mean += tl.sum(down * grad_hidden[:, None], axis=0)
    tl.store(shift_ptr + image * channels + c, grad_mean / pixels, mask=c < channels)

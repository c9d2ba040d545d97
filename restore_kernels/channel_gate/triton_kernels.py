"""The channel gate in Triton: two passes over the pixels with the small layers between them.

T is the bytes of the image (B, C, H, W).

                     reads              writes
  sum_kernel         x, or grad_out, x  partial sums                      T, or 2 T
  squeeze_kernel     partial sums       mean, hidden, gate
  unsqueeze_kernel   partial sums       gradients of them
  outer_kernel       two of these       gradients of a layer
  scale_kernel       x, residual        out                               2 T, or 3 T with a residual

Forward is sum, squeeze, scale; backward is sum of grad_out * x, unsqueeze, outer for each layer, and scale of
grad_out, with what the averages add to every pixel of a channel as a shift. One operation or two per element:
memory bounds both.

A program of the pixel kernels owns channels of one image and walks a run of blocks of its pixels; partial
sums of the runs are added up in order. A program of squeeze and unsqueeze owns one image.
"""

from __future__ import annotations

import triton
import triton.language as tl

from restore_kernels.triton_common.image_tiles import load_pixels, pixel_offsets


@triton.jit
def owned(channels, runs, BLOCK_C: tl.constexpr):
    """The image of a pixel kernel's program, its run, and its channels [BLOCK_C]."""
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_C)
    image = program // (runs * blocks)
    return image.to(tl.int64), program // blocks % runs, program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def sum_kernel(
    x_ptr, factor_ptr, partial_ptr, x_stride, factor_stride, batch, channels, pixels, width, runs, run,
    PRODUCTS: tl.constexpr, WHOLE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    image, own_run, c = owned(channels, runs, BLOCK_C)
    x_ptr += image * x_stride[0]
    factor_ptr += image * factor_stride[0]
    sums = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    for block in range(own_run * run, tl.minimum((own_run + 1) * run, tl.cdiv(pixels, BLOCK_N))):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        offsets = pixel_offsets(n, width, x_stride, WHOLE)
        x = load_pixels(x_ptr, c, channels, x_stride[1], offsets, n < pixels).to(tl.float32)
        if PRODUCTS:
            offsets = pixel_offsets(n, width, factor_stride, WHOLE)
            x *= load_pixels(factor_ptr, c, channels, factor_stride[1], offsets, n < pixels).to(tl.float32)
        sums += x
    partial = partial_ptr + (own_run * batch + image) * channels + c
    tl.store(partial, tl.sum(sums, axis=1), mask=c < channels)


@triton.jit
def scale_kernel(
    x_ptr, factor_ptr, residual_ptr, shift_ptr, out_ptr, x_stride, residual_stride, out_stride,
    channels, pixels, width, runs, run,
    RESIDUAL: tl.constexpr, SHIFT: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    image, own_run, c = owned(channels, runs, BLOCK_C)
    x_ptr += image * x_stride[0]
    residual_ptr += image * residual_stride[0]
    out_ptr += image * out_stride[0]
    factor = tl.load(factor_ptr + image * channels + c, mask=c < channels, other=0.0)[:, None]
    if SHIFT:
        shift = tl.load(shift_ptr + image * channels + c, mask=c < channels, other=0.0)[:, None]
    for block in range(own_run * run, tl.minimum((own_run + 1) * run, tl.cdiv(pixels, BLOCK_N))):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        offsets = pixel_offsets(n, width, x_stride, WHOLE)
        out = load_pixels(x_ptr, c, channels, x_stride[1], offsets, n < pixels).to(tl.float32) * factor
        if SHIFT:
            out += shift
        if RESIDUAL:
            offsets = pixel_offsets(n, width, residual_stride, WHOLE)
            out += load_pixels(residual_ptr, c, channels, residual_stride[1], offsets, n < pixels).to(
                tl.float32
            )
        offsets = pixel_offsets(n, width, out_stride, WHOLE)
        pointers = out_ptr + c.to(tl.int64)[:, None] * out_stride[1] + offsets[None, :]
        mask = (c < channels)[:, None] & (n < pixels)[None, :]
        tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_runs(partial_ptr, batch, channels, runs, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    """The sums of this program's image. -> [BLOCK_C]"""
    c = tl.arange(0, BLOCK_C)
    image = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for first in range(0, runs, BLOCK_R):
        run = first + tl.arange(0, BLOCK_R)
        partial = partial_ptr + ((run * batch + image) * channels)[:, None] + c[None, :]
        sums += tl.load(partial, mask=(run < runs)[:, None] & (c < channels)[None, :], other=0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def squeeze_kernel(
    partial_ptr, down_ptr, up_ptr, down_bias_ptr, up_bias_ptr, mean_ptr, hidden_ptr, gate_ptr,
    batch, channels, hiddens, pixels, runs,
    DOWN_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    image, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_C)
    mean = add_runs(partial_ptr, batch, channels, runs, BLOCK_C, BLOCK_R) / pixels
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
        # NaN stays, but for that of no number: zero times an average that is infinite.
        hidden = tl.where((r >= hiddens) | (hidden < 0), 0.0, hidden)
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
    grad_total = add_runs(partial_ptr, batch, channels, runs, BLOCK_C, BLOCK_R) * gate * (1 - gate)
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


@triton.jit
def outer_kernel(
    grad_ptr, x_ptr, grad_weight_ptr, grad_bias_ptr, batch, rows, columns,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of a layer (B, columns) -> (B, rows): what its weight and bias get, summed over the images."""
    r, c = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    grad_weight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    grad_bias = tl.zeros([BLOCK_R], tl.float32)
    for image in range(0, batch):
        grad = tl.load(grad_ptr + image * rows + r, mask=r < rows, other=0.0)
        x = tl.load(x_ptr + image * columns + c, mask=c < columns, other=0.0)
        grad_weight += grad[:, None] * x[None, :]
        grad_bias += grad
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    tl.store(grad_weight_ptr + r[:, None] * columns + c[None, :], grad_weight, mask=mask)
    tl.store(grad_bias_ptr + r, grad_bias, mask=r < rows)

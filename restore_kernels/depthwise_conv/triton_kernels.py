"""Depthwise convolution in Triton: taps as shifted tiles, in place.

x (B, M * C, H, W), weight (C, M, k, k) in float32, out (B, C, H, W); a pixel is numbered through its image.

convolve_kernel          a program owns a tile [PIXELS, CHANNELS] of one image: it loads the tile once per
                         tap, moved, zero outside of the image, and writes the weighted sum once. With
                         GRADIENT it reads the output's gradient with the taps reversed and makes that of
                         x, channel by channel; with RELU it drops what the output's zeros rectified.
tap_products_kernel      a program owns a share of the pixels of all images for CHANNELS channels, and adds
                         up in registers, for every tap, the products of the output's gradient and the
                         moved x. One share per program: they are added afterwards, in their order.

PIXELS run along memory in contiguous images (CHANNELS 1), CHANNELS in channels_last ones, so that loads are
whole lines. All taps of a tile but the first find it in the first-level cache: from memory every tensor comes
once, which bounds the kernels: 2 passes over the image forward, 2 for each of the two sums backward. No
GPU has been measured.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def image_offsets(image, channels, y, x, stride):
    """Offsets of one pixel of every row times these channels, whatever the strides. -> [PIXELS, CHANNELS]"""
    pixels = image.to(tl.int64) * stride[0] + y.to(tl.int64) * stride[2] + x.to(tl.int64) * stride[3]
    return tl.expand_dims(pixels, -1) + channels.to(tl.int64) * stride[1]


@triton.jit
def rectified(grad, out_ptr, offsets, mask, RELU: tl.constexpr):
    """The gradient where the output is not zero; NaN in the output passes it on."""
    if RELU:
        out = tl.load(out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        grad = tl.where(out <= 0, 0.0, grad)
    return grad


@triton.jit
def convolve_kernel(
    x_ptr, rectified_ptr, weight_ptr, bias_ptr, out_ptr, x_stride, rectified_stride, out_stride,
    channels, height, width, pixel_tiles, channel_tiles,
    SIZE: tl.constexpr, DILATION: tl.constexpr, INPUTS: tl.constexpr, BIAS: tl.constexpr,
    GRADIENT: tl.constexpr, RELU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    pixels = program % pixel_tiles * PIXELS + tl.arange(0, PIXELS)
    columns = program // pixel_tiles % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    image = program // pixel_tiles // channel_tiles
    y, x = pixels // width, pixels % width
    own = (y < height)[:, None] & (columns < channels)
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    if BIAS:
        total += tl.load(bias_ptr + columns, mask=columns < channels, other=0.0)
    SOURCES: tl.constexpr = 1 if GRADIENT else INPUTS
    for m in range(SOURCES):
        # A channel of x and its gradient belong to one output channel, an output channel to INPUTS of x.
        source = columns // INPUTS if GRADIENT else columns * INPUTS + m
        first_tap = (columns if GRADIENT else source) * (SIZE * SIZE)
        for tap in tl.static_range(SIZE * SIZE):
            from_y = y + (tap // SIZE - SIZE // 2) * DILATION
            from_x = x + (tap % SIZE - SIZE // 2) * DILATION
            inside = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
            mask = inside[:, None] & own
            value = tl.load(
                x_ptr + image_offsets(image, source, from_y, from_x, x_stride), mask=mask, other=0.0
            ).to(tl.float32)
            value = rectified(
                value, rectified_ptr, image_offsets(image, source, from_y, from_x, rectified_stride), mask,
                RELU and GRADIENT,
            )  # fmt: skip
            place = first_tap + (SIZE * SIZE - 1 - tap if GRADIENT else tap)
            total += value * tl.load(weight_ptr + place, mask=columns < channels, other=0.0)
    if RELU and not GRADIENT:
        total = tl.where(total <= 0, 0.0, total)
    out = out_ptr + image_offsets(image, columns, y, x, out_stride)
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=own)


@triton.jit
def tap_products_kernel(
    grad_ptr, rectified_ptr, x_ptr, weight_share_ptr, bias_share_ptr, grad_stride, rectified_stride, x_stride,
    batch, channels, height, width, channel_tiles, tiles_per_split,
    SIZE: tl.constexpr, DILATION: tl.constexpr, INPUTS: tl.constexpr, RELU: tl.constexpr,
    TAPS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = program % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    m = program // channel_tiles % INPUTS
    share = (program // channel_tiles // INPUTS).to(tl.int64)
    taps = tl.arange(0, TAPS)  # those past the last one are never stored
    shift_y = (taps // SIZE - SIZE // 2) * DILATION
    shift_x = (taps % SIZE - SIZE // 2) * DILATION
    total = tl.zeros((TAPS, PIXELS, CHANNELS), tl.float32)
    sum_of_grad = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for tile in range(share * tiles_per_split, (share + 1) * tiles_per_split):
        pixels = tile * PIXELS + tl.arange(0, PIXELS)  # numbered through all images
        image, y, x = pixels // (height * width), pixels // width % height, pixels % width
        own = (image < batch)[:, None] & (columns < channels)
        grad = tl.load(grad_ptr + image_offsets(image, columns, y, x, grad_stride), mask=own, other=0.0)
        grad = rectified(
            grad.to(tl.float32),
            rectified_ptr,
            image_offsets(image, columns, y, x, rectified_stride),
            own,
            RELU,
        )
        from_y, from_x = y + shift_y[:, None], x + shift_x[:, None]  # [TAPS, PIXELS]
        inside = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
        inside = inside & (taps < SIZE * SIZE)[:, None]
        offsets = image_offsets(image, columns * INPUTS + m, from_y, from_x, x_stride)
        value = tl.load(x_ptr + offsets, mask=inside[:, :, None] & own[None, :, :], other=0.0).to(tl.float32)
        total += value * grad[None, :, :]
        sum_of_grad += grad
    row = (share * channels + columns) * INPUTS + m
    places = weight_share_ptr + row[None, :] * (SIZE * SIZE) + taps[:, None]
    mask = (taps < SIZE * SIZE)[:, None] & (columns < channels)[None, :]
    tl.store(places, tl.sum(total, axis=1), mask=mask)
    if m == 0:
        sums = tl.sum(sum_of_grad, axis=0)
        tl.store(bias_share_ptr + share * channels + columns, sums, mask=columns < channels)

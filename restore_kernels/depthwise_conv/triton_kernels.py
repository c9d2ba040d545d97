"""Depthwise convolution in Triton: taps as shifted tiles, in place.

Images (B, C, H, W); a pixel is numbered through its image. Input m of a group comes from an image of its own,
so that joined images need not be one in memory. weight (C, M, k, k), bias and slope (C) in float32.

convolve_kernel      a program owns a tile [PIXELS, CHANNELS] of one image: it loads the tile once per tap,
                     moved, zero outside of the image, and writes the weighted sum once, activated and gated.
gradient_kernel      the same for an image of x from the gradient of the sums, with the taps reversed; with
                     RELU it drops what the zeros of the result rectified.
sum_gradient_kernel  a program makes its tile of the sums again, and from them and the result's gradient that
                     of the sums, which the other kernels then read, that of the gate, and one number per
                     channel of that of the slope.
tap_products_kernel  a program owns a share of the pixels of all images for CHANNELS channels, and adds up in
                     registers, for every tap, the products of the sums' gradient and the moved x. One share
                     per program: they are added afterwards, in their order.

PIXELS run along memory in contiguous images (CHANNELS 1), CHANNELS in channels_last ones, so that loads are
whole lines. All taps of a tile but the first find it in the first-level cache: from memory every tensor comes
once, which bounds the kernels: 2 passes over the image forward, 3 with a gate; backward 2 for each of the two
sums, and 3 to 5 before them for what is activated or gated. No GPU has been measured.
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
def normal_distribution(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def activated(x, slope, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = tl.where(x <= 0, 0.0, x)
    elif ACTIVATION == "gelu":
        x = x * normal_distribution(x)
    elif ACTIVATION == "prelu":
        x = tl.where(x > 0, x, x * slope)
    return x


@triton.jit
def through(grad, x, slope, ACTIVATION: tl.constexpr):
    """What the gradient of the activated x becomes for x."""
    if ACTIVATION == "relu":
        grad = tl.where(x <= 0, 0.0, grad)
    elif ACTIVATION == "gelu":
        density = tl.exp(-0.5 * x * x) * 0.3989422804014327
        grad = grad * (normal_distribution(x) + x * density)
    elif ACTIVATION == "prelu":
        grad = tl.where(x > 0, grad, grad * slope)
    return grad


@triton.jit
def own_tile(width, pixel_tiles, channel_tiles, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Image, y and x of the program's pixels, and its channels."""
    program = tl.program_id(0)
    pixels = program % pixel_tiles * PIXELS + tl.arange(0, PIXELS)
    columns = program // pixel_tiles % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    return program // pixel_tiles // channel_tiles, pixels // width, pixels % width, columns


@triton.jit
def weighted_taps(
    x_ptr, image, channels, y, x, stride, weight_ptr, exists, height, width,
    SIZE: tl.constexpr, DILATION: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The sum of these channels of x around every pixel; their weights begin at weight_ptr."""
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for tap in tl.static_range(SIZE * SIZE):
        from_y = y + (tap // SIZE - SIZE // 2) * DILATION
        from_x = x + (tap % SIZE - SIZE // 2) * DILATION
        inside = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
        offsets = image_offsets(image, channels, from_y, from_x, stride)
        value = tl.load(x_ptr + offsets, mask=inside[:, None] & exists, other=0.0).to(tl.float32)
        total += value * tl.load(weight_ptr + tap, mask=exists, other=0.0)
    return total


@triton.jit
def group_sums(
    x0_ptr, x1_ptr, x0_stride, x1_stride, weight_ptr, bias_ptr, image, columns, y, x, channels, height, width,
    SIZE: tl.constexpr, DILATION: tl.constexpr, INPUTS: tl.constexpr, BIAS: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The convolution of a tile, before activation and gate."""
    exists = columns < channels
    first = columns * INPUTS
    weights = weight_ptr + first * (SIZE * SIZE)
    total = weighted_taps(
        x0_ptr,
        image,
        first,
        y,
        x,
        x0_stride,
        weights,
        exists,
        height,
        width,
        SIZE,
        DILATION,
        PIXELS,
        CHANNELS,
    )
    if INPUTS == 2:
        weights += SIZE * SIZE
        total += weighted_taps(
            x1_ptr, image, first, y, x, x1_stride, weights, exists, height, width, SIZE, DILATION, PIXELS,
            CHANNELS,
        )  # fmt: skip
    if BIAS:
        total += tl.load(bias_ptr + columns, mask=exists, other=0.0)
    return total


@triton.jit
def convolve_kernel(
    x0_ptr, x1_ptr, gate_ptr, weight_ptr, bias_ptr, slope_ptr, out_ptr, x0_stride, x1_stride, gate_stride,
    out_stride, channels, height, width, pixel_tiles, channel_tiles,
    SIZE: tl.constexpr, DILATION: tl.constexpr, INPUTS: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    image, y, x, columns = own_tile(width, pixel_tiles, channel_tiles, PIXELS, CHANNELS)
    total = group_sums(
        x0_ptr, x1_ptr, x0_stride, x1_stride, weight_ptr, bias_ptr, image, columns, y, x, channels, height,
        width, SIZE, DILATION, INPUTS, BIAS, PIXELS, CHANNELS,
    )  # fmt: skip
    exists = columns < channels
    own = (y < height)[:, None] & exists
    slope = tl.load(slope_ptr + columns, mask=exists, other=0.0) if ACTIVATION == "prelu" else 0.0
    total = activated(total, slope, ACTIVATION)
    if GATE:
        offsets = image_offsets(image, columns, y, x, gate_stride)
        total *= tl.load(gate_ptr + offsets, mask=own, other=0.0).to(tl.float32)
    out = out_ptr + image_offsets(image, columns, y, x, out_stride)
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=own)


@triton.jit
def gradient_kernel(
    grad_ptr, rectified_ptr, weight_ptr, out_ptr, grad_stride, rectified_stride, out_stride,
    first, channels, height, width, pixel_tiles, channel_tiles,
    SIZE: tl.constexpr, DILATION: tl.constexpr, INPUTS: tl.constexpr, RELU: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    image, y, x, columns = own_tile(width, pixel_tiles, channel_tiles, PIXELS, CHANNELS)
    exists = columns < channels
    own = (y < height)[:, None] & exists
    source = (first + columns) // INPUTS
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for tap in tl.static_range(SIZE * SIZE):
        from_y = y + (tap // SIZE - SIZE // 2) * DILATION
        from_x = x + (tap % SIZE - SIZE // 2) * DILATION
        inside = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
        mask = inside[:, None] & own
        offsets = image_offsets(image, source, from_y, from_x, grad_stride)
        value = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        offsets = image_offsets(image, source, from_y, from_x, rectified_stride)
        value = rectified(value, rectified_ptr, offsets, mask, RELU)
        place = (first + columns) * (SIZE * SIZE) + SIZE * SIZE - 1 - tap
        total += value * tl.load(weight_ptr + place, mask=exists, other=0.0)
    out = out_ptr + image_offsets(image, columns, y, x, out_stride)
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=own)


@triton.jit
def sum_gradient_kernel(
    grad_ptr, x0_ptr, x1_ptr, gate_ptr, weight_ptr, bias_ptr, slope_ptr, out_ptr, grad_gate_ptr,
    slope_share_ptr, grad_stride, x0_stride, x1_stride, gate_stride, out_stride, grad_gate_stride,
    slope_share_stride, channels, height, width, pixel_tiles, channel_tiles,
    SIZE: tl.constexpr, DILATION: tl.constexpr, INPUTS: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, OF_GATE: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    image, y, x, columns = own_tile(width, pixel_tiles, channel_tiles, PIXELS, CHANNELS)
    exists = columns < channels
    own = (y < height)[:, None] & exists
    total = group_sums(
        x0_ptr, x1_ptr, x0_stride, x1_stride, weight_ptr, bias_ptr, image, columns, y, x, channels, height,
        width, SIZE, DILATION, INPUTS, BIAS, PIXELS, CHANNELS,
    )  # fmt: skip
    slope = tl.load(slope_ptr + columns, mask=exists, other=0.0) if ACTIVATION == "prelu" else 0.0
    offsets = image_offsets(image, columns, y, x, grad_stride)
    grad = tl.load(grad_ptr + offsets, mask=own, other=0.0).to(tl.float32)
    if OF_GATE:
        of_gate = grad_gate_ptr + image_offsets(image, columns, y, x, grad_gate_stride)
        value = grad * activated(total, slope, ACTIVATION)
        tl.store(of_gate, value.to(grad_gate_ptr.dtype.element_ty), mask=own)
    if GATE:
        offsets = image_offsets(image, columns, y, x, gate_stride)
        grad *= tl.load(gate_ptr + offsets, mask=own, other=0.0).to(tl.float32)
    if ACTIVATION == "prelu":
        share = image.to(tl.int64) * pixel_tiles + tl.program_id(0) % pixel_tiles
        of_slope = tl.sum(tl.where((total > 0) | (own == 0), 0.0, grad * total), axis=0)
        tl.store(slope_share_ptr + share * slope_share_stride + columns, of_slope, mask=exists)
    out = out_ptr + image_offsets(image, columns, y, x, out_stride)
    tl.store(out, through(grad, total, slope, ACTIVATION), mask=own)


@triton.jit
def tap_products_kernel(
    grad_ptr, rectified_ptr, x_ptr, weight_share_ptr, bias_share_ptr, grad_stride, rectified_stride, x_stride,
    weight_share_stride, bias_share_stride, batch, channels, height, width, channel_tiles, tiles_per_split,
    SIZE: tl.constexpr, DILATION: tl.constexpr, INPUTS: tl.constexpr, RELU: tl.constexpr, BIAS: tl.constexpr,
    TAPS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = program % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    share = (program // channel_tiles).to(tl.int64)
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
        offsets = image_offsets(image, columns * INPUTS, from_y, from_x, x_stride)
        value = tl.load(x_ptr + offsets, mask=inside[:, :, None] & own[None, :, :], other=0.0).to(tl.float32)
        total += value * grad[None, :, :]
        sum_of_grad += grad
    row = share * weight_share_stride + columns * (INPUTS * SIZE * SIZE)
    mask = (taps < SIZE * SIZE)[:, None] & (columns < channels)[None, :]
    tl.store(weight_share_ptr + row[None, :] + taps[:, None], tl.sum(total, axis=1), mask=mask)
    if BIAS:
        sums = tl.sum(sum_of_grad, axis=0)
        tl.store(bias_share_ptr + share * bias_share_stride + columns, sums, mask=columns < channels)

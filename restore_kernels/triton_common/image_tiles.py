"""Device functions for images (B, C, H, W) of any strides, whose pixels are numbered through."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pixel_offsets(pixels, width, stride, WHOLE: tl.constexpr):
    """Offsets of pixels of one channel. WHOLE: the rows of the image follow each other like its pixels."""
    if WHOLE:
        return pixels.to(tl.int64) * stride[3]
    else:
        return (pixels // width).to(tl.int64) * stride[2] + (pixels % width).to(tl.int64) * stride[3]


@triton.jit
def load_pixels(ptr, channels, channel_count, channel_stride, offsets, is_pixel):
    """These channels times the pixels at these offsets, zero outside. -> [len(channels), len(offsets)]"""
    pointers = ptr + channels.to(tl.int64)[:, None] * channel_stride + offsets[None, :]
    return tl.load(pointers, mask=(channels < channel_count)[:, None] & is_pixel[None, :], other=0.0)

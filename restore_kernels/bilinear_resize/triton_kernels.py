"""Bilinear resizing in Triton: every program owns consecutive elements of its result.

S is the bytes of the smaller image, L = 4 S those of the larger one.

                       reads                 writes
  double_kernel        S, residual           L        4 loads, 8 operations each
  gather_kernel        L                     S        16 loads: the gradient of the smaller image
  halve_kernel         L, residual           S        4 loads
  spread_kernel        S                     L        1 load: the gradient of the larger image

What neighbours load again comes from the L1 cache. Memory bounds all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def own_places(elements, channels, height, width, BLOCK: tl.constexpr):
    """Image, channel, row and column of this program's elements, and which of them exist."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    plane = n // (height * width)
    return plane // channels, plane % channels, n // width % height, n % width, n < elements


@triton.jit
def offset(b, c, y, x, stride):
    """Of these elements of an image with these strides."""
    return b * stride[0] + c * stride[1] + y * stride[2] + x * stride[3]


@triton.jit
def store_sum(total, residual_ptr, out_ptr, residual_stride, out_stride, b, c, y, x, mask):
    """Stores these elements of the result, the residual added."""
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offset(b, c, y, x, residual_stride), mask=mask, other=0.0)
        total += residual.to(tl.float32)
    tl.store(out_ptr + offset(b, c, y, x, out_stride), total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def double_kernel(
    x_ptr, residual_ptr, out_ptr, x_stride, residual_stride, out_stride,
    elements, channels, height, width, x_height, x_width, BLOCK: tl.constexpr,
):  # fmt: skip
    b, c, row, column, mask = own_places(elements, channels, height, width, BLOCK)
    y, x = row // 2, column // 2
    beside_y = tl.minimum(tl.maximum(y + row % 2 * 2 - 1, 0), x_height - 1)
    beside_x = tl.minimum(tl.maximum(x + column % 2 * 2 - 1, 0), x_width - 1)
    plane = x_ptr + b * x_stride[0] + c * x_stride[1]
    near, far = plane + y * x_stride[2], plane + beside_y * x_stride[2]
    total = 9 * tl.load(near + x * x_stride[3], mask=mask, other=0.0).to(tl.float32)
    total += 3 * tl.load(near + beside_x * x_stride[3], mask=mask, other=0.0).to(tl.float32)
    total += 3 * tl.load(far + x * x_stride[3], mask=mask, other=0.0).to(tl.float32)
    total += tl.load(far + beside_x * x_stride[3], mask=mask, other=0.0).to(tl.float32)
    total *= 1 / 16
    store_sum(total, residual_ptr, out_ptr, residual_stride, out_stride, b, c, row, column, mask)


@triton.jit
def gather_kernel(
    grad_ptr, out_ptr, grad_stride, out_stride,
    elements, channels, height, width, grad_height, grad_width, BLOCK: tl.constexpr,
):  # fmt: skip
    b, c, y, x, mask = own_places(elements, channels, height, width, BLOCK)
    plane = grad_ptr + b * grad_stride[0] + c * grad_stride[1]
    total = tl.zeros([BLOCK], tl.float32)
    for dy in tl.static_range(-1, 3):
        # The outermost pixels stand for those beyond them; of a larger image that was cut, some are missing.
        # Along each side the nearest two, at 0 and 1, weigh 3/4 and the others 1/4.
        row = tl.minimum(tl.maximum(2 * y + dy, 0), 2 * height - 1)
        for dx in tl.static_range(-1, 3):
            column = tl.minimum(tl.maximum(2 * x + dx, 0), 2 * width - 1)
            grad = tl.load(
                plane + row * grad_stride[2] + column * grad_stride[3],
                mask=mask & (row < grad_height) & (column < grad_width), other=0.0,
            )  # fmt: skip
            total += (3 if dy * dy == dy else 1) * (3 if dx * dx == dx else 1) * grad.to(tl.float32)
    store_sum(total * (1 / 16), None, out_ptr, out_stride, out_stride, b, c, y, x, mask)


@triton.jit
def halve_kernel(
    x_ptr, residual_ptr, out_ptr, x_stride, residual_stride, out_stride,
    elements, channels, height, width, x_height, x_width, BLOCK: tl.constexpr,
):  # fmt: skip
    b, c, y, x, mask = own_places(elements, channels, height, width, BLOCK)
    plane = x_ptr + b * x_stride[0] + c * x_stride[1]
    total = tl.zeros([BLOCK], tl.float32)
    for dy in tl.static_range(2):
        row = tl.minimum(2 * y + dy, x_height - 1)
        for dx in tl.static_range(2):
            column = tl.minimum(2 * x + dx, x_width - 1)
            total += tl.load(
                plane + row * x_stride[2] + column * x_stride[3], mask=mask, other=0.0
            ).to(tl.float32)  # fmt: skip
    total *= 1 / 4
    store_sum(total, residual_ptr, out_ptr, residual_stride, out_stride, b, c, y, x, mask)


@triton.jit
def spread_kernel(
    grad_ptr, out_ptr, grad_stride, out_stride,
    elements, channels, height, width, BLOCK: tl.constexpr,
):  # fmt: skip
    b, c, row, column, mask = own_places(elements, channels, height, width, BLOCK)
    places = offset(b, c, row // 2, column // 2, grad_stride)
    grad = tl.load(grad_ptr + places, mask=mask, other=0.0).to(tl.float32) * (1 / 4)
    # The last of an odd side was averaged alone.
    grad *= tl.where((row == height - 1) & (height % 2 == 1), 2.0, 1.0)
    grad *= tl.where((column == width - 1) & (width % 2 == 1), 2.0, 1.0)
    store_sum(grad, None, out_ptr, out_stride, out_stride, b, c, row, column, mask)

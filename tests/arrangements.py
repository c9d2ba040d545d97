"""Tensors of the same values in different places of memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Arrangement:
    """How a tensor (B, H, R, L) lies in memory.

    Attributes:
        order: its dimensions from the outermost to the innermost.
        sliced: the dimension whose stride is three times what it need be, as in one of three slices.
        step: the innermost stride.
        offset: of its first element; the base is 64-byte aligned.
        shared: the dimension of stride 0.
    """

    order: tuple[int, ...] = (0, 1, 2, 3)
    sliced: int | None = None
    step: int = 1
    offset: int = 0
    shared: int | None = None


ARRANGEMENTS = {
    "contiguous": Arrangement(),
    "qkv_slice": Arrangement(sliced=0),
    "pixel_major": Arrangement(order=(0, 3, 1, 2)),
    "pixel_major_qkv_slice": Arrangement(order=(0, 3, 1, 2), sliced=3),
    "token_major_qkv_slice": Arrangement(order=(0, 2, 1, 3), sliced=2),
    "transposed": Arrangement(order=(0, 1, 3, 2)),
    "batch_inside_heads": Arrangement(order=(1, 2, 0, 3)),
    "every_other_element": Arrangement(step=2),
    "unaligned": Arrangement(offset=1),
    "shared_by_batch": Arrangement(shared=0),
    "shared_by_heads": Arrangement(shared=1),
    "constant_along_rows": Arrangement(shared=3),
}
# Of an image (B, C, H, W) besides; the rest are of any four dimensions.
IMAGE_ARRANGEMENTS = ARRANGEMENTS | {
    "channels_last": Arrangement(order=(0, 2, 3, 1)),
    "channels_last_slice": Arrangement(order=(0, 2, 3, 1), sliced=3),
    "crop": Arrangement(sliced=2),
}
MARGIN = 64  # elements


def arrange(values: Tensor, name: str) -> Tensor:
    """A tensor of these values (B, H, R, L), or (B, R, L), that lies in memory as named.

    NaN fills the memory around and between its elements, so that a kernel that reads what is not
    its own shows it. Along a shared dimension the first slice's values stand for all.
    """
    if values.dim() == 3:
        return arrange(values.unsqueeze(1), name).squeeze(1)
    arrangement, shape = IMAGE_ARRANGEMENTS[name], values.shape
    if arrangement.shared is not None:
        values = values.narrow(arrangement.shared, 0, min(1, shape[arrangement.shared]))
    strides, stride = [0] * 4, arrangement.step
    for dim in reversed(arrangement.order):
        stride *= 3 if dim == arrangement.sliced else 1
        strides[dim] = stride
        stride *= values.shape[dim]
    memory = values.new_full((2 * MARGIN + stride + arrangement.offset,), float("nan"))
    placed = memory.as_strided(values.shape, strides, MARGIN + arrangement.offset).copy_(values)
    return placed.expand(shape)

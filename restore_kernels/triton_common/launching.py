"""What every launcher needs: devices, grids, block sizes, and how precisely to multiply."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows shorter than this are multiplied in float32 throughout. The gradients of normalised rows are
# what is left of larger terms that cancel, all but a share 1 / length of them in the mean, and the
# similarities of the shortest rows are equal often enough (±1 at length 1) to be wanted exactly.
SHORT = 16
UNBOUNDED = 1 << 30

# Left alone, the assembler spills a few bytes where that makes room for one more block.
NO_SPILLS = {"maxnreg": 255}


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes x's GPU the current one: Triton launches there. The interpreter has no devices."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def launch(kernel: Any, programs: int, *args: Any, num_warps: int = 4, **constants: Any) -> None:
    """Runs the kernel on a one-dimensional grid; an empty grid is nothing to do."""
    if programs > 0:
        # Fused multiply-add is the rule of these kernels; the default differs between versions.
        kernel[(programs,)](*args, **constants, num_warps=num_warps, enable_fp_fusion=True)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; for the interpreter a small number, so that small problems are split too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def capability(device: torch.device) -> int:
    """Major compute capability of the GPU; the interpreter stands in for a Hopper."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def split(tiles: int, programs: int, device: torch.device) -> tuple[int, int]:
    """Tiles per split and splits of a sum over so many tiles, which so many programs would make alone.

    As many splits as keep the GPU busy; fewer than four tiles would write more than they read.
    """
    wanted = triton.cdiv(2 * multiprocessors(device), max(1, programs))
    tiles_per_split = max(4, triton.cdiv(tiles, wanted))
    return tiles_per_split, max(1, triton.cdiv(tiles, tiles_per_split))


def block(size: int, largest: int) -> int:
    """The power of two from 16 (the least a matrix instruction takes) to largest that covers size."""
    return min(max(16, triton.next_power_of_2(size)), largest)


def is_whole(x: Tensor) -> bool:
    """Whether one stride leads from pixel to pixel through the whole image."""
    height, width = x.shape[2:]
    return width == 1 or height == 1 or x.stride(2) == width * x.stride(3)


def image_strides(x: Tensor, whole: bool) -> tuple[int, ...]:
    """Of batch, channel, row and pixel; where the image is whole its last one leads through all of it."""
    batch, channel, row, pixel = x.stride()
    return batch, channel, row, row if whole and x.shape[3] == 1 else pixel


def operand(dtype: torch.dtype, length: int) -> torch.dtype:
    """dtype of the small matrices that multiply rows of this length and dtype."""
    return torch.float32 if length < SHORT else dtype


def precision(dtype: torch.dtype, length: int) -> str:
    """Of products with rows of this length: three tf32 products on the tensor cores instead of
    float32 multiply-adds, which are as accurate. Products of the other dtypes are exact."""
    return "tf32x3" if dtype == torch.float32 and length >= SHORT else "ieee"


def computed_operand(dtype: torch.dtype, length: int) -> tuple[torch.dtype, str]:
    """dtype and precision of products whose operands are computed: gradients, gated rows.

    float16 has not the range of gradients over norms or of products with a mask; its own values are
    exact in tf32.
    """
    if dtype == torch.float16 and length >= SHORT:
        return torch.float32, "tf32"
    return operand(dtype, length), precision(dtype, length)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))

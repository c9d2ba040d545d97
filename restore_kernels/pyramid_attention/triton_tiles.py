"""Tile shapes of the Triton kernels of pyramid attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from restore_kernels.triton_common.launching import NO_SPILLS, block
from restore_kernels.triton_common.token_launch import takes_64_rows


@dataclass(frozen=True)
class Tile:
    """What a program works on.

    Attributes:
        owned, streamed: rows that it owns, and rows of the other side that it takes at a time.
        chunk: numbers of the patches that it multiplies at a time.
        sums: numbers of its patches that it sums, in two parts.
        keeps: whether it keeps its patches of query or keys at hand; then it multiplies them whole.
    """

    owned: int
    streamed: int
    warps: int
    chunk: int
    sums: tuple[int, int] = (0, 0)
    keeps: bool = False

    def options(self) -> dict[str, Any]:
        blocks = {"BLOCK_N": self.owned, "BLOCK_M": self.streamed}
        return {**blocks, "num_warps": self.warps, "num_stages": 2, **NO_SPILLS}


# The largest that fit into registers and shared memory, by kind of kernel. First of float32; then of 16-bit
# operands, whose patches of at most _KEPT numbers (those of the networks) may be kept; then longer ones. In
# each, first of GPUs whose matrix instructions take 64 rows.
_KEPT = 288
_TILES_OF_FLOAT32 = {
    True: {
        "statistics": Tile(64, 64, 8, 32),
        "row_sums": Tile(64, 32, 8, 32),
        **dict.fromkeys(("mixture", "selection", "gradient"), Tile(64, 32, 8, 32, (128, 16))),
    },
    False: {
        "statistics": Tile(64, 32, 8, 32),
        "row_sums": Tile(32, 32, 4, 32),
        **dict.fromkeys(("mixture", "selection", "gradient"), Tile(32, 32, 4, 32, (64, 0))),
    },
}
_TILES = {
    True: {
        "statistics": Tile(128, 64, 8, 64, keeps=True),
        "mixture": Tile(128, 64, 8, 64, (256, 32), keeps=True),
        "selection": Tile(64, 32, 8, 64, (256, 32)),
        "row_sums": Tile(128, 64, 8, 64, keeps=True),
        "gradient": Tile(128, 32, 8, 64, (256, 32), keeps=True),
    },
    False: {
        "statistics": Tile(64, 64, 4, 64, keeps=True),
        "mixture": Tile(64, 32, 8, 64, (128, 64), keeps=True),
        "selection": Tile(64, 32, 8, 64, (128, 64)),
        "row_sums": Tile(64, 32, 8, 64),
        "gradient": Tile(64, 32, 8, 64, (128, 16)),
    },
}
_TILES_OF_LONG_PATCHES = {
    True: {
        "statistics": Tile(64, 64, 8, 32),
        "selection": Tile(64, 32, 8, 64, (256, 32)),
        "row_sums": Tile(64, 32, 8, 32),
        **dict.fromkeys(("mixture", "gradient"), Tile(64, 32, 8, 32, (128, 64))),
    },
    False: {
        "statistics": Tile(64, 64, 4, 64),
        "row_sums": Tile(64, 32, 8, 64),
        **dict.fromkeys(("mixture", "selection", "gradient"), Tile(64, 32, 8, 64, (128, 16))),
    },
}


def padded_channels(channels: int) -> int:
    """Channels of a padded image: 16 bytes of 16-bit numbers, or a multiple of them."""
    return triton.cdiv(channels, 8) * 8


def pieces(length: int) -> tuple[int, int]:
    """Two powers of two, 16 at least or no second one, that cover so many numbers closely."""
    large = max(16, 1 << (length.bit_length() - 1))
    if length <= large:
        return large, 0
    small = block(length - large, large)
    return (large, small) if small < large else (2 * large, 0)


def tiles_for(x: Tensor, dtype: torch.dtype, length: int) -> dict[str, Tile]:
    """By kind of kernel: on x's GPU, of operands of this dtype, patches of query and keys of this length."""
    if dtype == torch.float32:
        tables = _TILES_OF_FLOAT32
    else:
        tables = _TILES if length <= _KEPT else _TILES_OF_LONG_PATCHES
    return dict(tables[takes_64_rows(x)])

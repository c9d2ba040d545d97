"""Tile shapes and precisions of the token kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from restore_kernels.triton_common.launching import SHORT, UNBOUNDED, block, capability, precision


def takes_64_rows(x: Tensor) -> bool:
    """Whether the matrix instructions of x's GPU do: Hopper's and data-center Blackwell's."""
    return 9 <= capability(x.device) <= 11


def _score_tile(q: Tensor, length: int, selects: bool) -> tuple[int, int, int]:
    """Queries, keys and warps of a tile whose gradients, rows of this length, stay in registers.

    Instructions that take 64 rows take at least one operand from shared memory, which leaves registers
    for larger tiles. Operands of float32 are split in two for every product.
    """
    if q.dtype == torch.float32:
        return (16, 32, 4) if length <= 64 else (16, 16, 8)
    if length <= (64 if takes_64_rows(q) else 32):
        # Beside a selection, gradients of float16's scores, which are float32 (computed_operand), leave no
        # room for 64 queries. Keys are as many as ever: windows fit one tile.
        return 32 if selects and q.dtype == torch.float16 and length > 32 else 64, 64, 8
    return (32, 32, 8) if length <= 128 else (16, 16, 4)


@dataclass(frozen=True)
class TokenTiles:
    """Tile shapes and precisions of every kernel of a call and of its backward.

    Kernels that repeat a selection by comparing recomputed scores must agree in them.
    """

    constants: dict[str, Any]
    row_tiles: int
    key_tiles: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, normalize: bool, selects: bool = False) -> TokenTiles:
        (batch, heads, queries, depth), (keys, width) = q.shape, v.shape[2:]
        block_d, block_e = block(depth, UNBOUNDED), block(width, UNBOUNDED)
        rows, columns, warps = _score_tile(q, max(block_d, block_e), selects)
        block_n, block_m = block(queries, rows), block(keys, columns)
        constants = {
            "NORMALIZE": normalize, "PRECISE": depth < SHORT, "PRECISION": precision(q.dtype, depth),
            "BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_D": block_d, "num_warps": warps,
        }  # fmt: skip
        matrices = batch * heads
        return cls(constants, matrices * triton.cdiv(queries, block_n), matrices * triton.cdiv(keys, block_m))

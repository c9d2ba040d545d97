"""The operators of bilinear resizing as ``ops.py`` describes them, as matrices in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from restore_kernels.tensors import accumulate_dtype, memory_format


def as_image(x: Tensor, like: Tensor) -> Tensor:
    """x in the dtype and memory format that the operator promises for a result like ``like``."""
    return torch.empty_like(x, dtype=like.dtype, memory_format=memory_format(like)).copy_(x)


def doubling(size: int, small: int) -> Tensor:
    """(size, small): what every pixel of a doubled side is made of."""
    matrix = torch.zeros(size, small, dtype=torch.float64)
    for i in range(size):
        for place, weight in ((i // 2, 0.75), (i // 2 + (1 if i % 2 else -1), 0.25)):
            matrix[i, min(max(place, 0), small - 1)] += weight
    return matrix


def halving(small: int, size: int) -> Tensor:
    """(small, size): what every pixel of a halved side is the average of."""
    matrix = torch.zeros(small, size, dtype=torch.float64)
    for i in range(size):
        matrix[i // 2, i] = 1
    return matrix / matrix.sum(1, keepdim=True)


def sides(doubles: bool, target: tuple[int, int], source: tuple[int, int]) -> tuple[Tensor, Tensor]:
    make = doubling if doubles else halving
    return make(target[0], source[0]), make(target[1], source[1])


def bilinear_resize(x: Tensor, residual: Tensor | None, doubles: bool, height: int, width: int) -> Tensor:
    wide = x.to(accumulate_dtype(x.dtype))
    rows, columns = (matrix.to(wide) for matrix in sides(doubles, (height, width), tuple(x.shape[2:])))
    out = rows @ wide @ columns.mT
    return as_image(out if residual is None else out + residual.to(wide.dtype), x)


def backward(grad_out: Tensor, doubles: bool, height: int, width: int) -> Tensor:
    wide = grad_out.to(accumulate_dtype(grad_out.dtype))
    rows, columns = (matrix.to(wide) for matrix in sides(doubles, tuple(wide.shape[2:]), (height, width)))
    return as_image(rows.mT @ wide @ columns, grad_out)

"""Checks of tensor arguments, with messages that name the argument, what it must be and what it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floating_tensor(name: str, x: Any, dims: Sequence[str]) -> None:
    """A tensor of a supported floating dtype with one dimension per name in dims."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {_dtype(x)}")
    if x.dim() != len(dims):
        raise ValueError(f"{name} must have shape ({', '.join(dims)}); got {tuple(x.shape)}")


def like(name: str, x: Any, q: Tensor, shape: tuple[int, ...], *, same_dtype: bool = True) -> None:
    """A tensor of this shape on q's device and, unless autocast will cast it, of q's dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} to fit q {tuple(q.shape)}; got {tuple(x.shape)}")
    if same_dtype and x.dtype != q.dtype:
        raise TypeError(f"{name} must have q's dtype {_dtype(q)}; got {_dtype(x)}")
    _same_device(name, x, q)


def broadcastable(name: str, x: Any, q: Tensor, shape: tuple[int, ...]) -> None:
    """A floating tensor on q's device that broadcasts to shape."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {_dtype(x)}")
    fits = x.dim() <= len(shape) and all(
        have in (1, want) for have, want in zip(reversed(x.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"{name} must broadcast to {shape}; got {tuple(x.shape)}")
    _same_device(name, x, q)


def _same_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}; got {x.device}")


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")

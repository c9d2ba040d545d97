"""Checks of tensor arguments, with messages that name the argument, what it must be and what it is.

Also what autocast makes of them, which is what is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def autocast(q: Any, *others: Any) -> tuple[Any, ...]:
    """The arguments as autocast, where it is on, casts those of a matrix product; all else passes."""
    if not isinstance(q, Tensor) or q.is_meta or not torch.is_autocast_enabled(q.device.type):
        return (q, *others)
    dtype = torch.get_autocast_dtype(q.device.type)
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in narrow else x for x in (q, *others))


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A block in which operations keep the dtypes they are given."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def floating_tensor(name: str, x: Any, dims: Sequence[str]) -> None:
    """A tensor of a supported floating dtype with one dimension per name in dims; only B may be 0."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {_dtype(x)}")
    if x.dim() != len(dims):
        raise ValueError(f"{name} must have shape ({', '.join(dims)}); got {tuple(x.shape)}")
    if any(size == 0 for dim, size in zip(dims, x.shape, strict=True) if dim != "B"):
        raise ValueError(f"{name} must have no empty dimension but the batch; got {tuple(x.shape)}")


def like(name: str, x: Any, q: Tensor, shape: tuple[int, ...]) -> None:
    """A tensor of this shape, of q's dtype and on q's device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} to fit q {tuple(q.shape)}; got {tuple(x.shape)}")
    if x.dtype != q.dtype:
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

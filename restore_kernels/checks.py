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
MOST_IMAGES = 8  # that an operator joins


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
        raise TypeError(f"{name} must be {_names(FLOATING)}; got {_name(x.dtype)}")
    if x.dim() != len(dims):
        raise ValueError(f"{name} must have shape ({', '.join(dims)}); got {tuple(x.shape)}")
    if any(size == 0 for dim, size in zip(dims, x.shape, strict=True) if dim != "B"):
        raise ValueError(f"{name} must have no empty dimension but the batch; got {tuple(x.shape)}")


def as_images(x: Any) -> tuple[Any, ...]:
    """An image, or several to be joined along channels, as several."""
    return tuple(x) if isinstance(x, (list, tuple)) else (x,)


def joined_images(name: str, images: Sequence[Any]) -> int:
    """1 to MOST_IMAGES images (B, C_i, H, W) that differ in C_i alone; returns their channels together."""
    if not 1 <= len(images) <= MOST_IMAGES:
        raise ValueError(f"{name} must be 1 to {MOST_IMAGES} images; got {len(images)}")
    for i, image in enumerate(images):
        own = name if len(images) == 1 else f"{name}[{i}]"
        floating_tensor(own, image, ("B", "C", "H", "W"))
        batch, _, *size = images[0].shape
        like(own, image, images[0], (batch, image.shape[1], *size), f"{name}[0]")
    return sum(image.shape[1] for image in images)


def like(name: str, x: Any, q: Tensor, shape: tuple[int, ...], q_name: str = "q") -> None:
    """A tensor of this shape, of q's dtype and on q's device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if tuple(x.shape) != shape:
        raise ValueError(
            f"{name} must have shape {shape} to fit {q_name} {tuple(q.shape)}; got {tuple(x.shape)}"
        )
    if x.dtype != q.dtype:
        raise TypeError(f"{name} must have {q_name}'s dtype {_name(q.dtype)}; got {_name(x.dtype)}")
    _same_device(name, x, q, q_name)


def broadcastable(
    name: str, x: Any, q: Tensor, shape: tuple[int, ...], dtypes: Sequence[torch.dtype] = FLOATING
) -> None:
    """A tensor of one of the dtypes on q's device that broadcasts to shape."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {_names(dtypes)}; got {_name(x.dtype)}")
    fits = x.dim() <= len(shape) and all(
        have in (1, want) for have, want in zip(reversed(x.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"{name} must broadcast to {shape}; got {tuple(x.shape)}")
    _same_device(name, x, q)


def parameter(name: str, x: Any, image: Tensor, shape: tuple[int, ...]) -> None:
    """A tensor of this shape, of any supported dtype, on the device of the image x."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be {_names(FLOATING)}; got {_name(x.dtype)}")
    if tuple(x.shape) != shape:
        raise ValueError(
            f"{name} must have shape {shape} to fit x {tuple(image.shape)}; got {tuple(x.shape)}"
        )
    _same_device(name, x, image, "x")


def attention_inputs(q: Any, k: Any, v: Any, layout: Any) -> int:
    """q, k and v of an attention operator; returns the length of a row of similarities."""
    if layout not in ("channel", "token"):
        raise ValueError(f"layout must be 'channel' or 'token'; got {layout!r}")
    if layout == "channel":
        floating_tensor("q", q, ("B", "H", "C", "N"))
        like("k", k, q, tuple(q.shape))
        like("v", v, q, tuple(q.shape))
        return q.shape[2]
    floating_tensor("q", q, ("B", "H", "N", "D"))
    batch, heads, _, depth = q.shape
    floating_tensor("k", k, ("B", "H", "M", "D"))
    keys = k.shape[2]
    like("k", k, q, (batch, heads, keys, depth))
    floating_tensor("v", v, ("B", "H", "M", "E"))
    like("v", v, q, (batch, heads, keys, v.shape[3]))
    return keys


def temperature(x: Any, q: Tensor) -> None:
    """None, a number, or a tensor with one per head."""
    if isinstance(x, Tensor):
        broadcastable("temperature", x, q, (*q.shape[:2], 1, 1))
    elif x is not None and not isinstance(x, (int, float)):
        raise TypeError(f"temperature must be a number or a tensor; got {type(x).__name__}")


def out_proj(x: Any, q: Tensor, layout: str) -> None:
    """None, or the weight of an output projection of the channel layout."""
    if x is None:
        return
    if layout == "token":
        raise ValueError("out_proj is for layout='channel'; got layout='token'")
    floating_tensor("out_proj", x, ("C_out", "H * C"))
    like("out_proj", x, q, (x.shape[0], q.shape[1] * q.shape[2]))


def _same_device(name: str, x: Tensor, q: Tensor, q_name: str = "q") -> None:
    if x.device != q.device:
        raise ValueError(f"{name} must be on {q_name}'s device {q.device}; got {x.device}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    *names, last = map(_name, dtypes)
    return f"{', '.join(names)} or {last}"

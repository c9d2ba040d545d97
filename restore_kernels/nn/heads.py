"""Images and their channels in heads, as attention takes them."""

from __future__ import annotations

from torch import Tensor


def check_heads(dim: int, heads: int) -> None:
    if dim < 1 or heads < 1 or dim % heads:
        raise ValueError(f"dim must be a positive multiple of heads; got dim={dim}, heads={heads}")


def check_image(name: str, x: Tensor, dim: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if x.dim() != 4 or x.shape[1] != dim:
        raise ValueError(f"{name} must have shape (B, {dim}, H, W); got {tuple(x.shape)}")


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, heads * C, H, W) -> (B, heads, C, H * W)."""
    return x.flatten(2).unflatten(1, (heads, -1))


def as_image(out: Tensor, like: Tensor, bias: Tensor | None) -> Tensor:
    """(B, dim, H * W) -> (B, dim, H, W), plus the bias of the output projection."""
    out = out.unflatten(2, like.shape[2:])
    return out if bias is None else out + bias[:, None, None].to(out.dtype)

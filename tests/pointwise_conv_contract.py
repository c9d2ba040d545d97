"""The operators of pointwise convolution as ``ops.py`` describes them, as formulas in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from restore_kernels.tensors import accumulate_dtype, memory_format


def as_image(x: Tensor, like: Tensor) -> Tensor:
    """x in the dtype and memory format that the operator promises for a result like ``like``."""
    return torch.empty_like(x, dtype=like.dtype, memory_format=memory_format(like)).copy_(x)


def together(images: Sequence[Tensor]) -> Tensor:
    """(B, C_i, H, W) -> (B, C, H * W) in the accumulation dtype."""
    return torch.cat(list(images), dim=1).flatten(2).to(accumulate_dtype(images[0].dtype))


def pointwise_conv(x: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    pixels = together(x)
    out = weight.flatten(-3).to(pixels.dtype) @ pixels
    if bias is not None:
        out = out + bias[:, None].to(pixels.dtype)
    return as_image(out.unflatten(2, x[0].shape[2:]), x[0])


def backward(
    grad_out: Tensor, x: Sequence[Tensor], weight: Tensor, wanted: Sequence[bool]
) -> tuple[list[Tensor], Tensor, Tensor]:
    pixels, grad = together(x), together([grad_out])
    grad_pixels = weight.flatten(-3).to(grad.dtype).mT @ grad
    parts = grad_pixels.unflatten(2, grad_out.shape[2:]).split([image.shape[1] for image in x], dim=1)
    products = grad @ pixels.mT  # (B, C_out, C)
    grad_weight = (products if weight.dim() == 5 else products.sum(0)).reshape(weight.shape)
    of_images = [as_image(part, image) for part, image in zip(parts, x, strict=True)]
    return of_images, grad_weight.to(weight.dtype), grad.sum((0, 2)).to(weight.dtype)

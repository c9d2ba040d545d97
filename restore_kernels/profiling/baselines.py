"""The operators as published code computes them: what the kernels are compared with.

Eager PyTorch, one statement per step of the published networks. Also the reference point of
``torch.compile`` comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def published_topk_attention(
    q: Tensor, k: Tensor, v: Tensor, topk: Sequence[int | None], weights: Tensor, temperature: Tensor | float,
    out_proj: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Normalise, multiply, then for every branch: topk, scatter a mask, where, softmax, multiply.

    Serves both layouts: in each, rows are normalised along the last dimension and S = q kᵀ.

    Args:
        q, k, v: (B, H, R, L), (B, H, S, L), (B, H, S, E).
        topk: entries kept by each branch, None for all.
        weights: (J,), one per branch.
        temperature: broadcastable to (B, H, 1, 1).
        out_proj: (C_out, H * R), the 1x1 convolution that follows in the channel layout.
    """
    scores = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)) * temperature
    out = torch.zeros((), dtype=v.dtype, device=v.device)
    for j, kept in enumerate(topk):
        branch = scores
        if kept is not None:
            mask = torch.zeros_like(scores, requires_grad=False)
            mask.scatter_(-1, torch.topk(scores, k=kept, dim=-1, largest=True).indices, 1.0)
            branch = torch.where(mask > 0, scores, torch.full_like(scores, float("-inf")))
        out = out + (branch.softmax(dim=-1) @ v) * weights[j]
    if out_proj is not None:
        out = F.conv1d(out.flatten(1, 2), out_proj[..., None])
    return out


def published_masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, temperature: Tensor, normalize: bool = True,
    layout: str = "channel", out_proj: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Gate or weigh by the mask, normalise, multiply, softmax, multiply: one statement per step.

    Arguments are those of ``restore_kernels.masked_attention``; the mask of the token layout is positive.
    """
    if mask is not None and layout == "channel":
        k, v = k * mask, v * mask
    if normalize:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    scores = (q @ k.transpose(-2, -1)) * temperature
    if mask is not None and layout == "token":
        scores = scores + mask.log().unsqueeze(-2)
    out = scores.softmax(dim=-1) @ v
    if out_proj is not None:
        out = F.conv1d(out.flatten(1, 2), out_proj[..., None])
    return out


def published_pyramid_attention(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], *, patch_size: int = 3,
    softmax_scale: float = 10.0, eps: float = 1e-4, out_scale: float = 0.25, hard: bool = False,
) -> Tensor:  # fmt: skip
    """Image by image: unfold key patches to filters, normalise, convolve, softmax, transposed convolution.

    Arguments are those of ``restore_kernels.pyramid_attention``.
    """
    images = []
    for i in range(len(query)):
        filters = torch.cat([_filters(key[i : i + 1], patch_size) for key in keys])
        norms = torch.linalg.vector_norm(filters, dim=(1, 2, 3), keepdim=True).clamp(min=eps)
        scores = F.conv2d(query[i : i + 1], filters / norms, padding=patch_size // 2)  # (1, L, H, W)
        if hard:
            best = scores.argmax(dim=1, keepdim=True)
            probabilities = torch.zeros_like(scores).scatter_(1, best, 1.0)
        else:
            probabilities = (scores * softmax_scale).softmax(dim=1)
        filters = torch.cat([_filters(value[i : i + 1], patch_size) for value in values])
        images.append(F.conv_transpose2d(probabilities, filters, padding=patch_size // 2) * out_scale)
    return torch.cat(images)


def _filters(x: Tensor, size: int) -> Tensor:
    """The zero-padded patches around all pixels of x (1, C, H, W): (H * W, C, size, size)."""
    return F.unfold(x, size, padding=size // 2)[0].T.unflatten(1, (x.shape[1], size, size))


def published_depthwise_conv(
    x: Tensor, weight: Tensor, slope: Tensor | None = None, gate: Tensor | None = None, *,
    dilation: int, activation: str | None,
) -> Tensor:  # fmt: skip
    """The library's grouped convolution: a group per output, the padding that keeps the size; then its
    activation, then the product with the gate."""
    padding = dilation * (weight.shape[-1] // 2)
    out = F.conv2d(x, weight, padding=padding, dilation=dilation, groups=weight.shape[0])
    if activation == "prelu":
        assert slope is not None
        out = F.prelu(out, slope)
    elif activation is not None:
        out = {"relu": F.relu, "gelu": F.gelu}[activation](out)
    return out if gate is None else out * gate


def published_dense_conv(x: Tensor, weight: Tensor) -> Tensor:
    """The library's convolution."""
    return F.conv2d(x, weight, padding=1)


def published_pointwise_conv(images: Sequence[Tensor], weight: Tensor) -> Tensor:
    """The library's convolution of the images written together."""
    return F.conv2d(images[0] if len(images) == 1 else torch.cat(list(images), dim=1), weight)


def published_channel_gate(
    x: Tensor, down: Tensor, up: Tensor, down_bias: Tensor, up_bias: Tensor, residual: Tensor
) -> Tensor:
    """Pool, convolve, rectify, convolve, sigmoid, multiply, add: one statement per step."""
    pooled = F.adaptive_avg_pool2d(x, 1)
    hidden = F.relu(F.conv2d(pooled, down, down_bias))
    gate = torch.sigmoid(F.conv2d(hidden, up, up_bias))
    return x * gate + residual


def published_bilinear_resize(x: Tensor, scale_factor: float, residual: Tensor) -> Tensor:
    """The library's resizing, or pooling, and an addition."""
    if scale_factor == 2:
        return F.interpolate(x, scale_factor=2.0, mode="bilinear") + residual
    return F.avg_pool2d(x, 2, ceil_mode=True) + residual


def published_channel_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The library's layer normalisation, between two changes of the order of dimensions."""
    normalised = F.layer_norm(x.flatten(2).transpose(1, 2), weight.shape, weight, bias)
    return normalised.transpose(1, 2).reshape(x.shape)

"""Attention from one image to another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from restore_kernels.masked_attention import masked_attention
from restore_kernels.nn.convolutions import DepthwiseConv2d, PointwiseConv2d
from restore_kernels.nn.heads import as_image, check_heads, check_image, split_heads


class MultiInputAttention(nn.Module):
    """Channel attention from one image's features to another's, under an optional mask.

    Source: the multi-input attention module of association learning (arXiv 2311.05147), with the
    state-dict keys of the released ELF: q, k and v are depthwise 3x3 convolutions of three inputs.
    There, the queries come from the predicted degradation, keys and values from the degraded image.

    Args:
        dim: channels of the images; a multiple of heads.
        heads: number of heads.
        bias: whether the convolutions have a bias.

    Shape: q, k, v (B, dim, H, W), mask None or broadcastable to (B, dim, H, W) -> (B, dim, H, W). The
    mask gates what the depthwise convolutions make of k and v, see ``masked_attention``.
    """

    def __init__(self, dim: int, heads: int, bias: bool = False) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.dim, self.heads = dim, heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.q = DepthwiseConv2d(dim, dim, 3, bias=bias)
        self.k = DepthwiseConv2d(dim, dim, 3, bias=bias)
        self.v = DepthwiseConv2d(dim, dim, 3, bias=bias)
        self.project_out = PointwiseConv2d(dim, dim, bias=bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_image(name, x, self.dim)
            if x.shape != q.shape:
                raise ValueError(f"{name} must have q's shape {tuple(q.shape)}; got {tuple(x.shape)}")
        if mask is not None:
            mask = self._mask_of_heads(mask, q)
        out = masked_attention(
            split_heads(self.q(q), self.heads), split_heads(self.k(k), self.heads),
            split_heads(self.v(v), self.heads), mask, temperature=self.temperature,
            out_proj=self.project_out.weight.flatten(1),
        )  # fmt: skip
        return as_image(out, q, self.project_out.bias)

    def _mask_of_heads(self, mask: Tensor, q: Tensor) -> Tensor:
        """The mask, broadcastable to (B, dim, H, W), as one broadcastable to (B, heads, C, H * W)."""
        fits = mask.dim() <= 4 and all(
            have in (1, want) for have, want in zip(reversed(mask.shape), reversed(q.shape), strict=False)
        )
        if not fits:
            raise ValueError(f"mask must broadcast to {tuple(q.shape)}; got {tuple(mask.shape)}")
        mask = mask[(None,) * (4 - mask.dim())]
        mask = mask.expand(-1, -1, *q.shape[2:]).flatten(2)  # (1 or B, 1 or dim, H * W)
        return mask.unsqueeze(1) if mask.shape[1] == 1 else mask.unflatten(1, (self.heads, -1))

"""Attention of an image to itself: q, k and v are projections of one image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restore_kernels.nn.convolutions import DepthwiseConv2d, PointwiseConv2d
from restore_kernels.nn.heads import as_image, check_heads, check_image, split_heads
from restore_kernels.tensors import memory_format
from restore_kernels.topk_attention import topk_attention


class _ProjectedAttention(nn.Module):
    """q, k and v of an image by a 1x1 and a depthwise 3x3 convolution; a 1x1 output projection."""

    def __init__(self, dim: int, heads: int, bias: bool = False) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.dim, self.heads = dim, heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = PointwiseConv2d(dim, 3 * dim, bias=bias)
        self.qkv_dwconv = DepthwiseConv2d(3 * dim, 3 * dim, 3, bias=bias)
        self.project_out = PointwiseConv2d(dim, dim, bias=bias)

    def _project_in(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, dim, H, W) -> q, k, v, each (B, heads, dim / heads, H * W)."""
        q, k, v = self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1)
        return split_heads(q, self.heads), split_heads(k, self.heads), split_heads(v, self.heads)

    def _channel_attention(self, x: Tensor, topk: list[int | None], weights: Tensor | None) -> Tensor:
        """Attention and output projection in one product; the attention output is never stored."""
        q, k, v = self._project_in(x)
        out = topk_attention(
            q, k, v, topk, weights=weights, temperature=self.temperature,
            out_proj=self.project_out.weight.flatten(1),
        )  # fmt: skip
        return as_image(out, x, self.project_out.bias)


class MultiDconvAttention(_ProjectedAttention):
    """Dense channel attention (MDTA, multi-Dconv head transposed attention; Restormer, arXiv 2111.09881).

    Args:
        dim: channels of the image; a multiple of heads.
        heads: number of heads.
        bias: whether the convolutions have a bias.

    Shape: (B, dim, H, W) -> (B, dim, H, W).
    """

    def forward(self, x: Tensor) -> Tensor:
        check_image("x", x, self.dim)
        return self._channel_attention(x, [None], weights=None)


class TopKSparseAttention(_ProjectedAttention):
    """The four-branch top-k channel attention of DRSformer (TKSA; Chen et al., CVPR 2023).

    Branches keep floor(C/2), floor(2C/3), floor(3C/4) and floor(4C/5) of the C = dim / heads
    channels; their outputs are weighted by the learned scalars ``attn1`` .. ``attn4``.

    Args:
        dim: channels of the image; a multiple of heads, at least 2 per head.
        heads: number of heads.
        bias: whether the convolutions have a bias.

    Shape: (B, dim, H, W) -> (B, dim, H, W).
    """

    def __init__(self, dim: int, heads: int, bias: bool = False) -> None:
        super().__init__(dim, heads, bias)
        channels = dim // heads
        if channels < 2:
            raise ValueError(f"dim / heads must be at least 2; got dim={dim}, heads={heads}")
        self.topk: list[int | None] = [channels // 2, channels * 2 // 3, channels * 3 // 4, channels * 4 // 5]
        self.attn1 = nn.Parameter(torch.full((1,), 0.2))
        self.attn2 = nn.Parameter(torch.full((1,), 0.2))
        self.attn3 = nn.Parameter(torch.full((1,), 0.2))
        self.attn4 = nn.Parameter(torch.full((1,), 0.2))

    def forward(self, x: Tensor) -> Tensor:
        check_image("x", x, self.dim)
        weights = torch.cat((self.attn1, self.attn2, self.attn3, self.attn4))
        return self._channel_attention(x, self.topk, weights)


class DynamicDualAttention(_ProjectedAttention):
    """Dynamic dual self-attention: a dense and a top-k branch over the same similarities.

    The branches' weights are dynamic: a softmax, per head, over two logits predicted from the
    globally averaged input plus a learned bias (DDSA, arXiv 2308.07781; the paper names the dynamic
    weighting but publishes no code, so its exact form is our reading).

    Args:
        dim: channels of the image; a multiple of heads.
        heads: number of heads.
        bias: whether the convolutions have a bias.
        topk_ratio: share of a row that the sparse branch keeps, in (0, 1].
        layout: ``"channel"`` (channels attend to channels) or ``"token"`` (pixels attend to pixels
            within windows).
        window_size: side of the windows of the token layout, in pixels.

    Shape: (B, dim, H, W) -> (B, dim, H, W).
    """

    def __init__(
        self, dim: int, heads: int, bias: bool = False, topk_ratio: float = 0.5,
        layout: str = "channel", window_size: int = 8,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, bias)
        if not 0 < topk_ratio <= 1:
            raise ValueError(f"topk_ratio must be in (0, 1]; got {topk_ratio}")
        if layout not in ("channel", "token"):
            raise ValueError(f"layout must be 'channel' or 'token'; got {layout!r}")
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1; got {window_size}")
        self.layout, self.window_size = layout, window_size
        row = dim // heads if layout == "channel" else window_size**2
        self.topk: list[int | None] = [None, max(1, int(row * topk_ratio))]
        self.branch_logits = nn.Linear(dim, 2 * heads)

    def forward(self, x: Tensor) -> Tensor:
        check_image("x", x, self.dim)
        logits = self.branch_logits(x.mean(dim=(2, 3)))
        weights = logits.unflatten(1, (self.heads, 2)).softmax(dim=-1)  # (B, heads, 2)
        if self.layout == "channel":
            return self._channel_attention(x, self.topk, weights)
        return self._window_attention(x, weights)

    def _window_attention(self, x: Tensor, weights: Tensor) -> Tensor:
        """Token attention in non-overlapping windows; padding at the right and below fills the last."""
        batch, _, height, width = x.shape
        side, heads, layout = self.window_size, self.heads, memory_format(x)
        x = F.pad(x, (0, -width % side, 0, -height % side), mode="replicate")
        rows, columns = x.shape[2] // side, x.shape[3] // side
        qkv = self.qkv_dwconv(self.qkv(x)).view(batch, 3, heads, -1, rows, side, columns, side)
        q, k, v = qkv.permute(1, 0, 4, 6, 2, 5, 7, 3).reshape(
            3, batch * rows * columns, heads, side**2, self.dim // heads
        )
        out = topk_attention(
            q, k, v, self.topk, weights=weights.repeat_interleave(rows * columns, dim=0),
            temperature=self.temperature, layout="token",
        )  # fmt: skip
        out = out.view(batch, rows, columns, heads, side, side, -1).permute(0, 3, 6, 1, 4, 2, 5)
        out = out.reshape(batch, self.dim, rows * side, columns * side)
        out = out[..., :height, :width].contiguous(memory_format=layout)
        return self.project_out(out)

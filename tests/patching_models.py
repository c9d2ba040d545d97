"""Networks as their users write them, in eager PyTorch: what ``restore_kernels.patch`` is for."""

from __future__ import annotations

import numbers

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restore_kernels.profiling.baselines import published_pyramid_attention, published_topk_attention


class BiasFreeLayerNorm(nn.Module):
    """Of tokens (B, N, C): divided by the standard deviation, the mean left in."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * self.weight


class WithBiasLayerNorm(nn.Module):
    """Of tokens (B, N, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.normalized_shape = (dim,) if isinstance(dim, numbers.Integral) else dim
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(variance + 1e-5) * self.weight + self.bias


class ImageLayerNorm(nn.Module):
    """As Restormer has it: the image becomes tokens, and again an image."""

    def __init__(self, dim: int, with_bias: bool) -> None:
        super().__init__()
        self.body = WithBiasLayerNorm(dim) if with_bias else BiasFreeLayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return self.body(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (height, width))


class LayerNorm2d(nn.LayerNorm):
    """As ConvNeXt has it: an ``nn.LayerNorm`` that is called with images."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Channel attention, dense or with DRSformer's four branches."""

    def __init__(self, dim: int, num_heads: int, bias: bool = False, sparse: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Conv2d(dim, dim * 3, kernel_size=1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(
            dim * 3, dim * 3, kernel_size=3, stride=1, padding=1, groups=dim * 3, bias=bias
        )
        self.project_out = nn.Conv2d(dim, dim, kernel_size=1, bias=bias)
        self.attn_drop = nn.Dropout(0.0)
        self.sparse = sparse
        if sparse:
            self.attn1 = nn.Parameter(torch.tensor([0.2]))
            self.attn2 = nn.Parameter(torch.tensor([0.2]))
            self.attn3 = nn.Parameter(torch.tensor([0.2]))
            self.attn4 = nn.Parameter(torch.tensor([0.2]))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1)
        q, k, v = (y.flatten(2).unflatten(1, (self.num_heads, -1)) for y in (q, k, v))
        channels = q.shape[2]
        topk, weights = [None], q.new_ones(1)
        if self.sparse:
            topk = [channels // 2, channels * 2 // 3, channels * 3 // 4, channels * 4 // 5]
            weights = torch.cat([self.attn1, self.attn2, self.attn3, self.attn4])
        out = published_topk_attention(q, k, v, topk, weights, self.temperature)
        return self.project_out(self.attn_drop(out.flatten(1, 2).unflatten(2, x.shape[2:])))


class CrossAttention(nn.Module):
    """Channel attention whose queries, keys and values come from three images."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.q = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.k = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.project_out = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        images = self.q(query), self.k(key), self.v(value)
        q, k, v = (y.flatten(2).unflatten(1, (self.num_heads, -1)) for y in images)
        out = published_topk_attention(q, k, v, [None], q.new_ones(1), self.temperature)
        return self.project_out(out.flatten(1, 2).unflatten(2, query.shape[2:]))


class ScaleAgnosticAttention(nn.Module):
    """Of PANet, with two levels unless told otherwise."""

    def __init__(self, channels: int = 16, reduction: int = 2, levels: int = 2, res_scale: float = 1) -> None:
        super().__init__()
        self.levels, self.res_scale = levels, res_scale
        self.conv_match_L_base = nn.Sequential(nn.Conv2d(channels, channels // reduction, 1), nn.PReLU())
        self.conv_match = nn.Sequential(nn.Conv2d(channels, channels // reduction, 1), nn.PReLU())
        self.conv_assembly = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.PReLU())
        self.register_buffer("escape_NaN", torch.FloatTensor([1e-4]))

    def forward(self, x: Tensor) -> Tensor:
        pyramid = [x]
        for i in range(1, self.levels):
            pyramid.append(F.interpolate(x, scale_factor=1 - i / 10, mode="bicubic"))
        keys, values = [self.conv_match(y) for y in pyramid], [self.conv_assembly(y) for y in pyramid]
        return self.res_scale * x + published_pyramid_attention(self.conv_match_L_base(x), keys, values)


class FeedForward(nn.Module):
    """Gated (GDFN), or with two kernel sizes whose convolutions take two channels each (MSFN)."""

    def __init__(self, dim: int, hidden: int, mixed_scale: bool = False) -> None:
        super().__init__()
        self.mixed_scale = mixed_scale
        self.project_in = nn.Conv2d(dim, hidden * 2, kernel_size=1, bias=False)
        if mixed_scale:
            self.dwconv5x5 = nn.Conv2d(hidden * 2, hidden, 5, padding="same", groups=hidden)
        self.dwconv = nn.Conv2d(hidden * 2, hidden * 2, 3, padding=1, groups=hidden * 2, bias=False)
        self.project_out = nn.Conv2d(hidden, dim, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project_in(x)
        a, b = self.dwconv(x).chunk(2, dim=1)
        return self.project_out(self.dwconv5x5(x) * b if self.mixed_scale else F.gelu(a) * b)


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, sparse: bool, with_bias: bool) -> None:
        super().__init__()
        self.norm1 = ImageLayerNorm(dim, with_bias)
        self.attn = Attention(dim, num_heads, bias=with_bias, sparse=sparse)
        self.norm2 = LayerNorm2d(dim)
        self.ffn = FeedForward(dim, 2 * dim, mixed_scale=sparse)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Restorer(nn.Module):
    """A small network of all of them, with one convolution that cannot be swapped."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 3, padding=1)
        self.blocks = nn.Sequential(Block(dim, 2, False, False), Block(dim, 1, True, True))
        self.down = nn.Conv2d(dim, dim, 3, stride=2, padding=1, groups=dim)
        self.up = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.tail = nn.Conv2d(dim, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.blocks(self.embed(x))
        return x + self.tail(features + self.up(self.down(features)))

"""Drop-in modules over the fused operators, with the state-dict keys of the published networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restore_kernels.channel_norm import channel_norm
from restore_kernels.depthwise_conv import depthwise_conv2d
from restore_kernels.depthwise_conv.api import ACTIVATIONS, DILATIONS, INPUTS, SIZES, activation_names
from restore_kernels.masked_attention import masked_attention
from restore_kernels.pointwise_conv import pointwise_conv2d
from restore_kernels.pyramid_attention import pyramid_attention
from restore_kernels.pyramid_attention.api import PATCH_SIZES
from restore_kernels.tensors import memory_format
from restore_kernels.topk_attention import topk_attention

__all__ = [
    "ChannelNorm",
    "DepthwiseConv2d",
    "DynamicDualAttention",
    "MultiDconvAttention",
    "MultiInputAttention",
    "PointwiseConv2d",
    "PyramidAttention",
    "TopKSparseAttention",
]


NORMS = ("WithBias", "BiasFree")


def _check_heads(dim: int, heads: int) -> None:
    if dim < 1 or heads < 1 or dim % heads:
        raise ValueError(f"dim must be a positive multiple of heads; got dim={dim}, heads={heads}")


def _check_image(name: str, x: Tensor, dim: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if x.dim() != 4 or x.shape[1] != dim:
        raise ValueError(f"{name} must have shape (B, {dim}, H, W); got {tuple(x.shape)}")


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, heads * C, H, W) -> (B, heads, C, H * W)."""
    return x.flatten(2).unflatten(1, (heads, -1))


def _as_image(out: Tensor, like: Tensor, bias: Tensor | None) -> Tensor:
    """(B, dim, H * W) -> (B, dim, H, W), plus the bias of the output projection."""
    out = out.unflatten(2, like.shape[2:])
    return out if bias is None else out + bias[:, None, None].to(out.dtype)


class ChannelNorm(nn.Module):
    """Layer normalisation of every pixel over its channels (biased variance).

    ``WithBias`` subtracts the mean, scales and shifts. ``BiasFree`` neither subtracts the mean nor
    shifts: it divides by the standard deviation and scales. Source: Restormer (arXiv 2111.09881).

    Args:
        dim: channels of the image.
        norm: ``"WithBias"`` or ``"BiasFree"``.
        eps: added to the variance.

    Shape: (B, dim, H, W) -> (B, dim, H, W), in the dtype and memory format of the input.
    """

    def __init__(self, dim: int, norm: str = "WithBias", eps: float = 1e-5) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1; got {dim}")
        if norm not in NORMS:
            raise ValueError(f"norm must be {' or '.join(map(repr, NORMS))}; got {norm!r}")
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if norm == "WithBias" else None

    def forward(self, x: Tensor) -> Tensor:
        _check_image("x", x, self.dim)
        return channel_norm(x, self.weight, self.bias, eps=self.eps)


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` with as many groups as output channels, stride 1 and the padding that keeps the size.

    A drop-in: the same state-dict keys, shapes and initial values.

    Args:
        in_channels: of the image; out_channels, or twice as many.
        out_channels: of the result.
        kernel_size: 1, 3, 5 or 7.
        dilation: 1 or 2, of the taps.
        bias: whether there is one.
        activation: None, ``"relu"``, ``"gelu"`` or ``"prelu"``, applied to the result. The slope of the last
            belongs to whoever calls the module, so that it can keep its place in published checkpoints.

    Called with one image or several that count as concatenated along channels, and optionally with a gate
    that multiplies the activated result and with the slope, (1) or (out_channels), of ``"prelu"``.

    Shape: (B, in_channels, H, W), and gate (B, out_channels, H, W) -> (B, out_channels, H, W), or all
    without B.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, dilation: int = 1, bias: bool = True,
        activation: str | None = None,
    ) -> None:  # fmt: skip
        if out_channels < 1 or in_channels not in [inputs * out_channels for inputs in INPUTS]:
            raise ValueError(
                "in_channels must be out_channels or twice as many; "
                f"got in_channels={in_channels}, out_channels={out_channels}"
            )
        if kernel_size not in SIZES:
            raise ValueError(f"kernel_size must be 1, 3, 5 or 7; got {kernel_size!r}")
        if dilation not in DILATIONS:
            raise ValueError(f"dilation must be 1 or 2; got {dilation!r}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be {activation_names()}; got {activation!r}")
        super().__init__(
            in_channels, out_channels, kernel_size, padding=dilation * (kernel_size // 2),
            dilation=dilation, groups=out_channels, bias=bias,
        )  # fmt: skip
        self.activation = activation

    def forward(
        self, input: Tensor | Sequence[Tensor], gate: Tensor | None = None, slope: Tensor | None = None
    ) -> Tensor:
        if isinstance(input, Tensor) and input.dim() == 3:  # which nn.Conv2d takes too
            return self.forward(input[None], None if gate is None else gate[None], slope)[0]
        return depthwise_conv2d(
            input, self.weight, self.bias, dilation=self.dilation[0], activation=self.activation, slope=slope,
            gate=gate,
        )  # fmt: skip


class PointwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` of size 1 and stride 1, of one image or of several as if they were concatenated.

    A drop-in: the same state-dict keys, shapes and initial values.

    Args:
        in_channels: of the image, or of all images together.
        out_channels: of the result.
        bias: whether there is one.

    Shape: (B, in_channels, H, W), or a sequence of 1 to 8 (B, C_i, H, W) whose C_i sum up to in_channels ->
    (B, out_channels, H, W). An image without B gives one without.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        if in_channels < 1 or out_channels < 1:
            raise ValueError(
                "in_channels and out_channels must be at least 1; "
                f"got in_channels={in_channels}, out_channels={out_channels}"
            )
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, input: Tensor | Sequence[Tensor]) -> Tensor:
        if isinstance(input, Tensor) and input.dim() == 3:
            return self.forward(input[None])[0]
        return pointwise_conv2d(input, self.weight, self.bias)


class _ProjectedAttention(nn.Module):
    """q, k and v of an image by a 1x1 and a depthwise 3x3 convolution; a 1x1 output projection."""

    def __init__(self, dim: int, heads: int, bias: bool = False) -> None:
        super().__init__()
        _check_heads(dim, heads)
        self.dim, self.heads = dim, heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = PointwiseConv2d(dim, 3 * dim, bias=bias)
        self.qkv_dwconv = DepthwiseConv2d(3 * dim, 3 * dim, 3, bias=bias)
        self.project_out = PointwiseConv2d(dim, dim, bias=bias)

    def _project_in(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, dim, H, W) -> q, k, v, each (B, heads, dim / heads, H * W)."""
        q, k, v = self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1)
        return _split_heads(q, self.heads), _split_heads(k, self.heads), _split_heads(v, self.heads)

    def _channel_attention(self, x: Tensor, topk: list[int | None], weights: Tensor | None) -> Tensor:
        """Attention and output projection in one product; the attention output is never stored."""
        q, k, v = self._project_in(x)
        out = topk_attention(
            q, k, v, topk, weights=weights, temperature=self.temperature,
            out_proj=self.project_out.weight.flatten(1),
        )  # fmt: skip
        return _as_image(out, x, self.project_out.bias)


class MultiDconvAttention(_ProjectedAttention):
    """Dense channel attention (MDTA, multi-Dconv head transposed attention; Restormer, arXiv 2111.09881).

    Args:
        dim: channels of the image; a multiple of heads.
        heads: number of heads.
        bias: whether the convolutions have a bias.

    Shape: (B, dim, H, W) -> (B, dim, H, W).
    """

    def forward(self, x: Tensor) -> Tensor:
        _check_image("x", x, self.dim)
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
        _check_image("x", x, self.dim)
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
        _check_image("x", x, self.dim)
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
        _check_heads(dim, heads)
        self.dim, self.heads = dim, heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.q = DepthwiseConv2d(dim, dim, 3, bias=bias)
        self.k = DepthwiseConv2d(dim, dim, 3, bias=bias)
        self.v = DepthwiseConv2d(dim, dim, 3, bias=bias)
        self.project_out = PointwiseConv2d(dim, dim, bias=bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        for name, x in (("q", q), ("k", k), ("v", v)):
            _check_image(name, x, self.dim)
            if x.shape != q.shape:
                raise ValueError(f"{name} must have q's shape {tuple(q.shape)}; got {tuple(x.shape)}")
        if mask is not None:
            mask = self._mask_of_heads(mask, q)
        out = masked_attention(
            _split_heads(self.q(q), self.heads), _split_heads(self.k(k), self.heads),
            _split_heads(self.v(v), self.heads), mask, temperature=self.temperature,
            out_proj=self.project_out.weight.flatten(1),
        )  # fmt: skip
        return _as_image(out, q, self.project_out.bias)

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


class PyramidAttention(nn.Module):
    """Attention of an image's 3x3 patches to those of the image at several scales.

    Source: scale-agnostic attention of pyramid attention networks (PANet, arXiv 2004.13824), with the
    state-dict keys of the published module. Queries come from the features themselves; keys and values
    of level i from the features resized by 1 - i/10 (bicubic, no antialiasing). The result is added to
    ``res_scale`` times the input.

    Args:
        channels: of the features.
        reduction: queries and keys have channels // reduction channels.
        levels: of the pyramid, 1 to 10.
        patch_size: side of the patches in pixels: 1, 3, 5 or 7.
        softmax_scale: multiplies the scores.
        res_scale: multiplies the input before it is added.
        hard: take the best match alone instead of the mixture; then queries and keys get no gradient.

    Shape: (B, channels, H, W) -> (B, channels, H, W), any H and W: a level has at least one pixel.
    """

    eps = 1e-4  # smallest norm that a key patch is divided by

    def __init__(
        self, channels: int = 64, reduction: int = 2, levels: int = 5, patch_size: int = 3,
        softmax_scale: float = 10, res_scale: float = 1, hard: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must be between 1 and channels={channels}; got {reduction}")
        if not 1 <= levels <= 10:
            raise ValueError(f"levels must be between 1 and 10; got {levels}")
        if patch_size not in PATCH_SIZES:
            raise ValueError(
                f"patch_size must be one of {', '.join(map(str, PATCH_SIZES))}; got {patch_size}"
            )
        self.channels, self.levels, self.patch_size = channels, levels, patch_size
        self.softmax_scale, self.res_scale, self.hard = softmax_scale, res_scale, hard
        # Nothing reads the buffer: published checkpoints hold eps.
        self.register_buffer("escape_NaN", torch.tensor([self.eps]))
        self.conv_match_L_base = _projection(channels, channels // reduction)
        self.conv_match = _projection(channels, channels // reduction)
        self.conv_assembly = _projection(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        query, keys, values = self.project(x)
        out = pyramid_attention(
            query, keys, values, patch_size=self.patch_size, softmax_scale=self.softmax_scale,
            eps=self.eps, hard=self.hard,
        )  # fmt: skip
        return self.res_scale * x + out

    def project(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """query (B, channels // reduction, H, W), and the keys and values of every level."""
        _check_image("x", x, self.channels)
        if 0 in x.shape[2:]:
            raise ValueError(f"x must have at least one pixel; got {tuple(x.shape)}")
        pyramid = [x, *(_resized(x, 1 - i / 10) for i in range(1, self.levels))]
        keys = [self.conv_match(level) for level in pyramid]
        return self.conv_match_L_base(x), keys, [self.conv_assembly(level) for level in pyramid]


def _projection(channels: int, projected: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, projected, 1), nn.PReLU())


def _resized(x: Tensor, factor: float) -> Tensor:
    """(B, C, H, W) -> (B, C, floor(factor * H), floor(factor * W)), but at least one pixel a side."""
    factors = [max(factor, 1 / side) for side in x.shape[2:]]
    return F.interpolate(x, scale_factor=factors, mode="bicubic")

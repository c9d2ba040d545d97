"""Which convolutions, resizings and norms are swapped and which refused, and that the reason is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from patching_models import (
    BiasFreeLayerNorm,
    ImageLayerNorm,
    LayerNorm2d,
    WithBiasLayerNorm,
)
from torch import Tensor, nn

from restore_kernels import channel_norm, patch
from restore_kernels.nn import (
    BilinearResize,
    ChannelNorm,
    DenseConv2d,
    DepthwiseConv2d,
    PointwiseConv2d,
)
from restore_kernels.patching import swapping


def depthwise(*sizes: int, **options: Any) -> nn.Conv2d:
    channels, size = sizes or (8, 3)
    return nn.Conv2d(channels, channels, size, **{"groups": channels, "padding": size // 2, **options})


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for x in module.parameters():
        nn.init.normal_(x)
    return module


DOUBLING = [
    nn.Upsample(scale_factor=2, mode="bilinear"),
    nn.Upsample(scale_factor=(2.0, 2.0), mode="bilinear", align_corners=False),
]  # fmt: skip
POINTWISE = [
    nn.Conv2d(8, 4, 1), nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 1, padding="same"),
    nn.Conv2d(8, 8, 1, padding="valid", padding_mode="reflect"),
]  # fmt: skip
DENSE = [
    nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(3, 8, 3, padding="same", bias=False),
    nn.Conv2d(8, 8, 3, padding=1, dtype=torch.bfloat16),
]  # fmt: skip
DEPTHWISE = [
    depthwise(), depthwise(8, 1, bias=False), depthwise(8, 5), depthwise(8, 7, padding="same"),
    depthwise(8, 3, dilation=2, padding=2), nn.Conv2d(8, 4, 3, padding=1, groups=4),
    depthwise(8, 1, padding_mode="circular"), depthwise(8, 3, dtype=torch.bfloat16),
    depthwise(8, 3, device="meta"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("conv", "replacement"),
    [
        *((resize, BilinearResize) for resize in DOUBLING),
        *((conv, DepthwiseConv2d) for conv in DEPTHWISE),
        *((conv, PointwiseConv2d) for conv in POINTWISE),
        *((conv, DenseConv2d) for conv in DENSE),
    ],
    ids=str,
)
def test_convolutions_and_resizings_are_swapped(conv, replacement):
    before = repr(conv)
    with patch(conv) as patched:
        assert [x.new for x in patched.replaced] == [replacement] and not patched.skipped
    assert repr(conv) == before


def parametrized() -> nn.Conv2d:
    return nn.utils.parametrizations.spectral_norm(depthwise())


def with_weights_by_a_hook() -> nn.Conv2d:
    return torch.nn.utils.spectral_norm(depthwise())


class OtherConv2d(nn.Conv2d):
    pass


def with_another_forward() -> nn.Conv2d:
    conv = depthwise()
    conv.forward = lambda x: x  # type: ignore[method-assign]
    return conv


NEAR_MISSES = [
    (nn.Conv2d(8, 8, 3), r"padding must be \(1, 1\); got \(0, 0\)"),
    (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), "padding_mode must be 'zeros'; got 'reflect'"),
    (OtherConv2d(8, 8, 3, padding=1), "something else than nn.Conv2d"),
    (depthwise(8, 3, stride=2), r"stride must be \(1, 1\); got \(2, 2\)"),
    (depthwise(8, 3, padding_mode="reflect"), "padding_mode must be 'zeros'; got 'reflect'"),
    (depthwise(8, 9), "kernel_size must be 1, 3, 5 or 7; got 9"),
    (depthwise(8, 3, dilation=3), "dilation must be 1 or 2; got 3"),
    (depthwise(8, 3, padding=0), r"padding must be \(1, 1\); got \(0, 0\)"),
    (depthwise(8, 3, padding="valid"), r"padding must be \(1, 1\); got 'valid'"),
    (nn.Conv2d(8, 8, 1, stride=2), r"stride must be \(1, 1\); got \(2, 2\)"),
    (nn.Conv2d(8, 8, 1, padding=1), r"padding must be \(0, 0\); got \(1, 1\)"),
    (OtherConv2d(8, 8, 1), "something else than nn.Conv2d"),
    (nn.Conv2d(8, 8, (3, 5), padding=(1, 2), groups=8), r"kernel_size must be \(3, 3\); got \(3, 5\)"),
    (nn.Conv2d(8, 16, 3, padding=1, groups=8), "in_channels must be out_channels or twice as many"),
    (nn.Conv2d(12, 4, 3, padding=1, groups=4), "in_channels must be out_channels or twice as many"),
    (OtherConv2d(8, 8, 3, padding=1, groups=8), "something else than nn.Conv2d"),
    (nn.LazyConv2d(8, 3, padding=1, groups=8), "something else than nn.Conv2d"),
    (parametrized(), "something else than nn.Conv2d"),
    (with_weights_by_a_hook(), "its parameters are .*weight_orig"),
    (
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
        "align_corners must be False; got True",
    ),
    (nn.UpsamplingBilinear2d(scale_factor=2), "align_corners must be False; got True"),
    (with_another_forward(), "its forward pass has been replaced already"),
]


@pytest.mark.parametrize(("conv", "reason"), NEAR_MISSES)
def test_near_misses_are_named(conv, reason):
    patched = patch(nn.Sequential(conv))
    assert not patched.replaced
    (skipped,) = patched.skipped
    assert skipped.name == "0"
    with pytest.raises(ValueError, match=reason):
        raise ValueError(skipped.reason)


class Unmade(nn.Module):
    """Whose weights have no shape yet."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LazyLinear(8)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(8, 8, 5, padding=2), nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.Conv2d(8, 8, 3, groups=2), nn.Conv1d(8, 8, 3, groups=8),
        nn.LayerNorm(8), Unmade(), nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=4, mode="bilinear"),
        nn.GroupNorm(1, 8), nn.BatchNorm2d(8), nn.PReLU(8), nn.Linear(8, 8), ChannelNorm(8),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_come_near_is_not_mentioned(module):
    patched = patch(module)
    assert not patched.replaced and not patched.skipped


class WrappedLayerNorm(nn.Module):
    """Whose normalisation is the library's, two names down."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"norm": nn.LayerNorm(8, eps=1e-3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["norm"](x.movedim(1, -1)).movedim(-1, 1)


class UnnamedEpsilon(nn.Module):
    """A layer norm over the channels of an image that has its epsilon in the code."""

    epsilon = 1e-6

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, 1, keepdim=True, correction=0)
        x = (x - mean) / (variance + self.epsilon).sqrt()
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class OtherEpsilon(UnnamedEpsilon):
    epsilon = 3e-6


class InFloat32(UnnamedEpsilon):
    """Rounds to float32 on the way, whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        normalised = F.layer_norm(
            x.float().movedim(1, -1), (8,), self.weight.float(), self.bias.float(), eps=1e-5
        )
        return normalised.movedim(-1, 1).to(x.dtype)


class ScaledGradient(UnnamedEpsilon):
    """The right result, a gradient of its own."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return 2 * out - out.detach()


class NoShift(UnnamedEpsilon):
    """Weight alone, but the mean is subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), (8,), self.weight).movedim(-1, 1)


class OfTwoArguments(UnnamedEpsilon):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * super().forward(x)


class OwnStateDict(UnnamedEpsilon):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}gamma"] = self.weight


class WithNoise(UnnamedEpsilon):
    """In training only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.1, self.training))


class Uncopyable(UnnamedEpsilon):
    def __init__(self) -> None:
        super().__init__()
        self.generator = (x for x in ())


@pytest.mark.parametrize(
    "module",
    [
        ImageLayerNorm(8, True), ImageLayerNorm(8, False), LayerNorm2d(8), LayerNorm2d(8, eps=1e-3),
        WrappedLayerNorm(), UnnamedEpsilon(), InFloat32(), LayerNorm2d(8).bfloat16(), LayerNorm2d(8).half(),
    ],
    ids=lambda x: type(x).__name__,
)  # fmt: skip
def test_norms_are_swapped(module):
    dtype = next(module.parameters()).dtype
    x, model = torch.randn(2, 8, 5, 6).to(dtype) * 1e-2, randomised(nn.Sequential(module))
    expected = model(x)
    assert any(swap.new is ChannelNorm for swap in patch(model).replaced)
    rounding = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(model(x), expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (WithBiasLayerNorm(8), "RuntimeError: The size of tensor"),
        (WithBiasLayerNorm(6), "its output differs by"),
        (BiasFreeLayerNorm(8), "RuntimeError: The size of tensor"),
        (OtherEpsilon(), "its .* differs by"),
        (ScaledGradient(), "its gradient of input 0 differs by .* in training mode"),
        (NoShift(), "its output differs by"),
        (OfTwoArguments(), "its forward pass takes x, scale"),
        (OwnStateDict(), "its class has its own _save_to_state_dict"),
        (WithNoise(), "its output differs by .* in training mode"),
        (Uncopyable(), "could not be tried, TypeError: cannot pickle 'generator'"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_norms_that_are_refused(module, reason):
    before = type(module)
    patched = patch(module)
    assert not patched.replaced and type(module) is before
    with pytest.raises(ValueError, match=reason):
        raise ValueError(patched.skipped[0].reason)


class Offset(UnnamedEpsilon):
    """Replaced as if it had no offset; what that is shows in a setting, or in a buffer."""

    dim = 8

    def __init__(self, setting: float, buffer: float) -> None:
        super().__init__()
        self.setting = setting
        self.register_buffer("buffer", torch.full((8, 1, 1), buffer))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.setting + self.buffer

    def restore_kernels_swap(self) -> nn.Module:
        return WithoutOffset(self.setting, 0.0)


class WithoutOffset(Offset):
    def forward(self, x: Tensor) -> Tensor:
        return channel_norm(x, self.weight, self.bias, eps=self.epsilon)


def test_modules_that_are_not_alike_are_tried_one_by_one():
    model = nn.Sequential(*(Offset(*offsets) for offsets in ((0, 0), (1, 0), (0, 1), (0, 0))))
    assert [x.name for x in patch(model).replaced] == ["0", "3"]


def test_modules_that_are_alike_are_tried_once(monkeypatch):
    tried, try_out = [], swapping.try_out
    monkeypatch.setattr(swapping, "try_out", lambda *pair: tried.append(pair) or try_out(*pair))
    norms = [randomised(LayerNorm2d(8, eps)) for eps in (1e-5, 1e-6, 1e-5)]
    model = nn.Sequential(*norms, depthwise(), depthwise(), depthwise().bfloat16())
    assert len(patch(model).replaced) == 6
    assert len(tried) == 3


def test_a_part_that_is_used_elsewhere_is_left_alone():
    """There its input has another layout."""
    norm = ImageLayerNorm(8, True)
    model = nn.ModuleList([norm, norm.body])
    patched = patch(model)
    assert not patched.replaced
    assert patched.skipped[0].reason == "its body belongs to another module, too"

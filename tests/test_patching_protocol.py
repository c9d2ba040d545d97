"""Which attention modules are swapped, and what a rule of somebody's own may do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from patching_models import (
    Attention,
    CrossAttention,
    FeedForward,
    ScaleAgnosticAttention,
)
from torch import Tensor, nn

from restore_kernels import channel_norm, patch
from restore_kernels.nn import (
    ChannelNorm,
    DenseConv2d,
    DepthwiseConv2d,
    MultiInputAttention,
    PointwiseConv2d,
    PyramidAttention,
)


def attention(**changes: Any) -> Attention:
    module = Attention(12, 2)
    for name, change in changes.items():
        setattr(module, name, change)
    return module


class Unnormalised(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-3 * self.qkv(x).chunk(3, dim=1)[2]


def listening() -> Attention:
    module = Attention(12, 2)
    module.project_out.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Unnormalised(12, 2), "its output differs by"),
        (attention(attn_drop=nn.Dropout(0.1)), "its output differs by .* in training mode"),
        (listening(), "its project_out has hooks, which the replacement would not run"),
        (attention(project_out=nn.utils.parametrizations.weight_norm(nn.Conv2d(12, 12, 1, bias=False))),
         "its parameters are those of none of TopKSparseAttention"),
        (attention(qkv=nn.Conv2d(12, 36, 1)), "its parameters are those of none of TopKSparseAttention"),
        (attention(qkv=nn.Conv2d(12, 36, 3, padding=1, bias=False)), "those of none of TopKSparse"),
    ],
)  # fmt: skip
def test_attentions_that_are_refused(module, reason):
    patched = patch(nn.Sequential(module))
    assert {x.new for x in patched.replaced} <= {DenseConv2d, DepthwiseConv2d, PointwiseConv2d}  # within
    with pytest.raises(ValueError, match=reason):
        raise ValueError(patched.skipped[0].reason)


@pytest.mark.parametrize(
    ("module", "replacement", "count"),
    [
        (CrossAttention(12, 3), MultiInputAttention, 3),
        (ScaleAgnosticAttention(8), PyramidAttention, 1),
        (ScaleAgnosticAttention(8, 4, levels=3, res_scale=0.1), PyramidAttention, 1),
    ],
)
def test_other_attentions(module, replacement, count):
    inputs = [
        torch.randn(1, module.project_out.in_channels if count == 3 else 8, 9, 10) for _ in range(count)
    ]
    expected = module(*inputs)
    patch(module)
    assert type(module) is replacement
    torch.testing.assert_close(module(*inputs), expected, rtol=1e-4, atol=1e-5)


class Scaled(nn.Module):
    """A norm of other names, which counts its calls."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.calls = dim, []
        self.gamma, self.beta = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(torch.rand(()))
        self.count += 1
        return F.layer_norm(x.movedim(1, -1), (self.dim,), self.gamma, self.beta).movedim(-1, 1)


class FastScaled(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return channel_norm(x, self.gamma, self.beta)


class WrongScaled(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return channel_norm(x, self.gamma)


class Declared(Scaled):
    def restore_kernels_swap(self) -> nn.Module:
        return FastScaled(self.dim)


def test_a_rule_for_other_modules():
    model = nn.Sequential(Scaled(8))
    assert not patch(model).replaced
    generator = torch.random.get_rng_state()
    with patch(model, {Scaled: lambda m: FastScaled(m.dim)}) as patched:
        assert str(patched.replaced[0]) == "Scaled -> FastScaled"
        assert model[0].calls == [] and model[0].count == 0
        assert torch.equal(torch.random.get_rng_state(), generator)
        assert not patch(model, {Scaled: lambda m: FastScaled(m.dim)}).replaced
    assert type(model[0]) is Scaled


def test_a_class_may_bring_its_rule():
    model = nn.Sequential(Declared(8))
    with patch(model):
        assert type(model[0]) is FastScaled
    assert not patch(model, {Declared: None}).replaced


def unable(module: nn.Module) -> nn.Module:
    raise ValueError("it has an odd number of channels")


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (lambda m: WrongScaled(m.dim), "its output differs by"),
        (lambda m: FastScaled(9), "its parameters are .*8,.* those of FastScaled are .*9,"),
        (lambda m: ChannelNorm(m.dim), "its parameters are .*gamma.* those of ChannelNorm are .*weight"),
        (unable, "it has an odd number of channels"),
    ],
)
def test_a_rule_that_is_wrong_is_refused(rule, reason):
    patched = patch(nn.Sequential(Scaled(8)), {Scaled: rule})
    assert not patched.replaced
    with pytest.raises(ValueError, match=reason):
        raise ValueError(patched.skipped[0].reason)


def test_a_rule_that_does_not_apply_and_one_that_forbids():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), FeedForward(8, 8))
    patched = patch(model, {nn.Conv2d: None, FeedForward: lambda m: None})
    assert not patched.replaced and not patched.skipped


def test_an_error_in_a_rule_is_the_caller_s():
    with pytest.raises(TypeError, match="the rule of Scaled must return a module or None; got <class"):
        patch(Scaled(8), {Scaled: lambda m: FastScaled})  # type: ignore[arg-type,return-value]
    with pytest.raises(AttributeError):
        patch(Scaled(8), {Scaled: lambda m: FastScaled(m.channels)})

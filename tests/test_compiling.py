"""Whole networks under torch.compile: one graph, the same loss and the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from restore_kernels import use_backend
from restore_nets import create_model, list_models
from restore_nets.models.blocks import TransformerBlock
from restore_nets.models.fusion import ChannelGate, ConvOptions, FuseTwo, GatedConvs
from restore_nets.models.gated import ResidualBlocks
from restore_nets.models.mefc import FeatureCompensator, _Mixture
from restore_nets.models.multi_scale import Decoder, Encoder, Resize, _DecoderLevel, _EncoderLevel
from restore_nets.models.residual import ResidualBlock
from restore_nets.models.tokens import TokenBranch

SMALL = {"dim": 8, "num_blocks": (1, 1, 1, 1), "heads": (1, 1, 1, 1), "ffn_expansion": 1.0}
NETWORKS = {
    # Reduced by 4, two channels would be left in a gate: often no ReLU of them fires, nor learns.
    "association": {"n_feat": 8, "reduction": 1, "num_blocks": 1, "tokens": 3, "token_layers": 1},
    "ddsa": SMALL,
    "drsformer": SMALL,
    "elf": {"n_feat": 8, "reduction": 1},
    "pa_edsr": {"n_resblocks": 2, "n_feats": 8, "reduction": 2, "scale": 3},
    "panet": {"n_resblocks": 2, "n_feats": 8},
}
CASES = {
    f"{name}, {checkpointing}": {"name": name, **NETWORKS[name], "checkpointing": checkpointing}
    for name in list_models()
    for checkpointing in ("none", "block")
} | {  # other operators, or the same ones with other arguments
    "ddsa, token": {"name": "ddsa", **SMALL, "layout": "token", "window_size": 4, "bias": True},
    "drsformer, no mefc": {"name": "drsformer", **SMALL, "mefc": False, "bias": True, "norm": "BiasFree"},
}  # fmt: skip
# Tracing takes a tenth of a second per operator, and a second block of these kinds would be the same again.
REPEATED = (
    ChannelGate, Decoder, Encoder, FeatureCompensator, FuseTwo, GatedConvs, ResidualBlock, ResidualBlocks,
    TokenBranch, TransformerBlock, _DecoderLevel, _EncoderLevel, _Mixture,
)  # fmt: skip
SIZE = (11, 13)  # odd: networks pad it, and crop what they return
# Sums in another order differ by some 1e-16 of their terms, of which a gradient may be a small remainder.
TOLERANCE = 1e-9


class Shortcut(nn.Module):
    """Stands where a block was left out: its input, plus others as large so that all before it learn."""

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        return sum((x for x in others if x.shape == first.shape), start=first)


def shorten(model: nn.Module, kept: set[type] | None = None) -> None:
    """Leave only the first block of each kind."""
    kept = set() if kept is None else kept
    for name, child in list(model.named_children()):
        if isinstance(child, REPEATED) and type(child) in kept:
            setattr(model, name, Shortcut())
        else:
            kept.add(type(child))
            shorten(child, kept)


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradient of every parameter that learns."""
    generator = torch.Generator().manual_seed(1)
    out = model(torch.rand(2, 3, *SIZE, generator=generator, dtype=torch.float64))
    outputs = out if isinstance(out, tuple) else (out,)  # of some networks an image at half resolution too
    targets = [torch.rand(x.shape, generator=generator, dtype=x.dtype) for x in outputs]
    loss = sum((x - y).square().mean() for x, y in zip(outputs, targets, strict=True))
    # torch.compile names parameters by the module that it wraps.
    learning = {name.removeprefix("_orig_mod."): p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(learning.values()))
    return loss.detach(), dict(zip(learning, gradients, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_are_one_graph_each(case):
    torch.manual_seed(0)
    model = create_model(**CASES[case]).double()
    shorten(model)
    with torch.no_grad():
        # As they start, weights before a normalisation without a bias between have gradients of zero.
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    loss, gradients = step(model)
    torch._dynamo.reset()
    # Graphs, fakes and derivatives are those under Inductor, without the minutes that its code takes.
    compiled_loss, compiled = step(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert abs(compiled_loss - loss) <= TOLERANCE * loss
    assert compiled.keys() == gradients.keys()
    for name, gradient in gradients.items():
        size = gradient.norm()
        assert size > 0, f"{name} does not learn: its gradient shows nothing"
        assert (compiled[name] - gradient).norm() <= TOLERANCE * size, name


class Enlarging(nn.Module):
    """What a level of the decoder makes of the level below."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.fuse = FuseTwo(ConvOptions(dim=48, kernel_size=3, reduction=4, bias=False))
        self.resize = Resize(48, factor)

    def forward(self, own: Tensor, below: Tensor) -> Tensor:
        return self.fuse(own, self.resize(below))


@pytest.mark.parametrize("factor", [2, 4])
def test_inductor_does_not_lose_gradients_of_enlarging(factor):
    """It may use sums that it scatters before they are made (pytorch/pytorch#185509): F.interpolate's."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, below = Enlarging(factor), torch.randn(1, 48, 64 // factor, 64 // factor, requires_grad=True)
    own = torch.randn(1, 48, 64, 64, requires_grad=True)
    with use_backend("eager"):
        expected, compiled = (
            torch.autograd.grad(f(own, below).square().mean(), (own, below, *model.parameters()))
            for f in (model, torch.compile(model, fullgraph=True))
        )
    for a, b in zip(expected, compiled, strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm()

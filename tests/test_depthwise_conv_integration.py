"""Depthwise convolution alone, beside what test_convolution_integration.py asks of all: modules, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_problems import INTERPRETED
from depthwise_conv_problems import FUSED
from operators import close, randn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from restore_kernels import depthwise_conv2d, explain, native, use_backend
from restore_kernels.nn import DepthwiseConv2d

QUICK = [backend for backend in FUSED if backend not in INTERPRETED]


def everything() -> list[Tensor]:
    """Two images of x, weight, bias, slope and gate; the sums are about as large as what they are made of."""
    shapes = (2, 1, 7, 5), (2, 5, 7, 5), (3, 2, 3, 3), (3,), (1,), (2, 3, 7, 5)
    tensors = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    return [x / 4 if i == 2 else x for i, x in enumerate(tensors)]


def gated_loss(backend: str) -> Callable[..., Tensor]:
    def call(
        first: Tensor, second: Tensor, weight: Tensor, bias: Tensor, slope: Tensor, gate: Tensor
    ) -> Tensor:
        out = depthwise_conv2d(
            (first, second), weight, bias, activation="prelu", slope=slope, gate=gate, backend=backend
        )
        return out.square().sum()

    return call


@pytest.mark.parametrize("in_python", [False, True])
@pytest.mark.parametrize("backend", QUICK)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (5,), (1, 5), (0, 2, 4)])
def test_no_gradient_that_nobody_wants(backend, wanted, in_python, monkeypatch):
    """Neither asked for nor made; what is made is as with all of them."""
    if in_python:
        monkeypatch.setattr(native, "loaded_cpu_module", None)
    tensors = everything()
    for i in wanted:
        tensors[i].requires_grad_()
    leaves = [tensors[i] for i in wanted]
    expected = torch.autograd.grad(gated_loss("eager")(*tensors), leaves)
    out = gated_loss(backend)(*tensors)
    with _Calls() as calls:
        got = torch.autograd.grad(out, leaves)
    for x, y in zip(got, expected, strict=True):
        close(x, y)
    (made,) = (results for name, results in calls.seen if name.endswith("depthwise_conv_backward"))
    of_parameters = any(i in wanted for i in (2, 3, 4))
    sizes = [x.numel() > 0 for x in (*made[0], *made[1:])]
    assert sizes == [0 in wanted, 1 in wanted, *[of_parameters] * 3, 5 in wanted]


class _Calls(TorchDispatchMode):
    """The results of every operator, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.seen.append((func.overloadpacket.__name__, results))
        return results


@pytest.mark.parametrize("backend", FUSED)
def test_a_slope_of_zero_rectifies(backend):
    """PReLU keeps nothing: its backward pass must not ask the result which side an element was on."""
    first, second, weight, bias, _, gate = (x.requires_grad_() for x in everything())
    slope = torch.zeros(3, requires_grad=True, device=weight.device)
    given = [first, second, weight, bias, gate]
    prelu = depthwise_conv2d(
        (first, second), weight, bias, activation="prelu", slope=slope, gate=gate, backend=backend
    )
    relu = depthwise_conv2d((first, second), weight, bias, activation="relu", gate=gate, backend=backend)
    close(prelu, relu)
    *got, of_slope = torch.autograd.grad(prelu.sum(), [*given, slope])
    for x, y in zip(got, torch.autograd.grad(relu.sum(), given), strict=True):
        close(x, y)
    sums = depthwise_conv2d((first, second), weight, bias, backend="eager")
    close(of_slope, (sums.clamp(max=0) * gate).sum((0, 2, 3)))


def test_networks_gates():
    """GDFN and SEFN: one half of a convolution activated, the other its gate."""
    x, weight, slope = randn(1, 6, 9, 8, seed=1), randn(6, 1, 3, 3, seed=2), randn(1, seed=3)
    a, b = F.conv2d(x, weight, padding=1, groups=6).chunk(2, dim=1)
    (x_a, x_b), (weight_a, weight_b) = x.chunk(2, dim=1), weight.chunk(2)
    gate = depthwise_conv2d(x_b, weight_b)
    close(depthwise_conv2d(x_a, weight_a, activation="gelu", gate=gate), F.gelu(a) * b)
    gated = depthwise_conv2d(x_a, weight_a, activation="prelu", slope=slope, gate=gate)
    close(gated, F.prelu(a, slope) * b)


MODULES = [
    ((6, 6, 3), {}), ((6, 6, 5), {"bias": False}), ((6, 3, 7), {"dilation": 2}), ((6, 6, 1), {}),
    ((6, 6, 3), {"activation": "relu"}), ((6, 6, 3), {"activation": "gelu"}),
]  # fmt: skip


@pytest.mark.parametrize(("sizes", "options"), MODULES)
def test_module_is_a_drop_in(sizes, options):
    """The initial values, state dict and results of ``nn.Conv2d``."""
    channels, outputs, size = sizes
    rest = {name: x for name, x in options.items() if name != "activation"}
    torch.manual_seed(0)
    ours = DepthwiseConv2d(*sizes, **options)
    torch.manual_seed(0)
    padding = size // 2 * options.get("dilation", 1)
    plain = nn.Conv2d(*sizes, padding=padding, groups=outputs, **rest)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for name, x in plain.state_dict().items():
        assert torch.equal(x, ours.state_dict()[name])
    ours.load_state_dict(plain.state_dict())
    x = randn(2, channels, 9, 8).cpu()
    activate = {"relu": F.relu, "gelu": F.gelu}.get(options.get("activation"), lambda x: x)
    gate = randn(2, outputs, 9, 8, seed=1).cpu()
    for backend in ("auto", "eager"):
        with use_backend(backend):
            close(ours(x), activate(plain(x)))
            close(ours(list(x.split(4, dim=1)), gate), activate(plain(x)) * gate)


def test_module_takes_its_slope_from_the_caller():
    act, conv, x = nn.PReLU(), DepthwiseConv2d(6, 3, 5, activation="prelu"), randn(2, 6, 9, 8).cpu()
    assert conv.state_dict().keys() == {"weight", "bias"}
    plain = F.conv2d(x, conv.weight, conv.bias, padding=2, groups=3)
    got, expected = conv(x, slope=act.weight), act(plain)
    close(got, expected)
    grads = (torch.autograd.grad(out.square().sum(), act.weight)[0] for out in (got, expected))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="slope must be given with activation='prelu'"):
        conv(x)


NAMES = "None, 'relu', 'gelu' or 'prelu'"
BAD_MODULES = [
    ((6, 4, 3), {}, "in_channels must be out_channels or twice as many; got in_channels=6, out_channels=4"),
    ((0, 0, 3), {}, "in_channels must be out_channels or twice as many; got in_channels=0, out_channels=0"),
    ((6, 6, 4), {}, "kernel_size must be 1, 3, 5 or 7; got 4"),
    ((6, 6, 3), {"dilation": 3}, "dilation must be 1 or 2; got 3"),
    ((6, 6, 3), {"activation": "tanh"}, f"activation must be {NAMES}; got 'tanh'"),
]


@pytest.mark.parametrize(("sizes", "options", "message"), BAD_MODULES)
def test_module_options(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        DepthwiseConv2d(*sizes, **options)


ones = torch.ones
GOOD: dict[str, Any] = {"x": ones(2, 6, 4, 5), "weight": ones(3, 2, 3, 3), "bias": ones(3)}
ERRORS = [
    (TypeError, {"x": None}, "x must be a tensor; got NoneType"),
    (TypeError, {"x": ones(2, 6, 4, 5, dtype=torch.int64)}, "x must be float32, .*; got int64"),
    (ValueError, {"x": ones(6, 4, 5)}, r"x must have shape \(B, C, H, W\); got \(6, 4, 5\)"),
    (ValueError, {"x": ones(2, 6, 0, 5)}, "x must have no empty dimension but the batch"),
    (ValueError, {"x": ones(2, 5, 4, 5)}, r"x must have 6 channels to fit weight \(3, 2, 3, 3\); got"),
    (ValueError, {"weight": ones(2, 3, 3, 3)}, "weight must have 1 or 2 input channels .*; got 3"),
    (ValueError, {"weight": ones(3, 2, 4, 4)}, "weight must be of size 1, 3, 5 or 7; got"),
    (ValueError, {"weight": ones(3, 2, 3, 5)}, r"weight must have shape \(3, 2, 3, 3\) to fit x"),
    (TypeError, {"weight": ones(3, 2, 3, 3).double()}, "weight must have x's dtype float32; got float64"),
    (ValueError, {"weight": ones(3, 2, 3, 3).to("meta")}, "weight must be on x's device cpu; got meta"),
    (ValueError, {"bias": ones(2)}, r"bias must have shape \(3,\) to fit x"),
    (TypeError, {"bias": 1.0}, "bias must be a tensor; got float"),
    (ValueError, {"dilation": 3}, "dilation must be 1 or 2; got 3"),
    (ValueError, {"dilation": True}, "dilation must be 1 or 2; got True"),
    (ValueError, {"activation": "silu"}, f"activation must be {NAMES}; got 'silu'"),
    (ValueError, {"x": []}, "x must be 1 to 8 images; got 0"),
    (ValueError, {"x": [ones(2, 1, 4, 5)] * 9}, "x must be 1 to 8 images; got 9"),
    (TypeError, {"x": [ones(2, 6, 4, 5), 1.0]}, r"x\[1\] must be a tensor; got float"),
    (
        ValueError,
        {"x": [ones(2, 3, 4, 5), ones(2, 3, 4, 4)]},
        r"x\[1\] must have shape \(2, 3, 4, 5\) to fit x",
    ),
    (TypeError, {"x": [ones(2, 3, 4, 5), ones(2, 3, 4, 5).double()]}, r"x\[1\] must have x\[0\]'s dtype"),
    (ValueError, {"x": [ones(2, 3, 4, 5), ones(2, 2, 4, 5)]}, "x must have 6 channels to fit weight"),
    (ValueError, {"activation": "prelu"}, "slope must be given with activation='prelu' and with no other"),
    (ValueError, {"slope": ones(1)}, "slope must be given with .*; got slope=a tensor, activation=None"),
    (ValueError, {"activation": "prelu", "slope": ones(2)}, r"slope must have shape \(3,\) to fit x"),
    (TypeError, {"activation": "prelu", "slope": 0.25}, "slope must be a tensor; got float"),
    (ValueError, {"gate": ones(2, 6, 4, 5)}, r"gate must have shape \(2, 3, 4, 5\) to fit x"),
    (TypeError, {"gate": ones(2, 3, 4, 5).half()}, "gate must have x's dtype float32; got float16"),
    (ValueError, {"backend": "gpu"}, "backend must be one of auto, eager, cpu, triton, cuda; got 'gpu'"),
]


@pytest.mark.parametrize(("error", "bad", "message"), ERRORS)
def test_errors(error, bad, message):
    depthwise_conv2d(**GOOD)
    for call in (depthwise_conv2d, lambda **args: explain(depthwise_conv2d, **args)):
        with pytest.raises(error, match=message):
            call(**{**GOOD, **bad})

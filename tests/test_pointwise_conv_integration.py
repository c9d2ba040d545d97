"""Pointwise convolution alone, beside what test_convolution_integration.py asks of all: modules, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_problems import INTERPRETED
from operators import close, randn
from pointwise_conv_problems import FUSED
from torch import Tensor, nn

from restore_kernels import explain, native, pointwise_conv2d, use_backend
from restore_kernels.nn import PointwiseConv2d

QUICK = [backend for backend in FUSED if backend not in INTERPRETED]


def inputs() -> list[Tensor]:
    """Two images, weight and bias."""
    shapes = ((2, 3, 7, 5), (2, 2, 7, 5), (4, 5, 1, 1), (4,))
    return [randn(*shape, seed=i) for i, shape in enumerate(shapes)]


def loss(backend: str) -> Callable[..., Tensor]:
    return lambda a, b, *rest: pointwise_conv2d([a, b], *rest, backend=backend).square().sum()


WANTED = [(0,), (1,), (2,), (3,), (2, 3), (0, 2), (0, 1)]


@pytest.mark.parametrize("in_python", [False, True])
@pytest.mark.parametrize("wanted", WANTED)
def test_no_gradient_is_made_that_nobody_wants(wanted, in_python, monkeypatch):
    if "cpu" not in QUICK:
        pytest.skip("no compiled library")
    if in_python:
        monkeypatch.setattr(native, "loaded_cpu_module", None)
    tensors = inputs()
    for i in wanted:
        tensors[i].requires_grad_()
    with torch.profiler.profile(record_shapes=True) as profile:
        loss("cpu")(*tensors).backward()
    (event,) = (x for x in profile.events() if x.name == "restore_kernels::pointwise_conv_backward")
    assert event.concrete_inputs[3] == [i in wanted for i in range(4)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("images", [1, 2])
def test_module_is_a_drop_in(images, bias):
    """The initial values, state dict and results of ``nn.Conv2d``."""
    torch.manual_seed(0)
    ours = PointwiseConv2d(6, 4, bias=bias)
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 4, 1, bias=bias)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for name, x in plain.state_dict().items():
        assert torch.equal(x, ours.state_dict()[name])
    ours.load_state_dict(plain.state_dict())
    x = randn(2, 6, 9, 8).cpu()
    given = x if images == 1 else x.split((1, 5), dim=1)
    close(ours(given), plain(x))
    with use_backend("eager"):
        close(ours(given), plain(x))


def test_module_options():
    with pytest.raises(ValueError, match="must be at least 1; got in_channels=0, out_channels=3"):
        PointwiseConv2d(0, 3)


ones = torch.ones
GOOD: dict[str, Any] = {"x": ones(2, 6, 4, 5), "weight": ones(3, 6, 1, 1), "bias": ones(3)}
PAIR = (ones(2, 2, 4, 5), ones(2, 4, 4, 5))
ERRORS = [
    (TypeError, {"x": None}, "x must be a tensor; got NoneType"),
    (TypeError, {"x": [None]}, "x must be a tensor; got NoneType"),
    (TypeError, {"x": [PAIR[0], 1]}, r"x\[1\] must be a tensor; got int"),
    (ValueError, {"x": []}, "x must be 1 to 8 images; got 0"),
    (ValueError, {"x": [PAIR[0]] * 9}, "x must be 1 to 8 images; got 9"),
    (TypeError, {"x": ones(2, 6, 4, 5, dtype=torch.int64)}, "x must be float32, .*; got int64"),
    (ValueError, {"x": ones(6, 4, 5)}, r"x must have shape \(B, C, H, W\); got \(6, 4, 5\)"),
    (ValueError, {"x": ones(2, 6, 0, 5)}, "x must have no empty dimension but the batch"),
    (ValueError, {"x": (PAIR[0], ones(2, 4, 4, 6))}, r"x\[1\] must have shape \(2, 4, 4, 5\) to fit x\[0\]"),
    (TypeError, {"x": (PAIR[0], PAIR[1].double())}, r"x\[1\] must have x\[0\]'s dtype float32; got float64"),
    (ValueError, {"x": (PAIR[0], PAIR[1].to("meta"))}, r"x\[1\] must be on x\[0\]'s device cpu; got meta"),
    (ValueError, {"x": ones(2, 5, 4, 5)}, r"weight must have shape \(3, 5, 1, 1\) to fit x \(2, 5, 4, 5\)"),
    (ValueError, {"weight": ones(3, 6, 3, 3)}, r"weight must have shape \(3, 6, 1, 1\) to fit x"),
    (ValueError, {"weight": ones(3, 6)}, r"weight must have shape \(C_out, C, 1, 1\); got \(3, 6\)"),
    (ValueError, {"weight": ones(3, 3, 6, 1, 1)}, r"weight must have shape \(2, 3, 6, 1, 1\) to fit x"),
    (TypeError, {"weight": ones(3, 6, 1, 1).double()}, "weight must have x's dtype float32; got float64"),
    (ValueError, {"bias": ones(2)}, r"bias must have shape \(3,\) to fit x"),
    (TypeError, {"bias": 1.0}, "bias must be a tensor; got float"),
    (ValueError, {"backend": "gpu"}, "backend must be one of auto, eager, cpu, triton, cuda; got 'gpu'"),
]


@pytest.mark.parametrize(("error", "bad", "message"), ERRORS)
def test_errors(error, bad, message):
    pointwise_conv2d(**GOOD)
    pointwise_conv2d(**{**GOOD, "x": PAIR})
    for call in (pointwise_conv2d, lambda **args: explain(pointwise_conv2d, **args)):
        with pytest.raises(error, match=message):
            call(**{**GOOD, **bad})

"""Dense convolution alone, beside what test_convolution_integration.py asks of all: module, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_conv_problems import FUSED
from operators import close, randn
from torch import Tensor, nn

from restore_kernels import dense_conv2d, explain, native, use_backend
from restore_kernels.nn import DenseConv2d


def inputs(height: int = 7, width: int = 5) -> list[Tensor]:
    """Image, weight and bias."""
    shapes = ((2, 3, height, width), (4, 3, 3, 3), (4,))
    return [randn(*shape, seed=i).double() for i, shape in enumerate(shapes)]


def loss(backend: str) -> Callable[..., Tensor]:
    return lambda *tensors: dense_conv2d(*tensors, backend=backend).square().sum()


def test_autocast():
    x, weight, bias = tensors = [x.float().requires_grad_() for x in inputs()]
    with torch.autocast(x.device.type, torch.bfloat16):
        out = dense_conv2d(*tensors)
        assert explain(dense_conv2d, x, weight, bias).chosen == "eager"
    assert torch.equal(out, nn.functional.conv2d(*(x.bfloat16() for x in tensors), padding=1))
    assert [g.dtype for g in torch.autograd.grad(out.sum(), tensors)] == [torch.float32] * 3


WANTED = [(0,), (1,), (2,), (1, 2), (0, 2), (0, 1)]


@pytest.mark.parametrize("in_python", [False, True])
@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("size", [(7, 5), (20, 30)])  # of few tiles, and of many
def test_no_gradient_is_made_that_nobody_wants(size, wanted, in_python, monkeypatch):
    if "cpu" not in FUSED:
        pytest.skip("no compiled library")
    if in_python:
        monkeypatch.setattr(native, "loaded_cpu_module", None)
    tensors = inputs(*size)
    leaves = [tensors[i].requires_grad_() for i in wanted]
    with torch.profiler.profile(record_shapes=True) as profile:
        got = torch.autograd.grad(loss("cpu")(*tensors), leaves)
    (event,) = (x for x in profile.events() if x.name == "restore_kernels::dense_conv_backward")
    assert event.concrete_inputs[3] == [i in wanted for i in range(3)]
    for x, y in zip(got, torch.autograd.grad(loss("eager")(*tensors), leaves), strict=True):
        close(x, y)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(9, 8), (32, 33)])
def test_module_is_a_drop_in(size, bias):
    """The initial values, state dict and results of ``nn.Conv2d``."""
    torch.manual_seed(0)
    ours = DenseConv2d(6, 4, bias=bias)
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 4, 3, padding=1, bias=bias)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for name, x in plain.state_dict().items():
        assert torch.equal(x, ours.state_dict()[name])
    x = randn(2, 6, *size).cpu()
    close(ours(x), plain(x))
    close(ours(x[0]), plain(x[0]))
    with use_backend("eager"):
        assert torch.equal(ours(x), plain(x))


def test_module_options():
    with pytest.raises(ValueError, match="must be at least 1; got in_channels=0, out_channels=3"):
        DenseConv2d(0, 3)


ones = torch.ones
GOOD: dict[str, Any] = {"x": ones(2, 6, 4, 5), "weight": ones(3, 6, 3, 3), "bias": ones(3)}
ERRORS = [
    (TypeError, {"x": None}, "x must be a tensor; got NoneType"),
    (TypeError, {"x": ones(2, 6, 4, 5, dtype=torch.int64)}, "x must be float32, .*; got int64"),
    (ValueError, {"x": ones(6, 4, 5)}, r"x must have shape \(B, C, H, W\); got \(6, 4, 5\)"),
    (ValueError, {"x": ones(2, 6, 0, 5)}, "x must have no empty dimension but the batch"),
    (ValueError, {"x": ones(2, 5, 4, 5)}, r"weight must have shape \(3, 5, 3, 3\) to fit x \(2, 5, 4, 5\)"),
    (ValueError, {"weight": ones(3, 6, 1, 1)}, r"weight must have shape \(3, 6, 3, 3\) to fit x"),
    (ValueError, {"weight": ones(3, 6)}, r"weight must have shape \(C_out, C, 3, 3\); got \(3, 6\)"),
    (ValueError, {"weight": ones(0, 6, 3, 3)}, "weight must have no empty dimension"),
    (TypeError, {"weight": ones(3, 6, 3, 3).double()}, "weight must have x's dtype float32; got float64"),
    (ValueError, {"weight": ones(3, 6, 3, 3, device="meta")}, "weight must be on x's device cpu; got meta"),
    (ValueError, {"bias": ones(2)}, r"bias must have shape \(3,\) to fit x"),
    (TypeError, {"bias": 1.0}, "bias must be a tensor; got float"),
    (ValueError, {"backend": "gpu"}, "backend must be one of auto, eager, cpu, triton, cuda; got 'gpu'"),
]


@pytest.mark.parametrize(("error", "bad", "message"), ERRORS)
def test_errors(error, bad, message):
    dense_conv2d(**GOOD)
    for call in (dense_conv2d, lambda **args: explain(dense_conv2d, **args)):
        with pytest.raises(error, match=message):
            call(**{**GOOD, **bad})

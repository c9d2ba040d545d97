"""Depthwise convolution inside the rest of PyTorch: module, torch.compile, autocast, torch.func, errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from attention_problems import INTERPRETED
from depthwise_conv_problems import FUSED
from operators import close, randn
from torch import Tensor, nn

from restore_kernels import depthwise_conv2d, explain, use_backend
from restore_kernels.nn import DepthwiseConv2d

QUICK = [backend for backend in FUSED if backend not in INTERPRETED]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield


def inputs(*batch: int) -> list[Tensor]:
    """x, weight and bias."""
    return [randn(*batch, 2, 6, 7, 5, seed=1), randn(*batch, 3, 2, 3, 3, seed=2), randn(*batch, 3, seed=3)]


def loss(backend: str) -> Callable[..., Tensor]:
    return lambda *x: depthwise_conv2d(*x, activation="relu", backend=backend).square().sum()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", [*QUICK, "eager"])
def test_compiles_in_one_graph_with_its_backward(backend, compiler):
    tensors = [x.requires_grad_() for x in inputs()]
    compiled = torch.compile(loss(backend), fullgraph=True, backend=compiler)
    close(compiled(*tensors), loss("eager")(*tensors))
    grads, others = (torch.autograd.grad(f(*tensors), tensors) for f in (compiled, loss("eager")))
    for got, expected in zip(grads, others, strict=True):
        close(got, expected)


@pytest.mark.parametrize("backend", QUICK)
@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, 0), (0, 0, None), (0, 0, 0)])
def test_vmap_and_per_sample_gradients(backend, in_dims):
    tensors = [x if dim == 0 else x[0] for x, dim in zip(inputs(3), in_dims, strict=True)]

    def both(name: str) -> list[Tensor]:
        per_sample = torch.func.grad(loss(name), argnums=(0, 1, 2))
        mapped = torch.func.vmap(per_sample, in_dims)(*tensors)
        return [torch.func.vmap(loss(name), in_dims)(*tensors), *mapped]

    for got, expected in zip(both(backend), both("eager"), strict=True):
        close(got, expected)


@pytest.mark.parametrize("backend", QUICK)
def test_a_second_derivative_is_an_error_that_names_the_way_out(backend):
    tensors = [x.requires_grad_() for x in inputs()]
    (grad,) = torch.autograd.grad(loss(backend)(*tensors), tensors[0], create_graph=True)
    message = f"depthwise_conv2d has no second derivative on backend '{backend}'; backend='eager' has"
    with pytest.raises(RuntimeError, match=message):
        grad.sum().backward()
    second = torch.func.grad(lambda *x: torch.func.grad(loss(backend))(*x).sum())
    with pytest.raises(RuntimeError, match="no second derivative"):
        second(*(x.detach() for x in tensors))


@pytest.mark.parametrize("backend", [*QUICK, "eager"])
def test_autocast(backend):
    tensors = [x.requires_grad_() for x in inputs()]
    with torch.autocast(tensors[0].device.type, torch.bfloat16):
        out = depthwise_conv2d(*tensors, backend=backend)
    expected = depthwise_conv2d(*(x.bfloat16() for x in tensors), backend="eager")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    grads = torch.autograd.grad(out.sum(), tensors)
    assert [g.dtype for g in grads] == [torch.float32] * 3


@pytest.mark.parametrize("backend", QUICK)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2)])
def test_some_gradients_alone(backend, wanted):
    tensors = inputs()
    for i in wanted:
        tensors[i].requires_grad_()
    leaves = [tensors[i] for i in wanted]
    got, expected = (torch.autograd.grad(loss(name)(*tensors), leaves) for name in (backend, "eager"))
    for x, y in zip(got, expected, strict=True):
        close(x, y)


MODULES = [
    ((6, 6, 3), {}), ((6, 6, 5), {"bias": False}), ((6, 3, 7), {"dilation": 2}), ((6, 6, 1), {}),
    ((6, 6, 3), {"activation": "relu"}),
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
    expected = plain(x).relu() if "activation" in options else plain(x)
    close(ours(x), expected)
    with use_backend("eager"):
        close(ours(x), expected)


BAD_MODULES = [
    ((6, 4, 3), {}, "in_channels must be out_channels or twice as many; got in_channels=6, out_channels=4"),
    ((0, 0, 3), {}, "in_channels must be out_channels or twice as many; got in_channels=0, out_channels=0"),
    ((6, 6, 4), {}, "kernel_size must be 1, 3, 5 or 7; got 4"),
    ((6, 6, 3), {"dilation": 3}, "dilation must be 1 or 2; got 3"),
    ((6, 6, 3), {"activation": "tanh"}, "activation must be None or 'relu'; got 'tanh'"),
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
    (ValueError, {"activation": "gelu"}, "activation must be None or 'relu'; got 'gelu'"),
    (ValueError, {"backend": "gpu"}, "backend must be one of auto, eager, cpu, triton, cuda; got 'gpu'"),
]


@pytest.mark.parametrize(("error", "bad", "message"), ERRORS)
def test_errors(error, bad, message):
    depthwise_conv2d(**GOOD)
    for call in (depthwise_conv2d, lambda **args: explain(depthwise_conv2d, **args)):
        with pytest.raises(error, match=message):
            call(**{**GOOD, **bad})

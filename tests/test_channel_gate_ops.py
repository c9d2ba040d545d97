"""The operators behind the channel gate, and what is around them: fakes, transforms, compilers."""

from __future__ import annotations

import conformance
import pytest
import torch
import torch.nn.functional as F
from attention_problems import ALL_DTYPES, DTYPES, INTERPRETED
from channel_gate_contract import backward as formula_backward
from channel_gate_contract import channel_gate as formula
from channel_gate_problems import BACKENDS, FUSED, PARAMETERS, Case, build, each
from conformance import judge
from torch import Tensor

from restore_kernels import channel_gate, use_backend
from restore_kernels.channel_gate.ops import overload
from restore_kernels.nn import ChannelGate
from restore_kernels.tensors import accumulate_dtype

COMPILED = [backend for backend in FUSED if backend not in INTERPRETED]
NAMES = ("x", *PARAMETERS, "residual")
CASES = [
    Case((2, 6, 5, 7), biased=biased, residual=biased, dtype=dtype, arrangement=place)
    for biased in (True, False)
    for dtype in ALL_DTYPES
    for place in ("contiguous", "channels_last", "crop")
]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(conformance.DEVICE, dtype)


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Of an image of 4 channels, by way of 2 numbers of which neither is rectified."""
    shapes = ((2, 4, 3, 5), (2, 4, 1, 1), (4, 2, 1, 1), (2,), (4,), (2, 4, 3, 5))
    given = {
        name: randn(*shape, seed=i, dtype=dtype)
        for i, (name, shape) in enumerate(zip(NAMES, shapes, strict=True))
    }
    return {**given, "down_bias": given["down_bias"].abs() + 2}


def arguments(case: Case) -> tuple:
    """As the operator takes them."""
    given, dtype = build(case).tensors, accumulate_dtype(case.dtype)
    parameters = (given[name].to(dtype) if name in given else None for name in PARAMETERS)
    return given["x"], *parameters, given.get("residual")


@each(CASES, FUSED)
def test_operators_do_what_the_formulas_say(backend, case):
    """Also what is saved, and the backward operator by itself, from what any backend saved."""
    problem, args = build(case), arguments(case)
    names = (
        "out",
        "mean",
        "hidden",
        "gate",
        "grad_x",
        "grad_down",
        "grad_up",
        "grad_down_bias",
        "grad_up_bias",
    )

    def passes(forward, backward, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        given = [x if x is None or dtype is None else x.to(dtype) for x in (problem.grad_out, *args)]
        grad, x, down, up, *others = given
        results = forward(x, down, up, *others)
        grads = backward(grad, x, down, up, *formula(x, down, up, *others)[1:])
        return dict(zip(names, (*results, *grads), strict=True))

    exact = passes(formula, formula_backward, torch.float64)
    own = passes(formula, formula_backward, torch.float32 if case.dtype == torch.float64 else None)
    result = passes(overload("channel_gate", backend), overload("channel_gate_backward", backend))
    x = problem.tensors["x"].double().abs()
    down = problem.tensors["down"].double().abs().flatten(1)
    of_hidden = x.mean((2, 3)) @ down.mT + (1 if case.biased else 0)
    sizes = {"mean": x.mean((2, 3)), "hidden": of_hidden, "gate": 1 + exact["gate"]}
    sizes |= {name: exact[name].abs() + 1 for name in names if name not in sizes}
    judge(result, own, exact, sizes | problem.magnitudes)


@each(CASES[:12:3] + CASES[13::6], FUSED)
def test_operators_are_registered_correctly(backend, case):
    """Schemas, and fakes that predict shapes, dtypes and strides."""
    args, grad = arguments(case), build(case).grad_out
    forward, backward = overload("channel_gate", backend), overload("channel_gate_backward", backend)
    utils = ("test_schema", "test_faketensor")
    if backend not in INTERPRETED:  # which calls the operator many times more
        utils += ("test_aot_dispatch_dynamic",)
    torch.library.opcheck(forward, args, test_utils=utils)
    torch.library.opcheck(backward, (grad, *args[:3], *forward(*args)[1:]), test_utils=utils)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if torch.float64 in DTYPES[backend]])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradcheck(backend, format):
    given = tensors(torch.float64)
    given["x"] = given["x"].contiguous(memory_format=format)
    torch.autograd.gradcheck(
        lambda *args: channel_gate(*args, backend=backend), [x.requires_grad_() for x in given.values()]
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_one_argument_alone(backend, name):
    given = tensors()
    expected = {key: x.clone().requires_grad_() for key, x in given.items()}
    channel_gate(**expected, backend=backend).square().sum().backward()
    given[name].requires_grad_()
    channel_gate(**given, backend=backend).square().sum().backward()
    torch.testing.assert_close(given[name].grad, expected[name].grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_image_as_its_own_residual(backend):
    given = tensors()
    del given["residual"]
    x = given.pop("x").requires_grad_()
    out = channel_gate(x, **given, residual=x, backend=backend)
    expected = channel_gate(x, **given, backend="eager") + x
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in (out, expected)))


def test_is_what_rcan_does():
    given = tensors()
    x, down, up, down_bias, up_bias, _ = given.values()
    hidden = F.relu(F.linear(F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0], down[:, :, 0, 0], down_bias))
    gate = torch.sigmoid(F.linear(hidden, up[:, :, 0, 0], up_bias))
    expected = x * gate[:, :, None, None] + given["residual"]
    for backend in BACKENDS:
        torch.testing.assert_close(channel_gate(**given, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_format_is_kept(backend, format):
    given = tensors()
    x = given.pop("x").contiguous(memory_format=format).requires_grad_()
    out = channel_gate(x, **given, backend=backend)
    (grad,) = torch.autograd.grad(out, x, randn(*x.shape, seed=9))
    assert out.is_contiguous(memory_format=format)
    assert grad.is_contiguous(memory_format=format) or backend == "eager"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ALL_DTYPES[1:], ids=str)
def test_autocast_leaves_the_dtype_and_computes_in_float32(backend, dtype):
    given = tensors()
    given |= {name: given[name].to(dtype) for name in ("x", "residual")}
    given = {name: x.requires_grad_() for name, x in given.items()}

    def passes() -> list[Tensor]:
        out = channel_gate(**given, backend=backend)
        return [out, *torch.autograd.grad(out, list(given.values()), torch.ones_like(out))]

    expected = passes()
    with torch.autocast(conformance.DEVICE, torch.bfloat16):
        results = passes()
    assert results[0].dtype == dtype
    assert torch.equal(results[0], expected[0])
    if backend != "eager":  # whose backward is PyTorch's and heeds an autocast that is still on
        assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend not in INTERPRETED])
def test_gradients_per_sample(backend):
    x, *parameters, residual = tensors().values()

    def loss(parameters: list[Tensor], x: Tensor, residual: Tensor) -> Tensor:
        return channel_gate(x[None], *parameters, residual[None], backend=backend).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, residual)
    for i in range(len(x)):
        for grad, own in zip(grads, torch.func.grad(loss)(parameters, x[i], residual[i]), strict=True):
            torch.testing.assert_close(grad[i], own)


@pytest.mark.parametrize("backend", COMPILED)
def test_vmap_over_parameters(backend):
    given, downs = tensors(), randn(3, 2, 4, 1, 1, seed=7)
    out = torch.func.vmap(lambda down: channel_gate(**{**given, "down": down}, backend=backend))(downs)
    for one, down in zip(out, downs, strict=True):
        torch.testing.assert_close(one, channel_gate(**{**given, "down": down}, backend=backend))


@pytest.mark.parametrize("backend", COMPILED)
def test_second_derivative_says_so(backend):
    given = tensors()
    x = given.pop("x").requires_grad_()
    out = channel_gate(x, **given, backend=backend).square().sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="channel_gate has no second derivative on backend"):
        grad.sum().backward()
    residual = given["residual"].requires_grad_()
    out = channel_gate(x, **given, backend=backend).square().sum()
    (grad,) = torch.autograd.grad(out, residual, create_graph=True)
    assert grad.requires_grad  # it is the gradient of the result itself


@pytest.mark.parametrize("backend", COMPILED)
def test_compiles_once_for_all_sizes(backend):
    torch.compiler.reset()
    module, graphs = ChannelGate(6, 2).to(conformance.DEVICE), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=keep)
    with use_backend(backend):
        for size in ((9, 12), (12, 11), (23, 14)):
            x = randn(2, 6, *size)
            torch._dynamo.mark_dynamic(x, (2, 3))
            torch.testing.assert_close(compiled(x), module(x))
    assert len(graphs) == 1


@pytest.mark.parametrize("backend", COMPILED)
def test_compiled_training_step(backend):
    torch.compiler.reset()
    module = ChannelGate(6, 2).to(conformance.DEVICE)
    x, residual = (randn(2, 6, 5, 7, seed=i).requires_grad_() for i in range(2))

    def loss() -> Tensor:
        return module(x, residual).square().sum()

    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with use_backend(backend):
        results = [torch.autograd.grad(f(), (x, residual, *module.parameters())) for f in (step, loss)]
    for compiled, own in zip(*results, strict=True):
        torch.testing.assert_close(compiled, own)


@pytest.mark.parametrize("bias", [True, False])
def test_module(bias):
    module = ChannelGate(8, 4, bias)
    shapes = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    biases = {"conv_du.0.bias": (2,), "conv_du.2.bias": (8,)} if bias else {}
    assert shapes == {"conv_du.0.weight": (2, 8, 1, 1), "conv_du.2.weight": (8, 2, 1, 1), **biases}
    x, residual = randn(2, 8, 5, 6).cpu(), randn(2, 8, 5, 6, seed=1).cpu()
    expected = x * module.conv_du(F.adaptive_avg_pool2d(x, 1))
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module(x, residual), expected + residual)


def test_module_adds_a_wider_residual():
    """As a block does under autocast whose convolutions are narrower than what they are added to."""
    module = ChannelGate(8, 4)
    x, residual = randn(2, 8, 5, 6, dtype=torch.bfloat16).cpu(), randn(2, 8, 5, 6, seed=1).cpu()
    out = module(x, residual)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, module(x) + residual)


IMAGE, DOWN, UP = torch.ones(2, 3, 4, 5), torch.ones(2, 3, 1, 1), torch.ones(3, 2, 1, 1)
ERRORS = [
    (ValueError, {"x": IMAGE[0]}, r"x must have shape \(B, C, H, W\); got \(3, 4, 5\)"),
    (TypeError, {"x": IMAGE.int()}, "x must be float32, .*; got int32"),
    (TypeError, {"down": None}, "down must be a tensor; got NoneType"),
    (ValueError, {"down": DOWN[:, :, 0, 0]}, r"down must have shape \(R, C, 1, 1\); got \(2, 3\)"),
    (
        ValueError,
        {"down": UP},
        r"down must have shape \(3, 3, 1, 1\) to fit x \(2, 3, 4, 5\); got \(3, 2, 1, 1\)",
    ),
    (ValueError, {"up": DOWN}, r"up must have shape \(3, 2, 1, 1\) to fit x.*; got \(2, 3, 1, 1\)"),
    (TypeError, {"up": UP.bool()}, "up must be float32, .*; got bool"),
    (ValueError, {"up": UP.to("meta")}, "up must be on x's device cpu; got meta"),
    (ValueError, {"down_bias": torch.ones(3)}, r"down_bias must have shape \(2,\) to fit x.*; got \(3,\)"),
    (ValueError, {"up_bias": torch.ones(2)}, r"up_bias must have shape \(3,\) to fit x.*; got \(2,\)"),
    (TypeError, {"up_bias": 0.0}, "up_bias must be a tensor; got float"),
    (
        ValueError,
        {"residual": IMAGE[:1]},
        r"residual must have shape \(2, 3, 4, 5\) to fit x.*; got \(1, 3, 4, 5\)",
    ),
    (TypeError, {"residual": IMAGE.double()}, "residual must have x's dtype float32; got float64"),
    (ValueError, {"backend": "gpu"}, "backend must be one of auto, eager, cpu, triton, cuda; got 'gpu'"),
]


@pytest.mark.parametrize(("error", "bad", "message"), ERRORS, ids=[row[2][:40] for row in ERRORS])
def test_errors(error, bad, message):
    good = {
        "x": IMAGE, "down": DOWN, "up": UP, "down_bias": torch.ones(2), "up_bias": torch.ones(3),
        "residual": IMAGE,
    }  # fmt: skip
    channel_gate(**good)
    with pytest.raises(error, match=message) as raised:
        channel_gate(**{**good, **bad})
    assert "\n" not in str(raised.value)


def test_module_options():
    with pytest.raises(ValueError, match="reduction must be 1 to dim; got dim=8, reduction=16"):
        ChannelGate(8)


def test_module_input():
    with pytest.raises(ValueError, match=r"x must have shape \(B, 4, H, W\); got \(2, 3, 5, 5\)"):
        ChannelGate(4, 2)(torch.ones(2, 3, 5, 5))
    with pytest.raises(
        ValueError, match=r"residual must have the shape of x \(2, 4, 5, 5\); got \(4, 5, 5\)"
    ):
        ChannelGate(4, 2)(torch.ones(2, 4, 5, 5), torch.ones(4, 5, 5))

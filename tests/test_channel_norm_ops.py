"""The operators behind channel normalisation, and what is around them: fakes, transforms, compilers."""

from __future__ import annotations

import conformance
import pytest
import torch
import torch.nn.functional as F
from attention_problems import ALL_DTYPES, DTYPES, INTERPRETED
from channel_norm_contract import backward as formula_backward
from channel_norm_contract import channel_norm as formula
from channel_norm_problems import BACKENDS, FUSED, Case, build, each
from conformance import judge
from torch import Tensor

from restore_kernels import channel_norm, use_backend
from restore_kernels.channel_norm.ops import overload
from restore_kernels.nn import ChannelNorm
from restore_kernels.tensors import accumulate_dtype

COMPILED = [backend for backend in FUSED if backend not in INTERPRETED]
CASES = [
    Case((2, 6, 5, 7), biased=biased, dtype=dtype, arrangement=place)
    for biased in (True, False)
    for dtype in ALL_DTYPES
    for place in ("contiguous", "channels_last", "crop")
]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(conformance.DEVICE, dtype)


def arguments(case: Case) -> tuple:
    """As the operator takes them."""
    given, dtype = build(case).tensors, accumulate_dtype(case.dtype)
    bias = given["bias"].to(dtype) if case.biased else None
    return given["x"], given["weight"].to(dtype), bias, case.eps


@each(CASES, FUSED)
def test_operators_do_what_the_formulas_say(backend, case):
    """Also what is saved, and the backward operator by itself, from what any backend saved."""
    problem, args = build(case), arguments(case)

    def passes(forward, backward, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        x, weight, bias, eps = args
        grad = problem.grad_out
        if dtype is not None:
            x, weight, grad = x.to(dtype), weight.to(dtype), grad.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        out, mean, rstd = forward(x, weight, bias, eps)
        _, exact_mean, exact_rstd = formula(x, weight, bias, eps)
        grads = backward(grad, x, weight, exact_mean, exact_rstd, case.biased)
        names = ("out", "mean", "rstd", "grad_x", "grad_weight", "grad_bias")
        results = dict(zip(names, (out, mean, rstd, *grads), strict=True))
        return {name: x for name, x in results.items() if x.numel()}

    exact = passes(formula, formula_backward, torch.float64)
    yardstick = torch.float32 if case.dtype == torch.float64 else None
    own = passes(formula, formula_backward, yardstick)
    result = passes(overload("channel_norm", backend), overload("channel_norm_backward", backend))
    x = problem.tensors["x"].double().abs()
    sizes = problem.magnitudes | {"mean": x.mean(1), "rstd": 2 * exact["rstd"]}
    judge(result, own, exact, sizes)


@each(CASES[:12:3] + CASES[1:12:3], FUSED)
def test_operators_are_registered_correctly(backend, case):
    """Schemas, and fakes that predict shapes, dtypes and strides."""
    args, grad = arguments(case), build(case).grad_out
    forward, backward = overload("channel_norm", backend), overload("channel_norm_backward", backend)
    utils = ("test_schema", "test_faketensor")
    if backend not in INTERPRETED:  # which calls the operator many times more
        utils += ("test_aot_dispatch_dynamic",)
    torch.library.opcheck(forward, args, test_utils=utils)
    _, mean, rstd = forward(*args)
    torch.library.opcheck(backward, (grad, *args[:2], mean, rstd, case.biased), test_utils=utils)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if torch.float64 in DTYPES[backend]])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradcheck(backend, biased, format):
    x = randn(2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=format).requires_grad_()
    parameters = [randn(3, seed=i, dtype=torch.float64).requires_grad_() for i in range(1 + biased)]

    def run(*args: Tensor) -> Tensor:
        return channel_norm(*args, backend=backend)

    torch.autograd.gradcheck(run, (x, *parameters))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_gradient_of_one_argument_alone(backend, name):
    tensors = {"x": randn(2, 3, 4, 5), "weight": randn(3, seed=1), "bias": randn(3, seed=2)}
    expected = {key: x.clone().requires_grad_() for key, x in tensors.items()}
    channel_norm(**expected, backend=backend).square().sum().backward()
    tensors[name].requires_grad_()
    channel_norm(**tensors, backend=backend).square().sum().backward()
    torch.testing.assert_close(tensors[name].grad, expected[name].grad)


def test_is_the_layer_norm_of_pytorch():
    x, weight, bias = randn(2, 7, 4, 5), randn(7, seed=1), randn(7, seed=2)
    expected = F.layer_norm(x.movedim(1, -1), (7,), weight, bias, 1e-3).movedim(-1, 1)
    for backend in BACKENDS:
        torch.testing.assert_close(channel_norm(x, weight, bias, eps=1e-3, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_format_is_kept(backend, format):
    x = randn(2, 6, 4, 5).contiguous(memory_format=format).requires_grad_()
    weight = randn(6, seed=1)
    out = channel_norm(x, weight, weight, backend=backend)
    (grad,) = torch.autograd.grad(out, x, randn(2, 6, 4, 5, seed=2))
    assert out.is_contiguous(memory_format=format)
    assert grad.is_contiguous(memory_format=format) or backend == "eager"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ALL_DTYPES[1:], ids=str)
def test_autocast_leaves_the_dtype_and_computes_in_float32(backend, dtype):
    x, weight = randn(2, 6, 4, 5, dtype=dtype), randn(6, seed=1)
    expected = channel_norm(x, weight, weight, backend=backend)
    with torch.autocast(conformance.DEVICE, torch.bfloat16):
        out = channel_norm(x, weight, weight, backend=backend)
    assert out.dtype == dtype
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend not in INTERPRETED])
@pytest.mark.parametrize("biased", [True, False])
def test_gradients_per_sample(backend, biased):
    x, parameters = randn(3, 5, 4, 6), [randn(5, seed=i) for i in range(1 + biased)]

    def loss(parameters: list[Tensor], x: Tensor) -> Tensor:
        return channel_norm(x[None], *parameters, backend=backend).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        for grad, own in zip(grads, torch.func.grad(loss)(parameters, x[i]), strict=True):
            torch.testing.assert_close(grad[i], own)


@pytest.mark.parametrize("backend", COMPILED)
def test_vmap_over_parameters(backend):
    x, weights = randn(2, 5, 4, 6), randn(3, 5, seed=1)
    out = torch.func.vmap(lambda weight: channel_norm(x, weight, backend=backend))(weights)
    for one, weight in zip(out, weights, strict=True):
        torch.testing.assert_close(one, channel_norm(x, weight, backend=backend))


@pytest.mark.parametrize("backend", COMPILED)
def test_second_derivative_says_so(backend):
    x = randn(1, 3, 4, 5).requires_grad_()
    out = channel_norm(x, randn(3, seed=1), backend=backend).square().sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="channel_norm has no second derivative on backend"):
        grad.sum().backward()


@pytest.mark.parametrize("norm", ["WithBias", "BiasFree"])
@pytest.mark.parametrize("backend", COMPILED)
def test_compiles_once_for_all_sizes(backend, norm):
    torch.compiler.reset()
    module, graphs = ChannelNorm(6, norm).to(conformance.DEVICE), []

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
    module = ChannelNorm(6, "WithBias").to(conformance.DEVICE)
    step = torch.compile(lambda x: module(x).square().sum(), fullgraph=True, backend="aot_eager")
    x = randn(2, 6, 5, 7).requires_grad_()
    with use_backend(backend):
        results = [torch.autograd.grad(f(x), (x, *module.parameters()))
                   for f in (step, lambda x: module(x).square().sum())]  # fmt: skip
    for compiled, own in zip(*results, strict=True):
        torch.testing.assert_close(compiled, own)


def test_module():
    biased, free = ChannelNorm(6, "WithBias"), ChannelNorm(6, "BiasFree")
    assert {name: x.shape for name, x in biased.state_dict().items()} == {"weight": (6,), "bias": (6,)}
    assert {name: x.shape for name, x in free.state_dict().items()} == {"weight": (6,)}
    x = randn(2, 6, 4, 5).cpu()
    centred = x - x.mean(1, keepdim=True)
    std = (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(biased(x), centred / std)
    torch.testing.assert_close(free(x), x / std)


IMAGE, ONES = torch.ones(2, 3, 4, 5), torch.ones(3)
ERRORS = [
    (ValueError, {"x": IMAGE[0]}, r"x must have shape \(B, C, H, W\); got \(3, 4, 5\)"),
    (ValueError, {"x": IMAGE[:, :, :0]}, r"x must have no empty dimension.*\(2, 3, 0, 5\)"),
    (TypeError, {"x": IMAGE.int()}, "x must be float32, .*; got int32"),
    (TypeError, {"weight": None}, "weight must be a tensor; got NoneType"),
    (TypeError, {"weight": ONES.bool()}, "weight must be float32, .*; got bool"),
    (ValueError, {"weight": torch.ones(4)}, r"weight must have shape \(3,\) to fit x \(2, 3.*; got \(4,\)"),
    (ValueError, {"weight": torch.ones(3, 1, 1)}, r"weight must have shape \(3,\).*got \(3, 1, 1\)"),
    (ValueError, {"weight": ONES.to("meta")}, "weight must be on x's device cpu; got meta"),
    (ValueError, {"bias": torch.ones(1)}, r"bias must have shape \(3,\) to fit x \(2, 3, 4, 5\); got \(1,\)"),
    (TypeError, {"bias": 0.0}, "bias must be a tensor; got float"),
    (ValueError, {"eps": 0.0}, "eps must be a positive finite number; got 0.0"),
    (ValueError, {"eps": float("nan")}, "eps must be a positive finite number; got nan"),
    (ValueError, {"eps": "small"}, "eps must be a positive finite number; got 'small'"),
    (ValueError, {"backend": "gpu"}, "backend must be one of auto, eager, cpu, triton, cuda; got 'gpu'"),
]


@pytest.mark.parametrize(("error", "bad", "message"), ERRORS, ids=[row[2][:40] for row in ERRORS])
def test_errors(error, bad, message):
    good = {"x": IMAGE, "weight": ONES, "bias": ONES}
    channel_norm(**good)
    with pytest.raises(error, match=message) as raised:
        channel_norm(**{**good, **bad})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "WithBias"), "dim must be at least 1; got 0"),
        ((4, "LayerNorm"), "norm must be 'WithBias' or 'BiasFree'; got 'LayerNorm'"),
    ],
)
def test_module_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        ChannelNorm(*arguments)


def test_module_input():
    with pytest.raises(ValueError, match=r"x must have shape \(B, 4, H, W\); got \(2, 3, 5, 5\)"):
        ChannelNorm(4, "WithBias")(torch.ones(2, 3, 5, 5))

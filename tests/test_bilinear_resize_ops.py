"""The operators behind bilinear resizing, and what is around them: fakes, transforms, compilers."""

from __future__ import annotations

from functools import partial

import bilinear_resize_contract as contract
import conformance
import pytest
import torch
import torch.nn.functional as F
from attention_problems import DTYPES, INTERPRETED
from bilinear_resize_problems import BACKENDS, FUSED, Case, build, each
from torch import Tensor, nn

from restore_kernels import bilinear_resize, use_backend
from restore_kernels.bilinear_resize.ops import overload
from restore_kernels.nn import BilinearResize

COMPILED = [backend for backend in FUSED if backend not in INTERPRETED]
CASES = [
    Case((2, 3, 5, 7), factor, cut=cut, arrangement=place)
    for factor, cut in ((2, (1, 0)), (2, None), (0.5, (0, 0)))
    for place in ("contiguous", "channels_last", "crop")
]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(conformance.DEVICE, dtype)


def arguments(case: Case) -> tuple:
    given = build(case).tensors
    return given["x"], given.get("residual"), case.factor == 2, *case.size


@each(CASES, FUSED, interpreted=9)
def test_operators_do_what_the_formulas_say(backend, case):
    args, grad = arguments(case), build(case).grad_out
    out = overload("bilinear_resize", backend)(*args)
    torch.testing.assert_close(out, contract.bilinear_resize(*args))
    back = (grad, args[2], *args[0].shape[2:])
    torch.testing.assert_close(overload("bilinear_resize_backward", backend)(*back), contract.backward(*back))


@each(CASES, FUSED)
def test_operators_are_registered_correctly(backend, case):
    """Schemas, and fakes that predict shapes, dtypes and strides."""
    args, grad = arguments(case), build(case).grad_out
    utils = ("test_schema", "test_faketensor")
    if backend not in INTERPRETED:  # which calls the operator many times more
        utils += ("test_aot_dispatch_dynamic",)
    torch.library.opcheck(overload("bilinear_resize", backend), args, test_utils=utils)
    back = (grad, args[2], *args[0].shape[2:])
    torch.library.opcheck(overload("bilinear_resize_backward", backend), back, test_utils=utils)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if torch.float64 in DTYPES[backend]])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("factor", "size"), [(2, (5, 8)), (2, (6, 7)), (0.5, (2, 2))], ids=str)
def test_gradcheck(backend, factor, size, format):
    x = randn(2, 3, 3, 4, dtype=torch.float64).contiguous(memory_format=format).requires_grad_()
    residual = randn(2, 3, *size, seed=1, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda x, r: bilinear_resize(x, factor, r, backend=backend), (x, residual))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["x", "residual"])
def test_gradient_of_one_argument_alone(backend, name):
    tensors = {"x": randn(2, 3, 4, 5), "residual": randn(2, 3, 8, 10, seed=1)}
    expected = {key: x.clone().requires_grad_() for key, x in tensors.items()}
    bilinear_resize(**expected, scale_factor=2, backend=backend).square().sum().backward()
    tensors[name].requires_grad_()
    bilinear_resize(**tensors, scale_factor=2, backend=backend).square().sum().backward()
    torch.testing.assert_close(tensors[name].grad, expected[name].grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [2, 0.5])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_format_is_kept(backend, factor, format):
    x = randn(2, 6, 4, 5).contiguous(memory_format=format).requires_grad_()
    out = bilinear_resize(x, factor, backend=backend)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert out.is_contiguous(memory_format=format)
    assert grad.is_contiguous(memory_format=format) or backend == "eager"


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_dtype(backend):
    x = randn(2, 3, 4, 5, dtype=torch.bfloat16)
    expected = bilinear_resize(x, 2, backend=backend)
    with torch.autocast(
        conformance.DEVICE, torch.float16 if conformance.DEVICE == "cuda" else torch.bfloat16
    ):
        out = bilinear_resize(x, 2, backend=backend)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend not in INTERPRETED])
@pytest.mark.parametrize("factor", [2, 0.5])
def test_gradients_per_sample(backend, factor):
    x = randn(3, 2, 4, 6)

    def loss(x: Tensor) -> Tensor:
        return bilinear_resize(x[None], factor, backend=backend).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss))(x)
    for grad, own in zip(grads, x, strict=True):
        torch.testing.assert_close(grad, torch.func.grad(loss)(own))


@pytest.mark.parametrize("backend", COMPILED)
def test_second_derivative_says_so(backend):
    x = randn(1, 3, 4, 5).requires_grad_()
    out = bilinear_resize(x, 2, backend=backend).square().sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="bilinear_resize has no second derivative on backend"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("factor", [2, 0.5])
def test_compiles_once_for_all_sizes(backend, factor):
    torch.compiler.reset()
    module, graphs = BilinearResize(factor), []

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
    x, residual = randn(2, 3, 5, 7).requires_grad_(), randn(2, 3, 9, 14, seed=1).requires_grad_()

    def loss() -> Tensor:
        return bilinear_resize(x, 2, residual, backend=backend).square().sum()

    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(), (x, residual)) for f in (step, loss)]
    for compiled, own in zip(*results, strict=True):
        torch.testing.assert_close(compiled, own)


@pytest.mark.parametrize("factor", [2, 0.5])
def test_module(factor):
    module = BilinearResize(factor)
    assert not module.state_dict()
    x = randn(2, 3, 4, 6).cpu()
    expected = nn.Upsample(scale_factor=factor, mode="bilinear")(x)
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module(x, torch.ones_like(expected)), expected + 1)


def test_module_options():
    with pytest.raises(ValueError, match=r"scale_factor must be 2 or 0\.5; got 4"):
        BilinearResize(4)


IMAGE, RESIDUAL = torch.ones(2, 3, 4, 5), torch.ones(2, 3, 8, 10)
ERRORS = [
    (ValueError, {"x": IMAGE[0]}, r"x must have shape \(B, C, H, W\); got \(3, 4, 5\)"),
    (ValueError, {"x": IMAGE[:, :, :0]}, r"x must have no empty dimension.*\(2, 3, 0, 5\)"),
    (TypeError, {"x": IMAGE.int()}, "x must be float32, .*; got int32"),
    (ValueError, {"scale_factor": 3}, "scale_factor must be 2 or 0.5; got 3"),
    (ValueError, {"scale_factor": "2"}, "scale_factor must be 2 or 0.5; got '2'"),
    (TypeError, {"residual": 0.0}, "residual must be a tensor; got float"),
    (
        ValueError,
        {"residual": RESIDUAL[:, :, :6]},
        r"residual must have shape \(2, 3, 8, 10\) to fit x \(2, 3, 4, 5\); got \(2, 3, 6, 10\)",
    ),
    (ValueError, {"residual": RESIDUAL[:1]}, r"residual must have shape \(2, 3, 8, 10\) to fit x"),
    (ValueError, {"residual": RESIDUAL[0]}, r"residual must have shape \(2, 3, 8, 10\) to fit x"),
    (TypeError, {"residual": RESIDUAL.double()}, "residual must have x's dtype float32; got float64"),
    (ValueError, {"residual": RESIDUAL.to("meta")}, "residual must be on x's device cpu; got meta"),
    (ValueError, {"scale_factor": 0.5}, r"residual must have shape \(2, 3, 2, 3\) to fit x"),
    (ValueError, {"backend": "gpu"}, "backend must be one of auto, eager, cpu, triton, cuda; got 'gpu'"),
]


@pytest.mark.parametrize(("error", "bad", "message"), ERRORS, ids=[row[2][:40] for row in ERRORS])
def test_errors(error, bad, message):
    good = {"x": IMAGE, "scale_factor": 2, "residual": RESIDUAL}
    bilinear_resize(**good)
    with pytest.raises(error, match=message) as raised:
        bilinear_resize(**{**good, **bad})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("size", [(5, 7), (5, 8), (6, 7)])
def test_compiled_eager_halves_odd_sizes(size):
    """Inductor's own gradient of pooling in ceil_mode is wrong (pytorch/pytorch#198119)."""
    torch.compiler.reset()
    x = randn(2, 3, *size).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return bilinear_resize(x, 0.5, backend="eager").square().sum()

    own, compiled = (torch.autograd.grad(f(x), x)[0] for f in (loss, torch.compile(loss, fullgraph=True)))
    torch.testing.assert_close(compiled, own)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (7, 4)], ids=str)
def test_eager_doubles_alike_when_it_is_compiled(size):
    torch.compiler.reset()
    x = randn(2, 3, *size, dtype=torch.float64)
    compiled = torch.compile(partial(bilinear_resize, scale_factor=2, backend="eager"), backend="eager")
    torch.testing.assert_close(compiled(x), F.interpolate(x, scale_factor=2.0, mode="bilinear"))

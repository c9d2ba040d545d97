"""Pyramid attention inside the rest of PyTorch: torch.compile, autocast, torch.func, partial gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import conformance
import pytest
import torch
from attention_problems import INTERPRETED
from operators import close, randn
from pyramid_attention_problems import BACKENDS, FUSED, HARD_BACKENDS
from torch import Tensor

from restore_kernels import explain, pyramid_attention, use_backend

COMPILED = [backend for backend in BACKENDS if backend not in INTERPRETED]
QUICK = [backend for backend in FUSED if backend in COMPILED]
LEVELS = ((5, 6), (3, 4))


def soft_and_hard(backends: Sequence[str]) -> list[tuple[str, bool]]:
    """The backends with whether matching is hard, as far as they have it."""
    return [(name, hard) for name in backends for hard in (False, True) if not hard or name in HARD_BACKENDS]


def each_way(backends: Sequence[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("backend", "hard"), soft_and_hard(backends))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield


def images(*batch: int) -> list[Tensor]:
    """A query, the keys and the values of two levels."""
    shapes = [(1, 4, 5, 6), *((1, 4, *size) for size in LEVELS), *((1, 3, *size) for size in LEVELS)]
    return [randn(*batch, *shape, seed=i) for i, shape in enumerate(shapes)]


def attention(*tensors: Tensor, **options: Any) -> Tensor:
    """With scores of about one, of which other orders of the same sums make little."""
    query, *levels = tensors
    half = len(levels) // 2
    return pyramid_attention(query, levels[:half], levels[half:], softmax_scale=0.5, **options)


def loss(backend: str, hard: bool = False) -> Callable[..., Tensor]:
    return lambda *tensors: attention(*tensors, hard=hard, backend=backend).square().sum()


def wanted(hard: bool) -> tuple[int, ...]:
    """The positions of what has a gradient."""
    return (3, 4) if hard else (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("backend", "compiler", "hard"),
    [
        *((backend, "aot_eager", hard) for backend, hard in soft_and_hard(QUICK)),
        *((backend, "inductor", False) for backend in QUICK), ("eager", "aot_eager", False),
    ],
)  # fmt: skip
def test_compiles_in_one_graph_with_its_backward(backend, compiler, hard):
    inputs = [x.requires_grad_() for x in images()]

    def call(query: Tensor, *levels: Tensor) -> Tensor:
        return attention(2 * query, *levels, hard=hard, backend=backend).sigmoid()

    out, expected = torch.compile(call, fullgraph=True, backend=compiler)(*inputs), call(*inputs)
    close(out, expected)
    leaves = [inputs[i] for i in wanted(hard)]
    grads = (torch.autograd.grad(x.square().sum(), leaves) for x in (out, expected))
    for grad, expected_grad in zip(*grads, strict=True):
        close(grad, expected_grad)


@each_way(COMPILED)
def test_one_graph_serves_every_size_and_needs_no_gradients(backend, hard):
    graphs = []

    def compiler(graph: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    def call(*inputs: Tensor) -> Tensor:
        return attention(*inputs, hard=hard, backend=backend)

    by_graph = torch.compile(call, fullgraph=True, backend=compiler, dynamic=True)
    for height, width in ((7, 9), (8, 12), (13, 10)):
        sizes = ((height, width), (height - 2, width - 3))
        shapes = [(2, 4, height, width), *((2, c, *size) for c in (4, 3) for size in sizes)]
        inputs = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
        close(by_graph(*inputs), call(*inputs))
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_way(COMPILED)
def test_autocast_is_that_of_a_matrix_product(backend, dtype, hard):
    inputs = [x.requires_grad_() for x in images()]
    inputs[1] = inputs[1].detach().to(dtype).requires_grad_()  # autocast mixes them
    with torch.autocast(conformance.DEVICE, dtype):
        out = attention(*inputs, hard=hard, backend=backend)
    assert out.dtype == dtype
    leaves = [inputs[i] for i in wanted(hard)]
    for leaf, grad in zip(leaves, torch.autograd.grad(out.float().sum(), leaves), strict=True):
        assert grad.dtype == leaf.dtype
    assert torch.equal(out, attention(*(x.to(dtype) for x in inputs), hard=hard, backend=backend))


def test_autocast_leaves_float64_alone():
    with torch.autocast(conformance.DEVICE, torch.bfloat16):
        assert attention(*(x.double() for x in images()), backend="eager").dtype == torch.float64


@pytest.mark.parametrize("position", range(5))
@each_way(QUICK)
def test_gradient_of_one_input_alone(backend, position, hard):
    if position not in wanted(hard):
        pytest.skip("hard matching has gradients to values alone")
    inputs = images()
    inputs[position].requires_grad_()
    grads = [
        torch.autograd.grad(loss(name, hard)(*inputs), inputs[position])[0] for name in (backend, "eager")
    ]
    close(*grads)


@each_way(QUICK)
def test_inference_mode_keeps_no_graph(backend, hard):
    inputs = [x.requires_grad_() for x in images()]
    expected = attention(*inputs, hard=hard, backend=backend)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = attention(*inputs, hard=hard, backend=backend)
        assert not out.requires_grad and torch.equal(out, expected)


def assert_as_eager(transform: Callable, inputs: list[Tensor], backend: str, hard: bool) -> None:
    """What a transform makes of the loss is the same as on the eager backend."""
    results = [transform(loss(name, hard))(*inputs) for name in (backend, "eager")]
    for result, expected in zip(*results, strict=True):
        close(result, expected)


@each_way(QUICK)
def test_grad(backend, hard):
    assert_as_eager(lambda f: torch.func.grad(f, argnums=wanted(hard)), images(), backend, hard)


@each_way(QUICK)
def test_vmap(backend, hard):
    """Mapped over the last dimension of one input and the first of others; the rest are shared."""
    query, key, *rest = images(2)
    inputs, in_dims = [query.movedim(0, -1), key[0], *rest], (-1, None, 0, 0, 0)
    vmap = lambda f: lambda *x: [torch.func.vmap(f, in_dims=in_dims)(*x)]  # noqa: E731
    assert_as_eager(vmap, inputs, backend, hard)


@each_way(QUICK)
def test_per_sample_gradients(backend, hard):
    per_sample = lambda f: torch.func.vmap(torch.func.grad(f, wanted(hard)))  # noqa: E731
    assert_as_eager(per_sample, images(2), backend, hard)


@each_way(QUICK)
def test_a_second_derivative_is_an_error_that_names_the_way_out(backend, hard):
    inputs = [x.requires_grad_() for x in images()]
    (grad,) = torch.autograd.grad(loss(backend, hard)(*inputs), inputs[4:], create_graph=True)
    message = f"pyramid_attention has no second derivative on backend '{backend}'; backend='eager' has"
    with pytest.raises(RuntimeError, match=message):
        grad.sum().backward()


@pytest.mark.parametrize("backend", QUICK)
def test_forward_mode_is_an_error(backend):
    query, *levels = images()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda query: loss(backend)(query, *levels), (query,), (query,))


@pytest.mark.parametrize("backend", QUICK)
def test_a_level_that_is_given_twice_has_the_sum_of_its_gradients(backend):
    """Also where keys and values are one tensor."""
    image = randn(1, 4, 5, 6)

    def gradient(name: str) -> Tensor:
        x = image.clone().requires_grad_()
        return torch.autograd.grad(loss(name)(x, x, x, x, x), x)[0]

    torch.testing.assert_close(gradient(backend), gradient("eager"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", FUSED)
def test_the_block_chooses_the_backend(backend):
    query, *levels = images()
    with use_backend(backend):
        explanation = explain(pyramid_attention, query, levels[:2], levels[2:])
        out = attention(query, *levels)
    assert (explanation.operator, explanation.chosen) == ("pyramid_attention", backend)
    assert torch.equal(out, attention(query, *levels, backend=backend))

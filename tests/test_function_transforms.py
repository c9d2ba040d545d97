"""The operators under torch.func, and where differentiation ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_problems import LAYOUTS
from operators import Operator, close, each_backend, qkv, quick, randn
from torch import Tensor


def _loss(operator: Operator, layout: str, backend: str, *names: str) -> Callable[..., Tensor]:
    """Of q, k, v and the tensors of these names."""

    def loss(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        named = dict(zip(names, more, strict=True))
        return operator(q, k, v, **named, layout=layout, backend=backend).square().sum()

    return loss


def _assert_as_eager(
    transform: Callable, inputs: list[Tensor], operator: Operator, layout: str, backend: str, *names: str
) -> None:
    """What a transform makes of the loss is the same as on the eager backend."""
    results = [transform(_loss(operator, layout, name, *names))(*inputs) for name in (backend, "eager")]
    for result, expected in zip(*results, strict=True):
        close(result, expected)


OWN = pytest.mark.parametrize("own", [True, False], ids=["own", "bare"])


def _inputs(operator: Operator, layout: str, own: bool, *batch: int) -> tuple[list[Tensor], list[str]]:
    """q, k, v and, if wanted, the operator's own tensor with its name."""
    inputs = qkv(layout, *batch)
    return ([*inputs, operator.own_tensor(layout, *batch)], [operator.own]) if own else (inputs, [])


@OWN
@pytest.mark.parametrize("layout", LAYOUTS)
@each_backend(quick)
def test_grad(operator, backend, layout, own):
    inputs, names = _inputs(operator, layout, own)
    grad = lambda f: torch.func.grad(f, argnums=tuple(range(len(inputs))))  # noqa: E731
    _assert_as_eager(grad, inputs, operator, layout, backend, *names)


@OWN
@pytest.mark.parametrize("layout", LAYOUTS)
@each_backend(quick)
def test_vmap(operator, backend, layout, own):
    """Mapped over the last dimension of one input and the first of another; the third is shared."""
    (q, k, v, *more), names = _inputs(operator, layout, own, 2)
    inputs, in_dims = [q.movedim(0, -1), k[0], v, *more], (-1, None, 0, *(0 for _ in more))
    vmap = lambda f: lambda *x: [torch.func.vmap(f, in_dims=in_dims)(*x)]  # noqa: E731
    _assert_as_eager(vmap, inputs, operator, layout, backend, *names)


@OWN
@pytest.mark.parametrize("layout", LAYOUTS)
@each_backend(quick)
def test_per_sample_gradients(operator, backend, layout, own):
    inputs, names = _inputs(operator, layout, own, 2)
    argnums = tuple(range(len(inputs)))
    per_sample = lambda f: torch.func.vmap(torch.func.grad(f, argnums))  # noqa: E731
    _assert_as_eager(per_sample, inputs, operator, layout, backend, *names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@each_backend(quick)
def test_per_sample_gradients_of_a_shared_tensor(operator, backend, layout, dtype):
    """The operator's own; the token layout saves more of what it rounded."""
    inputs = [*(x.to(dtype) for x in qkv(layout, 2)), operator.own_tensor(layout)]

    def gradients(name: str) -> Tensor:
        grad = torch.func.grad(_loss(operator, layout, name, operator.own), argnums=3)
        return torch.func.vmap(grad, in_dims=(0, 0, 0, None))(*inputs)

    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(gradients(backend), gradients("eager"), rtol=tolerance, atol=tolerance)


@OWN
@pytest.mark.parametrize("mapped", [None, 0])
@each_backend(quick)
def test_per_sample_gradients_of_a_projection(operator, backend, mapped, own):
    """A shared projection has a gradient per sample too; a mapped one has no batch to join."""
    inputs, names = _inputs(operator, "channel", own, 2)
    inputs.append(randn(2, 8, 12) if mapped == 0 else randn(8, 12))

    def per_sample(f: Callable) -> Callable:
        grad = torch.func.grad(f, tuple(range(len(inputs))))
        return torch.func.vmap(grad, in_dims=(*(0 for _ in inputs[1:]), mapped))

    _assert_as_eager(per_sample, inputs, operator, "channel", backend, *names, "out_proj")


@OWN
@each_backend(quick)
def test_gradient_through_vmap(operator, backend, own):
    (q, k, v, *more), names = _inputs(operator, "channel", own, 2)

    def total(f: Callable) -> Callable:
        mapped = torch.func.vmap(f, in_dims=(0, None, 0, *(0 for _ in more)))
        return torch.func.grad(lambda *x: mapped(*x).sum(), argnums=tuple(range(3 + len(more))))

    _assert_as_eager(total, [q, k[0], v, *more], operator, "channel", backend, *names)


@OWN
@pytest.mark.parametrize("layout", LAYOUTS)
@each_backend(quick)
def test_a_second_derivative_is_an_error_that_names_the_way_out(operator, backend, layout, own):
    inputs, names = _inputs(operator, layout, own)
    loss = _loss(operator, layout, backend, *names)
    inputs = [x.requires_grad_() for x in inputs]
    (grad,) = torch.autograd.grad(loss(*inputs), inputs[-1], create_graph=True)
    message = f"{operator.name} has no second derivative on backend '{backend}'; backend='eager' has"
    with pytest.raises(RuntimeError, match=message):
        grad.sum().backward()
    last = len(inputs) - 1
    second = torch.func.grad(lambda *x: torch.func.grad(loss, last)(*x).sum(), last)
    with pytest.raises(RuntimeError, match="no second derivative"):
        second(*(x.detach() for x in inputs))


@each_backend(quick)
def test_forward_mode_is_an_error(operator, backend):
    q, k, v = qkv("channel")
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda q: _loss(operator, "channel", backend)(q, k, v), (q,), (q,))

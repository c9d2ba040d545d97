"""Every convolution inside the rest of PyTorch: torch.compile, torch.func, double backward, single gradients.

What only one of them has, modules and error messages among it, is in test_*_conv_integration.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import dense_conv_problems
import depthwise_conv_problems
import pointwise_conv_problems
import pytest
import torch
from attention_problems import INTERPRETED
from operators import close, randn
from torch import Tensor

from restore_kernels import dense_conv2d, depthwise_conv2d, pointwise_conv2d


@dataclass(frozen=True)
class Convolution:
    """A convolution of small tensors.

    Attributes:
        call: of the tensors and options, `backend` among them.
        shapes: of the tensors.
        images: how many of them are images and follow a sample; the rest are parameters.
        fused: the backends whose autograd Function is our own.
    """

    name: str
    call: Callable[..., Tensor]
    shapes: Sequence[tuple[int, ...]]
    images: Sequence[int]
    fused: Sequence[str]
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.name.replace(" ", "_")

    @property
    def operator(self) -> str:
        return self.name.split()[-1]

    def tensors(self, *batch: int) -> list[Tensor]:
        # The weight is scaled down: sums are about as large as what they are made of.
        return [
            randn(*batch, *shape, seed=i, dtype=self.dtype)
            / (4 if len(shape) == 4 and i not in self.images else 1)
            for i, shape in enumerate(self.shapes)
        ]

    def loss(self, backend: str) -> Callable[..., Tensor]:
        return lambda *tensors: self.call(*tensors, backend=backend).square().sum()


def _pointwise(a: Tensor, b: Tensor, *rest: Tensor, **options: Any) -> Tensor:
    return pointwise_conv2d([a, b], *rest, **options)


def _rectified(*tensors: Tensor, **options: Any) -> Tensor:
    return depthwise_conv2d(*tensors, activation="relu", **options)


def _gated(
    a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, slope: Tensor, gate: Tensor, **options: Any
) -> Tensor:
    return depthwise_conv2d((a, b), weight, bias, activation="prelu", slope=slope, gate=gate, **options)


CONVOLUTIONS = (
    # Minimal filtering rounds more: in float64 that does not show.
    Convolution(
        "dense_conv2d", dense_conv2d, ((2, 3, 7, 5), (4, 3, 3, 3), (4,)), (0,), dense_conv_problems.FUSED,
        torch.float64,
    ),
    Convolution(
        "depthwise_conv2d", _rectified, ((2, 6, 7, 5), (3, 2, 3, 3), (3,)), (0,),
        depthwise_conv_problems.FUSED,
    ),
    Convolution(
        "gated depthwise_conv2d", _gated,
        ((2, 1, 7, 5), (2, 5, 7, 5), (3, 2, 3, 3), (3,), (1,), (2, 3, 7, 5)), (0, 1, 5),
        depthwise_conv_problems.FUSED,
    ),
    Convolution(
        "pointwise_conv2d", _pointwise, ((2, 3, 7, 5), (2, 2, 7, 5), (4, 5, 1, 1), (4,)), (0, 1),
        pointwise_conv_problems.FUSED,
    ),
)  # fmt: skip


def each(*others: str, among: Sequence[Convolution] = CONVOLUTIONS) -> pytest.MarkDecorator:
    """For every convolution, its fused backends that compile and the other ones named."""
    pairs = [
        (convolution, backend)
        for convolution in among
        for backend in (*convolution.fused, *others)
        if backend not in INTERPRETED
    ]
    return pytest.mark.parametrize(("convolution", "backend"), pairs, ids=str)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield


def same_gradients(
    convolution: Convolution, backend: str, tensors: Sequence[Tensor], leaves: Sequence[Tensor]
) -> None:
    got, expected = (
        torch.autograd.grad(convolution.loss(name)(*tensors), leaves) for name in (backend, "eager")
    )
    for x, y in zip(got, expected, strict=True):
        close(x, y)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@each("eager")
def test_compiles_in_one_graph_with_its_backward(convolution, backend, compiler):
    tensors = [x.requires_grad_() for x in convolution.tensors()]
    plain, compiled = (
        convolution.loss("eager"),
        torch.compile(convolution.loss(backend), fullgraph=True, backend=compiler),
    )
    close(compiled(*tensors), plain(*tensors))
    grads, others = (torch.autograd.grad(f(*tensors), tensors) for f in (compiled, plain))
    for got, expected in zip(grads, others, strict=True):
        close(got, expected)


@each("eager")
def test_compiles_without_gradients(convolution, backend):
    tensors = convolution.tensors()
    compiled = torch.compile(convolution.loss(backend), fullgraph=True, backend="aot_eager")
    close(compiled(*tensors), convolution.loss("eager")(*tensors))


@pytest.mark.parametrize("mapped", ["images", "parameters", "first image and last tensor", "all"])
@each()
def test_vmap_and_per_sample_gradients(convolution, backend, mapped):
    count = len(convolution.shapes)
    chosen = {
        "images": set(convolution.images),
        "parameters": set(range(count)) - set(convolution.images),
        "first image and last tensor": {0, count - 1},
        "all": set(range(count)),
    }[mapped]
    in_dims = tuple(0 if i in chosen else None for i in range(count))
    tensors = [x if dim == 0 else x[0] for x, dim in zip(convolution.tensors(3), in_dims, strict=True)]

    def both(name: str) -> list[Tensor]:
        loss = convolution.loss(name)
        per_sample = torch.func.grad(loss, argnums=tuple(range(count)))
        return [torch.func.vmap(loss, in_dims)(*tensors), *torch.func.vmap(per_sample, in_dims)(*tensors)]

    for got, expected in zip(both(backend), both("eager"), strict=True):
        close(got, expected)


@each()
def test_a_second_derivative_is_an_error_that_names_the_way_out(convolution, backend):
    tensors, loss = [x.requires_grad_() for x in convolution.tensors()], convolution.loss(backend)
    (grad,) = torch.autograd.grad(loss(*tensors), tensors[0], create_graph=True)
    message = (
        f"{convolution.operator} has no second derivative on backend '{backend}'; backend='eager' has one"
    )
    with pytest.raises(RuntimeError, match=message):
        grad.sum().backward()
    second = torch.func.grad(lambda *x: torch.func.grad(loss)(*x).sum())
    with pytest.raises(RuntimeError, match="no second derivative"):
        second(*(x.detach() for x in tensors))


@each()
def test_some_gradients_alone(convolution, backend):
    count = len(convolution.shapes)
    wanted = [(i,) for i in range(count)] + [(i, j) for i in range(count) for j in range(i + 1, count)]
    for indices in wanted:
        tensors = convolution.tensors()
        same_gradients(convolution, backend, tensors, [tensors[i].requires_grad_() for i in indices])


# In bfloat16 dense convolution is PyTorch's own, which is quicker: test_dense_conv_integration.py.
@each("eager", among=[each for each in CONVOLUTIONS if each.call is not dense_conv2d])
def test_autocast(convolution, backend):
    tensors = [x.requires_grad_() for x in convolution.tensors()]
    with torch.autocast(tensors[0].device.type, torch.bfloat16):
        out = convolution.call(*tensors, backend=backend)
    expected = convolution.call(*(x.bfloat16() for x in tensors), backend="eager")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    grads = torch.autograd.grad(out.sum(), tensors)
    assert [g.dtype for g in grads] == [torch.float32] * len(tensors)

"""Problems for pointwise convolution, and the sizes of the terms of its sums."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace

import conformance
import pytest
import torch
from arrangements import arrange
from attention_problems import drawing, each_of
from conformance import Problem, Tensors, runnable
from torch import Tensor

from restore_kernels import explain, pointwise_conv2d

PROBE = torch.ones(1, 1, 2, 2, device=conformance.DEVICE)
EXPLANATION = explain(pointwise_conv2d, PROBE, PROBE[:, :, :1, :1])
BACKENDS = runnable(EXPLANATION)
FUSED = [backend for backend in BACKENDS if backend != "eager"]


@dataclass(frozen=True)
class Case:
    """What distinguishes one call from another.

    Attributes:
        image: (B, C_out, H, W) of the result.
        channels: of every image of x.
        per_image: a weight for every image of the batch.
        frozen: whether weight and bias get no gradient.
        arrangements: of the images of x by turns, and last of the output gradient, names of
            ``arrangements.IMAGE_ARRANGEMENTS``; "one_value" has stride 0 everywhere, as from sum().
    """

    image: tuple[int, int, int, int]
    channels: tuple[int, ...]
    _: KW_ONLY
    bias: bool = False
    per_image: bool = False
    frozen: bool = False
    dtype: torch.dtype = torch.float32
    arrangements: tuple[str, ...] = ("contiguous", "contiguous")

    def __str__(self) -> str:
        parts = ["+".join(map(str, self.channels)) + "to" + "x".join(map(str, self.image))]
        parts += [str(self.dtype)[6:]]
        parts += ["bias"] * self.bias + ["per_image"] * self.per_image + ["frozen"] * self.frozen
        names = list(dict.fromkeys(self.arrangements))
        return "-".join(parts + (["+".join(names)] if names != ["contiguous"] else []))

    def work(self) -> int:
        """Multiplies."""
        return torch.Size(self.image).numel() * sum(self.channels)


def each(
    cases: Iterable[Case], backends: Sequence[str] = BACKENDS, interpreted: int = 1
) -> pytest.MarkDecorator:
    """``each_of`` the backends that run pointwise convolution here."""
    return each_of(cases, backends, interpreted)


def call(weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto", **images: Tensor) -> Tensor:
    """The operator with its images one by one."""
    x = list(images.values())
    return pointwise_conv2d(x[0] if len(x) == 1 else x, weight, bias, backend=backend)


def build(case: Case) -> Problem:
    """The case with random numbers in it."""
    randn = drawing(seed=0)
    batch, outputs, height, width = case.image
    *of_images, of_grad = case.arrangements

    def placed(values: Tensor, name: str) -> Tensor:
        return arrange(values.to(conformance.DEVICE, case.dtype), name)

    tensors = {
        f"x{i}": placed(randn(batch, channels, height, width), of_images[i % len(of_images)])
        for i, channels in enumerate(case.channels)
    }
    shape = (batch,) * case.per_image + (outputs, sum(case.channels), 1, 1)
    tensors["weight"] = randn(*shape).to(conformance.DEVICE, case.dtype)
    if case.bias:
        tensors["bias"] = randn(outputs).to(conformance.DEVICE, case.dtype)
    if of_grad == "one_value":
        grad_out = randn(1).to(conformance.DEVICE, case.dtype).expand(case.image)
    else:
        grad_out = placed(randn(*case.image), of_grad)
    constants = frozenset({"weight", "bias"} & tensors.keys() if case.frozen else ())
    problem = Problem(call, tensors, {}, grad_out, {}, constants=constants)
    return replace(problem, magnitudes=sizes_of_terms(problem))


def sizes_of_terms(problem: Problem) -> Tensors:
    """The convolution and its gradients of absolute values."""
    sizes = {name: x.detach().double().abs() for name, x in problem.tensors.items()}
    absolute = replace(problem, tensors=sizes, grad_out=problem.grad_out.double().abs())
    return conformance.evaluate(absolute, "eager")

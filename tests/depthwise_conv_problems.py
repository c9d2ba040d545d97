"""Problems for depthwise convolution, and the sizes of the terms of its sums."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import conformance
import pytest
import torch
from arrangements import arrange
from attention_problems import drawing, each_of
from conformance import Problem, Tensors, runnable
from torch import Tensor

from restore_kernels import depthwise_conv2d, explain
from restore_kernels.depthwise_conv import reference

PROBE = torch.ones(1, 1, 2, 2, device=conformance.DEVICE)
EXPLANATION = explain(depthwise_conv2d, PROBE, PROBE[:, :, :1, :1])
BACKENDS = runnable(EXPLANATION)
FUSED = [backend for backend in BACKENDS if backend != "eager"]


@dataclass(frozen=True)
class Case:
    """What distinguishes one call from another.

    Attributes:
        image: (B, C_out, H, W) of the result.
        size: of the kernel.
        inputs: channels of x for every one of the result.
        images: that x is made of; the channels of each, or None for one image.
        slopes: how many "prelu" has, 1 or C_out.
        arrangements: of x and of the output gradient, names of ``arrangements.IMAGE_ARRANGEMENTS``;
            "one_value" has stride 0 everywhere, as from sum(). Of several images every other one lies as the
            gradient does, and so does the gate.
    """

    image: tuple[int, int, int, int]
    size: int = 3
    _: KW_ONLY
    dilation: int = 1
    inputs: int = 1
    images: tuple[int, ...] | None = None
    bias: bool = False
    activation: str | None = None
    slopes: int = 1
    gate: bool = False
    dtype: torch.dtype = torch.float32
    arrangements: tuple[str, str] = ("contiguous", "contiguous")

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.image)), f"{self.size}x{self.size}", str(self.dtype)[6:]]
        parts += ["dilated"] * (self.dilation - 1) + ["paired"] * (self.inputs - 1) + ["bias"] * self.bias
        parts += [] if self.images is None else ["from" + "+".join(map(str, self.images))]
        parts += [] if self.activation is None else [self.activation]
        parts += [f"{self.slopes}slopes"] * (self.activation == "prelu") + ["gated"] * self.gate
        names = list(dict.fromkeys(self.arrangements))
        return "-".join(parts + (["+".join(names)] if names != ["contiguous"] else []))

    def work(self) -> int:
        """Multiplies."""
        batch, channels, height, width = self.image
        return batch * channels * height * width * self.inputs * self.size**2


def each(
    cases: Iterable[Case], backends: Sequence[str] = BACKENDS, interpreted: int = 1
) -> pytest.MarkDecorator:
    """``each_of`` the backends that run depthwise convolution here."""
    return each_of(cases, backends, interpreted)


def operator(*, weight: Tensor, **others: Any) -> Tensor:
    """The operator with one argument per image: ``x``, or ``x[0]``, ``x[1]``, ..."""
    images = [others.pop(name) for name in list(others) if name.startswith("x[")] or others.pop("x")
    return depthwise_conv2d(images, weight, **others)


def build(case: Case) -> Problem:
    """The case with random numbers in it."""
    randn = drawing(seed=0)
    batch, channels, height, width = case.image

    def plain(*shape: int) -> Tensor:
        return randn(*shape).to(conformance.DEVICE, case.dtype)

    def image(channels: int, name: str) -> Tensor:
        if name == "one_value":
            return plain(1).expand(batch, channels, height, width)
        return arrange(plain(batch, channels, height, width), name)

    if case.images is None:
        tensors = {"x": image(channels * case.inputs, case.arrangements[0])}
    else:
        assert sum(case.images) == channels * case.inputs
        tensors = {f"x[{i}]": image(c, case.arrangements[i % 2]) for i, c in enumerate(case.images)}
    tensors["weight"] = plain(channels, case.inputs, case.size, case.size)
    if case.bias:
        tensors["bias"] = plain(channels)
    if case.activation == "prelu":
        tensors["slope"] = plain(case.slopes)
    if case.gate:
        tensors["gate"] = image(channels, case.arrangements[1])
    grad_out = image(channels, case.arrangements[1])
    options = {"dilation": case.dilation, "activation": case.activation}
    problem = Problem(operator, tensors, options, grad_out, {})
    return replace(problem, magnitudes=sizes_of_terms(problem))


def arguments(problem: Problem) -> tuple[Any, ...]:
    """The call as the operators take it: x, weight, bias, slope, gate, dilation, activation."""
    tensors = problem.tensors
    x = [tensor for name, tensor in tensors.items() if name.startswith("x")]
    small = (tensors.get(name) for name in ("weight", "bias", "slope", "gate"))
    return x, *small, problem.options["dilation"], problem.options["activation"]


def sizes_of_terms(problem: Problem) -> Tensors:
    """The same of absolute values, with 2 for the derivative of an activation, none of which is larger.

    A slope adds to that, and what it multiplies is a sum.
    """
    absolute = {name: x.detach().double().abs().requires_grad_() for name, x in problem.tensors.items()}
    slope, names = absolute.get("slope"), list(absolute)
    sizes = replace(problem, tensors={name: x for name, x in absolute.items() if name != "slope"})
    x, weight, bias, _, gate, dilation, activation = arguments(sizes)
    out = reference.depthwise_conv(x, weight, bias, None, None, dilation, None)
    if activation is not None:
        out = out * (2 if slope is None else 1 + slope[:, None, None])
    out = out if gate is None else out * gate
    grads = torch.autograd.grad(out, [absolute[name] for name in names], problem.grad_out.double().abs())
    return {"out": out.detach(), **{f"grad_{name}": g for name, g in zip(names, grads, strict=True)}}

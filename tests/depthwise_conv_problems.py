"""Problems for depthwise convolution, and the sizes of the terms of its sums."""

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
        arrangements: of x and of the output gradient, names of ``arrangements.IMAGE_ARRANGEMENTS``;
            "one_value" has stride 0 everywhere, as from sum().
    """

    image: tuple[int, int, int, int]
    size: int = 3
    _: KW_ONLY
    dilation: int = 1
    inputs: int = 1
    bias: bool = False
    activation: str | None = None
    dtype: torch.dtype = torch.float32
    arrangements: tuple[str, str] = ("contiguous", "contiguous")

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.image)), f"{self.size}x{self.size}", str(self.dtype)[6:]]
        parts += ["dilated"] * (self.dilation - 1) + ["paired"] * (self.inputs - 1) + ["bias"] * self.bias
        parts += [] if self.activation is None else [self.activation]
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


def build(case: Case) -> Problem:
    """The case with random numbers in it."""
    randn = drawing(seed=0)
    batch, channels, height, width = case.image

    def placed(values: Tensor, name: str) -> Tensor:
        return arrange(values.to(conformance.DEVICE, case.dtype), name)

    tensors = {
        "x": placed(randn(batch, channels * case.inputs, height, width), case.arrangements[0]),
        "weight": randn(channels, case.inputs, case.size, case.size).to(conformance.DEVICE, case.dtype),
    }
    if case.bias:
        tensors["bias"] = randn(channels).to(conformance.DEVICE, case.dtype)
    if case.arrangements[1] == "one_value":
        grad_out = randn(1).to(conformance.DEVICE, case.dtype).expand(case.image)
    else:
        grad_out = placed(randn(*case.image), case.arrangements[1])
    options = {"dilation": case.dilation, "activation": case.activation}
    problem = Problem(depthwise_conv2d, tensors, options, grad_out, {})
    return replace(problem, magnitudes=sizes_of_terms(problem))


def sizes_of_terms(problem: Problem) -> Tensors:
    """The convolution and its gradients of absolute values."""
    names = list(problem.tensors)
    sizes = [x.detach().double().abs().requires_grad_() for x in problem.tensors.values()]
    x, weight, bias = (*sizes, None)[:3]
    out = reference.depthwise_conv(x, weight, bias, problem.options["dilation"], False)  # type: ignore[arg-type]
    grads = torch.autograd.grad(out, sizes, problem.grad_out.double().abs())
    return {"out": out.detach(), **{f"grad_{name}": g for name, g in zip(names, grads, strict=True)}}

"""Problems for dense convolution, and the sizes of the terms of its sums."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace

import conformance
import pytest
import torch
from arrangements import arrange
from attention_problems import drawing, each_of
from conformance import Problem, Tensors, runnable

from restore_kernels import dense_conv2d, explain

PROBE = torch.ones(1, 1, 3, 3, device=conformance.DEVICE)
EXPLANATION = explain(dense_conv2d, PROBE, PROBE)
BACKENDS = runnable(EXPLANATION)
FUSED = [backend for backend in BACKENDS if backend != "eager"]
DTYPES = (torch.float32, torch.float64)  # of the fused ones


@dataclass(frozen=True)
class Case:
    """What distinguishes one call from another.

    Attributes:
        image: (B, C_out, H, W) of the result.
        channels: of x.
        frozen: whether weight and bias get no gradient.
        arrangements: of x and of the output gradient, names of ``arrangements.IMAGE_ARRANGEMENTS``;
            "one_value" has stride 0 everywhere, as from sum().
    """

    image: tuple[int, int, int, int]
    channels: int
    _: KW_ONLY
    bias: bool = False
    frozen: bool = False
    dtype: torch.dtype = torch.float32
    arrangements: tuple[str, str] = ("contiguous", "contiguous")

    def __str__(self) -> str:
        parts = [f"{self.channels}to" + "x".join(map(str, self.image)), str(self.dtype)[6:]]
        parts += ["bias"] * self.bias + ["frozen"] * self.frozen
        names = list(dict.fromkeys(self.arrangements))
        return "-".join(parts + (["+".join(names)] if names != ["contiguous"] else []))

    def work(self) -> int:
        """Multiplies."""
        return 9 * torch.Size(self.image).numel() * self.channels


def each(cases: Iterable[Case], backends: Sequence[str] = BACKENDS) -> pytest.MarkDecorator:
    """``each_of`` the backends that run dense convolution here; fused ones with their own dtypes."""
    return each_of(cases, backends, 1, lambda backend, case: backend == "eager" or case.dtype in DTYPES)


def build(case: Case) -> Problem:
    """The case with random numbers in it."""
    randn = drawing(seed=0)
    batch, outputs, height, width = case.image
    of_x, of_grad = case.arrangements

    def placed(shape: Sequence[int], name: str) -> torch.Tensor:
        if name == "one_value":
            return randn(1).to(conformance.DEVICE, case.dtype).expand(shape)
        return arrange(randn(*shape).to(conformance.DEVICE, case.dtype), name)

    tensors = {
        "x": placed((batch, case.channels, height, width), of_x),
        "weight": randn(outputs, case.channels, 3, 3).to(conformance.DEVICE, case.dtype),
    }
    if case.bias:
        tensors["bias"] = randn(outputs).to(conformance.DEVICE, case.dtype)
    constants = frozenset({"weight", "bias"} & tensors.keys() if case.frozen else ())
    problem = Problem(dense_conv2d, tensors, {}, placed(case.image, of_grad), {}, constants=constants)
    return replace(problem, magnitudes=sizes_of_terms(problem))


def sizes_of_terms(problem: Problem) -> Tensors:
    """The convolution and its gradients of absolute values."""
    sizes = {name: x.detach().double().abs() for name, x in problem.tensors.items()}
    absolute = replace(problem, tensors=sizes, grad_out=problem.grad_out.double().abs())
    return conformance.evaluate(absolute, "eager")

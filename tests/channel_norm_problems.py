"""Problems for channel normalisation: images of every shape, dtype and memory layout, and their analysis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace

import conformance
import pytest
import torch
from arrangements import arrange
from attention_problems import drawing, each_of
from conformance import Problem, runnable
from torch import Tensor

from restore_kernels import channel_norm, explain

PROBE = torch.ones(1, 2, 3, 3, device=conformance.DEVICE)
EXPLANATION = explain(channel_norm, PROBE, PROBE[0, :, 0, 0])
BACKENDS = runnable(EXPLANATION)
FUSED = [backend for backend in BACKENDS if backend != "eager"]


@dataclass(frozen=True)
class Case:
    """What distinguishes one call from another.

    Attributes:
        image: (B, C, H, W).
        mean: of the image; its standard deviation is ``std``.
        arrangement: of the image, a name of ``arrangements.IMAGE_ARRANGEMENTS``.
        grad: arrangement of the output gradient; "one_value" has stride 0 everywhere, as from sum().
        parameters: dtype of weight and bias, by default the image's.
    """

    image: tuple[int, int, int, int]
    _: KW_ONLY
    biased: bool = True
    dtype: torch.dtype = torch.float32
    mean: float = 0.0
    std: float = 1.0
    eps: float = 1e-5
    arrangement: str = "contiguous"
    grad: str = "contiguous"
    parameters: torch.dtype | None = None

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.image)), "biased" if self.biased else "unbiased", str(self.dtype)[6:]]
        parts += [] if (self.mean, self.std) == (0, 1) else [f"mean{self.mean:g}", f"std{self.std:g}"]
        parts += [] if self.eps == 1e-5 else [f"eps{self.eps:g}"]
        parts += [] if self.arrangement == "contiguous" else [self.arrangement]
        parts += [] if self.grad == "contiguous" else [f"grad_{self.grad}"]
        parts += [] if self.parameters is None else [f"parameters_{str(self.parameters)[6:]}"]
        return "-".join(parts)

    def work(self) -> int:
        batch, channels, height, width = self.image
        return batch * channels * height * width


def each(
    cases: Iterable[Case], backends: Sequence[str] = BACKENDS, interpreted: int = 8
) -> pytest.MarkDecorator:
    """``each_of`` the backends that run channel normalisation here."""
    return each_of(cases, backends, interpreted)


def build(case: Case) -> Problem:
    """The case with random numbers in it."""
    randn = drawing(seed=0)

    def image(values: Tensor, place: str) -> Tensor:
        return arrange(values.to(conformance.DEVICE, case.dtype), place)

    def parameter() -> Tensor:
        return (1 + randn(case.image[1])).to(conformance.DEVICE, case.parameters or case.dtype)

    tensors = {
        "x": image(case.mean + case.std * randn(*case.image), case.arrangement),
        "weight": parameter(),
    }
    if case.biased:
        tensors["bias"] = parameter()
    if case.grad == "one_value":
        grad_out = randn(1).to(conformance.DEVICE, case.dtype).expand(case.image)
    else:
        grad_out = image(randn(*case.image), case.grad)
    return with_magnitudes(Problem(channel_norm, tensors, {"eps": case.eps}, grad_out, {}))


def with_magnitudes(problem: Problem) -> Problem:
    """The problem with the size of the terms of each result.

    A centred value is a difference of the size of its terms. The variance has its roundings times the
    centred values; a relative error of the variance is one of everything that is divided by it.
    """
    given, grad = problem.tensors, problem.grad_out.double().abs()
    x, weight = given["x"].double(), given["weight"].double().abs()[:, None, None]
    biased = "bias" in given
    centred = (x - x.mean(1, keepdim=True)).abs()
    terms = x.abs() + x.abs().mean(1, keepdim=True)
    variance = centred.square().mean(1, keepdim=True) + problem.options["eps"]
    rstd = variance.rsqrt()
    relative = 1 + (centred * terms).mean(1, keepdim=True) / variance
    normal = (terms + centred * relative) * rstd
    factor = normal if biased else x.abs() * relative * rstd
    scaled = grad * weight
    of_mean = scaled.mean(1, keepdim=True) if biased else 0
    sizes = {
        "out": factor * weight,
        "grad_x": (scaled * relative + of_mean + normal * (scaled * factor).mean(1, keepdim=True)) * rstd,
        "grad_weight": (grad * factor).sum((0, 2, 3)),
    }
    if biased:
        sizes["out"] = sizes["out"] + given["bias"].double().abs()[:, None, None]
        sizes["grad_bias"] = grad.sum((0, 2, 3))
    return replace(problem, magnitudes=sizes)

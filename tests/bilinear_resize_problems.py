"""Problems for bilinear resizing: images of every shape, dtype and memory layout, and their analysis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace

import conformance
import pytest
import torch
from arrangements import arrange
from attention_problems import drawing, each_of
from conformance import Problem, Tensors, runnable

from restore_kernels import bilinear_resize, explain

PROBE = torch.ones(1, 1, 2, 2, device=conformance.DEVICE)
EXPLANATION = explain(bilinear_resize, PROBE, 2)
BACKENDS = runnable(EXPLANATION)
FUSED = [backend for backend in BACKENDS if backend != "eager"]


@dataclass(frozen=True)
class Case:
    """What distinguishes one call from another.

    Attributes:
        image: (B, C, H, W) of x.
        factor: 2 or 0.5.
        cut: rows and columns of a doubled image that the residual leaves out; None: there is no residual.
        arrangement: of x, a name of ``arrangements.IMAGE_ARRANGEMENTS``.
        other: of the residual and of the output gradient; for the latter "one_value" has stride 0
            everywhere, as from sum().
    """

    image: tuple[int, int, int, int]
    factor: float
    _: KW_ONLY
    cut: tuple[int, int] | None = (0, 0)
    dtype: torch.dtype = torch.float32
    arrangement: str = "contiguous"
    other: str = "contiguous"

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.image)), f"by{self.factor:g}", str(self.dtype)[6:]]
        parts += ["alone"] if self.cut is None else [f"cut{self.cut[0]}{self.cut[1]}"] * any(self.cut)
        parts += [] if self.arrangement == "contiguous" else [self.arrangement]
        parts += [] if self.other == "contiguous" else [f"other_{self.other}"]
        return "-".join(parts)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the result."""
        height, width = self.image[2:]
        if self.factor == 2:
            rows, columns = self.cut or (0, 0)
            return 2 * height - rows, 2 * width - columns
        return (height + 1) // 2, (width + 1) // 2

    def work(self) -> int:
        return torch.Size(self.image).numel() * 4


def each(
    cases: Iterable[Case], backends: Sequence[str] = BACKENDS, interpreted: int = 8
) -> pytest.MarkDecorator:
    """``each_of`` the backends that run bilinear resizing here."""
    return each_of(cases, backends, interpreted)


def build(case: Case) -> Problem:
    """The case with random numbers in it."""
    randn = drawing(seed=0)
    result = (*case.image[:2], *case.size)

    def placed(shape: Sequence[int], name: str) -> torch.Tensor:
        if name == "one_value":
            return randn(1).to(conformance.DEVICE, case.dtype).expand(shape)
        return arrange(randn(*shape).to(conformance.DEVICE, case.dtype), name)

    tensors = {"x": placed(case.image, case.arrangement)}
    if case.cut is not None:
        tensors["residual"] = placed(result, "contiguous" if case.other == "one_value" else case.other)
    options = {"scale_factor": case.factor}
    problem = Problem(bilinear_resize, tensors, options, placed(result, case.other), {})
    return replace(problem, magnitudes=sizes_of_terms(problem))


def sizes_of_terms(problem: Problem) -> Tensors:
    """The result and the gradients of absolute values: all weights are positive."""
    sizes = {name: x.detach().double().abs() for name, x in problem.tensors.items()}
    absolute = replace(problem, tensors=sizes, grad_out=problem.grad_out.double().abs())
    return conformance.evaluate(absolute, "eager")

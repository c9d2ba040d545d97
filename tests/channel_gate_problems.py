"""Problems for the channel gate: images of every shape, dtype and memory layout, and their analysis."""

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

from restore_kernels import channel_gate, explain

PROBE = torch.ones(1, 1, 1, 1, device=conformance.DEVICE)
EXPLANATION = explain(channel_gate, PROBE, PROBE, PROBE)
BACKENDS = runnable(EXPLANATION)
FUSED = [backend for backend in BACKENDS if backend != "eager"]
PARAMETERS = ("down", "up", "down_bias", "up_bias")


@dataclass(frozen=True)
class Case:
    """What distinguishes one call from another.

    Attributes:
        image: (B, C, H, W).
        hidden: the averages pass through so many numbers.
        biased, residual: whether there are biases, and a residual.
        std: standard deviation of the image.
        arrangement: of the image, a name of ``arrangements.IMAGE_ARRANGEMENTS``.
        other: arrangement of the residual and of the output gradient; for the latter "one_value" has stride 0
            everywhere, as from sum().
        parameters: dtype of weights and biases, by default the image's.
    """

    image: tuple[int, int, int, int]
    hidden: int = 3
    _: KW_ONLY
    biased: bool = True
    residual: bool = True
    dtype: torch.dtype = torch.float32
    std: float = 1.0
    arrangement: str = "contiguous"
    other: str = "contiguous"
    parameters: torch.dtype | None = None

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.image)), f"hidden{self.hidden}", str(self.dtype)[6:]]
        parts += [] if self.biased else ["unbiased"]
        parts += [] if self.residual else ["alone"]
        parts += [] if self.std == 1 else [f"std{self.std:g}"]
        parts += [] if self.arrangement == "contiguous" else [self.arrangement]
        parts += [] if self.other == "contiguous" else [f"other_{self.other}"]
        parts += [] if self.parameters is None else [f"parameters_{str(self.parameters)[6:]}"]
        return "-".join(parts)

    def work(self) -> int:
        batch, channels, height, width = self.image
        return batch * channels * (height * width + self.hidden)


def each(
    cases: Iterable[Case], backends: Sequence[str] = BACKENDS, interpreted: int = 8
) -> pytest.MarkDecorator:
    """``each_of`` the backends that run the channel gate here."""
    return each_of(cases, backends, interpreted)


def build(case: Case) -> Problem:
    """The case with random numbers in it; the image's mean is not zero, so that averages are not."""
    randn = drawing(seed=0)
    channels, hidden = case.image[1], case.hidden

    def image(values: Tensor, place: str) -> Tensor:
        return arrange(values.to(conformance.DEVICE, case.dtype), place)

    def parameter(*shape: int) -> Tensor:
        return randn(*shape).to(conformance.DEVICE, case.parameters or case.dtype)

    tensors = {
        "x": image(case.std * (0.5 + randn(*case.image)), case.arrangement),
        "down": parameter(hidden, channels, 1, 1),
        "up": parameter(channels, hidden, 1, 1),
    }
    if case.biased:
        tensors |= {"down_bias": parameter(hidden), "up_bias": parameter(channels)}
    if case.residual:
        place = "contiguous" if case.other == "one_value" else case.other
        tensors["residual"] = image(randn(*case.image), place)
    if case.other == "one_value":
        grad_out = randn(1).to(conformance.DEVICE, case.dtype).expand(case.image)
    else:
        grad_out = image(randn(*case.image), case.other)
    return with_magnitudes(Problem(channel_gate, tensors, {}, grad_out, {}))


def with_magnitudes(problem: Problem) -> Problem:
    """The problem with the size of the terms of each result.

    An error of the gate is its slope times one of what the sigmoid is taken of, and one of the slope is at
    most as large.
    """
    given = {name: tensor.double() for name, tensor in problem.tensors.items()}
    x, grad = given["x"], problem.grad_out.double().abs()
    down, up = given["down"].flatten(1), given["up"].flatten(1)
    shift = {name: given.get(name, x.new_zeros(())) for name in ("down_bias", "up_bias")}
    hidden = (x.mean((2, 3)) @ down.mT + shift["down_bias"]).relu()
    gate = (hidden @ up.mT + shift["up_bias"]).sigmoid()

    mean = x.abs().mean((2, 3))
    of_hidden = mean @ down.abs().mT + shift["down_bias"].abs()
    of_total = of_hidden @ up.abs().mT + shift["up_bias"].abs()
    slope = gate * (1 - gate) * (1 + of_total)
    of_gate = (gate + slope)[:, :, None, None]
    grad_total = (grad * x.abs()).sum((2, 3)) * slope
    grad_hidden = (grad_total @ up.abs()) * (hidden > 0)
    sizes = {
        "out": x.abs() * of_gate + (given["residual"].abs() if "residual" in given else 0),
        "grad_x": grad * of_gate + (grad_hidden @ down.abs() / x.shape[2:].numel())[:, :, None, None],
        "grad_down": (grad_hidden.mT @ mean).view(given["down"].shape),
        "grad_up": (grad_total.mT @ of_hidden).view(given["up"].shape),
        "grad_down_bias": grad_hidden.sum(0),
        "grad_up_bias": grad_total.sum(0),
        "grad_residual": grad,
    }
    wanted = {"out", *(f"grad_{name}" for name in given)}
    return replace(problem, magnitudes={name: size for name, size in sizes.items() if name in wanted})

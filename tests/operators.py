"""The attention operators as the tests call them that care for what is around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import conformance
import masked_attention_problems
import pytest
import topk_attention_problems
import torch
from attention_problems import INTERPRETED
from torch import Tensor

from restore_kernels import masked_attention, topk_attention


@dataclass(frozen=True)
class Operator:
    """An operator with small arguments.

    Attributes:
        options: those that it cannot do without.
        own: the name of its own tensor argument, beside those that every operator has.
        own_shapes: of that argument, per layout.
    """

    function: Callable[..., Tensor]
    backends: list[str]
    options: dict[str, Any]
    own: str
    own_shapes: dict[str, tuple[int, ...]]

    @property
    def name(self) -> str:
        return self.function.__name__

    def __str__(self) -> str:
        return self.name

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return self.function(q, k, v, **self.options, **options)

    def own_tensor(self, layout: str, *batch: int) -> Tensor:
        return randn(*batch, *self.own_shapes[layout], seed=3).sigmoid()


OPERATORS = (
    Operator(
        topk_attention, topk_attention_problems.BACKENDS, {"topk": [2, None]}, "weights",
        {"channel": (2,), "token": (2,)},
    ),
    Operator(
        masked_attention, masked_attention_problems.BACKENDS, {}, "mask",
        {"channel": (1, 1, 1, 20), "token": (1, 1, 7)},
    ),
)  # fmt: skip
SHAPES = {
    "channel": ((1, 2, 6, 20),) * 3,
    "token": ((1, 2, 9, 6), (1, 2, 7, 6), (1, 2, 7, 5)),
}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(conformance.DEVICE, dtype)


def qkv(layout: str, *batch: int) -> list[Tensor]:
    return [randn(*batch, *shape, seed=i) for i, shape in enumerate(SHAPES[layout])]


def close(a: Tensor, b: Tensor) -> None:
    """Equal but for the order of sums: another program may split the same sum differently."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def each_backend(wanted: Callable[[str], bool] = lambda backend: True) -> pytest.MarkDecorator:
    """Runs the test for every operator and each wanted one of its backends."""
    pairs = [(operator, name) for operator in OPERATORS for name in operator.backends if wanted(name)]
    return pytest.mark.parametrize(("operator", "backend"), pairs, ids=str)


def fused(backend: str) -> bool:
    return backend != "eager"


def compiled(backend: str) -> bool:
    return backend not in INTERPRETED


def quick(backend: str) -> bool:
    """For what concerns the autograd Functions, which are the same for every backend."""
    return fused(backend) and compiled(backend)

"""Cases of dense_conv2d."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from restore_kernels.dense_conv import dense_conv2d
from restore_kernels.profiling.baselines import published_dense_conv
from restore_kernels.profiling.cases.case import BenchmarkCase, Inputs, option, sizes, whole


@dataclass(frozen=True)
class DenseCase(BenchmarkCase):
    """dense_conv2d of an image (B, C, H, W)."""

    shape: tuple[int, ...] = option("shape", sizes, "sizes: B,C,H,W")
    outputs: int = option("outputs", whole, "channels of the result", default=64)
    backward: bool = True

    operator = staticmethod(dense_conv2d)
    published_function = staticmethod(published_dense_conv)
    dims = ("B", "C", "H", "W")
    growing = 2
    size_name = "rows"

    @property
    def name(self) -> str:
        return f"dense_conv2d to {self.outputs} {'x'.join(map(str, self.shape))}"

    @property
    def flops(self) -> int:
        """9 multiply-adds per 4 results and input channel, of minimal filtering; in backward twice that."""
        return self.published_flops // 4

    @property
    def published_flops(self) -> int:
        """9 for each, of the definition."""
        return (3 if self.backward else 1) * 2 * 9 * self.outputs * torch.Size(self.shape).numel()

    @property
    def elements(self) -> int:
        """x in, out out; then out's gradient and x in, x's gradient out."""
        batch, _, height, width = self.shape
        x, out = torch.Size(self.shape).numel(), batch * self.outputs * height * width
        return 3 * x + 2 * out if self.backward else x + out

    @property
    def small(self) -> DenseCase:
        return replace(self, shape=(1, 2, 8, 8), outputs=3)

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        batch, channels, height, width = self.shape

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        tensors = {"x": drawn(*self.shape), "weight": drawn(self.outputs, channels, 3, 3)}
        grad_out = drawn(batch, self.outputs, height, width)
        return Inputs({name: x.requires_grad_() for name, x in tensors.items()}, grad_out)

    def arguments(self, x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(x.tensors.values()), {}

    def published(self, x: Inputs, function: Callable[..., Tensor] | None = None) -> Tensor:
        return (function or published_dense_conv)(*x.tensors.values())

    def check(self) -> None:
        super().check()
        if self.outputs < 1:
            raise ValueError(f"outputs must be at least 1; got {self.outputs}, nearest is 1")


CPU = (
    DenseCase((1, 64, 48, 48), 64),
    DenseCase((1, 64, 96, 96), 64),
    DenseCase((1, 48, 64, 64), 48),
    DenseCase((1, 96, 64, 64), 96),
    DenseCase((1, 256, 48, 48), 256),
)
GPU = ()  # no kernels
GROWTH = ()

"""Cases of bilinear_resize."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from restore_kernels.bilinear_resize import bilinear_resize
from restore_kernels.profiling.baselines import published_bilinear_resize
from restore_kernels.profiling.cases.case import BenchmarkCase, Inputs, one_of, option, sizes


@dataclass(frozen=True)
class ResizeCase(BenchmarkCase):
    """bilinear_resize of an image (B, C, H, W), with a residual."""

    shape: tuple[int, ...] = option("shape", sizes, "sizes: B,C,H,W")
    factor: str = option("factor", one_of("2", "0.5"), "2 or 0.5: how large the result is", default="2")
    backward: bool = True

    operator = staticmethod(bilinear_resize)
    published_function = staticmethod(published_bilinear_resize)
    dims = ("B", "C", "H", "W")
    growing = 2
    size_name = "rows"

    @property
    def name(self) -> str:
        return f"bilinear_resize to {self.factor} of {'x'.join(map(str, self.shape))}"

    @property
    def result(self) -> tuple[int, ...]:
        batch, channels, height, width = self.shape
        if self.factor == "2":
            return batch, channels, 2 * height, 2 * width
        return batch, channels, (height + 1) // 2, (width + 1) // 2

    @property
    def flops(self) -> int:
        """A pixel of the larger image is mixed in two steps, of two products each; the same in backward."""
        larger = max(torch.Size(self.shape).numel(), torch.Size(self.result).numel())
        return (12 if self.backward else 6) * larger

    @property
    def elements(self) -> int:
        """x and residual in, out out; then out's gradient in, x's gradient out."""
        x, out = torch.Size(self.shape).numel(), torch.Size(self.result).numel()
        return x + 2 * out + (x + out if self.backward else 0)

    @property
    def small(self) -> ResizeCase:
        return replace(self, shape=(1, 4, 8, 8))

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        tensors = {"x": normal(self.shape), "residual": normal(self.result)}
        return Inputs({name: t.requires_grad_() for name, t in tensors.items()}, normal(self.result))

    def arguments(self, x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {**x.tensors, "scale_factor": float(self.factor)}

    def published(self, x: Inputs, function: Callable[..., Tensor] | None = None) -> Tensor:
        return (function or published_bilinear_resize)(**x.tensors, scale_factor=float(self.factor))


CPU = (ResizeCase((1, 127, 64, 64)), ResizeCase((1, 48, 128, 128), "0.5"))
GPU = (ResizeCase((8, 127, 64, 64)), ResizeCase((8, 48, 128, 128), "0.5"))
GROWTH = ()

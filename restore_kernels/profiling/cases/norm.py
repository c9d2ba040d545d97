"""Cases of channel_norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from restore_kernels.channel_norm import channel_norm
from restore_kernels.profiling.baselines import published_channel_norm
from restore_kernels.profiling.cases.case import BenchmarkCase, Inputs, option, sizes


@dataclass(frozen=True)
class NormCase(BenchmarkCase):
    """channel_norm of an image (B, C, H, W), with weight and bias."""

    shape: tuple[int, ...] = option("shape", sizes, "sizes: B,C,H,W")
    backward: bool = True

    operator = staticmethod(channel_norm)
    published_function = staticmethod(published_channel_norm)
    dims = ("B", "C", "H", "W")
    growing = 2
    size_name = "rows"

    @property
    def name(self) -> str:
        return f"channel_norm {'x'.join(map(str, self.shape))}"

    @property
    def flops(self) -> int:
        """Two sums and the result, two operations each per element; twice that in backward."""
        return (18 if self.backward else 6) * torch.Size(self.shape).numel()

    @property
    def elements(self) -> int:
        """x in, out out; then x and out's gradient in, x's gradient out."""
        return (5 if self.backward else 2) * torch.Size(self.shape).numel()

    @property
    def small(self) -> NormCase:
        return replace(self, shape=(1, 4, 8, 8))

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        x, grad_out = normal(*self.shape), normal(*self.shape)
        weight, bias = normal(self.shape[1]), normal(self.shape[1])
        tensors = {"x": x, "weight": weight, "bias": bias}
        return Inputs({name: t.requires_grad_() for name, t in tensors.items()}, grad_out)

    def arguments(self, x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), x.tensors

    def published(self, x: Inputs, function: Callable[..., Tensor] | None = None) -> Tensor:
        return (function or published_channel_norm)(**x.tensors)


CPU = (NormCase((1, 48, 128, 128)), NormCase((1, 192, 32, 32)))
GPU = (NormCase((8, 48, 128, 128)), NormCase((8, 384, 16, 16)))
GROWTH = ()

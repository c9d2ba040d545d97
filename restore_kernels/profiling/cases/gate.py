"""Cases of channel_gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from restore_kernels.channel_gate import channel_gate
from restore_kernels.profiling.baselines import published_channel_gate
from restore_kernels.profiling.cases.case import BenchmarkCase, Inputs, option, sizes, whole


@dataclass(frozen=True)
class GateCase(BenchmarkCase):
    """channel_gate of an image (B, C, H, W), with biases and a residual."""

    shape: tuple[int, ...] = option("shape", sizes, "sizes: B,C,H,W")
    reduction: int = option("reduction", whole, "C // reduction numbers between the layers", default=4)
    backward: bool = True

    operator = staticmethod(channel_gate)
    published_function = staticmethod(published_channel_gate)
    dims = ("B", "C", "H", "W")
    growing = 2
    size_name = "rows"

    @property
    def name(self) -> str:
        return f"channel_gate {'x'.join(map(str, self.shape))}"

    @property
    def flops(self) -> int:
        """A sum and a multiply-add per element; two multiply-adds in backward."""
        return (7 if self.backward else 3) * torch.Size(self.shape).numel()

    @property
    def elements(self) -> int:
        """x twice and the residual in, out out; then x and twice out's gradient in, x's gradient out."""
        return (8 if self.backward else 4) * torch.Size(self.shape).numel()

    @property
    def small(self) -> GateCase:
        return replace(self, shape=(1, 4, 8, 8), reduction=min(self.reduction, 4))

    def check(self) -> None:
        super().check()
        if not 1 <= self.reduction <= self.shape[1]:
            raise ValueError(
                f"reduction must be between 1 and {self.shape[1]}, the channels of the shape; "
                f"got {self.reduction}, nearest is {min(max(self.reduction, 1), self.shape[1])}"
            )

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        channels, hidden = self.shape[1], self.shape[1] // self.reduction
        tensors = {
            "x": randn(*self.shape),
            "down": randn(hidden, channels, 1, 1), "up": randn(channels, hidden, 1, 1),
            "down_bias": randn(hidden), "up_bias": randn(channels),
            "residual": randn(*self.shape),
        }  # fmt: skip
        return Inputs({name: t.requires_grad_() for name, t in tensors.items()}, randn(*self.shape))

    def arguments(self, x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), x.tensors

    def published(self, x: Inputs, function: Callable[..., Tensor] | None = None) -> Tensor:
        return (function or published_channel_gate)(**x.tensors)


CPU = (GateCase((1, 48, 128, 128)), GateCase((1, 48, 32, 32)))
GPU = (GateCase((8, 48, 128, 128)), GateCase((8, 64, 256, 256), reduction=16))
GROWTH = ()

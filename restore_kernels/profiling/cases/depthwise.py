"""Cases of depthwise_conv2d."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from restore_kernels.depthwise_conv import depthwise_conv2d
from restore_kernels.profiling.baselines import published_depthwise_conv
from restore_kernels.profiling.cases.case import BenchmarkCase, Inputs, one_of, option, sizes, whole


@dataclass(frozen=True)
class DepthwiseCase(BenchmarkCase):
    """depthwise_conv2d of an image (B, C, H, W) to C / inputs channels, activated and gated."""

    shape: tuple[int, ...] = option("shape", sizes, "sizes: B,C,H,W")
    kernel: int = option("kernel", whole, "side of the kernel: 1, 3, 5 or 7", default=3)
    inputs_per_output: int = option("inputs", whole, "input channels of an output channel: 1 or 2", default=1)
    dilation: int = option("dilation", whole, "of the taps: 1 or 2", default=1)
    activation: str = option(
        "activation", one_of("none", "relu", "gelu", "prelu"), "none, relu, gelu or prelu", default="none"
    )
    gate: str = option("gate", one_of("without", "with"), "without or with a gate", default="without")
    backward: bool = True

    operator = staticmethod(depthwise_conv2d)
    published_function = staticmethod(published_depthwise_conv)
    dims = ("B", "C", "H", "W")
    growing = 2
    size_name = "rows"

    @property
    def name(self) -> str:
        paired = " 2 to 1" if self.inputs_per_output == 2 else ""
        dilated = " dilated" if self.dilation == 2 else ""
        size = "x".join(map(str, self.shape))
        activation = "" if self.activation == "none" else f" {self.activation}"
        gated = " gated" if self.gate == "with" else ""
        return f"depthwise_conv2d {self.kernel}x{self.kernel}{dilated}{paired}{activation}{gated} {size}"

    @property
    def flops(self) -> int:
        """A multiply-add per tap and input channel; in backward the same for x and for the weight.

        Not what backward computes again: keeping the sums instead would spare it.
        """
        return (6 if self.backward else 2) * self.kernel**2 * torch.Size(self.shape).numel()

    @property
    def elements(self) -> int:
        """x in, out out, a gate in; then out's gradient, x and the gate in, gradients of x and the gate out.

        What is rectified and not gated is read again.
        """
        x = torch.Size(self.shape).numel()
        out = x // self.inputs_per_output
        gated, rectified = self.gate == "with", self.activation == "relu" and self.gate == "without"
        forward = x + out + gated * out
        return forward + 2 * x + (1 + 2 * gated + rectified) * out if self.backward else forward

    @property
    def small(self) -> DepthwiseCase:
        return replace(self, shape=(1, 2 * self.inputs_per_output, 8, 8))

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        batch, channels, height, width = self.shape
        outputs = channels // self.inputs_per_output
        shapes = {
            "x": self.shape,
            "weight": (outputs, self.inputs_per_output, self.kernel, self.kernel),
        }
        if self.activation == "prelu":
            shapes["slope"] = (1,)
        if self.gate == "with":
            shapes["gate"] = (batch, outputs, height, width)
        tensors = {
            name: torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()
            for name, shape in shapes.items()
        }
        grad_out = torch.randn((batch, outputs, height, width), generator=generator, device=device).to(dtype)
        return Inputs(tensors, grad_out)

    def arguments(self, x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {**x.tensors, "dilation": self.dilation, "activation": self._activation}

    @property
    def _activation(self) -> str | None:
        return None if self.activation == "none" else self.activation

    def published(self, x: Inputs, function: Callable[..., Tensor] | None = None) -> Tensor:
        options = {"dilation": self.dilation, "activation": self._activation}
        return (function or published_depthwise_conv)(**x.tensors, **options)

    def check(self) -> None:
        super().check()
        if self.shape[1] % self.inputs_per_output:
            raise ValueError(
                f"C of the shape must be a multiple of {self.inputs_per_output}, the inputs of an output; "
                f"got {self.shape[1]}, nearest is {self.shape[1] + 1}"
            )


CPU = (
    DepthwiseCase((1, 254, 128, 128), 3),
    DepthwiseCase((1, 254, 128, 128), 5),
    DepthwiseCase((1, 254, 128, 128), 5, inputs_per_output=2),
    DepthwiseCase((1, 48, 128, 128), 7, dilation=2),
    DepthwiseCase((1, 127, 64, 64), 3, activation="prelu", gate="with"),
    DepthwiseCase((1, 254, 128, 128), 3, activation="gelu", gate="with"),
)
GPU = (
    DepthwiseCase((8, 254, 128, 128), 3),
    DepthwiseCase((8, 254, 128, 128), 5),
    DepthwiseCase((8, 254, 128, 128), 5, inputs_per_output=2),
    DepthwiseCase((8, 48, 128, 128), 7, dilation=2),
    DepthwiseCase((8, 254, 128, 128), 3, activation="gelu", gate="with"),
)
GROWTH = ()

"""Cases of pointwise_conv2d."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from restore_kernels.pointwise_conv import pointwise_conv2d
from restore_kernels.profiling.baselines import published_pointwise_conv
from restore_kernels.profiling.cases.case import BenchmarkCase, Inputs, option, sizes, whole


@dataclass(frozen=True)
class PointwiseCase(BenchmarkCase):
    """pointwise_conv2d of an image (B, C, H, W), or of several that have C channels together."""

    shape: tuple[int, ...] = option("shape", sizes, "sizes: B,C,H,W")
    outputs: int = option("outputs", whole, "channels of the result", default=96)
    images: int = option("images", whole, "images that the channels come from: 1 to 8", default=1)
    backward: bool = True

    operator = staticmethod(pointwise_conv2d)
    published_function = staticmethod(published_pointwise_conv)
    dims = ("B", "C", "H", "W")
    growing = 2
    size_name = "rows"

    @property
    def name(self) -> str:
        several = f" of {self.images} images" if self.images > 1 else ""
        return f"pointwise_conv2d to {self.outputs}{several} {'x'.join(map(str, self.shape))}"

    @property
    def flops(self) -> int:
        """A multiply-add per input and output channel; in backward the same for x and for the weight."""
        return (6 if self.backward else 2) * self.outputs * torch.Size(self.shape).numel()

    @property
    def elements(self) -> int:
        """x in, out out; then out's gradient and x in, x's gradient out."""
        batch, _, height, width = self.shape
        x, out = torch.Size(self.shape).numel(), batch * self.outputs * height * width
        return 3 * x + 2 * out if self.backward else x + out

    @property
    def published_elements(self) -> int:
        """Several images are written together first, and their gradient in parts."""
        copied = torch.Size(self.shape).numel() if self.images > 1 else 0
        return self.elements + copied * (2 if self.backward else 1)

    @property
    def small(self) -> PointwiseCase:
        return replace(self, shape=(1, 2 * self.images, 8, 8), outputs=3)

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        batch, channels, height, width = self.shape

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        of_images = [len(part) for part in torch.arange(channels).tensor_split(self.images)]
        tensors = {f"x{i}": drawn(batch, count, height, width) for i, count in enumerate(of_images)}
        tensors["weight"] = drawn(self.outputs, channels, 1, 1)
        grad_out = drawn(batch, self.outputs, height, width)
        return Inputs({name: x.requires_grad_() for name, x in tensors.items()}, grad_out)

    def arguments(self, x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        *images, weight = x.tensors.values()
        return (images, weight), {}

    def published(self, x: Inputs, function: Callable[..., Tensor] | None = None) -> Tensor:
        *images, weight = x.tensors.values()
        return (function or published_pointwise_conv)(images, weight)

    def check(self) -> None:
        super().check()
        if self.outputs < 1:
            raise ValueError(f"outputs must be at least 1; got {self.outputs}, nearest is 1")
        most = min(8, self.shape[1])
        if not 1 <= self.images <= most:
            raise ValueError(
                f"images must be between 1 and {most}, the channels of the shape or 8; got {self.images}, "
                f"nearest is {min(max(self.images, 1), most)}"
            )


CPU = (
    PointwiseCase((1, 768, 128, 128), 96),
    PointwiseCase((1, 768, 128, 128), 96, images=8),
    PointwiseCase((1, 96, 128, 128), 96),
    PointwiseCase((1, 96, 128, 128), 510),
    PointwiseCase((1, 510, 128, 128), 96),
    PointwiseCase((1, 2042, 16, 16), 384),
)
GPU = (
    PointwiseCase((8, 768, 128, 128), 96, images=8),
    PointwiseCase((8, 96, 128, 128), 96),
    PointwiseCase((8, 96, 128, 128), 510),
    PointwiseCase((8, 510, 128, 128), 96),
)
GROWTH = ()

"""Cases of pyramid_attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from restore_kernels.profiling.baselines import published_pyramid_attention
from restore_kernels.profiling.cases.case import BenchmarkCase, Excerpt, Inputs, option, sizes, whole
from restore_kernels.pyramid_attention import pyramid_attention


@dataclass(frozen=True)
class PyramidCase(BenchmarkCase):
    """pyramid_attention of an image to the levels of its pyramid, each a tenth smaller, 3x3 patches."""

    shape: tuple[int, ...] = option("shape", sizes, "sizes: B,Cq,Cv,H,W")
    levels: int = option("levels", whole, "levels of the pyramid, 1 to 9", default=5)
    backward: bool = True

    operator = staticmethod(pyramid_attention)
    published_function = staticmethod(published_pyramid_attention)
    dims = ("B", "Cq", "Cv", "H", "W")
    size_name = "pixels"

    @property
    def name(self) -> str:
        batch, channels, of_values, height, width = self.shape
        levels = "" if self.levels == 5 else f" {self.levels} levels"
        return f"pyramid_attention {batch}x{channels}+{of_values}x{height}x{width}{levels}"

    @property
    def series(self) -> str:
        batch, channels, of_values, *_ = self.shape
        return f"pyramid_attention {batch}x{channels}+{of_values}xHxW"

    @property
    def size(self) -> int:
        return self.shape[3] * self.shape[4]

    def grown(self, factor: float) -> PyramidCase:
        height, width = (max(2, round(side * factor**0.5)) for side in self.shape[3:])
        return replace(self, shape=(*self.shape[:3], height, width))

    @property
    def level_sizes(self) -> list[tuple[int, int]]:
        """Of 1, 0.9, 0.8 ... of the image's height and width, as PANet's."""
        height, width = self.shape[3:]
        tenths = range(10, 10 - self.levels, -1)
        return [(max(1, height * part // 10), max(1, width * part // 10)) for part in tenths]

    def check(self) -> None:
        super().check()
        if not 1 <= self.levels <= 9:
            raise ValueError(f"levels must be between 1 and 9; got {self.levels}, nearest is "
                             f"{min(max(self.levels, 1), 9)}")  # fmt: skip

    @property
    def pairs(self) -> int:  # type: ignore[override]
        """Query pixels times pixels of all levels."""
        batch, _, _, height, width = self.shape
        return batch * height * width * sum(h * w for h, w in self.level_sizes)

    @property
    def flops(self) -> int:
        """Operations of the products, of pixels: forward has the scores twice, backward twice more.

        Backward computes scores and their gradients for the sums over rows and again for the products
        with them: to the values, the query and the keys.
        """
        channels, of_values = self.shape[1:3]
        forward = 2 * channels + of_values
        backward = 2 * (channels + of_values) + of_values + 2 * channels
        return 2 * self.pairs * (forward + (backward if self.backward else 0))

    @property
    def published_flops(self) -> int:
        """Two products of patches of nine pixels forward, four backward."""
        return 2 * self.pairs * 9 * (self.shape[1] + self.shape[2]) * (3 if self.backward else 1)

    @property
    def elements(self) -> int:
        """Elements moved at the least: all inputs and out; then inputs and grad_out in, gradients out."""
        batch, channels, of_values, height, width = self.shape
        image, pixels = height * width, sum(h * w for h, w in self.level_sizes)
        inputs = channels * (image + pixels) + of_values * pixels
        forward = inputs + of_values * image
        return batch * (forward + (forward + inputs if self.backward else 0))

    @property
    def published_elements(self) -> int:
        """Scores, their softmax and, in it, the scaled scores."""
        return self.elements + 3 * self.pairs

    @property
    def small(self) -> PyramidCase:
        return replace(self, shape=(1, *self.shape[1:3], 10, 10))

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        batch, channels, of_values, height, width = self.shape
        shapes = {"query": (batch, channels, height, width)}
        shapes |= {f"keys[{i}]": (batch, channels, *size) for i, size in enumerate(self.level_sizes)}
        shapes |= {f"values[{i}]": (batch, of_values, *size) for i, size in enumerate(self.level_sizes)}
        tensors = {
            name: torch.randn(shape, generator=generator, device=device).to(dtype)
            for name, shape in shapes.items()
        }
        grad_out = torch.randn(batch, of_values, height, width, generator=generator, device=device).to(dtype)
        return Inputs({name: x.requires_grad_() for name, x in tensors.items()}, grad_out)

    def excerpt(self, x: Inputs) -> Excerpt:
        """A window at the lower border: all that it depends on is within four pixels of it.

        The gradient of the output is zero outside of it, so that the gradients of keys and values are whole.
        """
        height, width = self.shape[3:]
        top, left, right = max(0, height - 6), width // 3, min(width, width // 3 + 12)
        above, before, after = min(top, 2), min(left, 2), min(width - right, 2)
        window = (..., slice(top, height), slice(left, right))
        crop = (..., slice(top - above, height), slice(left - before, right + after))
        inner = (..., slice(above, None), slice(before, right - left + before))
        grad_out = torch.zeros_like(x.grad_out)
        grad_out[window] = x.grad_out[window]
        query = x.tensors["query"].detach()[crop].requires_grad_()
        part = Inputs({**x.tensors, "query": query}, grad_out[crop])

        def cut(results: dict[str, Tensor]) -> dict[str, Tensor]:
            whole = results["out"].shape[-2:] == (height, width)
            cuts = {"out": results["out"][window if whole else inner]}
            if whole and "grad query" in results:
                cuts["grad query"] = results["grad query"][crop]
            return results | cuts

        return Excerpt(Inputs(x.tensors, grad_out), part, cut)

    def arguments(self, x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        query, *levels = x.tensors.values()
        return (query, levels[: self.levels], levels[self.levels :]), {}

    def published(self, x: Inputs, function: Callable[..., Tensor] | None = None) -> Tensor:
        return (function or published_pyramid_attention)(*self.arguments(x)[0])


CPU = tuple(
    PyramidCase((1, 32, 64, side, side), backward=backward) for side in (48, 96) for backward in (False, True)
)
GPU = (
    PyramidCase((8, 32, 64, 48, 48), backward=False),
    PyramidCase((8, 32, 64, 48, 48)),
    PyramidCase((1, 32, 64, 96, 96), backward=False),
    PyramidCase((1, 32, 64, 96, 96)),
)
GROWTH = tuple(
    PyramidCase((1, 32, 64, side, side), backward=backward)
    for side in (24, 32, 48, 64, 96, 128, 192)
    for backward in (False, True)
)

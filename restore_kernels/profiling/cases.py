"""The benchmark cases: what is timed, at which sizes, and what it must move and compute at the least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from restore_kernels.backends import explain
from restore_kernels.masked_attention import masked_attention
from restore_kernels.profiling.baselines import (
    published_masked_attention,
    published_pyramid_attention,
    published_topk_attention,
)
from restore_kernels.pyramid_attention import pyramid_attention
from restore_kernels.topk_attention import topk_attention

DRSFORMER_BRANCHES = (24, 32, 36, 38)  # of 48 channels per head


@dataclass(frozen=True)
class Inputs:
    """The tensor arguments of a call, by name, all with gradients, and the gradient of its output."""

    tensors: dict[str, Any]  # of Tensors; they are passed on as keywords
    grad_out: Tensor

    def double(self) -> Inputs:
        """The same values in float64."""
        tensors = {name: x.detach().double().requires_grad_() for name, x in self.tensors.items()}
        return Inputs(tensors, self.grad_out.double())

    def training_step(self, forward: Callable[[Inputs], Tensor]) -> None:
        """Forward and backward into fresh gradients."""
        for x in self.tensors.values():
            x.grad = None
        forward(self).backward(self.grad_out)

    @torch.no_grad()
    def inference_step(self, forward: Callable[[Inputs], Tensor]) -> None:
        """Forward alone."""
        forward(self)

    def results(self, forward: Callable[[Inputs], Tensor], backward: bool = True) -> dict[str, Tensor]:
        """The output and, with ``backward``, the gradients of one step."""
        with torch.set_grad_enabled(backward):
            out = forward(self)
        if not backward:
            return {"out": out}
        grads = torch.autograd.grad(out, list(self.tensors.values()), self.grad_out)
        return {"out": out, **{f"grad {name}": x for name, x in zip(self.tensors, grads, strict=True)}}


@dataclass(frozen=True)
class Excerpt:
    """A part of a call that can be computed exactly where the whole is too large for that.

    Attributes:
        whole: the call.
        part: the call that computes part of its results.
        cut: takes that part from the results of the whole; and what the part is right about from its own.
    """

    whole: Inputs
    part: Inputs
    cut: Callable[[dict[str, Tensor]], dict[str, Tensor]]


class BenchmarkCase:
    """What holds of a case unless it says otherwise."""

    backward = True  # is timed too
    pairs: int | None = None  # of positions, to report the time of each

    @property
    def name(self) -> str:
        raise NotImplementedError

    @property
    def flops(self) -> int:
        """Operations of the products of the method, in all that is timed."""
        raise NotImplementedError

    def __str__(self) -> str:
        return f"{self.name}, {self.timed}"

    @property
    def timed(self) -> str:
        return "forward and backward" if self.backward else "forward"

    @property
    def published_flops(self) -> int:
        """Operations of the published computation."""
        return self.flops

    def step(self, x: Inputs, forward: Callable[[Inputs], Tensor]) -> None:
        """What is timed."""
        (x.training_step if self.backward else x.inference_step)(forward)

    def excerpt(self, x: Inputs) -> Excerpt:
        """What the correctness of the call is judged by."""
        return Excerpt(x, x, lambda results: results)


@dataclass(frozen=True)
class TopKCase(BenchmarkCase):
    """Forward and backward of topk_attention at one size.

    shape is (B, H, C, N) in the channel layout and (B, H, N, D), N = M and D = E, in the token layout.
    """

    layout: str
    shape: tuple[int, int, int, int]
    topk: tuple[int | None, ...]

    published_function = staticmethod(published_topk_attention)

    @property
    def name(self) -> str:
        return f"topk_attention {self.layout} {'x'.join(map(str, self.shape))} top {self.topk}"

    @property
    def flops(self) -> int:
        """Operations of the products, forward and backward, of the method (not of the baseline)."""
        batch, heads, rows, columns = self.shape
        if self.layout == "channel":  # two products of 2 C² N forward, four backward
            return batch * heads * 12 * rows**2 * columns
        dense = None in self.topk
        kept = rows if dense else max(count or 0 for count in self.topk)
        scores, rest = 2 * 2 * rows * columns, 5 * 2 * kept * columns  # scores twice; P v, dP, dq, dk, dv
        return batch * heads * rows * (scores + rest)

    @property
    def elements(self) -> int:
        """Elements moved at the least: q, k, v in, out out; then do, v, q, k in, dq, dk, dv out."""
        batch, heads, rows, columns = self.shape
        return 11 * batch * heads * rows * columns

    @property
    def small(self) -> TopKCase:
        """The same call at a size that takes next to no memory."""
        shape = (*self.shape[:3], 64) if self.layout == "channel" else (1, 1, 128, 8)
        return TopKCase(self.layout, shape, self.topk)

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        branches = len(self.topk)
        tensors = {name: torch.randn(self.shape, generator=generator).to(device, dtype) for name in "qkv"}
        tensors["weights"] = torch.full((branches,), 0.8 / branches, device=device)
        tensors["temperature"] = torch.ones(self.shape[1], 1, 1, device=device)
        grad_out = torch.randn(self.shape, generator=generator).to(device, dtype)
        return Inputs({name: x.requires_grad_() for name, x in tensors.items()}, grad_out)

    def ours(self, x: Inputs, backend: str) -> Tensor:
        return topk_attention(**x.tensors, topk=self.topk, layout=self.layout, backend=backend)

    def published(self, x: Inputs, function: Callable[..., Tensor] = published_topk_attention) -> Tensor:
        q, k, v, weights, temperature = x.tensors.values()
        return function(q, k, v, self.topk, weights.to(q.dtype), temperature.to(q.dtype))

    def why_not(self, x: Inputs) -> dict[str, str | None]:
        """Why each backend cannot run the call, or None."""
        return explain(topk_attention, **x.tensors, topk=self.topk, layout=self.layout).why_not


@dataclass(frozen=True)
class MaskedCase(BenchmarkCase):
    """Forward and backward of masked_attention at one size, with one mask value per pixel or key.

    shape is (B, H, C, N) in the channel layout and (B, H, N, M, D), D = E, in the token layout.
    """

    layout: str
    shape: tuple[int, ...]

    published_function = staticmethod(published_masked_attention)

    @property
    def name(self) -> str:
        return f"masked_attention {self.layout} {'x'.join(map(str, self.shape))}"

    @property
    def flops(self) -> int:
        """Operations of the products, forward and backward, of the method (not of the baseline)."""
        if self.layout == "channel":
            batch, heads, rows, columns = self.shape
            return batch * heads * 12 * rows**2 * columns
        batch, heads, queries, keys, depth = self.shape
        return batch * heads * 14 * queries * keys * depth  # scores twice; P v, dP, dq, dk, dv

    @property
    def elements(self) -> int:
        """Elements moved at the least; as for top-k attention, with the mask or, by token, out once more."""
        if self.layout == "channel":
            batch, heads, rows, columns = self.shape
            return batch * (11 * heads * rows + 4) * columns
        batch, heads, queries, keys, depth = self.shape
        return batch * heads * 6 * (queries + keys) * depth

    @property
    def small(self) -> MaskedCase:
        """The same call at a size that takes next to no memory."""
        return MaskedCase(
            self.layout, (*self.shape[:3], 64) if self.layout == "channel" else (1, 1, 64, 64, 8)
        )

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        batch, heads = self.shape[:2]
        if self.layout == "channel":
            shapes = [self.shape] * 3
            mask = torch.rand(batch, 1, 1, self.shape[3], generator=generator)
        else:
            queries, keys, depth = self.shape[2:]
            shapes = [(batch, heads, queries, depth)] + 2 * [(batch, heads, keys, depth)]
            mask = torch.rand(batch, 1, keys, generator=generator)
        tensors = {
            name: torch.randn(shape, generator=generator).to(device, dtype)
            for name, shape in zip("qkv", shapes, strict=True)
        }
        tensors["mask"] = (0.05 + 0.95 * mask).to(device)
        tensors["temperature"] = torch.ones(heads, 1, 1, device=device)
        grad_out = torch.randn(shapes[0], generator=generator).to(device, dtype)
        return Inputs({name: x.requires_grad_() for name, x in tensors.items()}, grad_out)

    def ours(self, x: Inputs, backend: str) -> Tensor:
        return masked_attention(**x.tensors, layout=self.layout, backend=backend)

    def published(self, x: Inputs, function: Callable[..., Tensor] = published_masked_attention) -> Tensor:
        q, k, v, mask, temperature = x.tensors.values()
        return function(q, k, v, mask.to(q.dtype), temperature.to(q.dtype), layout=self.layout)

    def why_not(self, x: Inputs) -> dict[str, str | None]:
        """Why each backend cannot run the call, or None."""
        return explain(masked_attention, **x.tensors, layout=self.layout).why_not


@dataclass(frozen=True)
class PyramidCase(BenchmarkCase):
    """pyramid_attention of an image to the five levels of its pyramid, 3x3 patches.

    Attributes:
        shape: (B, Cq, Cv, H, W).
        backward: forward and backward are timed, else forward alone.
    """

    shape: tuple[int, int, int, int, int]
    backward: bool = True

    published_function = staticmethod(published_pyramid_attention)

    @property
    def name(self) -> str:
        batch, channels, of_values, height, width = self.shape
        return f"pyramid_attention {batch}x{channels}+{of_values}x{height}x{width}"

    @property
    def levels(self) -> list[tuple[int, int]]:
        height, width = self.shape[3:]
        return [(height * tenths // 10, width * tenths // 10) for tenths in range(10, 5, -1)]

    @property
    def pairs(self) -> int:  # type: ignore[override]
        """Query pixels times pixels of all levels."""
        batch, _, _, height, width = self.shape
        return batch * height * width * sum(h * w for h, w in self.levels)

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
        image, pixels = height * width, sum(h * w for h, w in self.levels)
        inputs = channels * (image + pixels) + of_values * pixels
        forward = inputs + of_values * image
        return batch * (forward + (forward + inputs if self.backward else 0))

    @property
    def small(self) -> PyramidCase:
        """The same call at a size that takes next to no memory."""
        return replace(self, shape=(1, *self.shape[1:3], 10, 10))

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        batch, channels, of_values, height, width = self.shape
        shapes = {"query": (batch, channels, height, width)}
        shapes |= {f"keys[{i}]": (batch, channels, *size) for i, size in enumerate(self.levels)}
        shapes |= {f"values[{i}]": (batch, of_values, *size) for i, size in enumerate(self.levels)}
        tensors = {
            name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()
        }
        grad_out = torch.randn(batch, of_values, height, width, generator=generator).to(device, dtype)
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

    @staticmethod
    def _arguments(x: Inputs) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        query, *levels = x.tensors.values()
        return query, levels[: len(levels) // 2], levels[len(levels) // 2 :]

    def ours(self, x: Inputs, backend: str) -> Tensor:
        return pyramid_attention(*self._arguments(x), backend=backend)

    def published(self, x: Inputs, function: Callable[..., Tensor] = published_pyramid_attention) -> Tensor:
        return function(*self._arguments(x))

    def why_not(self, x: Inputs) -> dict[str, str | None]:
        """Why each backend cannot run the call, or None."""
        return explain(pyramid_attention, *self._arguments(x)).why_not


Case = TopKCase | MaskedCase | PyramidCase

CPU_CASES: tuple[Case, ...] = (
    TopKCase("channel", (1, 1, 48, 128 * 128), DRSFORMER_BRANCHES),
    TopKCase("channel", (1, 2, 48, 64 * 64), DRSFORMER_BRANCHES),
    TopKCase("channel", (1, 4, 48, 32 * 32), DRSFORMER_BRANCHES),
    TopKCase("channel", (1, 8, 48, 16 * 16), DRSFORMER_BRANCHES),
    TopKCase("channel", (1, 1, 48, 256 * 256), DRSFORMER_BRANCHES),
    TopKCase("token", (1, 1, 4096, 32), (64,)),
    TopKCase("token", (64, 2, 64, 24), (None, 32)),
    MaskedCase("channel", (1, 1, 48, 128 * 128)),
    MaskedCase("channel", (1, 2, 24, 64 * 64)),
    MaskedCase("token", (1, 1, 16, 128 * 128, 48)),
    MaskedCase("token", (1, 1, 128 * 128, 16, 48)),
    PyramidCase((1, 32, 64, 48, 48), backward=False),
    PyramidCase((1, 32, 64, 48, 48)),
    PyramidCase((1, 32, 64, 96, 96), backward=False),
    PyramidCase((1, 32, 64, 96, 96)),
)
GPU_CASES: tuple[Case, ...] = (
    TopKCase("channel", (8, 1, 48, 128 * 128), DRSFORMER_BRANCHES),
    TopKCase("channel", (8, 2, 48, 64 * 64), DRSFORMER_BRANCHES),
    TopKCase("channel", (8, 4, 48, 32 * 32), DRSFORMER_BRANCHES),
    TopKCase("channel", (8, 8, 48, 16 * 16), DRSFORMER_BRANCHES),
    TopKCase("channel", (8, 1, 48, 256 * 256), DRSFORMER_BRANCHES),
    TopKCase("token", (8, 2, 4096, 32), (64,)),
    TopKCase("token", (2048, 2, 64, 24), (None, 32)),
    MaskedCase("channel", (8, 1, 48, 128 * 128)),
    MaskedCase("channel", (8, 2, 24, 64 * 64)),
    MaskedCase("token", (8, 1, 16, 256 * 256, 48)),
    MaskedCase("token", (8, 1, 256 * 256, 16, 48)),
    PyramidCase((8, 32, 64, 48, 48), backward=False),
    PyramidCase((8, 32, 64, 48, 48)),
    PyramidCase((1, 32, 64, 96, 96), backward=False),
    PyramidCase((1, 32, 64, 96, 96)),
)
# Ours alone: the published computation takes 9 GiB for the scores and their gradients at 128x128.
GROWTH_CASES = tuple(
    PyramidCase((1, 32, 64, side, side), backward)
    for side in (48, 64, 96, 128, 192)
    for backward in (False, True)
)

"""Cases of masked_attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from restore_kernels.masked_attention import masked_attention
from restore_kernels.profiling.baselines import published_masked_attention
from restore_kernels.profiling.cases.case import BenchmarkCase, Inputs, one_of, option, sizes


@dataclass(frozen=True)
class MaskedCase(BenchmarkCase):
    """masked_attention at one size; in the token layout D = E.

    mask: ``shared`` has one value per pixel or key, ``full`` one per entry of k (channel) or per head and
    key (token), ``none`` is no mask.
    """

    layout: str = option("layout", one_of("channel", "token"), "channel or token: what attends to its like")
    shape: tuple[int, ...] = option("shape", sizes, "sizes: B,H,C,N by channel, B,H,N,M,D by token")
    mask: str = option(
        "mask", one_of("shared", "full", "none"), "shared: one value per pixel or key; full; none",
        default="shared",
    )  # fmt: skip
    backward: bool = True

    operator = staticmethod(masked_attention)
    published_function = staticmethod(published_masked_attention)

    @property
    def dims(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("B", "H", "C", "N") if self.layout == "channel" else ("B", "H", "N", "M", "D")

    @property
    def name(self) -> str:
        mask = "" if self.mask == "shared" else f" {self.mask} mask" if self.mask == "full" else " no mask"
        return f"masked_attention {self.layout} {'x'.join(map(str, self.shape))}{mask}"

    @property
    def growing(self) -> int:  # type: ignore[override]
        """N, or M where there are more keys than queries."""
        return 3 if self.layout == "channel" or self.shape[3] > self.shape[2] else 2

    @property
    def size_name(self) -> str:  # type: ignore[override]
        return "pixels" if self.layout == "channel" else "keys" if self.growing == 3 else "queries"

    @property
    def flops(self) -> int:
        """Channel: two products of 2 C² N forward, four backward. Token: two, five with the scores again."""
        if self.layout == "channel":
            batch, heads, rows, columns = self.shape
            return batch * heads * (12 if self.backward else 4) * rows**2 * columns
        batch, heads, queries, keys, depth = self.shape
        return batch * heads * (14 if self.backward else 4) * queries * keys * depth

    @property
    def published_flops(self) -> int:
        """Two products forward, two more for each backward, which keeps the scores."""
        queries, keys, depth = (
            self.shape[2:] if self.layout == "token" else (self.shape[2],) * 2 + self.shape[3:]
        )
        batch, heads = self.shape[:2]
        return batch * heads * (12 if self.backward else 4) * queries * keys * depth

    @property
    def elements(self) -> int:
        """q, k, v and mask in, out out; then these and do in (by channel without out), gradients out."""
        batch, heads = self.shape[:2]
        mask = (3 if self.backward else 1) * self._mask_elements
        if self.layout == "channel":
            return batch * heads * (11 if self.backward else 4) * self.shape[2] * self.shape[3] + mask
        queries, keys, depth = self.shape[2:]
        if not self.backward:
            return batch * heads * 2 * (queries + keys) * depth + mask
        return batch * heads * 6 * (queries + keys) * depth + mask

    @property
    def published_elements(self) -> int:
        batch, heads = self.shape[:2]
        scores = 0 if self.layout == "channel" else batch * heads * self.shape[2] * self.shape[3]
        return self.elements + 3 * scores

    @property
    def _mask_shape(self) -> tuple[int, ...]:
        batch, heads, *rest = self.shape
        if self.layout == "channel":
            return (batch, heads, *rest) if self.mask == "full" else (batch, 1, 1, rest[1])
        return (batch, heads if self.mask == "full" else 1, rest[1])

    @property
    def _mask_elements(self) -> int:
        return 0 if self.mask == "none" else torch.Size(self._mask_shape).numel()

    @property
    def small(self) -> MaskedCase:
        shape = (*self.shape[:3], 64) if self.layout == "channel" else (1, 1, 64, 64, 8)
        return replace(self, shape=shape)

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        batch, heads = self.shape[:2]
        mask = torch.rand(self._mask_shape, generator=generator, device=device)
        if self.layout == "channel":
            shapes = [self.shape] * 3
        else:
            queries, keys, depth = self.shape[2:]
            shapes = [(batch, heads, queries, depth)] + 2 * [(batch, heads, keys, depth)]
        tensors = {
            name: torch.randn(shape, generator=generator, device=device).to(dtype)
            for name, shape in zip("qkv", shapes, strict=True)
        }
        if self.mask != "none":
            tensors["mask"] = 0.05 + 0.95 * mask
        tensors["temperature"] = torch.ones(heads, 1, 1, device=device)
        grad_out = torch.randn(shapes[0], generator=generator, device=device).to(dtype)
        return Inputs({name: x.requires_grad_() for name, x in tensors.items()}, grad_out)

    def arguments(self, x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {**x.tensors, "layout": self.layout}

    def published(self, x: Inputs, function: Callable[..., Tensor] | None = None) -> Tensor:
        q, k, v, *mask, temperature = x.tensors.values()
        function = function or published_masked_attention
        given = mask[0].to(q.dtype) if mask else None
        return function(q, k, v, given, temperature.to(q.dtype), layout=self.layout)


CPU = (
    MaskedCase("channel", (1, 1, 48, 128 * 128)),
    MaskedCase("channel", (1, 2, 24, 64 * 64)),
    MaskedCase("token", (1, 1, 16, 128 * 128, 48)),
    MaskedCase("token", (1, 1, 128 * 128, 16, 48)),
)
GPU = (
    MaskedCase("channel", (8, 1, 48, 128 * 128)),
    MaskedCase("channel", (8, 2, 24, 64 * 64)),
    MaskedCase("token", (8, 1, 16, 256 * 256, 48)),
    MaskedCase("token", (8, 1, 256 * 256, 16, 48)),
)
GROWTH = (
    *(MaskedCase("channel", (1, 1, 48, side**2)) for side in (32, 64, 128, 256, 512)),
    *(MaskedCase("token", (1, 1, 16, side**2, 48)) for side in (32, 64, 128, 256, 512)),
)

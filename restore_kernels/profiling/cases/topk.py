"""Cases of topk_attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from restore_kernels.profiling.baselines import published_topk_attention
from restore_kernels.profiling.cases.case import BenchmarkCase, Excerpt, Inputs, one_of, option, sizes, whole
from restore_kernels.topk_attention import topk_attention

DRSFORMER_BRANCHES = (24, 32, 36, 38)  # of 48 channels per head


def branches(text: str) -> tuple[int | None, ...]:
    """``24,32,36,38``; ``none`` keeps all."""
    return tuple(None if entry.lower() == "none" else whole(entry) for entry in text.split(","))


# Normalised scores that are nearer to one another than this may come out in the other order in float32.
UNDECIDED = 64 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class TopKCase(BenchmarkCase):
    """topk_attention at one size; in the token layout N = M and D = E."""

    layout: str = option("layout", one_of("channel", "token"), "channel or token: what attends to its like")
    shape: tuple[int, ...] = option("shape", sizes, "sizes of q: B,H,C,N by channel, B,H,N,D by token")
    topk: tuple[int | None, ...] = option(
        "branches", branches, "entries that each branch keeps, none for all: 24,32,none"
    )
    backward: bool = True

    operator = staticmethod(topk_attention)
    published_function = staticmethod(published_topk_attention)

    @property
    def dims(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("B", "H", "C", "N") if self.layout == "channel" else ("B", "H", "N", "D")

    @property
    def name(self) -> str:
        return f"topk_attention {self.layout} {'x'.join(map(str, self.shape))} top {self.topk}"

    @property
    def growing(self) -> int:  # type: ignore[override]
        return self.dims.index("N")

    @property
    def size_name(self) -> str:  # type: ignore[override]
        return "pixels" if self.layout == "channel" else "tokens"

    @property
    def flops(self) -> int:
        """Channel: two products of 2 C² N forward, four backward.

        Token: scores in both passes, over all pairs; P v, then dP, dq, dk and dv over the pairs kept.
        """
        batch, heads, rows, columns = self.shape
        if self.layout == "channel":
            return batch * heads * (12 if self.backward else 4) * rows**2 * columns
        kept = rows if None in self.topk else max(count or 0 for count in self.topk)
        passes, of_kept = (2, 5) if self.backward else (1, 1)
        return batch * heads * rows * (passes * 2 * rows * columns + of_kept * 2 * kept * columns)

    @property
    def published_flops(self) -> int:
        """One product with v per branch, over all pairs; backward two products per product."""
        batch, heads, rows, columns = self.shape
        pairs = rows**2
        return batch * heads * 2 * pairs * columns * (1 + len(self.topk)) * (3 if self.backward else 1)

    @property
    def elements(self) -> int:
        """q, k, v in, out out; then do, v, q, k in, dq, dk, dv out."""
        batch, heads, rows, columns = self.shape
        return (11 if self.backward else 4) * batch * heads * rows * columns

    @property
    def published_elements(self) -> int:
        """Scores, and mask, masked scores and their softmax of each branch."""
        batch, heads, rows, _ = self.shape
        return self.elements + batch * heads * rows**2 * (1 + 3 * len(self.topk))

    @property
    def small(self) -> TopKCase:
        return replace(self, shape=(*self.shape[:3], 64)) if self.layout == "channel" else _SMALL_TOKENS

    def check(self) -> None:
        super().check()
        row = self.shape[2]
        for kept in self.topk:
            if kept is not None and not 1 <= kept <= row:
                raise ValueError(
                    f"a branch keeps between 1 and {row} entries, {self.dims[2]} of the shape; "
                    f"got {kept}, nearest is {min(max(kept, 1), row)}"
                )

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        branches = len(self.topk)
        tensors = {
            name: torch.randn(self.shape, generator=generator, device=device).to(dtype) for name in "qkv"
        }
        tensors["weights"] = torch.full((branches,), 0.8 / branches, device=device)
        tensors["temperature"] = torch.ones(self.shape[1], 1, 1, device=device)
        grad_out = torch.randn(self.shape, generator=generator, device=device).to(dtype)
        return Inputs({name: x.requires_grad_() for name, x in tensors.items()}, grad_out)

    def excerpt(self, x: Inputs) -> Excerpt:
        """Without the rows in which rounding decides what is kept: each choice is as right as the other."""
        decided = self._decided(x)
        judged = Inputs(x.tensors, x.grad_out * decided)
        return Excerpt(judged, judged, lambda results: {**results, "out": results["out"] * decided})

    def _decided(self, x: Inputs) -> Tensor:
        """(B, H, rows, 1): whether no branch ends between two scores that differ by rounding alone."""
        q, k = (F.normalize(x.tensors[name].detach().double(), dim=-1) for name in "qk")
        rows = self.shape[2]
        ends = [count for count in self.topk if count is not None and count < rows]
        decided = torch.ones((*self.shape[:3], 1), dtype=torch.bool, device=q.device)
        if ends:
            largest = (q @ k.mT).topk(max(ends) + 1, dim=-1).values
            for count in ends:
                gap = largest[..., count - 1 : count] - largest[..., count : count + 1]
                decided &= (gap == 0) | (gap > UNDECIDED)
        return decided

    def arguments(self, x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {**x.tensors, "topk": self.topk, "layout": self.layout}

    def published(self, x: Inputs, function: Callable[..., Tensor] | None = None) -> Tensor:
        q, k, v, weights, temperature = x.tensors.values()
        function = function or published_topk_attention
        return function(q, k, v, self.topk, weights.to(q.dtype), temperature.to(q.dtype))


_SMALL_TOKENS = TopKCase("token", (1, 1, 128, 8), (None, 32))

CPU = (
    TopKCase("channel", (1, 1, 48, 128 * 128), DRSFORMER_BRANCHES),
    TopKCase("channel", (1, 2, 48, 64 * 64), DRSFORMER_BRANCHES),
    TopKCase("channel", (1, 4, 48, 32 * 32), DRSFORMER_BRANCHES),
    TopKCase("channel", (1, 8, 48, 16 * 16), DRSFORMER_BRANCHES),
    TopKCase("channel", (1, 1, 48, 256 * 256), DRSFORMER_BRANCHES),
    TopKCase("token", (1, 1, 4096, 32), (64,)),
    TopKCase("token", (64, 2, 64, 24), (None, 32)),
)
GPU = (
    TopKCase("channel", (8, 1, 48, 128 * 128), DRSFORMER_BRANCHES),
    TopKCase("channel", (8, 2, 48, 64 * 64), DRSFORMER_BRANCHES),
    TopKCase("channel", (8, 4, 48, 32 * 32), DRSFORMER_BRANCHES),
    TopKCase("channel", (8, 8, 48, 16 * 16), DRSFORMER_BRANCHES),
    TopKCase("channel", (8, 1, 48, 256 * 256), DRSFORMER_BRANCHES),
    TopKCase("token", (8, 2, 4096, 32), (64,)),
    TopKCase("token", (2048, 2, 64, 24), (None, 32)),
)
GROWTH = (
    *(TopKCase("channel", (1, 1, 48, side**2), DRSFORMER_BRANCHES) for side in (32, 64, 128, 256, 512)),
    *(TopKCase("token", (1, 1, tokens, 32), (64,)) for tokens in (512, 1024, 2048, 4096, 8192)),
)

"""The benchmark cases: what is timed, at which sizes, and what it must move and compute at the least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from restore_kernels.profiling.baselines import published_topk_attention
from restore_kernels.topk_attention import topk_attention

DRSFORMER_BRANCHES = (24, 32, 36, 38)  # of 48 channels per head


@dataclass(frozen=True)
class TopKCase:
    """Forward and backward of topk_attention at one size.

    shape is (B, H, C, N) in the channel layout and (B, H, N, D), N = M and D = E, in the token layout.
    """

    layout: str
    shape: tuple[int, int, int, int]
    topk: tuple[int | None, ...]

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

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        heads, branches = self.shape[1], len(self.topk)

        def normal() -> Tensor:
            return torch.randn(self.shape, generator=generator).to(device, dtype)

        return Inputs(
            q=normal().requires_grad_(), k=normal().requires_grad_(), v=normal().requires_grad_(),
            weights=torch.full((branches,), 0.8 / branches, device=device, requires_grad=True),
            temperature=torch.ones(heads, 1, 1, device=device, requires_grad=True),
            grad_out=normal(),
        )  # fmt: skip

    def ours(self, x: Inputs, backend: str) -> Tensor:
        return topk_attention(
            x.q, x.k, x.v, self.topk, weights=x.weights, temperature=x.temperature,
            layout=self.layout, backend=backend,
        )  # fmt: skip

    def published(self, x: Inputs, function: Callable[..., Tensor] = published_topk_attention) -> Tensor:
        return function(x.q, x.k, x.v, self.topk, x.weights.to(x.q.dtype), x.temperature.to(x.q.dtype))


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor
    temperature: Tensor
    grad_out: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.weights, self.temperature

    def training_step(self, forward: Callable[[], Tensor]) -> None:
        """Forward and backward into fresh gradients."""
        for leaf in self.leaves:
            leaf.grad = None
        forward().backward(self.grad_out)

    def gradients(self, forward: Callable[[], Tensor]) -> list[Tensor]:
        """The output and the gradients of one step."""
        out = forward()
        return [out, *torch.autograd.grad(out, self.leaves, self.grad_out)]


CPU_CASES = (
    TopKCase("channel", (1, 1, 48, 128 * 128), DRSFORMER_BRANCHES),
    TopKCase("channel", (1, 2, 48, 64 * 64), DRSFORMER_BRANCHES),
    TopKCase("channel", (1, 4, 48, 32 * 32), DRSFORMER_BRANCHES),
    TopKCase("channel", (1, 8, 48, 16 * 16), DRSFORMER_BRANCHES),
    TopKCase("channel", (1, 1, 48, 256 * 256), DRSFORMER_BRANCHES),
    TopKCase("token", (1, 1, 4096, 32), (64,)),
    TopKCase("token", (64, 2, 64, 24), (None, 32)),
)
GPU_CASES = (
    TopKCase("channel", (8, 1, 48, 128 * 128), DRSFORMER_BRANCHES),
    TopKCase("channel", (8, 2, 48, 64 * 64), DRSFORMER_BRANCHES),
    TopKCase("channel", (8, 4, 48, 32 * 32), DRSFORMER_BRANCHES),
    TopKCase("channel", (8, 8, 48, 16 * 16), DRSFORMER_BRANCHES),
    TopKCase("channel", (8, 1, 48, 256 * 256), DRSFORMER_BRANCHES),
    TopKCase("token", (8, 2, 4096, 32), (64,)),
    TopKCase("token", (2048, 2, 64, 24), (None, 32)),
)

"""The benchmark cases: what is timed, at which sizes, and what it must move and compute at the least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from restore_kernels.backends import explain
from restore_kernels.masked_attention import masked_attention
from restore_kernels.profiling.baselines import published_masked_attention, published_topk_attention
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

    def results(self, forward: Callable[[Inputs], Tensor]) -> dict[str, Tensor]:
        """The output and the gradients of one step."""
        out = forward(self)
        grads = torch.autograd.grad(out, list(self.tensors.values()), self.grad_out)
        return {"out": out, **{f"grad {name}": x for name, x in zip(self.tensors, grads, strict=True)}}


@dataclass(frozen=True)
class TopKCase:
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
class MaskedCase:
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


Case = TopKCase | MaskedCase

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
)

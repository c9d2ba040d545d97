"""Which attention a network calls, at which sizes, and whether the fused operators pay there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

import restore_kernels
from restore_kernels.profiling.baselines import published_masked_attention, published_topk_attention
from restore_kernels.profiling.measure import Timing, interleave

# Of two ways to compute attention in float32, relative to the largest entry of the result.
SAME_RESULT = 1e-4
OPERATORS: dict[str, Callable[..., Tensor]] = {
    "topk_attention": restore_kernels.topk_attention,
    "masked_attention": restore_kernels.masked_attention,
}
_CALLERS = ("restore_kernels.nn", "restore_nets.models")  # modules that call operators by their names

Shape = tuple[int, ...]


@dataclass(frozen=True)
class AttentionCall:
    """One kind of call of an attention operator.

    Args:
        operator: a name in ``OPERATORS``.
        layout: ``"channel"`` or ``"token"``.
        q, k, v: shapes, see the operators.
        normalize: whether q and k are normalised.
        topk: entries kept by each branch, of ``topk_attention``.
        mask: shape of the mask, of ``masked_attention``, if there is one.
        projected: channels of the folded output projection, if there is one.
    """

    operator: str
    layout: str
    q: Shape
    k: Shape
    v: Shape
    normalize: bool = True
    topk: tuple[int | None, ...] = ()
    mask: Shape | None = None
    projected: int | None = None

    def __str__(self) -> str:
        batch, heads = self.q[:2]
        if self.layout == "channel":
            return f"B{batch} H{heads} C{self.q[2]} N{_pixels(self.q[3])}"
        return f"B{batch} H{heads} N{_pixels(self.q[2])} M{_pixels(self.k[2])} D{self.q[3]}"

    @property
    def selection(self) -> str:
        """What takes part in the attention, in words."""
        if self.operator == "masked_attention":
            return "masked" if self.mask is not None else "all"
        return ", ".join("all" if kept is None else str(kept) for kept in self.topk)


def _pixels(count: int) -> str:
    side = round(count**0.5)
    return f"{side}x{side}" if side * side == count and side > 4 else str(count)


def attention_calls(model: nn.Module, batch: Tensor) -> list[AttentionCall]:
    """The different calls of attention operators that a network makes for a batch (B, 3, H, W)."""
    with _recorded() as calls, torch.no_grad():
        model(batch)
    return calls


@contextmanager
def _recorded() -> Iterator[list[AttentionCall]]:
    """The different calls that the networks' modules make in the block, in their order."""
    calls: list[AttentionCall] = []
    modules = [module for name, module in sys.modules.items() if name.startswith(_CALLERS)]
    names = [(module, name) for module in modules for name in OPERATORS if hasattr(module, name)]
    originals = [(module, name, getattr(module, name)) for module, name in names]
    try:
        for module, name, original in originals:
            setattr(module, name, _recording(name, original, calls))
        yield calls
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def _recording(
    name: str, operator: Callable[..., Tensor], calls: list[AttentionCall]
) -> Callable[..., Tensor]:
    @wraps(operator)
    def record(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        out_proj = options.get("out_proj")
        call = AttentionCall(
            name, options.get("layout", "channel"), tuple(q.shape), tuple(k.shape), tuple(v.shape),
            normalize=options.get("normalize", True), projected=None if out_proj is None else len(out_proj),
        )  # fmt: skip
        if name == "topk_attention":
            call = replace(call, topk=tuple(args[0] if args else options["topk"]))
        elif (mask := args[0] if args else options.get("mask")) is not None:
            call = replace(call, mask=tuple(mask.shape))
        if call not in calls:
            calls.append(call)
        return operator(q, k, v, *args, **options)

    return record


@dataclass(frozen=True)
class AttentionTimes:
    """Forward and backward of one call: the fused operator against the published computation."""

    call: AttentionCall
    backend: str  # that runs the operator
    fused: Timing
    published: Timing
    difference: float  # of the results, relative to the largest entry

    @property
    def same(self) -> bool:
        return self.difference <= SAME_RESULT

    @property
    def speedup(self) -> float:
        return self.published.median / self.fused.median


def time_attention(call: AttentionCall, device: torch.device, seconds: float) -> AttentionTimes:
    """Time forward and backward in float32, interleaved in this process."""
    problem = _Problem(call, device)

    def both_passes(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), problem.inputs, problem.gradient)

    with torch.no_grad():
        expected = problem.published()
        difference = float((problem.fused() - expected).abs().max() / expected.abs().max())
    passes = {"fused": both_passes(problem.fused), "published": both_passes(problem.published)}
    times = interleave(passes, seconds=seconds, device=str(device))
    return AttentionTimes(call, problem.backend(), times["fused"], times["published"], difference)


class _Problem:
    """Random tensors of a call, and the two ways to compute it."""

    def __init__(self, call: AttentionCall, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        self.call = call
        batch, heads, channels, pixels = call.q
        if call.q == call.k == call.v and call.layout == "channel":
            # One tensor, as the convolution of a transformer block gives it.
            parts = normal(batch, 3 * heads * channels, pixels).chunk(3, dim=1)
            q, k, v = (part.unflatten(1, (heads, -1)) for part in parts)
        else:
            q, k, v = normal(*call.q), normal(*call.k), normal(*call.v)
        self.tensors = [x.requires_grad_() for x in (q, k, v)]
        self.mask = None if call.mask is None else torch.rand(call.mask, generator=generator).to(device)
        # A mask is predicted, so it takes part in the backward pass.
        self.inputs = self.tensors if self.mask is None else [*self.tensors, self.mask.requires_grad_()]
        self.weights = torch.full((len(call.topk),), 1 / len(call.topk), device=device) if call.topk else None
        self.temperature = torch.ones(heads, 1, 1, device=device)
        if not call.normalize:
            self.temperature *= call.q[-1] ** -0.5
        self.out_proj = None if call.projected is None else normal(call.projected, heads * channels)
        self.gradient = normal(*self._fused_shape())

    def _fused_shape(self) -> Shape:
        batch, _, _, pixels = self.call.q
        if self.call.projected is not None:
            return batch, self.call.projected, pixels
        return self.call.q if self.call.layout == "channel" else (*self.call.q[:3], self.call.v[3])

    def _arguments(self) -> tuple[list[Any], dict[str, Any]]:
        options: dict[str, Any] = {
            "temperature": self.temperature, "normalize": self.call.normalize, "layout": self.call.layout,
            "out_proj": self.out_proj,
        }  # fmt: skip
        if self.call.operator == "topk_attention":
            return [*self.tensors, self.call.topk], {**options, "weights": self.weights}
        return [*self.tensors, self.mask], options

    def backend(self) -> str:
        args, options = self._arguments()
        return str(restore_kernels.explain(OPERATORS[self.call.operator], *args, **options).chosen)

    def fused(self) -> Tensor:
        args, options = self._arguments()
        return OPERATORS[self.call.operator](*args, **options)

    def published(self) -> Tensor:
        q, k, v = self.tensors
        if self.weights is not None:
            return published_topk_attention(
                q, k, v, self.call.topk, self.weights, self.temperature, self.out_proj
            )
        return published_masked_attention(
            q, k, v, self.mask, self.temperature, self.call.normalize, self.call.layout, self.out_proj
        )

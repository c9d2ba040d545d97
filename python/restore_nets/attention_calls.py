"""Which attention a network calls, at which sizes, and whether the fused operators pay there."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import restore_kernels
from restore_kernels.profiling.baselines import (
    published_masked_attention,
    published_pyramid_attention,
    published_topk_attention,
)
from restore_kernels.profiling.measure import Timing, interleave

# Of two ways to compute attention in float32, relative to the largest entry of the result.
SAME_RESULT = 1e-4
OPERATORS: dict[str, Callable[..., Tensor]] = {
    "topk_attention": restore_kernels.topk_attention,
    "masked_attention": restore_kernels.masked_attention,
    "pyramid_attention": restore_kernels.pyramid_attention,
}
_CALLERS = ("restore_kernels.nn", "restore_nets.models")  # modules that call operators by their names

Shape = tuple[int, ...]


@dataclass(frozen=True)
class AttentionCall:
    """One kind of call of an attention operator with queries, keys and values of one source each.

    Args:
        operator: ``"topk_attention"`` or ``"masked_attention"``.
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


@dataclass(frozen=True)
class PyramidCall:
    """One kind of call of pyramid attention.

    Args:
        query: its shape.
        keys, values: the shapes of every level.
        patch_size, softmax_scale, hard: see the operator.
    """

    operator: ClassVar[str] = "pyramid_attention"

    query: Shape
    keys: tuple[Shape, ...]
    values: tuple[Shape, ...]
    patch_size: int = 3
    softmax_scale: float = 10.0
    hard: bool = False

    def __str__(self) -> str:
        batch, channels, height, width = self.query
        return f"B{batch} C{channels} N{height}x{width} M{sum(prod(key[2:]) for key in self.keys)}"

    @property
    def layout(self) -> str:
        return f"{self.patch_size}x{self.patch_size} patches"

    @property
    def selection(self) -> str:
        """What takes part in the attention, in words."""
        return f"{'best match' if self.hard else 'all'} of {len(self.keys)} levels"

    def of_one_image(self) -> PyramidCall:
        keys, values = (tuple((1, *shape[1:]) for shape in level) for level in (self.keys, self.values))
        return replace(self, query=(1, *self.query[1:]), keys=keys, values=values)


Call = AttentionCall | PyramidCall


def _pixels(count: int) -> str:
    side = round(count**0.5)
    return f"{side}x{side}" if side * side == count and side > 4 else str(count)


def attention_calls(model: nn.Module, batch: Tensor) -> list[Call]:
    """The different calls of attention operators that a network makes for a batch (B, 3, H, W)."""
    calls: list[Call] = []
    with wrapped_operators(partial(_recording, calls)), torch.no_grad():
        model(batch)
    return calls


@contextmanager
def wrapped_operators(wrap: Callable[[str, Callable[..., Tensor]], Callable[..., Tensor]]) -> Iterator[None]:
    """In the block, the networks' modules call ``wrap(name, operator)`` instead of each operator."""
    modules = [module for name, module in sys.modules.items() if name.startswith(_CALLERS)]
    names = [(module, name) for module in modules for name in OPERATORS if hasattr(module, name)]
    originals = [(module, name, getattr(module, name)) for module, name in names]
    try:
        for module, name, original in originals:
            setattr(module, name, wrap(name, original))
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def _recording(calls: list[Call], name: str, operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    describe = _pyramid_call if name == "pyramid_attention" else partial(_attention_call, name)

    @wraps(operator)
    def record(*args: Any, **options: Any) -> Tensor:
        call = describe(*args, **options)
        if call not in calls:
            calls.append(call)
        return operator(*args, **options)

    return record


def _attention_call(name: str, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> AttentionCall:
    out_proj = options.get("out_proj")
    call = AttentionCall(
        name, options.get("layout", "channel"), tuple(q.shape), tuple(k.shape), tuple(v.shape),
        normalize=options.get("normalize", True), projected=None if out_proj is None else len(out_proj),
    )  # fmt: skip
    if name == "topk_attention":
        return replace(call, topk=tuple(args[0] if args else options["topk"]))
    mask = args[0] if args else options.get("mask")
    return call if mask is None else replace(call, mask=tuple(mask.shape))


def _pyramid_call(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], **options: Any
) -> PyramidCall:
    settings = {name: options[name] for name in ("patch_size", "softmax_scale", "hard") if name in options}
    shapes = [tuple(tuple(x.shape) for x in level) for level in (keys, values)]
    return PyramidCall(tuple(query.shape), shapes[0], shapes[1], **settings)


@dataclass(frozen=True)
class AttentionTimes:
    """Forward and backward of one call: the fused operator against the published computation."""

    call: Call
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


def time_attention(call: Call, device: torch.device, seconds: float) -> AttentionTimes:
    """Time forward and backward in float32, interleaved in this process.

    Pyramid attention is timed on one image of the batch: published code takes image after image, and
    seconds for a batch.
    """
    if isinstance(call, PyramidCall):
        call = call.of_one_image()
        problem: _Problem = _PyramidProblem(call, device)
    else:
        problem = _AttentionProblem(call, device)

    def both_passes(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), problem.inputs, problem.gradient)

    with torch.no_grad():
        expected = problem.published()
        difference = float((problem.fused() - expected).abs().max() / expected.abs().max())
    passes = {"fused": both_passes(problem.fused), "published": both_passes(problem.published)}
    times = interleave(passes, seconds=seconds, device=str(device))
    return AttentionTimes(call, problem.backend(), times["fused"], times["published"], difference)


class _Problem(ABC):
    """Random tensors of a call, and the two ways to compute it.

    Attributes:
        inputs: the tensors that take part in the backward pass.
        gradient: of the result.
    """

    call: Call
    inputs: list[Tensor]
    gradient: Tensor

    def backend(self) -> str:
        args, options = self._arguments()
        return str(restore_kernels.explain(OPERATORS[self.call.operator], *args, **options).chosen)

    def fused(self) -> Tensor:
        args, options = self._arguments()
        return OPERATORS[self.call.operator](*args, **options)

    @abstractmethod
    def published(self) -> Tensor: ...

    @abstractmethod
    def _arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Of the operator."""


def _normal(device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device)


class _AttentionProblem(_Problem):
    def __init__(self, call: AttentionCall, device: torch.device) -> None:
        normal = _normal(device)
        self.call: AttentionCall = call
        batch, heads, channels, pixels = call.q
        if call.q == call.k == call.v and call.layout == "channel":
            # One tensor, as the convolution of a transformer block gives it.
            parts = normal(batch, 3 * heads * channels, pixels).chunk(3, dim=1)
            q, k, v = (part.unflatten(1, (heads, -1)) for part in parts)
        else:
            q, k, v = normal(*call.q), normal(*call.k), normal(*call.v)
        self.tensors = [x.requires_grad_() for x in (q, k, v)]
        self.mask = None if call.mask is None else normal(*call.mask).sigmoid()
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

    def published(self) -> Tensor:
        q, k, v = self.tensors
        if self.weights is not None:
            return published_topk_attention(
                q, k, v, self.call.topk, self.weights, self.temperature, self.out_proj
            )
        return published_masked_attention(
            q, k, v, self.mask, self.temperature, self.call.normalize, self.call.layout, self.out_proj
        )


class _PyramidProblem(_Problem):
    def __init__(self, call: PyramidCall, device: torch.device) -> None:
        normal = _normal(device)
        self.call: PyramidCall = call
        # Scores of about one: every match counts, so that no kernel may leave any of them out.
        self.query = normal(*call.query) / max(1.0, call.softmax_scale)
        self.keys, self.values = ([normal(*shape) for shape in level] for level in (call.keys, call.values))
        matched = [] if call.hard else [self.query, *self.keys]
        self.inputs = [x.requires_grad_() for x in (*matched, *self.values)]
        self.gradient = normal(call.query[0], call.values[0][1], *call.query[2:])

    def _arguments(self) -> tuple[list[Any], dict[str, Any]]:
        call = self.call
        options = {"patch_size": call.patch_size, "softmax_scale": call.softmax_scale, "hard": call.hard}
        return [self.query, self.keys, self.values], options

    def published(self) -> Tensor:
        args, options = self._arguments()
        return published_pyramid_attention(*args, **options)

"""What the problems of every attention operator are made of: cases, inputs, the sizes of their terms.

An operator's own module (``topk_attention_problems``, ``masked_attention_problems``) adds what only it
has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Protocol

import conformance
import pytest
import torch
from arrangements import arrange
from attention_contract import row_norms
from conformance import Problem, Tensors
from torch import Tensor

INTERPRETED = ("triton", "cuda") if conformance.DEVICE == "cpu" else ()
INTERPRETED_WORK = 20_000  # multiplies of the largest product that the interpreter is asked for

LAYOUTS = ("channel", "token")
ALL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPES = {"eager": ALL_DTYPES, "cpu": ALL_DTYPES, "triton": ALL_DTYPES[1:], "cuda": ALL_DTYPES[1:]}


@dataclass(frozen=True)
class AttentionCase:
    """What distinguishes one call from another.

    Attributes:
        shape: channel (B, H, C, N); token (B, H, N, M, D, E).
        out_proj: C_out, or None.
        temperature: the shape of a tensor argument, a number, or None for the default.
        arrangements: of q, k and v, names of ``arrangements.ARRANGEMENTS``.
        grad: arrangement of the output gradient; "one_value" has stride 0 everywhere, as from sum().
    """

    layout: str
    shape: tuple[int, ...]
    _: KW_ONLY
    dtype: torch.dtype = torch.float32
    normalize: bool = True
    out_proj: int | None = None
    temperature: tuple[int, ...] | float | None = None
    arrangements: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")
    grad: str = "contiguous"

    def own_parts(self) -> list[str]:
        """What the operator's own attributes add to the name."""
        return []

    def __str__(self) -> str:
        parts = [self.layout, "x".join(map(str, self.shape)), *self.own_parts(), str(self.dtype)[6:]]
        parts += [] if self.normalize else ["raw"]
        parts += [] if self.out_proj is None else [f"out_proj{self.out_proj}"]
        parts += [] if self.temperature is None else [f"temperature{self.temperature}"]
        names = list(dict.fromkeys(self.arrangements))
        parts += ["+".join(names)] if names != ["contiguous"] else []
        parts += [] if self.grad == "contiguous" else [f"grad_{self.grad}"]
        return "-".join(parts).replace(" ", "")

    def work(self) -> int:
        """Multiplies of the product of q and k."""
        if self.layout == "channel":
            batch, heads, channels, pixels = self.shape
            return batch * heads * channels**2 * pixels
        batch, heads, queries, keys, length, _ = self.shape
        return batch * heads * queries * keys * length

    def small_dtype(self) -> torch.dtype:
        """Of the tensors that are computed with as they are, such as the temperature."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


class SizedCase(Protocol):
    """What decides which backends run a case."""

    @property
    def dtype(self) -> torch.dtype: ...

    def work(self) -> int: ...


def each_of(
    cases: Iterable[SizedCase], backends: Sequence[str], interpreted: int,
    covered: Callable[[str, Any], bool] = lambda backend, case: True,
) -> pytest.MarkDecorator:  # fmt: skip
    """Runs the test for every backend and each of the cases that it supports and covers.

    The interpreter takes a second for what others do in a millisecond: it gets this many of those
    cases that are small enough for it, from the smallest to the largest.
    """
    cases, pairs = list(dict.fromkeys(cases)), []
    for backend in backends:
        supported = [case for case in cases if case.dtype in DTYPES[backend] and covered(backend, case)]
        if backend in INTERPRETED:
            small = [case for case in supported if case.work() <= INTERPRETED_WORK]
            small.sort(key=lambda case: case.work())
            count = min(interpreted, len(small))
            supported = [small[round(i * (len(small) - 1) / max(1, count - 1))] for i in range(count)]
        pairs += [pytest.param(backend, case, id=f"{backend}-{case}") for case in supported]
    return pytest.mark.parametrize(("backend", "case"), pairs)


def drawing(seed: int) -> Callable[..., Tensor]:
    """``randn(*shape)`` with a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def draw_inputs(case: AttentionCase, randn: Callable[..., Tensor]) -> tuple[Tensors, dict[str, Any]]:
    """The tensor arguments that every attention operator has, and its other arguments."""
    if case.layout == "channel":
        batch, heads, channels, pixels = case.shape
        common = randn(batch, heads, 3, pixels)  # so that similarities are not all next to zero
        q = randn(batch, heads, channels, 3) @ common + randn(*case.shape)
        k = randn(batch, heads, channels, 3) @ common + randn(*case.shape)
        v = randn(*case.shape)
    else:
        batch, heads, queries, keys, length, values = case.shape
        q, k = randn(batch, heads, queries, length), randn(batch, heads, keys, length)
        v = randn(batch, heads, keys, values)
    scale = 1.0 if case.normalize else q.shape[-1] ** -0.25  # keeps unnormalised scores about 1
    tensors = {
        name: arrange(x.to(conformance.DEVICE, case.dtype), arrangement)
        for name, x, arrangement in zip("qkv", (q * scale, k * scale, v), case.arrangements, strict=True)
    }
    options: dict[str, Any] = {"normalize": case.normalize, "layout": case.layout}
    if isinstance(case.temperature, tuple):
        temperature = 0.5 + randn(*case.temperature).abs()
        tensors["temperature"] = temperature.to(conformance.DEVICE, case.small_dtype())
    elif case.temperature is not None:
        options["temperature"] = case.temperature
    if case.out_proj is not None:
        weight = randn(case.out_proj, heads * case.shape[2])
        tensors["out_proj"] = weight.to(conformance.DEVICE, case.dtype)
    return tensors, options


def draw_grad(case: AttentionCase, randn: Callable[..., Tensor]) -> Tensor:
    """The gradient of the output."""
    batch, heads = case.shape[:2]
    if case.layout == "token":
        shape = (batch, heads, case.shape[2], case.shape[5])
    else:
        shape = case.shape if case.out_proj is None else (batch, case.out_proj, case.shape[3])
    if case.grad == "one_value":
        return randn(1).to(conformance.DEVICE, case.dtype).expand(shape)
    return arrange(randn(*shape).to(conformance.DEVICE, case.dtype), case.grad)


@dataclass(frozen=True)
class Products:
    """A problem's products in float64. R rows, K entries of a row, both C in the channel layout."""

    unit_q: Tensor  # (B, H, R, L)
    unit_k: Tensor  # (B, H, K, L)
    norms_q: Tensor  # (B, H, R)
    norms_k: Tensor  # (B, H, K)
    temperature: Tensor  # (B, H)
    scores: Tensor  # (B, H, R, K)

    def size_of_scores(self) -> Tensor:
        """(B, H, R, K): their sums over absolute values."""
        return self.temperature.abs()[..., None, None] * (self.unit_q.abs() @ self.unit_k.abs().mT)


def products(problem: Problem, k: Tensor | None = None) -> Products:
    """Those of the problem's q and k, or of a k that was made of it."""
    q = problem.tensors["q"].double()
    k = problem.tensors["k"].double() if k is None else k
    normalize = problem.options["normalize"]
    norms_q, norms_k = row_norms(q, normalize), row_norms(k, normalize)
    unit_q, unit_k = q / norms_q[..., None], k / norms_k[..., None]
    given = problem.tensors.get("temperature", problem.options.get("temperature"))
    if given is None:
        given = 1.0 if normalize else q.shape[-1] ** -0.5
    temperature = torch.as_tensor(given, dtype=torch.float64, device=q.device).expand(*q.shape[:2], 1, 1)
    scores = temperature * (unit_q @ unit_k.mT)
    return Products(unit_q, unit_k, norms_q, norms_k, temperature[..., 0, 0], scores)


def sizes_of_terms(
    problem: Problem, x: Products, v: Tensor, branches: Tensor, weights: Tensor
) -> tuple[Tensors, Tensor, Tensor]:
    """The sums over absolute values of the terms of the output and of the gradients.

    Args:
        v: (B, H, K, L), not negative: the size of what the probabilities multiply.
        branches: (J, B, H, R, K), the size of each branch's probabilities.
        weights: (B, H, J), not negative.

    Returns:
        Those of ``out`` and of the gradients to q, k, v, temperature and out_proj; those of the
        gradient to the scores (B, H, R, K); and those of the row sums of each branch's (J, B, H, R, 1).
    """
    given, grad = problem.tensors, problem.grad_out.double().abs()
    unit_q, unit_k, temperature = x.unit_q.abs(), x.unit_k.abs(), x.temperature.abs()[..., None, None]
    similarity = unit_q @ unit_k.mT

    mixture = torch.einsum("bhj,jbhrk->bhrk", weights, branches)
    out, sizes = mixture @ v, {}
    if "out_proj" in given:
        projection = given["out_proj"].double().abs()
        sizes["grad_out_proj"] = torch.einsum("bon,bcn->oc", grad, out.flatten(1, 2))
        out = projection @ out.flatten(1, 2)
        grad = (projection.mT @ grad).unflatten(1, v.shape[1:3])
    kept_grad = branches * (grad @ v.mT)
    row_sums = kept_grad.sum(-1, keepdim=True)
    grad_scores = (weights.movedim(-1, 0)[..., None, None] * (kept_grad + branches * row_sums)).sum(0)
    grad_similarity = temperature * grad_scores
    radial = grad_similarity * similarity if problem.options["normalize"] else 0 * similarity
    sizes |= {
        "out": out,
        "grad_q": (grad_similarity @ unit_k + radial.sum(-1)[..., None] * unit_q) / x.norms_q[..., None],
        "grad_k": (grad_similarity.mT @ unit_q + radial.sum(-2)[..., None] * unit_k) / x.norms_k[..., None],
        "grad_v": mixture.mT @ grad,
    }
    if "temperature" in given:
        size = (grad_scores * similarity).sum((-1, -2), keepdim=True)
        sizes["grad_temperature"] = size.sum_to_size(given["temperature"].shape)
    return sizes, grad_scores, row_sums

"""Problems for top-k attention: inputs of every shape, dtype and memory layout, and their analysis.

The selection makes the operator discontinuous: where the smallest kept and the largest dropped
score of a row differ by no more than rounding, float32 may rightly pick the other one. Such a row
is found here, in float64; its output is not judged and its output gradient is set to zero, so that
every gradient is determined. Scores that are exactly equal are no such case: the lower index wins,
and problems with exact ties are made of numbers for which the arithmetic is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import conformance
import pytest
import torch
from arrangements import arrange
from conformance import Problem, runnable
from topk_attention_contract import branch_probabilities, row_norms
from torch import Tensor

from restore_kernels import explain, topk_attention

PROBE = torch.ones(1, 1, 2, 2, device=conformance.DEVICE)
EXPLANATION = explain(topk_attention, PROBE, PROBE, PROBE, [1])
BACKENDS = runnable(EXPLANATION)
FUSED = [backend for backend in BACKENDS if backend != "eager"]
INTERPRETED = ("triton",) if conformance.DEVICE == "cpu" else ()
INTERPRETED_WORK = 20_000  # multiplies of the largest product that the interpreter is asked for

LAYOUTS = ("channel", "token")
ALL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPES = {"eager": ALL_DTYPES, "cpu": ALL_DTYPES, "triton": ALL_DTYPES[1:], "cuda": ALL_DTYPES[1:]}

# Kept counts as functions of the row length.
BRANCHES = {
    "half": lambda row: (max(1, row // 2),),
    "four": lambda row: tuple(max(1, row * n // d) for n, d in ((1, 2), (2, 3), (3, 4), (4, 5))),
    "dense": lambda row: (None,),
    "dense_and_half": lambda row: (None, max(1, row // 2)),
    "repeated": lambda row: (max(1, row // 3), row, max(1, row // 3), None),
    "falling": lambda row: (row, max(1, row * 3 // 4), max(1, row // 4), 1),
    "one": lambda row: (1,),
    "all_but_one": lambda row: (max(1, row - 1),),
}

# Scores nearer than this many roundings (of the largest product of two norms) count as undecided.
UNDECIDED = 64


@dataclass(frozen=True)
class Case:
    """What distinguishes one call from another.

    Attributes:
        shape: channel (B, H, C, N); token (B, H, N, M, D, E).
        out_proj: C_out, or None.
        temperature, weights: the shape of a tensor argument, a number, or None for the default.
        arrangements: of q, k and v, names of ``arrangements.ARRANGEMENTS``.
        grad: arrangement of the output gradient; "one_value" has stride 0 everywhere, as from sum().
    """

    layout: str
    shape: tuple[int, ...]
    topk: tuple[int | None, ...]
    dtype: torch.dtype = torch.float32
    normalize: bool = True
    out_proj: int | None = None
    temperature: tuple[int, ...] | float | None = None
    weights: tuple[int, ...] | None = None
    arrangements: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")
    grad: str = "contiguous"

    def __str__(self) -> str:
        parts = [self.layout, "x".join(map(str, self.shape)), f"top{list(self.topk)}", str(self.dtype)[6:]]
        parts += [] if self.normalize else ["raw"]
        parts += [] if self.out_proj is None else [f"out_proj{self.out_proj}"]
        parts += [] if self.temperature is None else [f"temperature{self.temperature}"]
        parts += [] if self.weights is None else [f"weights{self.weights}"]
        names = list(dict.fromkeys(self.arrangements))
        parts += ["+".join(names)] if names != ["contiguous"] else []
        parts += [] if self.grad == "contiguous" else [f"grad_{self.grad}"]
        return "-".join(parts).replace(" ", "")


def each(
    cases: Iterable[Case], backends: Sequence[str] = BACKENDS, interpreted: int = 8
) -> pytest.MarkDecorator:
    """Runs the test for every backend and each of the cases that it supports.

    The interpreter takes a second for what others do in a millisecond: it gets this many of those
    cases that are small enough for it, from the smallest to the largest.
    """
    cases, pairs = list(dict.fromkeys(cases)), []
    for backend in backends:
        supported = [case for case in cases if case.dtype in DTYPES[backend]]
        if backend in INTERPRETED:
            small = sorted((case for case in supported if _work(case) <= INTERPRETED_WORK), key=_work)
            count = min(interpreted, len(small))
            supported = [small[round(i * (len(small) - 1) / max(1, count - 1))] for i in range(count)]
        pairs += [pytest.param(backend, case, id=f"{backend}-{case}") for case in supported]
    return pytest.mark.parametrize(("backend", "case"), pairs)


def _work(case: Case) -> int:
    if case.layout == "channel":
        batch, heads, channels, pixels = case.shape
        return batch * heads * channels**2 * pixels
    batch, heads, queries, keys, length, _ = case.shape
    return batch * heads * queries * keys * length


def build(case: Case) -> Problem:
    """The case with random numbers in it."""
    whole_output_needed = case.out_proj is not None or case.grad == "one_value"
    for seed in range(50):
        problem = _draw(case, torch.Generator().manual_seed(seed))
        decided = decided_rows(problem)
        if decided.all():
            return with_magnitudes(problem)
        if not whole_output_needed:
            assert decided.double().mean() > 0.9, "where nearly no row is decided, nothing is tested"
            problem.grad_out.masked_fill_(~decided[..., None], 0)
            return with_magnitudes(replace(problem, parts={"out": [decided[..., None]]}))
    raise AssertionError(f"every draw of {case} has an undecided row")


def _draw(case: Case, generator: torch.Generator) -> Problem:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

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
    small = torch.float64 if case.dtype == torch.float64 else torch.float32
    for name, shape in (("temperature", case.temperature), ("weights", case.weights)):
        if isinstance(shape, tuple):
            tensors[name] = (0.5 + randn(*shape).abs()).to(conformance.DEVICE, small)
    if case.out_proj is not None:
        weight = randn(case.out_proj, heads * case.shape[2])
        tensors["out_proj"] = weight.to(conformance.DEVICE, case.dtype)
    options: dict[str, Any] = {"topk": list(case.topk), "normalize": case.normalize, "layout": case.layout}
    if isinstance(case.temperature, (int, float)):
        options["temperature"] = case.temperature
    return Problem(topk_attention, tensors, options, _draw_grad(case, randn), {})


def _draw_grad(case: Case, randn) -> Tensor:
    batch, heads = case.shape[:2]
    if case.layout == "token":
        shape = (batch, heads, case.shape[2], case.shape[5])
    else:
        shape = case.shape if case.out_proj is None else (batch, case.out_proj, case.shape[3])
    if case.grad == "one_value":
        return randn(1).to(conformance.DEVICE, case.dtype).expand(shape)
    return arrange(randn(*shape).to(conformance.DEVICE, case.dtype), case.grad)


@dataclass(frozen=True)
class _Products:
    """A problem's products in float64. R rows, K entries of a row, both C in the channel layout."""

    unit_q: Tensor  # (B, H, R, L)
    unit_k: Tensor  # (B, H, K, L)
    norms_q: Tensor  # (B, H, R)
    norms_k: Tensor  # (B, H, K)
    temperature: Tensor  # (B, H)
    scores: Tensor  # (B, H, R, K)
    topk: list[int]


def _products(problem: Problem) -> _Products:
    q, k = problem.tensors["q"].double(), problem.tensors["k"].double()
    normalize, batch_heads = problem.options["normalize"], q.shape[:2]
    norms_q, norms_k = row_norms(q, normalize), row_norms(k, normalize)
    unit_q, unit_k = q / norms_q[..., None], k / norms_k[..., None]
    given = problem.tensors.get("temperature", problem.options.get("temperature"))
    if given is None:
        given = 1.0 if normalize else q.shape[-1] ** -0.5
    temperature = torch.as_tensor(given, dtype=torch.float64, device=q.device).expand(*batch_heads, 1, 1)
    scores = temperature * (unit_q @ unit_k.mT)
    topk = [scores.shape[-1] if kept is None else kept for kept in problem.options["topk"]]
    return _Products(unit_q, unit_k, norms_q, norms_k, temperature[..., 0, 0], scores, topk)


def decided_rows(problem: Problem) -> Tensor:
    """(B, H, R): whether each branch's selection is the same however the scores are rounded."""
    x = _products(problem)
    largest = x.unit_q.norm(dim=-1) * x.unit_k.norm(dim=-1).amax(-1, keepdim=True)  # (B, H, R)
    nearness = UNDECIDED * torch.finfo(torch.float32).eps * largest * x.temperature.abs()[..., None]
    descending = x.scores.sort(dim=-1, descending=True).values
    decided = torch.ones_like(nearness, dtype=torch.bool)
    for kept in x.topk:
        if kept < x.scores.shape[-1]:
            gap = descending[..., kept - 1] - descending[..., kept]
            decided &= (gap == 0) | (gap > nearness)
    return decided


def with_magnitudes(problem: Problem) -> Problem:
    """The problem with the size of the terms of each result: its sums over absolute values.

    Rounding a score s, or the logarithm of the sum of a row's exponentials, by one part in 2^24
    changes the probability by |s| parts in 2^24, so probabilities count |s| + 1 times.
    """
    x = _products(problem)
    given = problem.tensors
    v, grad = given["v"].double().abs(), problem.grad_out.double().abs()
    weights = given.get("weights", torch.full((1,), 1 / len(x.topk), device=v.device)).double().abs()
    weights = weights.expand(*v.shape[:2], len(x.topk))
    unit_q, unit_k, temperature = x.unit_q.abs(), x.unit_k.abs(), x.temperature.abs()[..., None, None]
    similarity = unit_q @ unit_k.mT
    largest_score = (temperature * similarity).amax(-1, keepdim=True)
    branches = branch_probabilities(x.scores, x.topk) * (largest_score + 1)  # (J, B, H, R, K)

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
    for name, size in (
        ("temperature", (grad_scores * similarity).sum((-1, -2), keepdim=True)),
        ("weights", row_sums.sum((-1, -2)).movedim(0, -1)),
    ):
        if name in given:
            sizes[f"grad_{name}"] = size.sum_to_size(given[name].shape)
    return replace(problem, magnitudes=sizes)

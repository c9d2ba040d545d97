"""Problems for top-k attention: inputs of every shape, dtype and memory layout, and their analysis.

The selection makes the operator discontinuous: where the smallest kept and the largest dropped
score of a row differ by no more than rounding, float32 may rightly pick the other one. Such a row
is found here, in float64; its output is not judged and its output gradient is set to zero, so that
every gradient is determined. Scores that are exactly equal are no such case: the lower index wins,
and problems with exact ties are made of numbers for which the arithmetic is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace

import conformance
import pytest
import torch
from attention_problems import (
    AttentionCase,
    draw_grad,
    draw_inputs,
    drawing,
    each_of,
    products,
    sizes_of_terms,
)  # fmt: skip
from conformance import Problem, runnable
from topk_attention_contract import branch_probabilities
from torch import Tensor

from restore_kernels import explain, topk_attention

PROBE = torch.ones(1, 1, 2, 2, device=conformance.DEVICE)
EXPLANATION = explain(topk_attention, PROBE, PROBE, PROBE, [1])
BACKENDS = runnable(EXPLANATION)
FUSED = [backend for backend in BACKENDS if backend != "eager"]

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
class Case(AttentionCase):
    """One call of top-k attention.

    Attributes:
        topk: one entry per branch.
        weights: the shape of a tensor argument, or None for the default.
    """

    topk: tuple[int | None, ...]
    _: KW_ONLY
    weights: tuple[int, ...] | None = None

    def own_parts(self) -> list[str]:
        weights = [] if self.weights is None else [f"weights{self.weights}"]
        return [f"top{list(self.topk)}", *weights]


def each(
    cases: Iterable[Case], backends: Sequence[str] = BACKENDS, interpreted: int = 8
) -> pytest.MarkDecorator:
    """``each_of`` the backends that run top-k attention here."""
    return each_of(cases, backends, interpreted)


def build(case: Case) -> Problem:
    """The case with random numbers in it."""
    whole_output_needed = case.out_proj is not None or case.grad == "one_value"
    for seed in range(50):
        problem = _draw(case, seed)
        decided = decided_rows(problem)
        if decided.all():
            return with_magnitudes(problem)
        if not whole_output_needed:
            assert decided.double().mean() > 0.9, "where nearly no row is decided, nothing is tested"
            problem.grad_out.masked_fill_(~decided[..., None], 0)
            return with_magnitudes(replace(problem, parts={"out": [decided[..., None]]}))
    raise AssertionError(f"every draw of {case} has an undecided row")


def _draw(case: Case, seed: int) -> Problem:
    randn = drawing(seed)
    tensors, options = draw_inputs(case, randn)
    if case.weights is not None:
        tensors["weights"] = (0.5 + randn(*case.weights).abs()).to(conformance.DEVICE, case.small_dtype())
    options["topk"] = list(case.topk)
    return Problem(topk_attention, tensors, options, draw_grad(case, randn), {})


def _kept_counts(problem: Problem, row: int) -> list[int]:
    return [row if kept is None else kept for kept in problem.options["topk"]]


def decided_rows(problem: Problem) -> Tensor:
    """(B, H, R): whether each branch's selection is the same however the scores are rounded."""
    x = products(problem)
    largest = x.unit_q.norm(dim=-1) * x.unit_k.norm(dim=-1).amax(-1, keepdim=True)  # (B, H, R)
    nearness = UNDECIDED * torch.finfo(torch.float32).eps * largest * x.temperature.abs()[..., None]
    descending = x.scores.sort(dim=-1, descending=True).values
    decided = torch.ones_like(nearness, dtype=torch.bool)
    for kept in _kept_counts(problem, x.scores.shape[-1]):
        if kept < x.scores.shape[-1]:
            gap = descending[..., kept - 1] - descending[..., kept]
            decided &= (gap == 0) | (gap > nearness)
    return decided


def with_magnitudes(problem: Problem) -> Problem:
    """The problem with the size of the terms of each result: its sums over absolute values.

    Rounding a score s, or the logarithm of the sum of a row's exponentials, by one part in 2^24
    changes the probability by |s| parts in 2^24, so probabilities count |s| + 1 times.
    """
    x, given = products(problem), problem.tensors
    topk = _kept_counts(problem, x.scores.shape[-1])
    weights = given.get("weights", torch.full((1,), 1 / len(topk), device=x.scores.device)).double().abs()
    weights = weights.expand(*x.scores.shape[:2], len(topk))
    largest_score = x.size_of_scores().amax(-1, keepdim=True)
    branches = branch_probabilities(x.scores, topk) * (largest_score + 1)  # (J, B, H, R, K)
    sizes, _, row_sums = sizes_of_terms(problem, x, given["v"].double().abs(), branches, weights)
    if "weights" in given:
        grad_weights = row_sums.sum((-1, -2)).movedim(0, -1)
        sizes["grad_weights"] = grad_weights.sum_to_size(given["weights"].shape)
    return replace(problem, magnitudes=sizes)

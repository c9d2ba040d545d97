"""The conformance suite of top-k attention: every backend against the float64 truth.

Each axis (size, memory layout, branches, projection, broadcast shapes) is walked in full with the
others taking turns, rather than every combination being run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from typing import Any

import attention_cases
import conformance
import pytest
import torch
from attention_cases import turn
from attention_problems import ALL_DTYPES, INTERPRETED, LAYOUTS
from conformance import (
    assert_conforms,
    assert_every_element_is_written,
    assert_reproducible,
    check_runs,
    evaluate,
)  # fmt: skip
from topk_attention_problems import (
    BACKENDS,
    BRANCHES,
    EXPLANATION,
    Case,
    build,
    decided_rows,
    each,
    with_magnitudes,
)  # fmt: skip

SPREAD = ("four", "dense_and_half", "half", "falling", "repeated")


def _branches(case: dict[str, Any], *counters: int) -> tuple[int | None, ...]:
    """Of the shared case, by turns."""
    row = case["shape"][2 if case["layout"] == "channel" else 3]
    return BRANCHES[turn(SPREAD, *counters)](row)


def sizes() -> Iterable[Case]:
    for i, case in enumerate(attention_cases.sizes()):
        topk = _branches(case, i // 2)
        yield Case(topk=topk, weights=None if case["layout"] == "channel" else (len(topk),), **case)


def _memory() -> Iterable[Case]:
    for case in attention_cases.memory_layouts():
        yield Case(topk=(4, 6, None), **case)


def branches() -> Iterable[Case]:
    for (name, topk), layout, normalize in product(BRANCHES.items(), LAYOUTS, (True, False)):
        shape = (1, 2, 15, 40) if layout == "channel" else (1, 2, 20, 15, 8, 8)
        dtype = turn(ALL_DTYPES, len(name), normalize)
        small = {"temperature": (2, 1, 1), "weights": (len(topk(15)),)}
        yield Case(layout, shape, topk(15), dtype=dtype, normalize=normalize, **small)


def _projections() -> Iterable[Case]:
    for i, case in enumerate(attention_cases.projections()):
        yield Case(topk=_branches(case, i // 2), **case)


def _broadcasts() -> Iterable[Case]:
    temperatures = (None, 3, 0.25, -1.5, (), (1,), (3, 1, 1), (2, 1, 1, 1), (2, 3, 1, 1), (1, 1))
    weights = (None, (), (2,), (1,), (3, 1), (3, 2), (2, 1, 1), (2, 3, 2), (1, 3, 2), (2, 1, 2))
    for layout, (temperature, weight) in product(LAYOUTS, zip(temperatures, weights, strict=True)):
        shape = (2, 3, 10, 30) if layout == "channel" else (2, 3, 9, 10, 8, 7)
        yield Case(layout, shape, (4, None), temperature=temperature, weights=weight)


@pytest.mark.parametrize("backend", EXPLANATION.why_not)
def test_backend_runs_here(backend):
    check_runs(EXPLANATION, backend)


@each(sizes(), interpreted=14)
def test_sizes(backend, case):
    assert_conforms(build(case), backend)


@each(_memory(), interpreted=16)
def test_memory_layouts(backend, case):
    assert_conforms(build(case), backend)


@each(branches())
def test_branches(backend, case):
    assert_conforms(build(case), backend)


@each(_projections())
def test_output_projection(backend, case):
    assert_conforms(build(case), backend)


@each(_broadcasts())
def test_broadcast_temperature_and_weights(backend, case):
    assert_conforms(build(case), backend)


def _basic(dtypes: Iterable[torch.dtype] = ALL_DTYPES) -> Iterable[Case]:
    small = {"temperature": (2, 1, 1), "weights": (3,)}
    for dtype in dtypes:
        yield Case("channel", (1, 2, 12, 30), (3, 6, None), dtype=dtype, **small)
        yield Case("token", (1, 2, 20, 12, 8, 9), (3, 6, None), dtype=dtype, **small)


def _with(case: Case, **tensors: torch.Tensor) -> conformance.Problem:
    """The case's problem with some tensors replaced; scores must not depend on rounding."""
    problem = build(case)
    changed = {name: x.to(problem.tensors[name]) for name, x in tensors.items()}
    problem = replace(problem, tensors={**problem.tensors, **changed}, parts={})
    assert decided_rows(problem).all()
    return with_magnitudes(problem)


@each(_basic())
def test_negative_temperature_reverses_the_order(backend, case):
    assert_conforms(_with(case, temperature=torch.tensor([-2.0, 1.0])[:, None, None]), backend)


@each(_basic())
def test_large_scores(backend, case):
    """Whose exponentials are beyond float32 unless the largest of a row is subtracted."""
    assert_conforms(_with(case, temperature=torch.tensor([300.0, -200.0])[:, None, None]), backend)


@each(_basic())
def test_zero_temperature_keeps_the_lowest_indices(backend, case):
    """Every score is +0 or -0; they are equal."""
    assert_conforms(_with(case, temperature=torch.zeros(2, 1, 1)), backend)


def exact_scores(case: Case) -> conformance.Problem:
    """Entries of ±1 and rows of 4^n of them: norms, products and scores are exact, and often equal."""
    problem = build(case)
    generator = torch.Generator().manual_seed(1)
    shapes = {name: problem.tensors[name].shape for name in "qk"}
    signs = {name: torch.randint(2, shape, generator=generator) * 2 - 1 for name, shape in shapes.items()}
    signs["k"][:, :, 1::3] = signs["k"][:, :, :1]  # duplicates
    return _with(case, **signs, temperature=torch.tensor([2.0, -0.5])[:, None, None])


def ties() -> Iterable[Case]:
    for dtype, normalize in product(ALL_DTYPES, (True, False)):
        options = {"dtype": dtype, "normalize": normalize, "temperature": (2, 1, 1)}
        yield Case("channel", (1, 2, 23, 64), (1, 5, 11, 17, 22, None), **options)
        yield Case("token", (1, 2, 13, 23, 16, 6), (1, 5, 11, 17, 22, None), **options)
        yield Case("channel", (1, 2, 100, 16), (50, 66, 75, 80), **options)
        yield Case("token", (1, 2, 9, 300, 4, 5), (64, 150), **options)


@each(ties())
def test_of_equal_scores_the_lower_index_is_kept(backend, case):
    assert_conforms(exact_scores(case), backend)


@each(_basic(ALL_DTYPES[:3]))
def test_zero_vectors(backend, case):
    """A zero row of q ties all of its scores, and its norm is the clamp, 1e-12: a huge gradient."""
    problem = build(case)
    zeroed = {name: problem.tensors[name].clone() for name in "qk"}
    for x in zeroed.values():
        x[:, 0, 2] = 0
    problem = _with(case, **zeroed)
    is_zero = (zeroed["q"] == 0).all(-1, keepdim=True), (zeroed["k"] == 0).all(-1, keepdim=True)
    parts = {f"grad_{name}": [zero, ~zero] for name, zero in zip("qk", is_zero, strict=True)}
    assert_conforms(replace(problem, parts=parts), backend)


def _scaled(layout: str, dtype: torch.dtype, size: float) -> conformance.Problem:
    shape = (1, 1, 12, 40) if layout == "channel" else (1, 1, 20, 12, 8, 9)
    problem = build(Case(layout, shape, (4, None), dtype=dtype, temperature=(1, 1, 1)))
    scaled = {name: problem.tensors[name] * size for name in "qk"}
    return replace(problem, tensors={**problem.tensors, **scaled})


@pytest.mark.parametrize(("dtype", "size"), attention_cases.MAGNITUDES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_magnitudes(backend, layout, dtype, size):
    """As long as products of two entries are within float32; below 1e-12 the norms are clamped."""
    assert_conforms(with_magnitudes(_scaled(layout, dtype, size)), backend)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_nan_where_products_underflow_or_overflow(backend, layout, dtype, size):
    for name, x in evaluate(_scaled(layout, dtype, size), backend).items():
        assert x.isfinite().all(), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_shows_in_its_head_and_no_other(backend, layout):
    """A score of NaN counts as the largest of its row, as it does to torch.topk."""
    shape = (1, 3, 12, 40) if layout == "channel" else (1, 3, 20, 12, 8, 9)
    problem = build(Case(layout, shape, (4, None)))
    clean = evaluate(problem, backend)
    for name, rows in (("q", [3]), ("k", range(problem.grad_out.shape[2]))):
        x = problem.tensors[name].clone()
        x[0, 1, 3, 2] = float("nan")
        dirty = evaluate(replace(problem, tensors={**problem.tensors, name: x}), backend)
        assert dirty["out"][0, 1].isnan().all(-1).nonzero().flatten().tolist() == list(rows)
        for result in clean:
            assert torch.equal(clean[result][:, ::2], dirty[result][:, ::2]), result


@pytest.mark.parametrize("pixels", [6, 20])  # CUDA has other kernels for fewer than 16
@pytest.mark.parametrize(("layout", "out_proj"), [("channel", None), ("channel", 7), ("token", None)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, layout, out_proj, pixels):
    shape = (0, 2, 5, pixels) if layout == "channel" else (0, 2, 5, pixels, 3, 4)
    problem = build(Case(layout, shape, (2, None), out_proj=out_proj, temperature=(2, 1, 1), weights=(2,)))
    result = evaluate(problem, backend)
    assert result["out"].shape == problem.grad_out.shape
    for name, x in problem.tensors.items():
        assert torch.equal(result[f"grad_{name}"], torch.zeros_like(x)), name


@each(_basic())
def test_every_element_is_written(backend, case):
    assert_every_element_is_written(build(case), backend)


@each(_basic(dtypes=(torch.float32, torch.bfloat16)))
def test_results_are_bitwise_reproducible(backend, case):
    if backend not in INTERPRETED:
        shape = (2, 2, 48, 600) if case.layout == "channel" else (1, 2, 300, 200, 16, 16)
        case = replace(case, shape=shape)
    assert_reproducible(build(case), backend)


def _few_pixels() -> Iterable[Case]:
    for shape in ((1, 4, 48, 1024), (1, 1, 192, 500), (3, 2, 96, 256)):
        yield Case("channel", shape, (shape[2] // 2, None), out_proj=shape[1] * shape[2])


@each(_few_pixels(), [backend for backend in BACKENDS if backend == "cpu"])
def test_few_pixels_of_many_channels(backend, case):
    """They are shared out among threads in shorter pieces."""
    problem = build(case)
    assert_conforms(problem, backend)
    assert_reproducible(problem, backend)

"""The conformance suite of masked attention: every backend against the float64 truth.

As in ``test_topk_attention``, each axis is walked with the others taking turns; what only masks have
is in ``test_masked_attention_masks``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from typing import Any

import attention_cases
import pytest
import torch
from arrangements import ARRANGEMENTS
from attention_cases import float32_and_another, turn
from attention_problems import ALL_DTYPES, INTERPRETED, LAYOUTS
from conformance import (
    Problem,
    assert_conforms,
    assert_every_element_is_written,
    assert_reproducible,
    check_runs,
    evaluate,
)  # fmt: skip
from masked_attention_problems import (
    BACKENDS,
    EXPLANATION,
    Case,
    build,
    each,
    full_mask,
    with_magnitudes,
    with_tensors,
)  # fmt: skip


def _mask(case: dict[str, Any], *counters: int) -> dict[str, Any]:
    """Of the shared case, by turns: none, or a shape and a kind."""
    full = full_mask(case["layout"], case["shape"])
    one_row = (full[0], *[1] * (len(full) - 2), full[-1])
    shape = turn((full, one_row, full[1:], None, full[-1:]), *counters)
    return {"mask": shape, "kind": turn(("mixed", "soft", "hard"), *counters)}


def sizes() -> Iterable[Case]:
    for i, case in enumerate(attention_cases.sizes()):
        yield Case(**case, **_mask(case, i // 2))
    for i, tokens in enumerate(((16, 3000, 24, 20), (3000, 16, 20, 24), (1, 3000, 8, 8), (2000, 1, 8, 8))):
        for dtype in float32_and_another(i):
            for normalize in (True, False):
                shape = (1, 2, *tokens)
                yield Case("token", shape, (1, 2, tokens[1]), dtype=dtype, normalize=normalize)


def _memory() -> Iterable[Case]:
    for i, case in enumerate(attention_cases.memory_layouts()):
        yield Case(**case, **_mask(case, i // 2))


def _projections() -> Iterable[Case]:
    for i, case in enumerate(attention_cases.projections()):
        yield Case(**case, **_mask(case, i // 2))


def _mask_memory() -> Iterable[Case]:
    """The mask in every place, of all dimensions and, in the channel layout, of a shared row."""
    for i, name in enumerate(ARRANGEMENTS):
        for dtype in float32_and_another(i):
            options = {"dtype": dtype, "mask_arrangement": name, "normalize": i % 2 == 0}
            yield Case("channel", (2, 2, 11, 35), (2, 2, 11, 35), **options)
            yield Case("channel", (2, 2, 11, 35), (2, 2, 1, 35), **options)
            yield Case("token", (2, 2, 35, 13, 10, 9), (2, 2, 13), **options)


def _temperatures() -> Iterable[Case]:
    temperatures = (None, 3, 0.25, -1.5, (), (1,), (3, 1, 1), (2, 1, 1, 1), (2, 3, 1, 1), (1, 1))
    for (i, temperature), layout, normalize in product(enumerate(temperatures), LAYOUTS, (True, False)):
        shape = (2, 3, 10, 30) if layout == "channel" else (2, 3, 9, 10, 8, 7)
        mask = full_mask(layout, shape) if i % 2 else None
        yield Case(layout, shape, mask, temperature=temperature, normalize=normalize)


def basic(dtypes: Iterable[torch.dtype] = ALL_DTYPES) -> Iterable[Case]:
    for dtype in dtypes:
        yield Case("channel", (1, 2, 12, 30), (1, 1, 1, 30), dtype=dtype, temperature=(2, 1, 1))
        yield Case("token", (1, 2, 20, 12, 8, 9), (1, 1, 12), dtype=dtype, temperature=(2, 1, 1))
        yield Case("channel", (1, 2, 12, 30), (1, 2, 12, 30), dtype=dtype, temperature=(2, 1, 1))


@pytest.mark.parametrize("backend", EXPLANATION.why_not)
def test_backend_runs_here(backend):
    check_runs(EXPLANATION, backend)


@each(sizes(), interpreted=7)
def test_sizes(backend, case):
    assert_conforms(build(case), backend)


@each(_memory(), interpreted=4)
def test_memory_layouts(backend, case):
    assert_conforms(build(case), backend)


@each(_mask_memory(), interpreted=3)
def test_memory_layouts_of_the_mask(backend, case):
    assert_conforms(build(case), backend)


@each(_projections(), interpreted=2)
def test_output_projection(backend, case):
    assert_conforms(build(case), backend)


@each(_temperatures(), interpreted=1)
def test_temperatures(backend, case):
    assert_conforms(build(case), backend)


@each(basic(), interpreted=2)
def test_large_scores(backend, case):
    """Whose exponentials are beyond float32 unless the largest of a row is subtracted."""
    temperature = torch.tensor([300.0, -200.0])[:, None, None]
    assert_conforms(with_tensors(build(case), temperature=temperature), backend)


@each(basic(), interpreted=1)
def test_zero_temperature_weighs_by_the_mask_alone(backend, case):
    assert_conforms(with_tensors(build(case), temperature=torch.zeros(2, 1, 1)), backend)


@each(basic(ALL_DTYPES[:3]), interpreted=2)
def test_zero_vectors(backend, case):
    """The norm of a zero row of q or k is the clamp, 1e-12: a huge gradient."""
    problem = build(case)
    zeroed = {name: problem.tensors[name].clone() for name in "qk"}
    for x in zeroed.values():
        x[:, 0, 2] = 0
    problem = with_tensors(problem, **zeroed)
    is_zero = (zeroed["q"] == 0).all(-1, keepdim=True), (zeroed["k"] == 0).all(-1, keepdim=True)
    parts = {f"grad_{name}": [zero, ~zero] for name, zero in zip("qk", is_zero, strict=True)}
    assert_conforms(replace(problem, parts={**problem.parts, **parts}), backend)


def _scaled(layout: str, dtype: torch.dtype, size: float) -> Problem:
    shape = (1, 1, 12, 40) if layout == "channel" else (1, 1, 20, 12, 8, 9)
    problem = build(Case(layout, shape, full_mask(layout, shape), dtype=dtype, temperature=(1, 1, 1)))
    scaled = {name: problem.tensors[name] * size for name in "qk"}
    return replace(problem, tensors={**problem.tensors, **scaled})


@pytest.mark.parametrize(("dtype", "size"), attention_cases.MAGNITUDES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend not in INTERPRETED])
def test_magnitudes(backend, layout, dtype, size):
    assert_conforms(with_magnitudes(_scaled(layout, dtype, size)), backend)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend not in INTERPRETED])
def test_no_nan_where_products_underflow_or_overflow(backend, layout, dtype, size):
    for name, x in evaluate(_scaled(layout, dtype, size), backend).items():
        assert x.isfinite().all(), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_shows_in_its_head_and_no_other(backend, layout):
    shape = (1, 2, 12, 40) if layout == "channel" else (1, 2, 20, 12, 8, 9)
    problem = build(Case(layout, shape, full_mask(layout, shape), kind="soft"))
    clean = evaluate(problem, backend)
    for name, rows in (("q", [3]), ("k", range(problem.grad_out.shape[2])), ("mask", None)):
        x = problem.tensors[name].clone()
        x[(0, 1, 3, 2) if x.dim() == 4 else (0, 1, 3)] = float("nan")
        dirty = evaluate(replace(problem, tensors={**problem.tensors, name: x}), backend)
        if rows is not None:
            assert dirty["out"][0, 1].isnan().all(-1).nonzero().flatten().tolist() == list(rows)
        for result in clean:
            assert torch.equal(clean[result][:, 0], dirty[result][:, 0]), result


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("pixels", [6, 20])  # CUDA has other kernels for fewer than 16
@pytest.mark.parametrize(("layout", "out_proj"), [("channel", None), ("channel", 7), ("token", None)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, layout, out_proj, mask, pixels):
    shape = (0, 2, 5, pixels) if layout == "channel" else (0, 2, 5, pixels, 3, 4)
    mask_shape = full_mask(layout, (1, *shape[1:])) if mask else None
    problem = build(Case(layout, shape, mask_shape, out_proj=out_proj, temperature=(2, 1, 1)))
    result = evaluate(problem, backend)
    assert result["out"].shape == problem.grad_out.shape
    for name, x in problem.tensors.items():
        assert torch.equal(result[f"grad_{name}"], torch.zeros_like(x)), name


@each(basic(), interpreted=2)
def test_every_element_is_written(backend, case):
    assert_every_element_is_written(build(case), backend)


@each(basic(dtypes=(torch.float32, torch.bfloat16)), interpreted=2)
def test_results_are_bitwise_reproducible(backend, case):
    if backend not in INTERPRETED:
        shape = (2, 2, 48, 600) if case.layout == "channel" else (1, 2, 300, 200, 16, 16)
        case = replace(case, shape=shape, mask=full_mask(case.layout, shape))
    assert_reproducible(build(case), backend)

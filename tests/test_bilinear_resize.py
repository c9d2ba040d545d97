"""The conformance suite of bilinear resizing: every backend against the float64 truth."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from arrangements import IMAGE_ARRANGEMENTS
from attention_cases import turn
from attention_problems import ALL_DTYPES
from bilinear_resize_problems import BACKENDS, EXPLANATION, FUSED, PROBE, Case, build, each
from conformance import (
    DEVICE,
    assert_conforms,
    assert_every_element_is_written,
    assert_reproducible,
    check_runs,
    evaluate,
)

from restore_kernels import bilinear_resize, explain

FACTORS = (2, 0.5)
SIZES = (
    (1, 1, 1, 1), (1, 5, 1, 2), (2, 1, 2, 1), (1, 3, 1, 40), (2, 3, 33, 1), (3, 4, 5, 7), (1, 2, 8, 16),
    (2, 2, 17, 31), (70, 2, 3, 2), (1, 1, 6, 131),
)  # fmt: skip
CUTS = (None, (0, 0), (1, 0), (0, 1), (1, 1))


def sizes() -> Iterable[Case]:
    for i, size in enumerate(SIZES):
        for j, dtype in enumerate(ALL_DTYPES):
            for factor in FACTORS:
                cut = turn(CUTS, i + j) if factor == 2 else turn((None, (0, 0)), i + j)
                place = turn(("contiguous", "channels_last"), i + j)
                yield Case(size, factor, cut=cut, dtype=dtype, arrangement=place, other=place)
        yield Case(size, turn(FACTORS, i))


def memory_layouts() -> Iterable[Case]:
    for i, name in enumerate(IMAGE_ARRANGEMENTS):
        for j, dtype in enumerate(ALL_DTYPES):
            factor = turn(FACTORS, i + j)
            yield Case((3, 4, 5, 18), factor, dtype=dtype, arrangement=name)
            yield Case((3, 4, 5, 18), factor, dtype=dtype, other=name)
    for factor in FACTORS:
        yield Case((2, 6, 4, 9), factor, other="one_value")


def basic() -> Iterable[Case]:
    for factor in FACTORS:
        for dtype in ALL_DTYPES:
            for place in ("contiguous", "channels_last"):
                yield Case((2, 3, 5, 7), factor, dtype=dtype, arrangement=place)


# Of several tasks: chunks of rows of a channel, and channels together.
LARGE = [Case((1, 2, 150, 130), factor) for factor in FACTORS] + [Case((3, 70, 20, 18), f) for f in FACTORS]


@pytest.mark.parametrize("backend", [name for name in EXPLANATION.why_not if name != "cuda"])
def test_backend_runs_here(backend):
    check_runs(EXPLANATION, backend)


@each(sizes(), interpreted=20)
def test_sizes(backend, case):
    assert_conforms(build(case), backend)


@each([Case((2, 2, 6, 9), 2, cut=cut) for cut in CUTS] + [Case((2, 2, 6, 9), 0.5, cut=None)], interpreted=6)
def test_residuals(backend, case):
    assert_conforms(build(case), backend)


@each(memory_layouts(), interpreted=16)
def test_memory_layouts(backend, case):
    assert_conforms(build(case), backend)


@each(LARGE, interpreted=2)
def test_several_tasks(backend, case):
    assert_conforms(build(case), backend)


@each(basic())
def test_every_element_is_written(backend, case):
    assert_every_element_is_written(build(case), backend)


@each([*basic(), *LARGE], FUSED)
def test_results_are_bitwise_reproducible(backend, case):
    assert_reproducible(build(case), backend)


@each(basic())
def test_nan_shows_where_it_is_seen_and_nowhere_else(backend, case):
    problem = build(case)
    problem.tensors["x"][0, 1, 2, 3] = float("nan")
    out = evaluate(problem, backend)["out"]
    rows, columns = (slice(3, 7), slice(5, 9)) if case.factor == 2 else (slice(1, 2), slice(1, 2))
    seen = torch.zeros_like(out, dtype=torch.bool)
    seen[0, 1, rows, columns] = True
    assert torch.equal(out.isnan(), seen)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", FACTORS)
def test_empty_batch(backend, factor):
    x = torch.empty(0, 3, 4, 6, device=DEVICE, requires_grad=True)
    out = bilinear_resize(x, factor, backend=backend)
    assert out.shape == (0, 3, int(4 * factor), int(6 * factor))
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_resizing_of_pytorch(backend):
    x = torch.randn(2, 3, 6, 8, device=DEVICE)
    for factor in FACTORS:
        expected = F.interpolate(x, scale_factor=factor, mode="bilinear")
        torch.testing.assert_close(bilinear_resize(x, factor, backend=backend), expected)


def test_what_is_slower_is_not_chosen_by_default():
    x = torch.ones(1, 4, 3, 3)
    assert explain(bilinear_resize, x, 2).not_by_default == {}
    x = x.to(memory_format=torch.channels_last)
    assert explain(bilinear_resize, x, 2).not_by_default == {"cpu": "x is in channels_last"}


def test_backends_without_kernels_say_so():
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run this call: "):
        bilinear_resize(PROBE, 2, backend="cuda")

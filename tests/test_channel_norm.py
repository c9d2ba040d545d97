"""The conformance suite of channel normalisation: every backend against the float64 truth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from arrangements import IMAGE_ARRANGEMENTS
from attention_cases import turn
from attention_problems import ALL_DTYPES
from channel_norm_problems import BACKENDS, EXPLANATION, Case, build, each
from conformance import (
    assert_conforms,
    assert_every_element_is_written,
    assert_reproducible,
    check_runs,
    evaluate,
)

SIZES = [
    (1, 1, 1, 1), (1, 5, 1, 1), (2, 1, 3, 4), (1, 16, 1, 70), (1, 17, 33, 1), (3, 48, 5, 7), (2, 3, 16, 16),
    (1, 31, 9, 11), (1, 97, 6, 8), (2, 254, 4, 4), (1, 384, 3, 5), (1, 48, 32, 33), (70, 4, 2, 3),
]  # fmt: skip


def sizes() -> Iterable[Case]:
    for i, size in enumerate(SIZES):
        for j, dtype in enumerate(ALL_DTYPES):
            place = turn(("contiguous", "channels_last"), i + j)
            yield Case(size, biased=(i + j) // 2 % 2 == 0, dtype=dtype, arrangement=place, grad=place)
        yield Case(size, biased=False)
        yield Case(size)


def memory_layouts() -> Iterable[Case]:
    for i, name in enumerate(IMAGE_ARRANGEMENTS):
        for j, dtype in enumerate(ALL_DTYPES):
            yield Case((3, 7, 5, 18), biased=(i + j) % 2 == 0, dtype=dtype, arrangement=name)
            yield Case((3, 7, 5, 18), biased=(i + j) % 2 == 1, dtype=dtype, grad=name)
    for place in ("contiguous", "channels_last"):
        yield Case((2, 6, 4, 9), arrangement=place, grad="one_value")
        yield Case((2, 20, 6, 9), arrangement=place, grad=turn(("channels_last", "contiguous"), len(place)))


def basic(dtypes: Iterable[torch.dtype] = ALL_DTYPES) -> Iterable[Case]:
    for dtype in dtypes:
        for place in ("contiguous", "channels_last"):
            for biased in (True, False):
                yield Case((2, 6, 5, 7), biased=biased, dtype=dtype, arrangement=place)


HAVE_KERNELS = [name for name in EXPLANATION.why_not if name != "cuda"]


@pytest.mark.parametrize("backend", HAVE_KERNELS)
def test_backend_runs_here(backend):
    check_runs(EXPLANATION, backend)


@each(sizes(), interpreted=20)
def test_sizes(backend, case):
    assert_conforms(build(case), backend)


@each(memory_layouts(), interpreted=20)
def test_memory_layouts(backend, case):
    assert_conforms(build(case), backend)


@each([replace(case, mean=mean) for case in basic(ALL_DTYPES[:2]) for mean in (1e2, -1e4)])
def test_mean_far_from_zero(backend, case):
    """Where the mean of the squares minus the square of the mean would be nothing but rounding."""
    assert_conforms(build(case), backend)


@each([replace(case, std=std) for case in basic(ALL_DTYPES[:3]) for std in (1e-15, 1e-5, 1e15)])
def test_magnitudes(backend, case):
    assert_conforms(build(case), backend)


@each([replace(case, eps=eps) for case in basic() for eps in (1e-12, 0.5)])
def test_eps(backend, case):
    assert_conforms(build(case), backend)


NARROW = ALL_DTYPES[1:]


@each([replace(case, parameters=x) for case in basic(NARROW) for x in NARROW if x != case.dtype])
def test_parameters_of_another_dtype(backend, case):
    problem = build(case)
    result = evaluate(problem, backend)
    assert result["out"].dtype == case.dtype
    assert result["grad_weight"].dtype == case.parameters
    assert_conforms(problem, backend)


@each([replace(case, image=(2, 8, 5, 7)) for case in basic()])
def test_equal_channels(backend, case):
    """The variance is zero, exactly for whole numbers, and what is left is eps."""
    problem = build(case)
    equal = problem.tensors["x"][:, :1].round().expand_as(problem.tensors["x"])
    result = evaluate(replace(problem, tensors={**problem.tensors, "x": equal}), backend)
    for name, x in result.items():
        assert x.isfinite().all(), name
    if case.biased:
        bias = problem.tensors["bias"][:, None, None].expand_as(result["out"])
        torch.testing.assert_close(result["out"], bias)


@each(basic())
def test_nan_shows_at_its_pixel_and_no_other(backend, case):
    problem = build(case)
    clean, x = evaluate(problem, backend), problem.tensors["x"].clone()
    x[1, 2, 3, 4] = float("nan")
    dirty = evaluate(replace(problem, tensors={**problem.tensors, "x": x}), backend)
    for name in ("out", "grad_x"):
        assert dirty[name][1, :, 3, 4].isnan().all()
        dirty[name][1, :, 3, 4] = clean[name][1, :, 3, 4]
        assert torch.equal(dirty[name], clean[name]), name


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, biased):
    problem = build(Case((0, 5, 3, 4), biased=biased))
    result = evaluate(problem, backend)
    assert result["out"].shape == (0, 5, 3, 4)
    for name, x in problem.tensors.items():
        assert torch.equal(result[f"grad_{name}"], torch.zeros_like(x)), name


@each(basic())
def test_every_element_is_written(backend, case):
    assert_every_element_is_written(build(case), backend)


@each([*basic(ALL_DTYPES[:2]), Case((2, 12, 40, 41)), Case((2, 12, 40, 41), arrangement="channels_last")])
def test_reproducible(backend, case):
    assert_reproducible(build(case), backend)

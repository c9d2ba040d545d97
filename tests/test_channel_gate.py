"""The conformance suite of the channel gate: every backend against the float64 truth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from arrangements import IMAGE_ARRANGEMENTS
from attention_cases import turn
from attention_problems import ALL_DTYPES
from channel_gate_problems import BACKENDS, EXPLANATION, Case, build, each
from conformance import (
    assert_conforms,
    assert_every_element_is_written,
    assert_reproducible,
    check_runs,
    evaluate,
)

SIZES = [
    ((1, 1, 1, 1), 1), ((1, 5, 1, 1), 2), ((2, 1, 3, 4), 3), ((1, 16, 1, 70), 4), ((1, 17, 33, 1), 1),
    ((3, 48, 5, 7), 12), ((1, 97, 6, 8), 24), ((2, 254, 4, 4), 63), ((1, 48, 32, 33), 3), ((70, 4, 2, 3), 2),
    ((1, 3, 46, 90), 1),
]  # fmt: skip


def sizes() -> Iterable[Case]:
    for i, (size, hidden) in enumerate(SIZES):
        for j, dtype in enumerate(ALL_DTYPES):
            place = turn(("contiguous", "channels_last"), i + j)
            biased, residual = (i + j) // 2 % 2 == 0, (i + j) // 4 % 2 == 0
            yield Case(
                size, hidden, biased=biased, residual=residual, dtype=dtype, arrangement=place, other=place
            )
        yield Case(size, hidden)


def memory_layouts() -> Iterable[Case]:
    for i, name in enumerate(IMAGE_ARRANGEMENTS):
        for j, dtype in enumerate(ALL_DTYPES):
            yield Case((3, 7, 5, 18), residual=(i + j) % 2 == 0, dtype=dtype, arrangement=name)
            yield Case((3, 7, 5, 18), dtype=dtype, other=name)
    for place in ("contiguous", "channels_last"):
        yield Case((2, 6, 4, 9), arrangement=place, other="one_value")
        yield Case((2, 20, 6, 9), arrangement=place, other=turn(("channels_last", "contiguous"), len(place)))


def basic(dtypes: Iterable[torch.dtype] = ALL_DTYPES) -> Iterable[Case]:
    for dtype in dtypes:
        for place in ("contiguous", "channels_last"):
            for residual in (True, False):
                yield Case((2, 6, 5, 7), residual=residual, dtype=dtype, arrangement=place)


HAVE_KERNELS = [name for name in EXPLANATION.why_not if name != "cuda"]


@pytest.mark.parametrize("backend", HAVE_KERNELS)
def test_backend_runs_here(backend):
    check_runs(EXPLANATION, backend)


@each(sizes(), interpreted=16)
def test_sizes(backend, case):
    assert_conforms(build(case), backend)


SEVERAL_RUNS = [
    Case((1, 2, 80, 110), 1), Case((1, 2, 80, 110), 1, arrangement="channels_last"), Case((2, 1, 80, 110), 1),
]  # fmt: skip


@each(SEVERAL_RUNS, interpreted=3)
def test_images_in_several_runs(backend, case):
    """More than four blocks of pixels: Triton adds up partial sums of a channel, of one image or of two."""
    assert_conforms(build(case), backend)


@each(memory_layouts(), interpreted=16)
def test_memory_layouts(backend, case):
    assert_conforms(build(case), backend)


@each([replace(case, std=std) for case in basic(ALL_DTYPES[:3]) for std in (1e-15, 1e-5, 30.0)])
def test_magnitudes(backend, case):
    """Gates of one half, and gates of nearly 0 and 1."""
    assert_conforms(build(case), backend)


NARROW = ALL_DTYPES[1:]


@each([replace(case, parameters=x) for case in basic(NARROW) for x in NARROW if x != case.dtype])
def test_parameters_of_another_dtype(backend, case):
    problem = build(case)
    result = evaluate(problem, backend)
    assert result["out"].dtype == case.dtype
    assert result["grad_up"].dtype == result["grad_down_bias"].dtype == case.parameters
    assert_conforms(problem, backend)


@each(basic())
def test_rectified_hidden_numbers_have_no_gradient(backend, case):
    """Where the rectifier lets nothing through, every gate is what its bias says."""
    problem = build(case)
    problem.tensors["down_bias"] = torch.full_like(problem.tensors["down_bias"], -1e4)
    result = evaluate(problem, backend)
    for name in ("down", "up", "down_bias"):
        assert not result[f"grad_{name}"].any(), name
    x, gate = problem.tensors["x"].double(), problem.tensors["up_bias"].double().sigmoid()[:, None, None]
    expected = x * gate + problem.tensors["residual"].double() if case.residual else x * gate
    torch.testing.assert_close(result["out"], expected.to(case.dtype))


@each(basic())
def test_nan_shows_in_its_image_and_no_other(backend, case):
    problem = build(case)
    clean, x = evaluate(problem, backend), problem.tensors["x"].clone()
    x[1, 2, 3, 4] = float("nan")
    dirty = evaluate(replace(problem, tensors={**problem.tensors, "x": x}), backend)
    for name in ("out", "grad_x"):
        assert dirty[name][1].isnan().all(), name
        assert torch.equal(dirty[name][0], clean[name][0]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    problem = build(Case((0, 5, 3, 4)))
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

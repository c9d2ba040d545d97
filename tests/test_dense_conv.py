"""The conformance suite of dense convolution: every backend against the float64 truth.

Each axis is walked with the others taking turns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from arrangements import IMAGE_ARRANGEMENTS
from attention_cases import turn
from conformance import (
    assert_conforms,
    assert_every_element_is_written,
    assert_reproducible,
    check_runs,
    eager_in,
    evaluate,
)
from dense_conv_problems import BACKENDS, DTYPES, EXPLANATION, FUSED, PROBE, Case, build, each
from torch import Tensor

from restore_kernels import dense_conv2d, explain
from restore_kernels.dense_conv.ops import overload

# Sizes that are and are not multiples of tiles, of vectors of them, of blocks of tiles; the last are those of
# images that are not of few tiles, however few there are.
IMAGES = (
    (1, 1), (1, 40), (2, 2), (3, 2), (8, 16), (9, 17), (16, 33), (67, 5), (5, 131), (6, 96),
    (24, 45), (32, 32), (70, 15),
)  # fmt: skip
OUTPUTS = (1, 2, 7, 16, 19, 34, 97)
CHANNELS = (1, 3, 5, 16, 48, 65, 130)


def sizes() -> Iterable[Case]:
    for i, ((height, width), channels) in enumerate(product(IMAGES, CHANNELS)):
        image = (turn((1, 2, 3), i), turn(OUTPUTS, i // 2), height, width)
        for j, dtype in enumerate(DTYPES):
            layout = turn(("contiguous", "channels_last"), i // 3, j)
            yield Case(
                image, channels, bias=i % 3 == 0, frozen=i % 5 == 2, dtype=dtype,
                arrangements=(layout, layout),
            )  # fmt: skip


def memory_layouts() -> Iterable[Case]:
    for i, name in enumerate(IMAGE_ARRANGEMENTS):
        another = turn(list(IMAGE_ARRANGEMENTS), i + 5)
        for dtype in DTYPES:
            for arrangements in ((name, name), (name, another), (name, "one_value")):
                yield Case((2, 21, 9, 20), 18, bias=i % 2 == 0, dtype=dtype, arrangements=arrangements)


def basic() -> Iterable[Case]:
    for dtype in DTYPES:
        yield Case((2, 3, 6, 7), 4, dtype=dtype, bias=True)
        yield Case((1, 5, 6, 7), 2, dtype=dtype)
        yield Case((1, 4, 9, 5), 3, dtype=dtype, arrangements=("channels_last", "contiguous"))


# Images of many blocks, also of tiles of 4x4 pixels, and channels of many that leave few shares of the
# weight's gradient.
LARGE = (
    Case((1, 3, 67, 70), 5, bias=True),
    Case((1, 7, 130, 61), 2, frozen=True),
    Case((2, 18, 5, 515), 21, arrangements=("contiguous", "channels_last")),
    Case((2, 40, 70, 130), 70, bias=True),
    Case((1, 48, 128, 128), 48),
    Case((3, 64, 48, 48), 64, bias=True),
    Case((1, 48, 70, 50), 96, arrangements=("channels_last", "channels_last")),
    Case((1, 257, 32, 32), 255, bias=True),
    Case((1, 520, 32, 32), 512),
)

# Images of few tiles, of 2x2 or 4x4 pixels, whose weights are taken in several parts, and the least that are
# not of few.
SMALL = (
    Case((1, 170, 14, 13), 200, bias=True),
    Case((2, 97, 26, 25), 100, bias=True),
    Case((17, 240, 3, 2), 131),
    Case((1, 520, 9, 8), 512),
    Case((2, 97, 7, 10), 200, bias=True),
    Case((3, 25, 4, 4), 161, bias=True, arrangements=("channels_last", "contiguous")),
    Case((1, 50, 29, 33), 81, bias=True),
    Case((1, 50, 31, 31), 81, bias=True),
    Case((5, 33, 1, 2), 97, frozen=True),
    Case((1, 130, 9, 8), 1),
    Case((4, 1, 5, 6), 100),
)


def test_backend_runs_here():
    check_runs(EXPLANATION, "cpu")


@each(sizes())
def test_sizes(backend, case):
    assert_conforms(build(case), backend)


@each(memory_layouts())
def test_memory_layouts(backend, case):
    assert_conforms(build(case), backend)


@each([replace(case, dtype=dtype) for case in (*SMALL, *LARGE) for dtype in DTYPES], FUSED)
def test_many_parts(backend, case):
    assert_conforms(build(case), backend)


@each(basic())
def test_every_element_is_written(backend, case):
    assert_every_element_is_written(build(case), backend)


@each([*basic(), *SMALL, *LARGE], FUSED)
def test_results_are_bitwise_reproducible(backend, case):
    assert_reproducible(build(case), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    result = evaluate(build(Case((0, 3, 4, 5), 2, bias=True)), backend)
    assert result["out"].shape == (0, 3, 4, 5)
    assert result["grad_x"].shape == (0, 2, 4, 5)
    assert result["grad_weight"].shape == (3, 2, 3, 3)
    assert not result["grad_weight"].any() and not result["grad_bias"].any()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last_slice"])
def test_results_keep_the_memory_format(backend, layout):
    result = evaluate(build(Case((2, 6, 5, 4), 5, arrangements=(layout, "contiguous"))), backend)
    for name in ("out", "grad_x"):
        is_last = result[name].is_contiguous(memory_format=torch.channels_last)
        assert is_last == (layout != "contiguous")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_is_conv2d(dtype):
    x, weight, bias = torch.randn(2, 6, 9, 8), torch.randn(3, 6, 3, 3), torch.randn(3)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    expected = F.conv2d(x, weight, bias, padding=1)
    assert torch.equal(dense_conv2d(x, weight, bias, backend="eager"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_left_to_the_library(dtype):
    x, weight = torch.randn(1, 3, 40, 40).to(dtype), torch.randn(3, 3, 3, 3).to(dtype)
    assert explain(dense_conv2d, x, weight).chosen == "eager"
    message = f"cannot run this call: it computes float32 and float64, got {str(dtype)[6:]}"
    with pytest.raises(RuntimeError, match=message):
        dense_conv2d(x, weight, backend="cpu")


@pytest.mark.skipif("cpu" not in FUSED, reason="no compiled library")
def test_what_is_slower_is_not_chosen_by_default():
    weight, wide = torch.ones(2, 2, 3, 3), torch.ones(64, 64, 3, 3)
    large, small = torch.ones(1, 2, 90, 92), torch.ones(1, 2, 90, 90)
    assert explain(dense_conv2d, large, weight).chosen == "cpu"
    assert explain(dense_conv2d, torch.ones(1, 64, 8, 7), wide).chosen == "cpu"
    for x, of_x, reason in (
        (small, weight, "too little to multiply: 2 channels, 2025 tiles of 2x2 pixels"),
        (torch.ones(1, 64, 10, 6), wide, "fewer than 16 tiles of 2x2 pixels, got 15"),
    ):
        explanation = explain(dense_conv2d, x, of_x)
        assert explanation.chosen == "eager" and explanation.why_not["cpu"] is None
        assert f"cpu    available, not by default: {reason}" in str(explanation)
    assert explain(dense_conv2d, small, weight, backend="cpu").chosen == "cpu"
    last = large.to(memory_format=torch.channels_last)
    assert "not by default: x is in channels_last" in str(explain(dense_conv2d, last, weight))
    assert explain(dense_conv2d, small, weight, backend=("auto", "cpu")).chosen == "eager"


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("channels", [48, 80, 256])
@pytest.mark.parametrize("size", [32, 68])  # tiles of 4x4 pixels, few of them and many
def test_errors_are_near_those_of_a_plain_sum(backend, size, channels):
    problem = build(Case((1, channels, size, size), channels, bias=True))
    exact = eager_in(torch.float64, problem)
    own, result = evaluate(problem, "eager"), evaluate(problem, backend)
    for name, of_plain_sum in own.items():
        allowed = 4 * (of_plain_sum - exact[name]).norm()
        assert (result[name] - exact[name]).norm() < allowed, name


@pytest.mark.parametrize("backend", FUSED)
def test_nan_shows_in_what_sees_it_and_in_no_other_tile(backend):
    problem = build(Case((2, 19, 20, 21), 7))
    clean = evaluate(problem, backend)["out"]
    x = problem.tensors["x"].clone()
    x[0, 1, 9, 8] = float("nan")
    dirty = evaluate(replace(problem, tensors={**problem.tensors, "x": x}), backend)["out"]
    seen, tiles = torch.zeros_like(clean, dtype=torch.bool), torch.zeros_like(clean, dtype=torch.bool)
    seen[0, :, 8:11, 7:10] = True
    tiles[0, :, 8:12, 6:10] = True
    assert dirty[seen].isnan().all()
    assert torch.equal(dirty[~tiles], clean[~tiles])


@each([case for case in basic() if case.dtype == torch.float64])
def test_gradcheck(backend, case):
    problem = build(case)
    names, tensors = list(problem.tensors), [x.requires_grad_() for x in problem.tensors.values()]

    def function(*args: Tensor) -> Tensor:
        return problem.operator(**dict(zip(names, args, strict=True)), backend=backend)

    assert torch.autograd.gradcheck(function, tensors)
    if backend == "eager":
        assert torch.autograd.gradgradcheck(function, tensors)


@each(basic(), FUSED)
def test_operators_are_registered_correctly(backend, case):
    """Schemas, and fakes that predict shapes, dtypes and strides."""
    problem = build(case)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    x, weight, bias = (problem.tensors.get(name) for name in ("x", "weight", "bias"))
    torch.library.opcheck(overload("dense_conv", backend), (x, weight, bias), test_utils=utils)
    for wanted in ([True] * 3, [not case.bias, True, False], [True, False, False], [False, False, True]):
        args = (problem.grad_out, x, weight, wanted)
        torch.library.opcheck(overload("dense_conv_backward", backend), args, test_utils=utils)


def test_backends_without_kernels_say_so():
    for name in ("triton", "cuda"):
        reason = EXPLANATION.why_not[name]
        assert reason is not None
        with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run this call: "):
            dense_conv2d(PROBE, PROBE, backend=name)

"""The conformance suite of pointwise convolution: every backend against the float64 truth.

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
from attention_cases import float32_and_another, turn
from attention_problems import ALL_DTYPES, DTYPES, INTERPRETED
from conformance import (
    assert_conforms,
    assert_every_element_is_written,
    assert_reproducible,
    check_runs,
    evaluate,
)
from pointwise_conv_problems import BACKENDS, EXPLANATION, FUSED, Case, build, each
from torch import Tensor

from restore_kernels import pointwise_conv2d
from restore_kernels.pointwise_conv.ops import overload

# Sizes that are and are not multiples of vectors, of what is computed together, of tiles of pixels.
IMAGES = ((1, 1), (1, 40), (3, 2), (8, 16), (9, 17), (16, 33), (67, 5), (5, 131))
OUTPUTS = (1, 2, 7, 16, 19, 34, 97)
CHANNELS = ((1,), (5,), (48,), (17, 31), (130,), (1, 2, 3), (200,), (3,) * 8, (70, 129, 60))


def sizes() -> Iterable[Case]:
    for i, ((height, width), channels) in enumerate(product(IMAGES, CHANNELS)):
        image = (turn((1, 2, 3), i), turn(OUTPUTS, i // 2), height, width)
        for j, dtype in enumerate(float32_and_another(i)):
            layout = turn(("contiguous", "channels_last"), i // 3, j)
            yield Case(
                image, channels, bias=i % 3 == 0, per_image=i % 4 == 1, frozen=i % 5 == 2, dtype=dtype,
                arrangements=(layout, layout),
            )  # fmt: skip


def memory_layouts() -> Iterable[Case]:
    for i, name in enumerate(IMAGE_ARRANGEMENTS):
        another = turn(list(IMAGE_ARRANGEMENTS), i + 5)
        for j, dtype in enumerate(float32_and_another(i)):
            for channels, arrangements in (
                ((18,), (name, name)),
                ((9, 13), (name, another, another)),
                ((20,), (name, "one_value")),
            ):
                yield Case(
                    (2, 21, 9, 20), channels, bias=(i + j) % 2 == 0, per_image=i % 3 == 0, dtype=dtype,
                    arrangements=arrangements,
                )  # fmt: skip


def basic(dtypes: Iterable[torch.dtype] = ALL_DTYPES) -> Iterable[Case]:
    for dtype in dtypes:
        yield Case((2, 3, 6, 7), (4,), dtype=dtype, bias=True)
        yield Case((1, 5, 6, 7), (2, 3), dtype=dtype)
        yield Case((2, 4, 3, 5), (3,), dtype=dtype, per_image=True, bias=True)
        yield Case((1, 4, 9, 5), (2, 1), dtype=dtype, arrangements=("channels_last", "contiguous"))


# Images of many tiles, and channels of many that tiles alone would not divide.
LARGE = (
    Case((2, 40, 70, 130), (70, 40), bias=True),
    Case((1, 100, 128, 128), (48,)),
    Case((3, 64, 40, 64), (160,), bias=True, per_image=True),
    Case((1, 48, 70, 50), (96,), arrangements=("channels_last", "channels_last")),
    Case((1, 384, 16, 16), (1021,), bias=True),
    Case((1, 1020, 8, 8), (192,)),
)

HAVE_KERNELS = [name for name in EXPLANATION.why_not if name != "cuda"]


@pytest.mark.parametrize("backend", HAVE_KERNELS)
def test_backend_runs_here(backend):
    check_runs(EXPLANATION, backend)


@each(sizes(), interpreted=8)
def test_sizes(backend, case):
    assert_conforms(build(case), backend)


@each(memory_layouts(), interpreted=6)
def test_memory_layouts(backend, case):
    assert_conforms(build(case), backend)


@each([replace(case, dtype=dtype) for case in LARGE for dtype in (torch.float32, torch.bfloat16)])
def test_large_images(backend, case):
    assert_conforms(build(case), backend)


@each(basic(), interpreted=3)
def test_every_element_is_written(backend, case):
    assert_every_element_is_written(build(case), backend)


@each([*basic(ALL_DTYPES[1:3]), *LARGE], FUSED, interpreted=2)
def test_results_are_bitwise_reproducible(backend, case):
    assert_reproducible(build(case), backend)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, per_image):
    result = evaluate(build(Case((0, 3, 4, 5), (2, 3), bias=True, per_image=per_image)), backend)
    assert result["out"].shape == (0, 3, 4, 5)
    assert result["grad_x1"].shape == (0, 3, 4, 5)
    assert result["grad_weight"].shape == ((0,) * per_image + (3, 5, 1, 1))
    assert not result["grad_weight"].any() and not result["grad_bias"].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last_slice"])
def test_results_keep_the_memory_format(backend, layout):
    problem = build(Case((2, 6, 5, 4), (5, 3), arrangements=(layout, "contiguous", "contiguous")))
    result = evaluate(problem, backend)
    assert result["out"].is_contiguous(memory_format=torch.channels_last) == (layout != "contiguous")
    if backend != "eager":
        is_last = result["grad_x0"].is_contiguous(memory_format=torch.channels_last)
        assert is_last == (layout != "contiguous")
        assert result["grad_x1"].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_reference_is_conv2d_of_the_concatenated_images(dtype):
    x, weight, bias = torch.randn(2, 6, 9, 8).to(dtype), torch.randn(3, 6, 1, 1).to(dtype), torch.randn(3)
    expected = F.conv2d(x, weight, bias.to(dtype))
    got = pointwise_conv2d(x.split((1, 5), dim=1), weight, bias.to(dtype), backend="eager")
    assert torch.equal(got, expected)


def test_the_reference_with_a_weight_per_image_is_one_call_per_image():
    x, weight, bias = torch.randn(3, 6, 5, 4), torch.randn(3, 7, 6, 1, 1), torch.randn(7)
    expected = torch.cat([F.conv2d(x[i : i + 1], weight[i], bias) for i in range(3)])
    torch.testing.assert_close(pointwise_conv2d(x, weight, bias, backend="eager"), expected)


@pytest.mark.parametrize("backend", [name for name in FUSED if name not in INTERPRETED])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_shows_at_its_pixel_and_nowhere_else(backend, layout):
    problem = build(Case((2, 19, 20, 21), (3, 4), arrangements=(layout, "contiguous")))
    clean = evaluate(problem, backend)["out"]
    x = problem.tensors["x1"].clone()
    x[0, 1, 8, 9] = float("nan")
    dirty = evaluate(replace(problem, tensors={**problem.tensors, "x1": x}), backend)["out"]
    expected = torch.zeros_like(clean, dtype=torch.bool)
    expected[0, :, 8, 9] = True
    assert torch.equal(dirty.isnan(), expected)
    assert torch.equal(dirty[~expected], clean[~expected])


@each([case for case in basic() if case.dtype == torch.float64], interpreted=0)
def test_gradcheck(backend, case):
    if case.dtype not in DTYPES[backend]:
        pytest.skip("no float64")
    problem = build(case)
    names, tensors = list(problem.tensors), [x.requires_grad_() for x in problem.tensors.values()]

    def function(*args: Tensor) -> Tensor:
        return problem.operator(**dict(zip(names, args, strict=True)), backend=backend)

    assert torch.autograd.gradcheck(function, tensors)
    if backend == "eager":
        assert torch.autograd.gradgradcheck(function, tensors)


@each(basic((torch.float32, torch.bfloat16)), FUSED)
def test_operators_are_registered_correctly(backend, case):
    """Schemas, and fakes that predict shapes, dtypes and strides."""
    problem = build(case)
    utils = ("test_schema", "test_faketensor")
    if backend not in INTERPRETED:  # which calls the operator many times more
        utils += ("test_aot_dispatch_dynamic",)
    images = [x for name, x in problem.tensors.items() if name.startswith("x")]
    weight, bias = problem.tensors["weight"], problem.tensors.get("bias")
    forward, backward = overload("pointwise_conv", backend), overload("pointwise_conv_backward", backend)
    torch.library.opcheck(forward, (images, weight, bias), test_utils=utils)
    everything = [True] * (len(images) + 2)
    for wanted in (everything, [not case.bias, *everything[1:-1], False]):
        torch.library.opcheck(backward, (problem.grad_out, images, weight, wanted), test_utils=utils)

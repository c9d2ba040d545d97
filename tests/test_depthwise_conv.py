"""The conformance suite of depthwise convolution: every backend against the float64 truth.

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
from depthwise_conv_problems import BACKENDS, EXPLANATION, FUSED, Case, arguments, build, each, operator
from torch import Tensor

from restore_kernels import depthwise_conv2d
from restore_kernels.depthwise_conv.ops import overload

# Sizes that are and are not multiples of vectors, of the rows computed together, of bands.
IMAGES = ((1, 1), (1, 40), (3, 2), (8, 16), (9, 17), (16, 33), (67, 5), (70, 31), (5, 131))
CHANNELS = (1, 2, 16, 19, 34)
ACTIVATIONS = (None, "relu", "gelu", "prelu")
KERNELS = ((1, 1), (3, 1), (5, 1), (7, 1), (1, 2), (3, 2), (5, 2), (7, 2))  # size, dilation


def sizes() -> Iterable[Case]:
    for i, ((height, width), (size, dilation)) in enumerate(product(IMAGES, KERNELS)):
        image = (turn((1, 2, 3), i), turn(CHANNELS, i // 2), height, width)
        for j, dtype in enumerate(float32_and_another(i)):
            layout = turn(("contiguous", "channels_last"), i // 3, j)
            yield Case(
                image, size, dilation=dilation, inputs=turn((1, 2), i // 5, j), bias=i % 3 == 0,
                activation=turn((None, "relu"), i // 4), dtype=dtype, arrangements=(layout, layout),
            )  # fmt: skip


def memory_layouts() -> Iterable[Case]:
    for i, name in enumerate(IMAGE_ARRANGEMENTS):
        another = turn(list(IMAGE_ARRANGEMENTS), i + 5)
        for j, dtype in enumerate(float32_and_another(i)):
            for inputs, grad in ((1, name), (2, another), (1, "one_value")):
                yield Case(
                    (2, 18, 9, 20), turn((3, 5), i), inputs=inputs, activation=turn((None, "relu"), i, j),
                    dtype=dtype, arrangements=(name, grad),
                )  # fmt: skip


def activations_and_gates() -> Iterable[Case]:
    for i, (activation, gate) in enumerate(product(ACTIVATIONS, (False, True))):
        for j, dtype in enumerate(ALL_DTYPES):
            layouts = (
                turn(("contiguous", "channels_last", "crop"), i, j),
                turn(("contiguous", "channels_last"), j),
            )
            yield Case(
                (2, 19, 9, 37), turn((3, 5, 7, 1), i // 2, j), dilation=turn((1, 2), j),
                inputs=turn((1, 2), i, j), bias=(i + j) % 3 > 0, activation=activation,
                slopes=turn((1, 19), j), gate=gate, dtype=dtype, arrangements=layouts,
            )  # fmt: skip
    for activation in ACTIVATIONS:  # small enough for an interpreter
        yield Case((1, 2, 5, 4), bias=True, activation=activation, slopes=2, gate=True)


def several_images() -> Iterable[Case]:
    """Groups that straddle two images, images within one block of channels, more blocks than one."""
    splits = ((3, 1), (1, 2, 1), (1,) * 8, (17, 3), (31, 33), (5, 38, 21), (127, 127))
    for i, (images, inputs) in enumerate(product(splits, (1, 2))):
        for j, dtype in enumerate(float32_and_another(i)):
            layouts = (
                turn(("contiguous", "channels_last", "crop"), i, j),
                turn(("contiguous", "channels_last"), i),
            )
            yield Case(
                (2, sum(images) // inputs, 6, 21), turn((3, 5), i // 2), inputs=inputs, images=images,
                activation=turn(ACTIVATIONS, i, j), gate=i % 3 == 0, dtype=dtype, arrangements=layouts,
            )  # fmt: skip


def basic(dtypes: Iterable[torch.dtype] = ALL_DTYPES) -> Iterable[Case]:
    for dtype in dtypes:
        yield Case((2, 3, 6, 7), dtype=dtype, bias=True)
        yield Case((1, 2, 6, 7), 5, dtype=dtype, inputs=2, activation="relu")
        yield Case((1, 4, 9, 5), 3, dtype=dtype, dilation=2, arrangements=("channels_last", "contiguous"))
        yield Case((1, 3, 5, 4), 3, dtype=dtype, inputs=2, images=(3, 3), activation="gelu", gate=True)
        yield Case((1, 3, 4, 5), 3, dtype=dtype, bias=True, activation="prelu", slopes=3, gate=True)


LARGE = Case((2, 40, 70, 130), 3, bias=True, activation="relu")  # results that are streamed past the caches


HAVE_KERNELS = [name for name in EXPLANATION.why_not if name != "cuda"]


@pytest.mark.parametrize("backend", HAVE_KERNELS)
def test_backend_runs_here(backend):
    check_runs(EXPLANATION, backend)


@each(sizes(), interpreted=4)
def test_sizes(backend, case):
    assert_conforms(build(case), backend)


@each(memory_layouts(), interpreted=3)
def test_memory_layouts(backend, case):
    assert_conforms(build(case), backend)


@each(activations_and_gates(), interpreted=4)
def test_activations_and_gates(backend, case):
    assert_conforms(build(case), backend)


@each(several_images(), interpreted=3)
def test_several_images(backend, case):
    assert_conforms(build(case), backend)


GATED = replace(LARGE, image=(2, 40, 70, 128), activation="prelu", gate=True)


@each([
    LARGE, replace(LARGE, image=(2, 40, 70, 128)), replace(LARGE, arrangements=("channels_last",) * 2), GATED,
    replace(GATED, inputs=2, images=(41, 39)), replace(GATED, arrangements=("contiguous", "channels_last")),
])  # fmt: skip
def test_large_images(backend, case):
    assert_conforms(build(case), backend)


@each(basic(), interpreted=2)
def test_every_element_is_written(backend, case):
    assert_every_element_is_written(build(case), backend)


@each([*basic(ALL_DTYPES[1:3]), replace(LARGE, image=(2, 20, 130, 40)), GATED], FUSED, interpreted=2)
def test_results_are_bitwise_reproducible(backend, case):
    assert_reproducible(build(case), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    result = evaluate(build(Case((0, 3, 4, 5), bias=True)), backend)
    assert result["out"].shape == (0, 3, 4, 5)
    assert not result["grad_weight"].any() and not result["grad_bias"].any()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last_slice"])
def test_results_keep_the_memory_format(backend, layout):
    result = evaluate(build(Case((2, 6, 5, 4), inputs=2, arrangements=(layout, "contiguous"))), backend)
    for name in ("out", "grad_x"):
        is_last = result[name].is_contiguous(memory_format=torch.channels_last)
        assert is_last == (layout != "contiguous"), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_reference_is_conv2d(dtype):
    x, weight, bias = torch.randn(2, 6, 9, 8).to(dtype), torch.randn(3, 2, 5, 5).to(dtype), torch.randn(3)
    expected = F.conv2d(x, weight, bias.to(dtype), padding=4, dilation=2, groups=3)
    got = depthwise_conv2d(x, weight, bias.to(dtype), dilation=2, backend="eager")
    assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", [name for name in FUSED if name not in INTERPRETED])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_shows_under_its_taps_and_nowhere_else(backend, layout):
    problem = build(Case((2, 3, 20, 21), 5, activation="relu", arrangements=(layout, "contiguous")))
    clean = evaluate(problem, backend)["out"]
    x = problem.tensors["x"].clone()
    x[0, 1, 8, 9] = float("nan")
    dirty = evaluate(replace(problem, tensors={**problem.tensors, "x": x}), backend)["out"]
    expected = torch.zeros_like(clean, dtype=torch.bool)
    expected[0, 1, 6:11, 7:12] = True
    assert torch.equal(dirty.isnan(), expected)
    assert torch.equal(dirty[~expected], clean[~expected])


@each([case for case in basic() if case.dtype == torch.float64], interpreted=0)
def test_gradcheck(backend, case):
    if case.dtype not in DTYPES[backend]:
        pytest.skip("no float64")
    problem = build(case)
    names, tensors = list(problem.tensors), [x.requires_grad_() for x in problem.tensors.values()]

    def call(*args: Tensor) -> Tensor:
        return operator(**dict(zip(names, args, strict=True)), **problem.options, backend=backend)

    assert torch.autograd.gradcheck(call, tensors)
    if backend == "eager" and case.activation is None:
        assert torch.autograd.gradgradcheck(call, tensors)


@each(basic((torch.float32, torch.bfloat16)), FUSED)
def test_operators_are_registered_correctly(backend, case):
    """Schemas, and fakes that predict shapes, dtypes and strides."""
    problem = build(case)
    utils = ("test_schema", "test_faketensor")
    if backend not in INTERPRETED:  # which calls the operator many times more
        utils += ("test_aot_dispatch_dynamic",)
    forward, backward = overload("depthwise_conv", backend), overload("depthwise_conv_backward", backend)
    args = arguments(problem)
    torch.library.opcheck(forward, args, test_utils=utils)
    *tensors, dilation, activation = args
    out = forward(*args) if activation == "relu" and not case.gate else None
    for wanted in ([True] * (len(args[0]) + 1) + [case.gate], [False] * (len(args[0]) + 2)):
        given = (problem.grad_out, *tensors, out, dilation, activation, wanted)
        torch.library.opcheck(backward, given, test_utils=utils)

"""The operators behind pyramid attention: what they save, their fakes, their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import conformance
import pyramid_attention_contract as contract
import pytest
import torch
from attention_problems import ALL_DTYPES, DTYPES, INTERPRETED
from conformance import judge
from pyramid_attention_problems import (
    BACKENDS,
    FUSED,
    HARD_FUSED,
    Case,
    arguments,
    build,
    by_name,
    by_result,
    each,
    exact_scores,
    pyramid,
)
from torch import Tensor

from restore_kernels.pyramid_attention.ops import overload
from restore_kernels.tensors import accumulate_dtype

SMALL = Case((2, 5, 6, 6, 7), ((6, 7), (4, 5), (1, 1)))
PLACES = ("channels_last_slice", "crop", "channels_last")
CASES = [
    replace(case, dtype=dtype)
    for case in (
        SMALL, replace(SMALL, patch_size=5, eps=9.0), replace(SMALL, arrangements=PLACES, grad="crop"),
        Case((1, 9, 8, 11, 13), pyramid(11, 13), softmax_scale=200.0),
    )
    for dtype in ALL_DTYPES
] + [Case((1, 4, 3, 4, 5), ((4, 5), (2, 3)))]  # fmt: skip


def in_dtype(dtype: torch.dtype, args: tuple) -> tuple:
    def converted(x: Any) -> Any:
        if isinstance(x, list):
            return [converted(y) for y in x]
        return x.to(dtype) if isinstance(x, Tensor) else x

    return tuple(map(converted, args))


@each(CASES, FUSED)
def test_saved_log_sum_exp(backend, case):
    problem = build(case)
    args = arguments(problem)
    _, saved = overload("pyramid_attention", backend)(*args)
    batch, _, _, height, width = case.image
    assert (saved.shape, saved.dtype) == ((batch, height, width), accumulate_dtype(case.dtype))
    exact, yardstick = (
        contract.pyramid_attention(*in_dtype(dtype, args))[1] for dtype in (torch.float64, torch.float32)
    )
    largest = exact_scores(problem).abs().max().clamp_min(1)
    judge(*({"log_sum_exp": x} for x in (saved, yardstick, exact)), {"log_sum_exp": largest})


@each(CASES, HARD_FUSED)
def test_saved_index(backend, case):
    """What it points to is judged in ``test_pyramid_attention_hard``."""
    args = arguments(build(case))
    _, index = overload("pyramid_attention_hard", backend)(*args)
    batch, _, _, height, width = case.image
    assert (index.shape, index.dtype) == ((batch, height, width), torch.int64)
    assert index.min() >= 0 and index.max() < sum(h * w for h, w in case.levels)


@each(CASES, FUSED)
def test_backward_reads_what_any_backend_saved(backend, case):
    """The backward operator by itself."""
    problem = build(case)
    args = arguments(problem)
    out, log_sum_exp = contract.pyramid_attention(*args)
    backward = overload("pyramid_attention_backward", backend)
    grads = backward(problem.grad_out, *args[:3], log_sum_exp, *args[3:])
    exact = conformance.eager_in(torch.float64, problem)
    yardstick = conformance.eager_in(torch.float32 if case.dtype == torch.float64 else case.dtype, problem)
    judge(by_result(out, grads), yardstick, exact, problem.magnitudes, problem.parts)


@each(CASES, HARD_FUSED)
def test_hard_backward_reads_any_index(backend, case):
    """The backward operator by itself, for matches that no scores have led to."""
    problem = build(case)
    _, _, values, patch_size, _, _, out_scale = arguments(problem)
    batch, _, _, height, width = case.image
    length = sum(h * w for h, w in case.levels)
    index = torch.arange(batch * height * width).reshape(batch, height, width) * 7 % length
    index = index.to(conformance.DEVICE)

    def grads(function: Callable, *dtype: torch.dtype) -> dict[str, Tensor]:
        args = (problem.grad_out, values, index, patch_size, out_scale)
        for x in dtype:
            args = (*in_dtype(x, args[:2]), *args[2:])
        return {f"level {i}": x for i, x in enumerate(function(*args))}

    exact = grads(contract.hard_backward, torch.float64)
    yardstick = torch.float32 if case.dtype == torch.float64 else case.dtype
    own = grads(contract.hard_backward, yardstick)
    sizes = (problem.grad_out.double().abs(), values, index, patch_size, out_scale)
    magnitudes = {f"level {i}": x.double() for i, x in enumerate(contract.hard_backward(*sizes))}
    judge(grads(overload("pyramid_attention_hard_backward", backend)), own, exact, magnitudes)


def _backward_arguments(name: str, problem: conformance.Problem, saved: Tensor) -> tuple:
    """Of the operator's backward pass."""
    query, keys, values, *settings = arguments(problem)
    if name == "pyramid_attention":
        return (problem.grad_out, query, keys, values, saved, *settings)
    return (problem.grad_out, values, saved, settings[0], settings[3])


@pytest.mark.parametrize("name", ["pyramid_attention", "pyramid_attention_hard"])
@each([SMALL, replace(SMALL, arrangements=PLACES, dtype=torch.bfloat16), CASES[-1]], FUSED)
def test_operators_are_registered_correctly(backend, case, name):
    """Schemas, and fakes that predict shapes, dtypes and strides."""
    if name == "pyramid_attention_hard" and backend not in HARD_FUSED:
        pytest.skip(f"{backend} has no hard matching")
    problem = build(case)
    utils = ("test_schema", "test_faketensor")
    if backend not in INTERPRETED:  # which calls the operator many times more
        utils += ("test_aot_dispatch_dynamic",)
    forward, backward = overload(name, backend), overload(f"{name}_backward", backend)
    args = arguments(problem)
    torch.library.opcheck(forward, args, test_utils=utils)
    _, saved = forward(*args)
    torch.library.opcheck(backward, _backward_arguments(name, problem, saved), test_utils=utils)


@pytest.mark.parametrize("name", ["pyramid_attention", "pyramid_attention_hard"])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_fakes_predict_shapes_dtypes_and_strides(backend, name):
    """As the contract writes them, which needs no library."""
    problem = build(replace(SMALL, dtype=torch.bfloat16, arrangements=PLACES))
    args = arguments(problem)
    expected = getattr(contract, name.removeprefix("pyramid_attention_"))(*args)
    backward_args = _backward_arguments(name, problem, expected[1])
    backward_name = "backward" if name == "pyramid_attention" else "hard_backward"
    expected = [*expected, *getattr(contract, backward_name)(*backward_args)]

    def on_meta(x: Any) -> Any:
        if isinstance(x, list):
            return [on_meta(y) for y in x]
        return x.to("meta") if isinstance(x, Tensor) else x

    results = [
        *overload(name, backend)(*map(on_meta, args)),
        *overload(f"{name}_backward", backend)(*map(on_meta, backward_args)),
    ]
    assert len(results) == len(expected)
    for got, want in zip(_flat(results), _flat(expected), strict=True):
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


def _flat(x: list) -> list[Tensor]:
    return [z for y in x for z in (y if isinstance(y, list) else [y])]


DOUBLE = Case((1, 2, 3, 4, 5), ((4, 5), (2, 3), (1, 1)), dtype=torch.float64, softmax_scale=3.0)


@pytest.mark.parametrize(
    ("patch_size", "eps"),
    [(3, 1e-4), (3, 3.0), (3, 50.0), (1, 1.5), (5, 3.0)],
)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if torch.float64 in DTYPES[name]])
def test_gradcheck(backend, patch_size, eps):
    problem = build(replace(DOUBLE, patch_size=patch_size, eps=eps))
    clamped, free = (sum(int(parts[i].sum()) for parts in problem.parts.values()) for i in range(2))
    assert (clamped > 0, free > 0) == (eps > 1, eps < 50)
    names, inputs = list(problem.tensors), [x.detach().requires_grad_() for x in problem.tensors.values()]

    def call(*args: Tensor) -> Tensor:
        return by_name(**dict(zip(names, args, strict=True)), **problem.options, backend=backend)

    assert torch.autograd.gradcheck(call, inputs)
    if backend == "eager" and (patch_size, eps) == (3, 1e-4):
        assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if torch.float64 in DTYPES[name]])
def test_gradcheck_of_hard_matching(backend):
    problem = build(DOUBLE)
    constants = {name: x for name, x in problem.tensors.items() if not name.startswith("values")}
    names = [name for name in problem.tensors if name not in constants]
    values = [problem.tensors[name].detach().requires_grad_() for name in names]

    def call(*args: Tensor) -> Tensor:
        given = dict(zip(names, args, strict=True))
        return by_name(**constants, **given, **problem.options, hard=True, backend=backend)

    assert torch.autograd.gradcheck(call, values)

"""Holds a backend of an operator against the truth; nothing here knows a particular operator.

The truth is the eager backend in float64 on the same, already rounded, inputs. The yardstick is
eager in the inputs' own dtype: it computes in float32 and rounds once. (Eager in float64 is the
truth itself; there the yardstick is eager's error in float32 times the ratio of the two roundings,
on inputs that float32 can hold.) A backend's error may not exceed

    MULTIPLE * the yardstick's error  +  one rounding of the output  +  ACCUMULATION roundings of
    the terms that add up to it,

in the largest element and in the root mean square. MULTIPLE is 4: a backend sums in another order,
hence draws its rounding errors anew; those have the same size, but the largest of a few elements
varies between draws. In the root mean square of bfloat16 and float16 it is 2: there the final
rounding, the same for everyone, is nearly all of the error; 2 leaves room to round the factors of a
matrix product to the dtype, as tensor cores need it. The other two terms are there because the
yardstick may be right by luck, above all where terms cancel (a softmax over one entry has gradient
zero); ``magnitudes`` gives the size of the terms, the result of the same sums over absolute values.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import host_kernels
import pytest
import torch
from torch import Tensor

from restore_kernels.backends import Explanation
from restore_kernels.native import CUDA_HOST_VARIABLE

DEVICE = "cpu"  # --device
REQUIRED: tuple[str, ...] = ()  # --require-backends

MULTIPLE = 4
MULTIPLE_OF_NARROW_MEANS = 2
ACCUMULATION = 4

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """One call of an operator, and what is needed to judge it.

    Attributes:
        operator: the public function.
        tensors: its tensor arguments by name; each gets a gradient but for the constants.
        options: its other arguments.
        grad_out: the gradient of its output.
        magnitudes: for ``out`` and every ``grad_<name>``, the sums of the absolute values of the
            terms of each element, float64, broadcastable to it.
        parts: masks, broadcastable to an output, on which it is judged separately (default: all of it
            at once). What is in none of them must be finite and is otherwise not judged.
        constants: names of tensors that get no gradient.
    """

    operator: Callable[..., Tensor]
    tensors: Tensors
    options: dict[str, Any]
    grad_out: Tensor
    magnitudes: Tensors
    parts: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    constants: frozenset[str] = frozenset()


def evaluate(problem: Problem, backend: str) -> Tensors:
    """The output and the gradients of every tensor argument that gets one."""
    tensors = {name: x.detach() for name, x in problem.tensors.items()}
    leaves = {name: x.requires_grad_() for name, x in tensors.items() if name not in problem.constants}
    out = problem.operator(**tensors, **problem.options, backend=backend)
    grads = torch.autograd.grad(out, list(leaves.values()), problem.grad_out)
    return {"out": out.detach(), **{f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}}


def eager_in(dtype: torch.dtype, problem: Problem) -> Tensors:
    """The eager result on the same inputs converted to dtype."""
    tensors = {name: x.to(dtype) for name, x in problem.tensors.items()}
    return evaluate(replace(problem, tensors=tensors, grad_out=problem.grad_out.to(dtype)), "eager")


def assert_conforms(problem: Problem, backend: str) -> None:
    """The backend's output and gradients are as near the truth as eager's; no input has changed."""
    inputs = [*problem.tensors.values(), problem.grad_out]
    before = [_storage(x).clone() for x in inputs]
    result = evaluate(problem, backend)
    for x, bytes_before in zip(inputs, before, strict=True):
        assert torch.equal(_storage(x), bytes_before), "the call wrote to one of its inputs"
    exact = eager_in(torch.float64, problem)
    is_double = problem.grad_out.dtype == torch.float64
    yardstick = eager_in(torch.float32, problem) if is_double else evaluate(problem, "eager")
    expected = exact if is_double else yardstick
    for name, x in result.items():
        want = expected[name]
        assert (x.shape, x.dtype, x.device) == (want.shape, want.dtype, want.device), name
    judge(result, yardstick, exact, problem.magnitudes, problem.parts)


def judge(
    result: Tensors, yardstick: Tensors, exact: Tensors, magnitudes: Tensors,
    parts: Mapping[str, Sequence[Tensor]] | None = None,
) -> None:  # fmt: skip
    """Raises AssertionError for a result whose error is not explained by rounding."""
    assert result.keys() == yardstick.keys() == exact.keys()
    for name, own in yardstick.items():
        got = result[name]
        assert not got.isnan().any(), f"{name} has NaN"
        everything = torch.ones((), dtype=torch.bool, device=got.device)
        for mask in (parts or {}).get(name, [everything]):
            mask = mask.expand_as(got)
            magnitude = magnitudes[name].expand_as(got)[mask]
            _judge_part(name, got[mask], own[mask], exact[name][mask], magnitude)


def _judge_part(name: str, got: Tensor, own: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    overflowed = own.isinf()  # the truth is beyond the dtype
    assert torch.equal(got[overflowed], own[overflowed]), f"{name} overflows elsewhere than eager"
    got, own, exact, magnitude = (x[~overflowed] for x in (got, own, exact, magnitude))
    if not got.numel():
        return
    dtype = torch.finfo(got.dtype)
    working = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32)
    ratio = working.eps / torch.finfo(torch.float32).eps
    narrow = got.dtype in (torch.bfloat16, torch.float16)
    measures = (
        ("largest", _largest, MULTIPLE),
        ("root mean square", _root_mean_square, MULTIPLE_OF_NARROW_MEANS if narrow else MULTIPLE),
    )
    for measure, size, multiple in measures:
        error, own_error = size(got.double() - exact), ratio * size(own.double() - exact)
        rounding = (size(exact) + dtype.smallest_normal) * dtype.eps / 2
        terms = working.eps * size(magnitude)
        allowed = multiple * own_error + rounding + ACCUMULATION * terms
        assert error <= allowed, (
            f"{name}: {measure} error {error:.2e}, allowed {allowed:.2e}; eager's own {own_error:.2e}, "
            f"{measure} value {size(exact):.2e}, terms {size(magnitude):.2e}"
        )


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _root_mean_square(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def _storage(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def assert_every_element_is_written(problem: Problem, backend: str) -> None:
    """Deterministic mode fills uninitialised memory with NaN, of which nothing may be left."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        result = evaluate(problem, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, x in result.items():
        assert x.isfinite().all(), name


def assert_reproducible(problem: Problem, backend: str, across_threads: bool = True) -> None:
    """The same bits in every run; on the CPU also with any number of threads, or, if not, with each."""
    first, threads = evaluate(problem, backend), torch.get_num_threads()
    if backend == "cuda" and problem.grad_out.device.type == "cpu":
        _assert_same_in_any_order(problem, first)
    for count in (threads, 1, 2) if backend == "cpu" else (threads,):
        torch.set_num_threads(count)
        try:
            again = evaluate(problem, backend)
            if not across_threads:
                first, again = again, evaluate(problem, backend)
        finally:
            torch.set_num_threads(threads)
        for name, x in first.items():
            assert torch.equal(x, again[name]), f"{name}, {count} threads"


def _assert_same_in_any_order(problem: Problem, first: Tensors) -> None:
    """CUDA kernels on the host: blocks and threads run in an order that a seed draws."""
    kernels = host_kernels.load(os.environ[CUDA_HOST_VARIABLE])
    try:
        for seed in range(1, 4):
            kernels.seed(seed)
            for name, x in evaluate(problem, "cuda").items():
                assert torch.equal(x, first[name]), f"{name}, seed {seed}"
    finally:
        kernels.seed(0)


def runnable(explanation: Explanation) -> list[str]:
    """The backends that can run the explained call."""
    return [name for name, why_not in explanation.why_not.items() if why_not is None]


def check_runs(explanation: Explanation, backend: str) -> None:
    """Skips, with the reason, for a backend that cannot run the explained call; fails if it must."""
    reason = explanation.why_not[backend]
    if reason is not None:
        (pytest.fail if backend in REQUIRED else pytest.skip)(f"{backend}: {reason}")

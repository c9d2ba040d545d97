"""The operators behind top-k attention: what they save, their fakes, their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import conformance
import pytest
import topk_attention_contract as contract
import torch
from attention_problems import ALL_DTYPES, DTYPES, INTERPRETED
from conformance import judge
from topk_attention_problems import BACKENDS, FUSED, Case, build, decided_rows, each
from torch import Tensor

from restore_kernels import topk_attention
from restore_kernels.topk_attention.ops import overload

CHANNEL = Case("channel", (1, 2, 12, 30), (3, 7, 12), temperature=(1, 2, 1, 1), weights=(1, 2, 3))
TOKEN = Case("token", (1, 2, 20, 12, 8, 9), (3, 7, 12), temperature=(1, 2, 1, 1), weights=(1, 2, 3))
CASES = [
    replace(case, dtype=dtype, normalize=normalize, out_proj=out_proj, arrangements=(placed,) * 3)
    for case, out_proj, normalize, placed in (
        (CHANNEL, None, True, "contiguous"), (CHANNEL, None, False, "pixel_major_qkv_slice"),
        (CHANNEL, 9, True, "pixel_major"), (TOKEN, None, True, "contiguous"),
        (TOKEN, None, False, "token_major_qkv_slice"),
    )
    for dtype in ALL_DTYPES
]  # fmt: skip


def arguments(problem: conformance.Problem) -> tuple:
    """The problem's call as the operators take it, for cases that give every tensor in full."""
    tensors, options = problem.tensors, problem.options
    projection = (tensors.get("out_proj"),) if options["layout"] == "channel" else ()
    small = tensors["temperature"][..., 0, 0], tensors["weights"]
    return (*(tensors[x] for x in "qkv"), *small, *projection, options["topk"], options["normalize"])


def in_dtype(dtype: torch.dtype, args: tuple) -> tuple:
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def run(case: Case, backend: str, args: tuple) -> tuple[tuple[Tensor, ...], tuple]:
    """The forward operator's saved outputs, and the arguments of its backward with them."""
    _, *saved = overload(f"topk_attention_{case.layout}", backend)(*args)
    return tuple(saved), (*args[:-2], *saved, *args[-2:])


def judge_saved(names: list[str], saved: tuple, model: Callable, args: tuple) -> None:
    """Holds what a forward operator saved against the contract; scores are the terms it is made of."""
    working = torch.float64 if args[0].dtype == torch.float64 else torch.float32
    result, exact, yardstick = (
        {name: x for name, x in zip(names, values, strict=True) if x.is_floating_point()}
        for values in (
            saved,
            *(model(*in_dtype(dtype, args))[1:] for dtype in (torch.float64, torch.float32)),
        )
    )
    terms = contract.normalized_product(args[0].double().abs(), args[1].double().abs(), args[-1])[0]
    largest = (terms * args[3].double().abs()[..., None, None]).amax().clamp_min(1)
    for name, x in result.items():
        assert (x.shape, x.dtype) == (exact[name].shape, working), name
    judge(result, yardstick, exact, dict.fromkeys(result, largest))


@each([case for case in CASES if case.layout == "channel"], FUSED)
def test_saved_by_the_channel_layout(backend, case):
    args = arguments(build(case))
    saved, _ = run(case, backend, args)
    judge_saved(["similarity", "norms"], saved, contract.channel, args)


@each([replace(case, topk=(1, 5, 11)) for case in CASES if case.layout == "token"], FUSED)
def test_saved_by_the_token_layout(backend, case):
    problem = build(case)
    args = arguments(problem)
    saved, _ = run(case, backend, args)
    judge_saved(["threshold", "last_tie", "log_sum_exp"], saved, contract.token, args)
    decided, exact_last_tie = decided_rows(problem), contract.token(*in_dtype(torch.float64, args))[2]
    assert saved[1].dtype == torch.int32
    assert torch.equal(saved[1][decided], exact_last_tie[decided])


@each([replace(TOKEN, dtype=dtype, shape=(1, 2, 13, 23, 16, 6), topk=(1, 5, 22, 23), weights=(1, 2, 4),
               temperature=(1, 2, 1, 1)) for dtype in ALL_DTYPES], FUSED)  # fmt: skip
def test_saved_selection_is_exact_among_ties(backend, case):
    """A score is kept if it is above the threshold, or at it and no later than last_tie."""
    problem = build(case)
    generator = torch.Generator().manual_seed(0)
    for name in "qk":
        x = problem.tensors[name]
        x.copy_(torch.randint(2, x.shape, generator=generator) * 2 - 1)
    problem.tensors["temperature"].copy_(torch.tensor([2.0, -0.5])[None, :, None, None])
    args = arguments(problem)
    (threshold, last_tie, _), _ = run(case, backend, args)
    q, k = args[0].double(), args[1].double()
    scores = args[3].double()[..., None, None] * contract.normalized_product(q, k, case.normalize)[0]
    index = torch.arange(scores.shape[-1], device=scores.device)
    for j, count in enumerate(case.topk):
        least, last = threshold[..., j, None].double(), last_tie[..., j, None]
        kept = (scores > least) | ((scores == least) & (index <= last))
        assert torch.equal(kept, contract.kept_entries(scores, count)), f"branch {j}"


@each([case for case in CASES if case.layout == "channel"], FUSED)
def test_channel_backward_reads_what_any_backend_saved(backend, case):
    """The backward operator by itself. (The token layout's thresholds are the saving backend's own.)"""
    problem = build(case)
    args = arguments(problem)
    saved = contract.channel(*args)[1:]
    op = overload("topk_attention_channel_backward", backend)
    grads = op(problem.grad_out, *args[:-2], *saved, *args[-2:])
    names = ["q", "k", "v", "temperature", "weights", "out_proj"]
    result = {f"grad_{name}": x for name, x in zip(names, grads, strict=True) if name in problem.tensors}
    result["grad_temperature"] = result["grad_temperature"][..., None, None]
    if case.out_proj is not None:
        result["grad_out_proj"] = result["grad_out_proj"].to(case.dtype)
    exact = conformance.eager_in(torch.float64, problem)
    yardstick = conformance.eager_in(torch.float32 if case.dtype == torch.float64 else case.dtype, problem)
    judge(result, *({name: x[name] for name in result} for x in (yardstick, exact)), problem.magnitudes)


@each([case for case in CASES if case.dtype in (torch.float32, torch.bfloat16)], FUSED, interpreted=4)
def test_operators_are_registered_correctly(backend, case):
    """Schemas, and fakes that predict shapes, dtypes and strides."""
    problem = build(case)
    args = arguments(problem)
    _, with_saved = run(case, backend, args)
    utils = ("test_schema", "test_faketensor")
    if backend not in INTERPRETED:  # which calls the operator many times more
        utils += ("test_aot_dispatch_dynamic",)
    torch.library.opcheck(overload(f"topk_attention_{case.layout}", backend), args, test_utils=utils)
    backward = overload(f"topk_attention_{case.layout}_backward", backend)
    torch.library.opcheck(backward, (problem.grad_out, *with_saved), test_utils=utils)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("layout", "out_proj"), [("channel", None), ("channel", 4), ("token", None)])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if torch.float64 in DTYPES[name]])
def test_gradcheck(backend, layout, out_proj, normalize):
    shape = (2, 2, 5, 6) if layout == "channel" else (2, 2, 4, 5, 3, 2)
    problem = build(
        Case(
            layout, shape, (2, 3, None), dtype=torch.float64, normalize=normalize, out_proj=out_proj,
            temperature=(2, 1, 1), weights=(2, 3),
        )
    )  # fmt: skip
    names, inputs = list(problem.tensors), [x.detach().requires_grad_() for x in problem.tensors.values()]

    def call(*args: Tensor) -> Tensor:
        return topk_attention(**dict(zip(names, args, strict=True)), **problem.options, backend=backend)

    assert torch.autograd.gradcheck(call, inputs)
    if backend == "eager":
        assert torch.autograd.gradgradcheck(call, inputs)

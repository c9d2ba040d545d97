"""The operators behind masked attention: what they save, their fakes, their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import conformance
import masked_attention_contract as contract
import pytest
import torch
from attention_contract import normalized_product
from attention_problems import ALL_DTYPES, DTYPES, INTERPRETED
from conformance import judge
from masked_attention_problems import BACKENDS, FUSED, Case, build, each
from torch import Tensor

from restore_kernels import masked_attention
from restore_kernels.masked_attention.ops import overload
from restore_kernels.tensors import accumulate_dtype

CHANNEL = Case("channel", (1, 2, 12, 30), (1, 2, 12, 30), temperature=(1, 2, 1, 1))
TOKEN = Case("token", (1, 2, 20, 12, 8, 9), (1, 2, 12), temperature=(1, 2, 1, 1))
CASES = [
    replace(case, dtype=dtype, arrangements=(placed,) * 3)
    for case, placed in (
        (CHANNEL, "contiguous"), (replace(CHANNEL, normalize=False, mask=(30,)), "pixel_major_qkv_slice"),
        (replace(CHANNEL, out_proj=9, mask=(1, 2, 1, 30)), "pixel_major"),
        (replace(CHANNEL, mask=None), "qkv_slice"),
        (TOKEN, "contiguous"), (replace(TOKEN, normalize=False, mask=(12,)), "token_major_qkv_slice"),
        (replace(TOKEN, mask=None), "contiguous"),
        (replace(TOKEN, kind="zeros"), "contiguous"),
    )
    for dtype in ALL_DTYPES
]  # fmt: skip
NARROW_CASES = [case for case in CASES if case.dtype in (torch.float32, torch.bfloat16)]


def arguments(problem: conformance.Problem) -> tuple:
    """The problem's call as the operators take it."""
    tensors, options = problem.tensors, problem.options
    q, k, mask = tensors["q"], tensors["k"], tensors.get("mask")
    is_channel = options["layout"] == "channel"
    if mask is not None and is_channel:
        rows = mask.shape[-2] if mask.dim() > 1 else 1
        mask = mask.expand(*q.shape[:2], rows, q.shape[3])
    elif mask is not None:
        mask = mask.expand(*q.shape[:2], k.shape[2])
    projection = (tensors.get("out_proj"),) if is_channel else ()
    temperature = tensors["temperature"][..., 0, 0]
    return (q, k, tensors["v"], mask, temperature, *projection, options["normalize"])


def in_dtype(dtype: torch.dtype, args: tuple) -> tuple:
    return tuple(x.to(dtype) if isinstance(x, Tensor) else x for x in args)


def judge_saved(names: list[str], saved: tuple, model: Callable, args: tuple) -> None:
    """Holds what a forward operator saved against the contract; scores are the terms it is made of."""
    result = dict(zip(names, saved, strict=True))
    exact, yardstick = (
        dict(zip(names, model(*in_dtype(dtype, args))[1:], strict=True))
        for dtype in (torch.float64, torch.float32)
    )
    terms = normalized_product(args[0].double().abs(), args[1].double().abs(), args[-1])[0]
    largest = (terms * args[4].double().abs()[..., None, None]).amax().clamp_min(1)
    if args[3] is not None:  # whose logarithm is a term of log_sum_exp
        largest = largest - args[3].double().clamp(1e-3, 1).log().amin()
    for name, x in result.items():
        assert (x.shape, x.dtype) == (exact[name].shape, accumulate_dtype(args[0].dtype)), name
    judge(result, yardstick, exact, dict.fromkeys(result, largest))


@each([case for case in CASES if case.layout == "channel"], FUSED, interpreted=2)
def test_saved_by_the_channel_layout(backend, case):
    args = arguments(build(case))
    _, *saved = overload("masked_attention_channel", backend)(*args)
    judge_saved(["similarity", "norms"], tuple(saved), contract.channel, args)


@each([case for case in CASES if case.layout == "token"], FUSED, interpreted=2)
def test_saved_by_the_token_layout(backend, case):
    args = arguments(build(case))
    out, log_sum_exp, wide_out = overload("masked_attention_token", backend)(*args)
    judge_saved(["log_sum_exp"], (log_sum_exp,), lambda *x: contract.token(*x)[:2], args)
    if case.dtype in (torch.bfloat16, torch.float16):
        assert wide_out.dtype == torch.float32
        assert torch.equal(wide_out.to(case.dtype), out), "the output is wide_out, rounded"
    else:
        assert (wide_out.shape, wide_out.dtype) == ((0,), case.dtype)


@each(CASES, FUSED, interpreted=3)
def test_backward_reads_what_any_backend_saved(backend, case):
    """The backward operator by itself."""
    problem = build(case)
    args = arguments(problem)
    op = overload(f"masked_attention_{case.layout}_backward", backend)
    grads = op(problem.grad_out, *_with_saved(case, args, getattr(contract, case.layout)(*args)))
    names = ["q", "k", "v", "mask", "temperature", "out_proj"][: len(grads)]
    grads = dict(zip(names, grads, strict=True))
    for name in ("mask", "out_proj"):
        if name in grads and name not in problem.tensors:
            assert grads.pop(name).shape == (0,)
    result = {f"grad_{name}": x for name, x in grads.items()}
    result["grad_temperature"] = result["grad_temperature"][..., None, None]
    if case.mask is not None:
        result["grad_mask"] = result["grad_mask"].sum_to_size(case.mask)
    if case.out_proj is not None:
        result["grad_out_proj"] = result["grad_out_proj"].to(case.dtype)
    exact = conformance.eager_in(torch.float64, problem)
    yardstick = conformance.eager_in(torch.float32 if case.dtype == torch.float64 else case.dtype, problem)
    yardstick, exact = ({name: x[name] for name in result} for x in (yardstick, exact))
    judge(result, yardstick, exact, problem.magnitudes, problem.parts)


def _with_saved(case: Case, args: tuple, outputs: tuple[Tensor, ...]) -> tuple:
    """The arguments of a backward operator but for the output's gradient."""
    out, *saved = outputs
    if case.layout == "token":
        log_sum_exp, wide_out = saved
        saved = [wide_out if wide_out.numel() else out, log_sum_exp]
    return (*args[:-1], *saved, args[-1])


@each(NARROW_CASES, FUSED, interpreted=2)
def test_operators_are_registered_correctly(backend, case):
    """Schemas, and fakes that predict shapes, dtypes and strides."""
    problem = build(case)
    args = arguments(problem)
    forward = overload(f"masked_attention_{case.layout}", backend)
    utils = ("test_schema", "test_faketensor")
    if backend not in INTERPRETED:  # which calls the operator many times more
        utils += ("test_aot_dispatch_dynamic",)
    torch.library.opcheck(forward, args, test_utils=utils)
    backward = overload(f"masked_attention_{case.layout}_backward", backend)
    saved = _with_saved(case, args, forward(*args))
    torch.library.opcheck(backward, (problem.grad_out, *saved), test_utils=utils)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("layout", "mask", "kind", "out_proj"),
    [
        ("channel", (2, 2, 5, 6), "mixed", None), ("channel", (2, 1, 1, 6), "beyond", 4),
        ("channel", (5, 1), "soft", None), ("channel", None, "", 4),
        ("token", (2, 2, 5), "soft", None), ("token", (5,), "soft", None), ("token", None, "", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", [name for name in BACKENDS if torch.float64 in DTYPES[name]])
def test_gradcheck(backend, layout, mask, kind, out_proj, normalize):
    """A key's weight has a corner at 0, so the token layout's masks are all positive."""
    shape = (2, 2, 5, 6) if layout == "channel" else (2, 2, 4, 5, 3, 2)
    case = Case(layout, shape, mask, kind, dtype=torch.float64, normalize=normalize, out_proj=out_proj)
    problem = build(replace(case, temperature=(2, 1, 1)))
    names, inputs = list(problem.tensors), [x.detach().requires_grad_() for x in problem.tensors.values()]

    def call(*args: Tensor) -> Tensor:
        return masked_attention(**dict(zip(names, args, strict=True)), **problem.options, backend=backend)

    assert torch.autograd.gradcheck(call, inputs)
    if backend == "eager" and mask in ((5, 1), (2, 2, 5)):
        assert torch.autograd.gradgradcheck(call, inputs)

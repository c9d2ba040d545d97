"""What masks do in masked attention: every broadcast shape, kind of value and dtype, on every backend."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import conformance
import pytest
import torch
from attention_cases import float32_and_another, turn
from attention_problems import ALL_DTYPES, DTYPES, INTERPRETED, LAYOUTS
from conformance import Tensors, assert_conforms, evaluate, judge
from masked_attention_problems import BACKENDS, KINDS, MASKS, Case, build, each, full_mask, with_tensors
from torch import Tensor

from restore_kernels import masked_attention

SHAPES = {"channel": (2, 2, 6, 20), "token": (2, 2, 9, 11, 8, 7)}


def _broadcasts() -> Iterable[Case]:
    """Every subset of the dimensions, with the leading ones of size 1 left out and kept."""
    for layout, shape in SHAPES.items():
        full = full_mask(layout, shape)
        for i, kept in enumerate(product((True, False), repeat=len(full))):
            mask = tuple(size if keep else 1 for size, keep in zip(full, kept, strict=True))
            leading = next((j for j, size in enumerate(mask) if size > 1), len(mask))
            for j, dropped in enumerate(range(leading + 1)):
                dtype = turn(float32_and_another(i), j)
                yield Case(layout, shape, mask[dropped:], dtype=dtype, normalize=(i + j) % 3 != 0)


def _kinds(*kinds: str, dtypes: Iterable[torch.dtype] = ALL_DTYPES) -> Iterable[Case]:
    for kind, layout, (i, dtype) in product(kinds, LAYOUTS, enumerate(dtypes)):
        if kind not in KINDS[layout]:
            continue
        full = full_mask(layout, SHAPES[layout])
        projection = 5 if layout == "channel" and i % 2 else None
        for mask, normalize in ((full, i % 2 == 0), ((full[0], *[1] * (len(full) - 2), full[-1]), True)):
            yield Case(
                layout, SHAPES[layout], mask, kind, dtype=dtype, normalize=normalize, out_proj=projection,
                temperature=(2, 1, 1),
            )  # fmt: skip


def _kinds_for_other_sides() -> Iterable[Case]:
    """More queries than keys: few keys, and as many as are worked on tile by tile."""
    for shape, (i, kind) in product(((2, 2, 35, 13, 10, 9), (2, 2, 60, 52, 8, 7)), enumerate(MASKS)):
        for dtype in float32_and_another(i):
            mask = full_mask("token", shape)
            yield Case("token", shape, mask, kind, dtype=dtype, normalize=i % 2 == 0, temperature=(2, 1, 1))


def _without_mask(results: Tensors) -> Tensors:
    return {name: x for name, x in results.items() if name != "grad_mask"}


@each(_broadcasts(), interpreted=6)
def test_broadcast_shapes(backend, case):
    assert_conforms(build(case), backend)


@each(_kinds(*MASKS), interpreted=5)
def test_kinds(backend, case):
    assert_conforms(build(case), backend)


@each(_kinds_for_other_sides(), interpreted=8)
def test_kinds_with_more_queries_than_keys(backend, case):
    assert_conforms(build(case), backend)


@pytest.mark.parametrize("kind", ["tiny", "huge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend not in INTERPRETED])
def test_no_nan_where_gated_products_underflow_or_overflow(backend, dtype, kind):
    problem = build(Case("channel", SHAPES["channel"], (20,), kind, dtype=dtype))
    for name, x in evaluate(problem, backend).items():
        assert x.isfinite().all(), name


@each(_kinds("ones"), interpreted=2)
def test_ones_are_no_mask(backend, case):
    """Within rounding of the call without one; eager bitwise.

    Times 1 and plus log 1 are exact, so the definition may not differ. A fused backend may run other
    code without a mask, which sums in another order: it must be as near the truth *without* a mask.
    """
    problem = build(case)
    unmasked = replace(problem, tensors={name: x for name, x in problem.tensors.items() if name != "mask"})
    result = _without_mask(evaluate(problem, backend))
    exact = conformance.eager_in(torch.float64, unmasked)
    if case.dtype == torch.float64:
        yardstick = conformance.eager_in(torch.float32, unmasked)
    else:
        yardstick = evaluate(unmasked, "eager")
    judge(result, yardstick, exact, problem.magnitudes)
    if backend == "eager":
        for name, x in evaluate(unmasked, "eager").items():
            assert torch.equal(result[name], x), name


@each(_kinds("zeros"), interpreted=2)
def test_zeros_give_zero(backend, case):
    """Exactly, and no gradients; only the channel layout's mask has one, by way of the gated v."""
    result = evaluate(build(case), backend)
    for name, x in result.items():
        assert x.isfinite().all(), name
        if name != "grad_mask" or case.layout == "token":
            assert torch.equal(x, torch.zeros_like(x)), name
    if case.layout == "channel":
        assert (result["grad_mask"] != 0).any()


@each(_kinds("mixed"), interpreted=2)
def test_a_masked_head_gives_zero(backend, case):
    """All of the first image's second head is masked, where the mask has heads, else the first image."""
    problem = build(case)
    mask = problem.tensors["mask"].clone()
    head = 1 if mask.shape[1] > 1 else slice(None)
    mask[0, head] = 0
    problem = with_tensors(problem, mask=mask)
    assert_conforms(problem, backend)
    result = evaluate(problem, backend)
    zeros = ["grad_q", "grad_k", "grad_v", *(["grad_mask"] if case.layout == "token" else [])]
    zeros += ["out"] if case.out_proj is None else []
    for name in zeros:
        hidden = result[name][0, head if result[name].shape[1] > 1 else slice(None)]
        assert torch.equal(hidden, torch.zeros_like(hidden)), name


@each((Case("channel", (2, 2, 7, 20), mask, dtype=dtype, out_proj=out_proj)
       for mask, dtype, out_proj in product(((7, 1), (2, 7, 1), (2, 2, 7, 20)), ALL_DTYPES, (None, 5))),
      interpreted=1)  # fmt: skip
def test_a_masked_channel(backend, case):
    """Its gated row of k is 0 with the clamp, 1e-12, for a norm: the mask's gradient is huge there."""
    problem = build(case)
    mask = problem.tensors["mask"].clone()
    mask[..., 2, :] = 0
    problem = with_tensors(problem, mask=mask)
    assert_conforms(problem, backend)
    result = evaluate(problem, backend)
    for name in ("grad_k", "grad_v"):
        assert not result[name][:, :, 2].any(), name
    assert result["grad_mask"][..., 2, :].abs().amax() > 1e6 * result["grad_mask"][..., 3, :].abs().amax()


@each((case for case in _kinds("hard", "beyond") if case.layout == "token"), interpreted=1)
def test_a_key_left_out_has_no_influence(backend, case):
    """Bitwise none, with scores and values of any size; and it gets gradients of exactly 0."""
    problem = build(case)
    mask = problem.tensors["mask"]
    left_out = (mask <= 0).expand(problem.tensors["k"].shape[:3])  # (B, H, M)
    assert left_out.any() and not left_out.all()
    first, size = evaluate(problem, backend), 1e4 if case.dtype == torch.float16 else 1e15
    others = {name: problem.tensors[name].clone() for name in "kv"}
    for x in others.values():
        x[left_out] = (x[left_out] + 1) * size  # one of them now has by far the largest score
    second = evaluate(replace(problem, tensors={**problem.tensors, **others}), backend)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    for name in ("grad_k", "grad_v"):
        assert not second[name][left_out].any(), name
    assert not second["grad_mask"][mask <= 0].any()


@each(_kinds("mixed", dtypes=(torch.float32, torch.bfloat16)), interpreted=2)
def test_no_mask(backend, case):
    assert_conforms(build(replace(case, mask=None)), backend)


MASK_DTYPES = (torch.bool, *ALL_DTYPES)


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(backend, dtype) for backend in BACKENDS if backend not in INTERPRETED for dtype in DTYPES[backend]],
)
def test_mask_of_any_dtype(backend, dtype, layout, mask_dtype):
    """It is converted to the dtype of the computation, its gradient back: bitwise the same as there."""
    case = Case(layout, SHAPES[layout], full_mask(layout, SHAPES[layout]), "hard", dtype=dtype)
    problem = build(case if mask_dtype == torch.bool else replace(case, kind="mixed"))
    mask = problem.tensors["mask"].to(mask_dtype)
    working = mask.to(torch.float64 if dtype == torch.float64 else torch.float32)
    expected = evaluate(replace(problem, tensors={**problem.tensors, "mask": working}), backend)
    leaves: dict[str, Tensor] = {
        name: x.detach().requires_grad_() for name, x in problem.tensors.items() if name != "mask"
    }
    leaves["mask"] = mask.requires_grad_() if mask.is_floating_point() else mask
    out = masked_attention(**leaves, **problem.options, backend=backend)
    assert torch.equal(out, expected["out"])
    out.backward(problem.grad_out)
    for name, x in leaves.items():
        if x.requires_grad:
            assert x.grad is not None and x.grad.dtype == x.dtype
            assert torch.equal(x.grad, expected[f"grad_{name}"].to(x.dtype)), name

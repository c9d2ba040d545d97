"""Hard matching: ties exactly, near ties by the score of what was chosen, the rest as with given matches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import conformance
import pytest
import torch
import torch.nn.functional as F
from attention_cases import float32_and_another, turn
from attention_problems import ALL_DTYPES, INTERPRETED, drawing
from conformance import (
    ACCUMULATION,
    MULTIPLE,
    Problem,
    assert_every_element_is_written,
    evaluate,
    judge,
)
from pyramid_attention_problems import (
    HARD_BACKENDS,
    HARD_FUSED,
    Case,
    Levels,
    arguments,
    build,
    each,
    exact_scores,
    levels_of,
    pyramid,
    scores_in,
)
from torch import Tensor

from restore_kernels import pyramid_attention
from restore_kernels.pyramid_attention import autograd, reference
from restore_kernels.tensors import accumulate_dtype

TINY = Case((1, 4, 3, 4, 5), ((4, 5), (2, 3)))


def hard(problem: Problem) -> Problem:
    """The problem with hard matching, where values alone have gradients."""
    constants = frozenset(name for name in problem.tensors if not name.startswith("values"))
    return replace(problem, options={**problem.options, "hard": True}, constants=constants)


def index_of(problem: Problem, backend: str) -> Tensor:
    """(B, H * W): the position of every pixel's match."""
    if backend == "eager":
        return scores_in(accumulate_dtype(problem.grad_out.dtype), problem).argmax(-1)
    return autograd.overload("pyramid_attention_hard", backend)(*arguments(problem))[1].flatten(1)


def with_matches(problem: Problem, index: Tensor) -> Problem:
    """What the reference makes of these matches, whatever their scores; and the sizes of its terms."""
    options, shape = problem.options, problem.grad_out.shape[2:]
    size, out_scale = options["patch_size"], options["out_scale"]

    def matched(values: list[Tensor], out_scale: float) -> Tensor:
        dtype = accumulate_dtype(values[0].dtype)
        length = sum(value.shape[2:].numel() for value in values)
        chosen = F.one_hot(index, length).to(dtype)
        wide = [value.to(dtype) for value in values]
        return (reference.overlap_add(chosen, wide, size, shape) * out_scale).to(values[0].dtype)

    def operator(*, backend: str, **tensors: Tensor) -> Tensor:
        return matched(list(tensors.values()), out_scale)

    values = {name: x for name, x in problem.tensors.items() if name not in problem.constants}
    terms = Problem(
        operator, {name: x.double().abs() for name, x in values.items()}, {}, problem.grad_out, {}
    )
    magnitudes = evaluate(replace(terms, grad_out=problem.grad_out.double().abs()), "eager")
    return Problem(operator, values, {}, problem.grad_out, magnitudes)


def assert_best(problem: Problem, index: Tensor) -> None:
    """Every match has the largest score, or one that rounding does not tell from it."""
    exact, dtype = exact_scores(problem), accumulate_dtype(problem.grad_out.dtype)
    gap = (exact.amax(-1, keepdim=True) - exact.gather(-1, index[..., None])).max().item()
    ratio = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    own = ratio * (scores_in(torch.float32, problem).double() - exact).abs().max().item()
    terms = torch.finfo(dtype).eps * exact.abs().max().item()
    allowed = 2 * (MULTIPLE * own + ACCUMULATION * terms)  # two scores are compared
    assert gap <= allowed, f"a match is {gap:.2e} below the best, allowed {allowed:.2e}"


def assert_matches(problem: Problem, backend: str) -> Tensor:
    """The backend's matches are the best, and its results those of its matches; returns the matches."""
    problem = hard(problem)
    index = index_of(problem, backend)
    assert_best(problem, index)
    result, expected = evaluate(problem, backend), with_matches(problem, index)
    exact = conformance.eager_in(torch.float64, expected)
    is_double = problem.grad_out.dtype == torch.float64
    yardstick = conformance.eager_in(torch.float32, expected) if is_double else evaluate(expected, "eager")
    for name, x in result.items():
        assert (x.shape, x.dtype) == (exact[name].shape, problem.grad_out.dtype), name
    judge(result, yardstick, exact, expected.magnitudes)
    return index


def _levels(kind: int, height: int, width: int) -> Levels:
    return turn((pyramid(height, width), ((height, width),), ((2, width + 9), (1, 1), (height + 3, 4))), kind)


def _cases() -> Iterable[Case]:
    images = ((1, 1), (2, 3), (9, 8), (17, 23), (5, 60))
    for i, ((height, width), size) in enumerate(product(images, (1, 3, 5, 7))):
        channels = turn(((3, 8), (8, 3), (33, 16)), i)
        for dtype in float32_and_another(i):
            image = (turn((1, 2), i), *channels, height, width)
            yield Case(image, _levels(i // 4 + i, height, width), dtype=dtype, patch_size=size)
    placed = ("channels_last", "crop", "channels_last_slice")
    yield Case((2, 6, 7, 9, 11), _levels(2, 9, 11), arrangements=placed, grad="transposed")
    yield Case((2, 6, 7, 9, 11), _levels(0, 9, 11), arrangements=placed[::-1], grad="one_value")


@each(_cases(), HARD_BACKENDS, interpreted=2)
def test_matches(backend, case):
    assert_matches(build(case), backend)


def exact_ties(case: Case) -> Problem:
    """Scores that are whole numbers, exactly, in whatever order they are summed.

    Each key patch has at most one pixel that is not zero, of norm 2, and the query is whole numbers. The
    last level is as the first.
    """
    problem, randn = build(case), drawing(seed=1)
    step, tensors = case.patch_size, dict(problem.tensors)
    for name in tensors:
        if name.startswith("keys"):
            signs = randn(*tensors[name].shape).sign()
            lattice = torch.zeros_like(signs)
            lattice[..., step // 2 :: step, step // 2 :: step] = 1
            tensors[name] = (signs * lattice).to(tensors[name])
    tensors[f"keys[{len(case.levels) - 1}]"] = tensors["keys[0]"]
    tensors["query"] = randn(*tensors["query"].shape).round().clamp(-2, 2).to(tensors["query"])
    return replace(problem, tensors=tensors)


def _tied() -> Iterable[Case]:
    for (i, dtype), size in product(enumerate(ALL_DTYPES), (3, 5, 1)):
        for height, width in ((4, 5), (15, 15), (11, 34)):
            levels = _levels(2 * i, height, width)
            yield Case((1, 4, 3, height, width), (*levels, levels[0]), dtype=dtype, patch_size=size)


@each(_tied(), HARD_BACKENDS, interpreted=2)
def test_of_equal_scores_the_first_is_taken(backend, case):
    problem = exact_ties(case)
    scores = exact_scores(problem)
    is_best = scores == scores.amax(-1, keepdim=True)
    assert (is_best.sum(-1) > 1).any(), "there are ties"
    first = torch.where(is_best, torch.arange(scores.shape[-1], device=scores.device), scores.shape[-1])
    index = assert_matches(problem, backend)
    assert torch.equal(index, first.amin(-1)), "not the first of equal scores"


@each([case for case in _tied() if case.patch_size == 3][::4], HARD_BACKENDS)
@pytest.mark.parametrize("constant", [0.0, 0.5])
def test_a_query_without_a_preference_takes_the_first_patch(backend, case, constant):
    """A query of zeros; or equal keys everywhere, of which the first whole patch is as good as any."""
    problem = build(replace(case, patch_size=1 if constant else 3))
    name = "keys" if constant else "query"
    tensors = {
        x: torch.full_like(tensor, constant) if x.startswith(name) else tensor
        for x, tensor in problem.tensors.items()
    }
    assert not assert_matches(replace(problem, tensors=tensors), backend).any()


@pytest.mark.parametrize("backend", HARD_BACKENDS)
def test_only_values_have_gradients(backend):
    problem = build(TINY)
    tensors = {name: x.detach().requires_grad_() for name, x in problem.tensors.items()}
    query, keys, values = levels_of(tensors)
    out = pyramid_attention(query, keys, values, hard=True, backend=backend)
    out.square().sum().backward()
    assert query.grad is None and all(key.grad is None for key in keys)
    assert all(value.grad is not None for value in values)
    for name in ("query", "keys[0]"):
        constants = {x: tensor.detach() for x, tensor in tensors.items()}
        constants[name].requires_grad_()
        query, keys, values = levels_of(constants)
        assert torch.equal(pyramid_attention(query, keys, values, hard=True, backend=backend), out)


@pytest.mark.parametrize("scale", [0.25, -10.0])
@pytest.mark.parametrize("backend", HARD_BACKENDS)
def test_softmax_scale_matters_by_its_sign(backend, scale):
    assert_matches(build(replace(TINY, softmax_scale=scale)), backend)


@pytest.mark.parametrize("backend", HARD_BACKENDS)
def test_scores_in_the_thousands(backend):
    assert_matches(build(Case((1, 4, 3, 6, 7), ((6, 7), (2, 3)), softmax_scale=3000.0)), backend)


@pytest.mark.parametrize("backend", HARD_BACKENDS)
def test_empty_batch(backend):
    problem = hard(build(replace(TINY, image=(0, 4, 3, 4, 5))))
    result = evaluate(problem, backend)
    assert result["out"].shape == problem.grad_out.shape
    assert result["grad_values[1]"].shape == (0, 3, 2, 3)


@pytest.mark.parametrize("backend", HARD_FUSED)
def test_every_element_is_written(backend):
    assert_every_element_is_written(hard(build(TINY)), backend)


@pytest.mark.parametrize("backend", HARD_FUSED)
def test_results_are_bitwise_reproducible(backend):
    case = TINY if backend in INTERPRETED else Case((2, 4, 5, 18, 23), pyramid(18, 23))
    conformance.assert_reproducible(hard(build(case)), backend)

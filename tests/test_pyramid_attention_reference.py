"""The eager definition itself, against loops over single numbers; and what its parts make of each other."""

from __future__ import annotations

import math
from itertools import product

import conformance
import pytest
import torch
import torch.nn.functional as F
from conformance import evaluate, judge
from pyramid_attention_problems import Case, arguments, build, each, exact_scores, levels_of
from test_pyramid_attention import sizes
from torch import Tensor

from restore_kernels import pyramid_attention

EAGER = ["eager"]
Image = list[list[list[float]]]  # channels of rows


def pixel(image: Image, channel: int, y: int, x: int) -> float:
    rows = image[channel]
    return rows[y][x] if 0 <= y < len(rows) and 0 <= x < len(rows[0]) else 0.0


def positions(image: Image) -> list[tuple[int, int]]:
    return list(product(range(len(image[0])), range(len(image[0][0]))))


def patch(image: Image, y: int, x: int, size: int) -> list[float]:
    reach = range(-(size // 2), size // 2 + 1)
    return [pixel(image, c, y + dy, x + dx) for c in range(len(image)) for dy, dx in product(reach, reach)]


def by_loops(query: Image, keys: list[Image], values: list[Image], size: int, scale: float, eps: float,
             out_scale: float, hard: bool) -> Image:  # fmt: skip
    """Nothing but Python's numbers."""
    places = [(i, *place) for i, key in enumerate(keys) for place in positions(key)]
    out = [[[0.0] * len(query[0][0]) for _ in query[0]] for _ in values[0]]
    reach = range(-(size // 2), size // 2 + 1)
    for y, x in positions(query):
        scores, wanted = [], patch(query, y, x, size)
        for i, v, u in places:
            found = patch(keys[i], v, u, size)
            norm = max(math.sqrt(sum(a * a for a in found)), eps)
            scores.append(scale * sum(a * b / norm for a, b in zip(wanted, found, strict=True)))
        largest = max(scores)
        weights = [math.exp(score - largest) for score in scores]
        if hard:
            weights = [float(i == scores.index(largest)) for i in range(len(scores))]
        total = sum(weights)
        for (i, v, u), weight in zip(places, weights, strict=True):
            for channel, dy, dx in product(range(len(out)), reach, reach):
                if 0 <= y + dy < len(out[0]) and 0 <= x + dx < len(out[0][0]):
                    value = pixel(values[i], channel, v + dy, u + dx)
                    out[channel][y + dy][x + dx] += out_scale * weight / total * value
    return out


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(("size", "eps"), [(1, 1e-4), (3, 1e-4), (3, 3.0), (5, 1e-4), (7, 1e-4)])
def test_is_what_the_documentation_says(size, eps, hard):
    case = Case((2, 2, 3, 3, 4), ((3, 4), (2, 5), (1, 1)), dtype=torch.float64)
    query, keys, values = levels_of(build(case).tensors)
    settings = (size, 2.0, eps, 0.75, hard)
    names = ("patch_size", "softmax_scale", "eps", "out_scale", "hard")
    out = pyramid_attention(query, keys, values, **dict(zip(names, settings, strict=True)), backend="eager")
    for b in range(2):
        image, *levels = (x[b].tolist() for x in (query, *keys, *values))
        close(out[b], torch.tensor(by_loops(image, levels[:3], levels[3:], *settings), dtype=torch.float64))


def test_defaults():
    query, keys, values = levels_of(build(Case((1, 3, 2, 4, 5), ((4, 5), (2, 2)))).tensors)
    in_full = pyramid_attention(
        query, keys, values, patch_size=3, softmax_scale=10.0, eps=1e-4, out_scale=0.25, hard=False
    )
    assert torch.equal(pyramid_attention(query, keys, values), in_full)
    assert torch.equal(pyramid_attention(query, tuple(keys), tuple(values)), in_full)


def test_with_patches_of_one_pixel_it_is_attention_to_normalized_keys():
    problem = build(Case((2, 5, 6, 4, 7), ((4, 7), (3, 3)), dtype=torch.float64, patch_size=1))
    query, keys, values, *_ = arguments(problem)
    joined_keys, joined_values = (torch.cat([x.flatten(2) for x in y], dim=2).mT for y in (keys, values))
    expected = F.scaled_dot_product_attention(
        query.flatten(2).mT, F.normalize(joined_keys, dim=-1), joined_values, scale=10.0
    )
    out = pyramid_attention(query, keys, values, patch_size=1, out_scale=1.0, backend="eager")
    close(out, expected.mT.reshape_as(out))


def test_a_level_may_be_cut_in_two_where_patches_are_pixels():
    query, keys, values = levels_of(build(Case((1, 4, 3, 5, 6), ((5, 6),), dtype=torch.float64)).tensors)
    whole = pyramid_attention(query, keys, values, patch_size=1, backend="eager")
    halves = ([x[:, :, :2], x[:, :, 2:]] for x in (keys[0], values[0]))
    close(pyramid_attention(query, *halves, patch_size=1, backend="eager"), whole)


def test_finds_the_patch_that_it_was_cut_from():
    """Hard matching of an image to itself and to another one: every pixel finds itself."""
    generator = torch.Generator().manual_seed(0)
    image, other = (torch.randn(1, 8, 6, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    image = image / torch.linalg.vector_norm(image, dim=1, keepdim=True)
    out = pyramid_attention(
        image, [other, image], [torch.zeros_like(other), image], patch_size=1, out_scale=1.0, hard=True,
        backend="eager",
    )  # fmt: skip
    close(out, image)


@pytest.mark.parametrize("hard", [False, True])
def test_probabilities_sum_to_one(hard):
    """Values of one everywhere, whose patches miss what is outside of them: at most patch_size² each."""
    problem = build(Case((1, 4, 3, 9, 8), ((9, 8), (7, 7)), dtype=torch.float64))
    query, keys, values = levels_of(problem.tensors)
    ones = [torch.ones_like(x) for x in values]
    out = pyramid_attention(query, keys, ones, patch_size=1, out_scale=0.5, hard=hard, backend="eager")
    close(out, torch.full_like(out, 0.5))
    assert exact_scores(problem).softmax(-1).sum(-1).allclose(torch.ones((), dtype=torch.float64))


@each([case for case in sizes() if case.dtype == torch.float32 and case.work() < 3e6], EAGER)
def test_rounding_explains_the_error_of_the_yardstick(backend, case):
    """So that a broken yardstick does not let every backend pass."""
    problem = build(case)
    exact = conformance.eager_in(torch.float64, problem)
    judge(evaluate(problem, backend), exact, exact, problem.magnitudes, problem.parts)

"""The conformance suite of pyramid attention: every backend against the float64 truth.

Each axis is walked with the others taking turns. Hard matching is in ``test_pyramid_attention_hard``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import pytest
import torch
from arrangements import IMAGE_ARRANGEMENTS
from attention_cases import float32_and_another, turn
from attention_problems import ALL_DTYPES, INTERPRETED
from conformance import (
    assert_conforms,
    assert_every_element_is_written,
    assert_reproducible,
    check_runs,
    evaluate,
)
from pyramid_attention_problems import (
    BACKENDS,
    EXPLANATION,
    FUSED,
    Case,
    Levels,
    build,
    each,
    pyramid,
    with_magnitudes,
    with_tensors,
)

COMPILED = [backend for backend in BACKENDS if backend not in INTERPRETED]
SMALL_IMAGES = ((1, 1), (2, 3), (1, 40), (9, 8), (17, 23))
CHANNELS = ((1, 1), (3, 8), (8, 3), (32, 64), (33, 32), (64, 33))  # of query and keys, of values


def _levels(kind: int, height: int, width: int) -> Levels:
    """By turns: the image's own size, a pyramid, sizes that have nothing to do with each other."""
    kinds = (((height, width),), pyramid(height, width), ((height + 9, 4), (1, 1), (3, width + 5), (2, 1)))
    return turn(kinds, kind)


def sizes() -> Iterable[Case]:
    for i, ((height, width), channels) in enumerate(product(SMALL_IMAGES, CHANNELS)):
        batch, scale = turn((1, 3, 2), i // 2), turn((10.0, 2.0, 0.25), i // 3)
        for dtype in float32_and_another(i):
            image = (batch, *channels, height, width)
            yield Case(image, _levels(i + i // 3, height, width), dtype=dtype, softmax_scale=scale)
    for i, (height, width, channels) in enumerate(
        ((33, 50, (3, 8)), (5, 131, (8, 3)), (19, 70, (8, 16)), (16, 32, (32, 64)), (23, 24, (5, 16)))
    ):
        for dtype in float32_and_another(i):
            yield Case((1, *channels, height, width), _levels(i, height, width), dtype=dtype)


def _patches() -> Iterable[Case]:
    images = ((2, 3), (9, 14), (13, 7))
    for (i, size), (height, width) in product(enumerate((1, 5, 7)), images):
        for dtype in float32_and_another(i):
            image, levels = (2, 5, 6, height, width), _levels(i + height, height, width)
            yield Case(image, levels, dtype=dtype, patch_size=size, softmax_scale=turn((3.0, 10.0), i))


IMAGE = (2, 6, 7, 9, 11)
LEVELS = ((9, 11), (6, 13), (2, 3))


def _memory() -> Iterable[Case]:
    for i, name in enumerate(IMAGE_ARRANGEMENTS):
        another = turn(list(IMAGE_ARRANGEMENTS), i + 5)
        for j, dtype in enumerate(float32_and_another(i)):
            places = (name, name, name) if j else (name, another, "contiguous")
            yield Case(IMAGE, LEVELS, dtype=dtype, arrangements=places, grad="one_value" if j else name)


def basic(dtypes: Iterable[torch.dtype] = ALL_DTYPES) -> Iterable[Case]:
    for dtype in dtypes:
        yield Case((2, 5, 6, 6, 7), ((6, 7), (4, 5), (1, 1)), dtype=dtype)
        yield Case((1, 32, 16, 12, 13), pyramid(12, 13), dtype=dtype)


TINY = Case((1, 4, 3, 4, 5), ((4, 5), (2, 3)))


@pytest.mark.parametrize("backend", EXPLANATION.why_not)
def test_backend_runs_here(backend):
    check_runs(EXPLANATION, backend)


@each(sizes(), FUSED, interpreted=3)
def test_sizes(backend, case):
    """Of eager, ``test_pyramid_attention_reference`` knows more."""
    assert_conforms(build(case), backend)


@each(_patches(), interpreted=2)
def test_patch_sizes(backend, case):
    assert_conforms(build(case), backend)


@each(_memory(), interpreted=2)
def test_memory_layouts(backend, case):
    assert_conforms(build(case), backend)


@pytest.mark.parametrize("backend", FUSED)
def test_results_keep_the_memory_format(backend):
    """Of the image that each is like: channels_last where it is."""
    places = ("channels_last", "contiguous", "channels_last_slice")
    problem = build(replace(TINY, arrangements=places))
    assert evaluate(problem, "eager")["out"].is_contiguous(memory_format=torch.channels_last)
    for name, x in evaluate(problem, backend).items():
        is_last = not name.startswith("grad_keys")
        assert x.is_contiguous(memory_format=torch.channels_last) == is_last, name


@each(basic(), interpreted=1)
def test_logits_in_the_thousands(backend, case):
    """Whose exponentials are beyond float32 unless the largest of a row is subtracted."""
    assert_conforms(build(replace(case, softmax_scale=2000.0)), backend)


@each(basic(ALL_DTYPES[:2]))
@pytest.mark.parametrize("scale", [0.0, -3.0])
def test_any_softmax_scale(backend, case, scale):
    assert_conforms(build(replace(case, softmax_scale=scale)), backend)


def _key_sizes() -> Iterable[tuple[str, float]]:
    """What keys are multiplied by: all patches are under eps, or about half of them."""
    return (("under", 1e-6), ("both", 1e-4 / 3 / 5**0.5))


@pytest.mark.parametrize(("kind", "size"), _key_sizes())
@each([next(iter(basic((dtype,)))) for dtype in ALL_DTYPES[:3]])
def test_norms_under_eps(backend, case, kind, size):
    problem = build(case)
    keys = {name: x * size for name, x in problem.tensors.items() if name.startswith("keys")}
    problem = with_tensors(problem, **keys)
    clamped, free = (sum(part[i].sum().item() for part in problem.parts.values()) for i in range(2))
    assert clamped > 0 and (free > 0) == (kind == "both")
    assert_conforms(problem, backend)


@each(basic(ALL_DTYPES[:3]), interpreted=1)
@pytest.mark.parametrize("zero", ["a level", "a corner", "everything"])
def test_zero_keys(backend, case, zero):
    problem = build(case)
    keys = {name: x.clone() for name, x in problem.tensors.items() if name.startswith("keys")}
    for name, x in keys.items():
        if zero == "everything" or name == "keys[0]":
            x[..., : 4 if zero == "a corner" else None, : 4 if zero == "a corner" else None] = 0
    problem = with_tensors(problem, **keys)
    assert problem.parts["grad_keys[0]"][0].any()
    assert_conforms(problem, backend)


@pytest.mark.parametrize("name", ["query", "values[0]"])
@pytest.mark.parametrize("backend", COMPILED)
def test_zero_images(backend, name):
    problem = build(next(iter(basic())))
    assert_conforms(with_tensors(problem, **{name: torch.zeros_like(problem.tensors[name])}), backend)


# What query and keys are multiplied by: all products of patches stay within float32.
MAGNITUDES = [
    *((torch.float32, *sizes) for sizes in ((1e4, 1e4), (1e-6, 1e12), (1e15, 1e-12), (1e-3, 1e18))),
    *((torch.bfloat16, *sizes) for sizes in ((1e4, 1e4), (1e-6, 1e12))),
    *((torch.float16, *sizes) for sizes in ((1e-2, 4e3), (1e3, 1e-2))),  # at 4e3 squares overflow it
]


@pytest.mark.parametrize(("dtype", "of_query", "of_keys"), MAGNITUDES)
@pytest.mark.parametrize("backend", COMPILED)
def test_magnitudes(backend, dtype, of_query, of_keys):
    """Of eps as of the keys, so that it clamps some."""
    case = replace(next(iter(basic((dtype,)))), softmax_scale=10 / max(of_query, 1e-2), eps=4 * of_keys)
    problem = build(case)
    factors = {"query": of_query} | {f"keys[{i}]": of_keys for i in range(len(case.levels))}
    tensors = {name: x * factors.get(name, 1) for name, x in problem.tensors.items()}
    assert_conforms(with_magnitudes(replace(problem, tensors=tensors)), backend)


@pytest.mark.parametrize("of_keys", [1e-30, 1.0, 1e20, 1e30])
@pytest.mark.parametrize("of_query", [1e-30, 1.0, 1e20, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", COMPILED)
def test_no_nan_where_products_underflow_or_overflow(backend, dtype, of_query, of_keys):
    problem = build(next(iter(basic((dtype,)))))
    factors = {"query": of_query} | {f"keys[{i}]": of_keys for i in range(3)}
    tensors = {name: x * factors.get(name, 1) for name, x in problem.tensors.items()}
    result = evaluate(replace(problem, tensors=tensors), backend)
    for name, x in result.items():
        assert not x.isnan().any(), name
    assert result["out"].isfinite().all()


@pytest.mark.parametrize("backend", COMPILED)
def test_nan_shows_around_its_pixel_and_nowhere_else(backend):
    problem = build(Case((2, 5, 6, 20, 21), ((20, 21), (12, 13))))
    clean = evaluate(problem, backend)
    query = problem.tensors["query"].clone()
    query[0, 2, 8, 9] = float("nan")
    dirty = evaluate(replace(problem, tensors={**problem.tensors, "query": query}), backend)
    for name in clean:
        assert torch.equal(clean[name][1], dirty[name][1]), name
    expected = torch.zeros(20, 21, dtype=torch.bool)
    expected[6:11, 7:12] = True  # the patches that have the pixel, and the pixels of those patches
    assert torch.equal(dirty["out"][0].isnan().all(0).cpu(), expected)
    assert torch.equal(dirty["out"][0].isnan().any(0).cpu(), expected)
    key = problem.tensors["keys[1]"].clone()
    key[1, 0, 3, 4] = float("nan")
    dirty = evaluate(replace(problem, tensors={**problem.tensors, "keys[1]": key}), backend)
    assert dirty["out"][1].isnan().all() and torch.equal(dirty["out"][0], clean["out"][0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    problem = build(replace(TINY, image=(0, *TINY.image[1:])))
    result = evaluate(problem, backend)
    assert result["out"].shape == problem.grad_out.shape
    for name, x in problem.tensors.items():
        assert result[f"grad_{name}"].shape == x.shape


@each([TINY, *basic()], interpreted=1)
def test_every_element_is_written(backend, case):
    assert_every_element_is_written(build(case), backend)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(backend, torch.float32) for backend in FUSED] + [(x, torch.bfloat16) for x in FUSED if x in COMPILED],
)
def test_results_are_bitwise_reproducible(backend, dtype):
    case = TINY if backend in INTERPRETED else Case((2, 8, 9, 24, 23), pyramid(24, 23))
    assert_reproducible(build(replace(case, dtype=dtype)), backend, across_threads=False)


def test_results_are_right_with_any_number_of_threads():
    """Which part the sums that go over tiles of queries."""
    if "cpu" not in BACKENDS:
        pytest.skip("no compiled library")
    threads = torch.get_num_threads()
    problem = build(Case((2, 8, 9, 24, 23), pyramid(24, 23)))
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            assert_conforms(problem, "cpu")
        finally:
            torch.set_num_threads(threads)

"""Random sizes, levels, memory layouts and settings of pyramid attention against the truth."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from arrangements import IMAGE_ARRANGEMENTS
from attention_problems import ALL_DTYPES, DTYPES, INTERPRETED
from conformance import assert_conforms
from pyramid_attention_problems import FUSED, HARD_FUSED, Case, build
from test_pyramid_attention_hard import assert_matches

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


@st.composite
def cases(draw, dtypes, largest_side: int, most_channels: int, patch_sizes: Sequence[int]) -> Case:
    side, channels = st.integers(1, largest_side), st.integers(1, most_channels)
    image = (draw(st.integers(1, 2)), draw(channels), draw(channels), draw(side), draw(side))
    return Case(
        image, tuple(draw(st.lists(st.tuples(side, side), min_size=1, max_size=4))),
        dtype=draw(st.sampled_from(dtypes)),
        patch_size=draw(st.sampled_from(patch_sizes)),
        softmax_scale=draw(st.floats(0.0625, 20, width=16)),
        eps=draw(st.sampled_from((1e-4, 1e-4, 2.9))),
        arrangements=draw(st.tuples(*[st.sampled_from(list(IMAGE_ARRANGEMENTS))] * 3)),
        grad=draw(st.sampled_from(("contiguous", "transposed", "channels_last", "crop", "one_value"))),
    )  # fmt: skip


@pytest.mark.parametrize("backend", FUSED)
def test_random_calls(backend):
    sizes = (2, 3, 4) if backend in INTERPRETED else (120 if backend == "cpu" else 40, 16, 40)
    examples, largest_side, most_channels = sizes
    patch_sizes = (3,) if backend == "cuda" else (3, 3, 1, 5, 7)
    dtypes = [dtype for dtype in ALL_DTYPES if dtype in DTYPES[backend]]

    @hypothesis.settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    @hypothesis.given(cases(dtypes, largest_side, most_channels, patch_sizes))
    def conforms(case: Case) -> None:
        problem = build(case)
        assert_conforms(problem, backend)
        if backend in HARD_FUSED:
            assert_matches(problem, backend)

    conforms()

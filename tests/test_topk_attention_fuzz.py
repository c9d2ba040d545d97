"""Random shapes, memory layouts, branches and options of top-k attention against the truth."""

from __future__ import annotations

import pytest
from arrangements import ARRANGEMENTS
from attention_problems import ALL_DTYPES, DTYPES, INTERPRETED
from conformance import assert_conforms
from topk_attention_problems import FUSED, Case, build

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

PLACES = [name for name, place in ARRANGEMENTS.items() if place.shared != 3]


@st.composite
def cases(draw, dtypes, largest_side: int) -> Case:
    side = st.integers(1, largest_side)
    layout = draw(st.sampled_from(("channel", "token")))
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    row = draw(side)
    if layout == "channel":
        shape = (batch, heads, row, draw(st.integers(1, 4 * largest_side)))
    else:
        shape = (batch, heads, draw(side), row, draw(side), draw(side))
    topk = draw(st.lists(st.none() | st.integers(1, row), min_size=1, max_size=5))
    small = st.sampled_from(((), (1,), (heads, 1, 1), (batch, heads, 1, 1)))
    return Case(
        layout, shape, tuple(topk),
        dtype=draw(st.sampled_from(dtypes)),
        normalize=draw(st.booleans()),
        out_proj=draw(st.none() | side) if layout == "channel" else None,
        temperature=draw(st.none() | st.floats(-3, 3, width=16) | small),
        weights=draw(st.sampled_from((None, (len(topk),), (heads, len(topk)), (batch, heads, 1)))),
        arrangements=draw(st.tuples(*[st.sampled_from(PLACES)] * 3)),
        grad=draw(st.sampled_from(("contiguous", "transposed", "pixel_major", "every_other_element"))),
    )  # fmt: skip


@pytest.mark.parametrize("backend", FUSED)
def test_random_calls(backend):
    if backend in INTERPRETED:
        examples, largest_side = 8, 12
    else:  # Triton compiles for every new combination of sizes
        examples, largest_side = (300 if backend == "cpu" else 40), 40
    dtypes = [dtype for dtype in ALL_DTYPES if dtype in DTYPES[backend]]

    @hypothesis.settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    @hypothesis.given(cases(dtypes, largest_side))
    def conforms(case: Case) -> None:
        assert_conforms(build(case), backend)

    conforms()

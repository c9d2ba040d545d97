"""Random shapes, memory layouts, masks and options of masked attention against the truth."""

from __future__ import annotations

import pytest
from arrangements import ARRANGEMENTS
from attention_problems import ALL_DTYPES, DTYPES, INTERPRETED
from conformance import assert_conforms
from masked_attention_problems import FUSED, KINDS, Case, build, full_mask

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

PLACES = [name for name, place in ARRANGEMENTS.items() if place.shared != 3]


@st.composite
def cases(draw, dtypes, largest_side: int) -> Case:
    side = st.integers(1, largest_side)
    layout = draw(st.sampled_from(("channel", "token")))
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    if layout == "channel":
        shape = (batch, heads, draw(side), draw(st.integers(1, 4 * largest_side)))
    else:
        shape = (batch, heads, *draw(st.tuples(side, side, side, side)))
    mask = tuple(draw(st.sampled_from((1, size))) for size in full_mask(layout, shape))
    leading = next((i for i, size in enumerate(mask) if size > 1), len(mask))
    mask = mask[draw(st.integers(0, leading)) :]
    small = st.sampled_from(((), (1,), (heads, 1, 1), (batch, heads, 1, 1)))
    return Case(
        layout, shape, draw(st.sampled_from((mask, mask, mask, None))), draw(st.sampled_from(KINDS[layout])),
        mask_arrangement=draw(st.sampled_from(list(ARRANGEMENTS))),
        dtype=draw(st.sampled_from(dtypes)),
        normalize=draw(st.booleans()),
        out_proj=draw(st.none() | side) if layout == "channel" else None,
        temperature=draw(st.none() | st.floats(-3, 3, width=16) | small),
        arrangements=draw(st.tuples(*[st.sampled_from(PLACES)] * 3)),
        grad=draw(st.sampled_from(("contiguous", "transposed", "pixel_major", "every_other_element"))),
    )  # fmt: skip


@pytest.mark.parametrize("backend", FUSED)
def test_random_calls(backend):
    if backend in INTERPRETED:
        examples, largest_side = 5, 12
    else:  # Triton compiles for every new combination of sizes
        examples, largest_side = (300 if backend == "cpu" else 40), 40
    dtypes = [dtype for dtype in ALL_DTYPES if dtype in DTYPES[backend]]

    @hypothesis.settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    @hypothesis.given(cases(dtypes, largest_side))
    def conforms(case: Case) -> None:
        assert_conforms(build(case), backend)

    conforms()

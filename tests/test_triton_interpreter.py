"""What the tests replace in Triton's interpreter still does what it did; device functions by themselves."""

from __future__ import annotations

import conformance
import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
to_operand = pytest.importorskip("restore_kernels.triton_common.tiles").to_operand

pytestmark = pytest.mark.skipif(conformance.DEVICE != "cpu", reason="no interpreter on a GPU")


@triton.jit
def rounding_kernel(x_pointer, out_pointer):
    at = tl.arange(0, 8)
    tl.store(out_pointer + at, to_operand(tl.load(x_pointer + at), tl.float32, "tf32"))


def test_rounding_to_tf32_keeps_every_nan():
    """Of all bits set, as a GPU computes it, too."""
    bits = [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800000, -0x800000, 0x3F801000, 0x3F803000, 0x3F800FFF]
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    out = torch.empty_like(x)
    rounding_kernel[(1,)](x, out)
    assert out[:3].isnan().all()
    assert out[3:].tolist() == [float("inf"), -float("inf"), 1.0, 1 + 2.0**-9, 1.0]


@triton.jit
def combine(a, b, OPERATION: tl.constexpr):
    """A device function, as is all of Triton's own library that is written in Triton."""
    if OPERATION == "add":
        return a + b
    return a - b if OPERATION == "sub" else a * b


@triton.jit
def combine_kernel(a_pointer, b_pointer, out_pointer, OPERATION: tl.constexpr):
    at = tl.arange(0, 4)
    out = combine(tl.load(a_pointer + at), tl.load(b_pointer + at), OPERATION)
    tl.store(out_pointer + at, out + tl.sum(tl.zeros_like(out)))


def combined(a: list[int], b: list[int], operation: str) -> list[int]:
    x, y = (torch.tensor(values, dtype=torch.int32) for values in (a, b))
    out = torch.zeros(4, dtype=torch.int32)
    combine_kernel[(1,)](x, y, out, operation)
    return out.tolist()


LARGE = 2**31 - 1
FITS = {
    "add": ([LARGE - 1, 3, -LARGE, 0], [1, 4, -1, 0], [LARGE, 7, -LARGE - 1, 0]),
    "sub": ([LARGE, 3, -LARGE, 0], [0, 4, 1, 0], [LARGE, -1, -LARGE - 1, 0]),
    "mul": ([2**30, 3, 46340, 0], [-2, 4, 46340, 9], [-(2**31), 12, 46340**2, 0]),
}
OVERFLOWS = {
    "add": ([LARGE, -LARGE], [1, -2]),
    "sub": ([-LARGE, LARGE], [2, -1]),
    "mul": ([2**30, 46341], [2, 46341]),
}


@pytest.mark.parametrize("operation", FITS)
def test_integers_within_range(operation):
    a, b, expected = FITS[operation]
    for _ in range(2):  # the second launch finds the language restored by the first
        assert combined(a, b, operation) == expected


@pytest.mark.parametrize("position", range(2))
@pytest.mark.parametrize("operation", OVERFLOWS)
def test_an_overflow_of_one_element_is_an_error(operation, position):
    a, b = ([0, 0, 0, values[position]] for values in OVERFLOWS[operation])
    with pytest.raises(Exception, match=f"int32 overflows in {operation}"):
        combined(a, b, operation)

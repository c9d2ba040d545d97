"""The Triton kernels of pointwise convolution compiled for GPUs: no spills, within limits, matrix units."""

from __future__ import annotations

import importlib.util

import aot
import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# The full table, every dtype and case, is `python tests/aot.py`; these are its extremes.
CASES = ("pointwise 96 to 510", "pointwise 8 images to 96, crops")


@pytest.fixture(scope="module")
def rows() -> list[aot.Row]:
    return aot.compile_apart(CASES, ("float32", "bfloat16"))


def test_every_architecture_and_dtype_is_compiled(rows):
    compiled = {(row.architecture, row.dtype, row.case) for row in rows}
    assert len(compiled) == len(aot.ARCHITECTURES) * 2 * len(CASES)


def test_no_spills_and_within_limits(rows):
    aot.assert_fits(rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_products_are_on_the_matrix_units(rows, architecture, dtype):
    assert aot.on_matrix_units(rows, architecture, dtype) == set(CASES)

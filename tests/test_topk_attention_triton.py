"""The Triton kernels of top-k attention compiled for GPUs: no spills, within limits, on the matrix units."""

from __future__ import annotations

import importlib.util

import aot
import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# The full table, every dtype and case, is `python tests/aot.py`; these are its extremes.
CASES = ("channel heads=8 out_proj", "token D=32 M=64")


@pytest.fixture(scope="module")
def rows() -> list[aot.Row]:
    return aot.compile_apart(CASES, ("float32", "bfloat16"))


def test_every_architecture_and_dtype_is_compiled(rows):
    compiled = {(row.architecture, row.dtype, row.case) for row in rows}
    assert len(compiled) == len(aot.ARCHITECTURES) * 2 * len(CASES)


def test_no_spills_and_within_limits(rows):
    aot.assert_fits(rows)


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_bfloat16_products_run_on_the_matrix_units(rows, architecture):
    assert aot.on_matrix_units(rows, architecture, "bfloat16") == set(CASES)

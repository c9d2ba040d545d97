"""The Triton kernels of depthwise convolution compiled for GPUs: no spills, within limits."""

from __future__ import annotations

import importlib.util

import aot
import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# The full table, every dtype and case, is `python tests/aot.py`; these are its extremes.
CASES = ("depthwise 7x7 dilated", "depthwise 5x5 paired gelu gated")


@pytest.fixture(scope="module")
def rows() -> list[aot.Row]:
    return aot.compile_apart(CASES, ("float32", "bfloat16"))


def test_every_architecture_and_dtype_is_compiled(rows):
    compiled = {(row.architecture, row.dtype, row.case) for row in rows}
    assert len(compiled) == len(aot.ARCHITECTURES) * 2 * len(CASES)


def test_no_spills_and_within_limits(rows):
    aot.assert_fits(rows)

"""Triton's kernels compiled ahead of time for GPUs: no spills, within limits, on the matrix units."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import aot
import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# The full table, every dtype and case, is `python tests/aot.py`; these are its extremes.
CASES = ("channel heads=1", "channel heads=8 out_proj", "token D=32 M=64")


@pytest.fixture(scope="module")
def rows() -> list[aot.Row]:
    """Compiled in a process of its own: interpreted and compiled kernels do not mix in one."""
    command = [sys.executable, aot.__file__, "--json", "--cases", *CASES, "--dtypes", "float32", "bfloat16"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent)
    assert run.returncode == 0, run.stderr
    return [aot.Row(**json.loads(line)) for line in run.stdout.splitlines()]


def test_every_architecture_and_dtype_is_compiled(rows):
    compiled = {(row.architecture, row.dtype, row.case) for row in rows}
    assert len(compiled) == len(aot.ARCHITECTURES) * 2 * len(CASES)


def test_nothing_spills_to_local_memory(rows):
    assert [row for row in rows if row.spilled_bytes] == []


def test_registers_and_shared_memory_fit(rows):
    assert [row for row in rows if row.registers > 255] == []
    assert [row for row in rows if row.shared_bytes > aot.SHARED_MEMORY_LIMIT[row.architecture]] == []


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_bfloat16_products_run_on_the_matrix_units(rows, architecture):
    products = [row for row in rows if row.architecture == architecture and row.dtype == "bfloat16"]
    on_matrix_units = {row.case for row in products if set(row.instructions) - {"FFMA"}}
    assert on_matrix_units == set(CASES)

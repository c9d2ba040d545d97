"""The CUDA kernels of pyramid attention: cases that take their own ways, and faults that must show.

Conformance walks the cases of every backend, on the host the smallest of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import host_kernels
import pytest
import torch
from conformance import assert_conforms, assert_reproducible, evaluate
from pyramid_attention_problems import BACKENDS, Case, build, pyramid, with_tensors

from restore_kernels import explain, pyramid_attention
from restore_kernels.native import CUDA_HOST_VARIABLE

pytestmark = pytest.mark.skipif("cuda" not in BACKENDS, reason="no CUDA kernels here")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A block owns 14 or 30 columns (16 or 32 without halo) of 4 rows, and streams columns in tiles of 16.
WAYS = {
    "one pixel": Case((1, 1, 1, 1, 1), ((1, 1),)),
    "tiles in both directions": Case((1, 3, 5, 9, 31), ((3, 18), (6, 2))),
    "exact tiles": Case((1, 8, 16, 4, 32), ((4, 16),)),
    "many rows of keys": Case((1, 2, 3, 3, 4), ((23, 2),)),
    "many columns of keys, split": Case((1, 2, 3, 3, 4), ((2, 50),)),
    "all channels": Case((1, 32, 64, 3, 4), ((5, 3),)),
    "odd channels": Case((2, 17, 33, 4, 3), ((2, 5), (1, 1))),
    "pyramid": Case((1, 6, 7, 6, 7), pyramid(6, 7), arrangements=("channels_last", "crop", "transposed")),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WAYS.values(), ids=WAYS)
def test_ways_through_the_kernels(case, dtype):
    assert_conforms(build(replace(case, dtype=dtype)), "cuda")


SMALL = Case((2, 5, 6, 6, 7), ((6, 7), (4, 5), (1, 1)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, -3.0, 2000.0])
def test_any_softmax_scale(dtype, scale):
    assert_conforms(build(replace(SMALL, dtype=dtype, softmax_scale=scale)), "cuda")


@pytest.mark.parametrize("size", [0.0, 1e-6, 1e-4 / 15])
def test_norms_under_eps(size):
    problem = build(SMALL)
    keys = {name: x * size for name, x in problem.tensors.items() if name.startswith("keys")}
    assert_conforms(with_tensors(problem, **keys), "cuda")


def test_keys_whose_norm_overflows_score_zero():
    problem = build(SMALL)
    tensors = {name: x * (1e20 if name == "keys[1]" else 1) for name, x in problem.tensors.items()}
    result = evaluate(replace(problem, tensors=tensors), "cuda")
    expected = evaluate(with_tensors(problem, **{"keys[1]": 0 * problem.tensors["keys[1]"]}), "cuda")
    assert all(x.isfinite().all() for x in result.values())
    assert torch.equal(result["out"], expected["out"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_shows_around_its_pixel_and_nowhere_else(dtype):
    problem = build(replace(SMALL, dtype=dtype))
    clean = evaluate(problem, "cuda")
    query = problem.tensors["query"].clone()
    query[0, 2, 2, 3] = float("nan")
    dirty = evaluate(replace(problem, tensors={**problem.tensors, "query": query}), "cuda")
    expected = torch.zeros(6, 7, dtype=torch.bool)
    expected[0:5, 1:6] = True  # the patches that have the pixel, and the pixels of those patches
    assert torch.equal(dirty["out"][0].isnan().all(0).cpu(), expected)
    assert torch.equal(dirty["out"][0].isnan().any(0).cpu(), expected)
    for name in clean:
        assert torch.equal(clean[name][1], dirty[name][1]), name


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_same_bits_in_any_order_of_blocks_and_threads(dtype):
    case = Case((1, 3, 4, 5, 17), ((3, 18), (6, 2)), dtype=dtype)
    assert_reproducible(build(case), "cuda", across_threads=False)


def test_what_is_not_covered_is_said():
    x, wide = torch.ones(1, 2, 3, 3), torch.ones(1, 65, 3, 3)

    def reason(query, values, **options) -> str | None:
        return explain(pyramid_attention, query, [query], [values], **options).why_not["cuda"]

    x, wide = x.to(build(SMALL).grad_out.device), wide.to(build(SMALL).grad_out.device)
    assert reason(x, x) is None
    assert reason(x, x, hard=True) == "it has no kernels for hard=True"
    assert reason(x, x, patch_size=5) == "its kernels are for patch_size 3, got 5"
    assert reason(x, wide) == "its kernels take at most 64 channels of values, got 65"
    assert reason(wide, x) == "its kernels take at most 32 channels of query, got 65"


on_the_host = pytest.mark.skipif(
    torch.cuda.is_available() or host_kernels.why_not() is not None, reason="kernels run on the host"
)


# What is left out of the kernels, as the environment says, so that they are compiled once.
FAULTS = {
    "weights are read before all are there": "__syncthreads();  // all weights are there",
    "rows are read before they have come": "wait_for_copies<Does::mixes_first ? 0 : 1>();",
}
LEFT_OUT = """
#include <cstdlib>
inline bool left_out(int fault) {
  static const int planted = std::atoi(std::getenv("PLANTED_FAULT"));
  return fault == planted;
}
"""
CALL = """
import torch
from restore_kernels import pyramid_attention
x, value = (torch.randn(1, c, 6, 40, generator=torch.Generator().manual_seed(c)) for c in (3, 5))
out, expected = (pyramid_attention(x, [x], [value], backend=name) for name in ("cuda", "eager"))
print("same" if torch.allclose(out, expected, atol=1e-3) else "different")
"""


def result_of(library: Path, **environment: str) -> str:
    """What CALL says of a library of the kernels."""
    environment |= {CUDA_HOST_VARIABLE: str(library), "PYTHONPATH": str(host_kernels.ROOT)}
    command = [sys.executable, "-c", CALL]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> Path:
    """A library of the kernels that leaves out the statement whose number is in PLANTED_FAULT."""
    folder = tmp_path_factory.mktemp("faulty")
    sources, library = folder / "cuda", folder / "library.so"
    shutil.copytree(host_kernels.ROOT / "csrc/cuda", sources)
    header = sources / "pyramid_walk.cuh"
    text = header.read_text()
    for number, statement in enumerate(FAULTS.values()):
        assert text.count(statement) == 1
        text = text.replace(statement, f"if (!left_out({number})) {statement}")
    header.write_text(text.replace("#pragma once\n", "#pragma once\n" + LEFT_OUT))
    host_kernels.build_library(sources, ("pyramid_attention.cu", "library.cu"), library)
    return library


@on_the_host
def test_no_fault_shows_where_none_is(faulty):
    assert result_of(faulty, PLANTED_FAULT="-1") == "same"


@on_the_host
@pytest.mark.parametrize("number", range(len(FAULTS)), ids=list(FAULTS))
def test_a_planted_fault_shows(number, faulty):
    assert result_of(faulty, PLANTED_FAULT=str(number)) == "different"

"""Channel attention in CUDA C++, run on the host: what the conformance suites' small problems do not reach.

They have one tile of 48 channels, one run of pixels and one chunk of them.
"""

from __future__ import annotations

import subprocess

import conformance
import host_kernels
import masked_attention_problems as masked
import pytest
import topk_attention_problems as topk
import torch
from conformance import assert_conforms, check_runs

from restore_kernels import explain, masked_attention, topk_attention

pytestmark = pytest.mark.skipif(
    conformance.DEVICE == "cpu" and host_kernels.why_not() is not None, reason=f"{host_kernels.why_not()}"
)
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
PIXEL_MAJOR = ("pixel_major", "pixel_major", "pixel_major")


@pytest.fixture(autouse=True)
def runs():
    check_runs(topk.EXPLANATION, "cuda")


TOPK = [
    topk.Case("channel", (1, 1, 50, 272), (20, None), dtype=BFLOAT16),
    topk.Case("channel", (1, 1, 50, 136), (20, None), dtype=FLOAT16),
    topk.Case("channel", (1, 1, 50, 84), (20, None)),
    topk.Case("channel", (1, 1, 5, 1111), (3,), temperature=(1, 1, 1)),
    topk.Case("channel", (1, 1, 70, 20), (7, 40, 70), normalize=False),  # more channels than 64
    topk.Case("channel", (1, 2, 30, 72), (9, None), dtype=BFLOAT16, out_proj=50),
    topk.Case("channel", (2, 3, 18, 40), (9, None), out_proj=7, arrangements=PIXEL_MAJOR),
    topk.Case("channel", (1, 3, 18, 41), (9, None), dtype=FLOAT16, out_proj=49),
]


@pytest.mark.parametrize("case", TOPK, ids=str)
def test_topk_attention(case):
    assert_conforms(topk.build(case), "cuda")


MASKED = [
    masked.Case("channel", (1, 1, 50, 136), (136,), dtype=BFLOAT16),
    masked.Case("channel", (1, 1, 50, 72), (50, 72), dtype=FLOAT16, mask_arrangement="pixel_major"),
    masked.Case("channel", (2, 1, 50, 40), (2, 1, 1, 40), kind="beyond"),
    masked.Case("channel", (1, 2, 30, 72), (2, 30, 72), dtype=BFLOAT16, out_proj=50),
]


@pytest.mark.parametrize("case", MASKED, ids=str)
def test_masked_attention(case):
    assert_conforms(masked.build(case), "cuda")


def test_what_is_not_covered():
    q = torch.ones(1, 1, 257, 16, device=conformance.DEVICE)
    few = q[:, :, :256]
    assert explain(topk_attention, q, q, q, [3]).why_not["cuda"] == (
        "its channel kernels take heads of at most 256 channels, got 257"
    )
    assert explain(topk_attention, few, few, few, [3] * 33).why_not["cuda"] == (
        "its channel kernels take at most 32 branches, got 33"
    )
    assert explain(topk_attention, few, few, few, [3] * 32).why_not["cuda"] is None
    assert explain(masked_attention, q, q, q).why_not["cuda"] is not None
    assert explain(masked_attention, few, few, few).why_not["cuda"] is None


ON_HOST = pytest.mark.skipif(conformance.DEVICE != "cpu", reason="runs on the host")


GRAM = """
#include <cstdio>
#include "device.cuh"
#ifdef NO_BARRIERS
#define __syncthreads() static_cast<void>(0)
#endif
#include "channel_gram.cuh"

int main() {
  using namespace restore_kernels;
  using namespace restore_kernels::channel;
  constexpr int channels = 20, pixels = 300;
  static float x[channels * pixels], partials[channels * channels + 2 * channels];
  for (int i = 0; i < channels * pixels; ++i) x[i] = static_cast<float>(i % 7 - 3);
  const Rows<const float> rows{{x, {0, 0, pixels, 1}}, channels};
  const Gram<float> p{rows, rows, {}, 1, channels, channels, pixels, pixels, 1, partials, true};
  int wrong = 0;
  for (int seed = 0; seed < 8; ++seed) {
    cuda_host::launch(channel_gram_kernel<float, true>, 1, kThreads, 0, seed, p);
    for (int i = 0; i < channels; ++i)
      for (int j = 0; j < channels; ++j) {
        float exact = 0;
        for (int n = 0; n < pixels; ++n) exact += x[i * pixels + n] * x[j * pixels + n];
        if (!(partials[i * channels + j] == exact)) {
          ++wrong;
          i = j = channels;
        }
      }
  }
  std::printf("%d", wrong);
}
"""


@ON_HOST
@pytest.mark.parametrize(("flags", "wrong"), [((), 0), (("-DNO_BARRIERS",), 8)])
def test_missing_barriers_show(tmp_path, flags, wrong):
    """In how many of eight orders of the threads the sums of integers are not exact."""
    source, program = tmp_path / "gram.cpp", tmp_path / "gram"
    source.write_text(GRAM)
    command = [
        "g++",
        "-std=c++20",
        "-O1",
        f"-I{host_kernels.ROOT / 'csrc/cuda'}",
        *flags,
        source,
        "-o",
        program,
    ]
    subprocess.run(command, check=True)
    result = subprocess.run([program], check=True, capture_output=True, text=True)
    assert int(result.stdout) == wrong

"""CUDA kernels on the host: the harness that executes them, the faults that it finds, and the kernels."""

from __future__ import annotations

import math
import re

import host_kernels
import pytest
import torch

pytestmark = pytest.mark.skipif(host_kernels.why_not() is not None, reason=f"{host_kernels.why_not()}")

SEEDS = range(8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def kernels():
    return host_kernels.load(host_kernels.build("check"))


# --- the harness ---------------------------------------------------------------------------------


def reversed_in_blocks(kernels, fence: str, threads: int, seed: int) -> bool:
    x, out = torch.randn(3, threads), torch.empty(3, threads)
    kernels.reverse(fence, x.data_ptr(), out.data_ptr(), 3, threads, seed)
    return torch.equal(out, x.flip(1))


@pytest.mark.parametrize("seed", SEEDS)
def test_barriers(kernels, seed):
    assert reversed_in_blocks(kernels, "block", 96, seed)
    assert reversed_in_blocks(kernels, "block", 1, seed)
    assert reversed_in_blocks(kernels, "warp", 32, seed)


@pytest.mark.parametrize(("fence", "threads"), [("none", 96), ("none", 32), ("warp", 96)])
def test_missing_barrier_shows(kernels, fence, threads):
    """Under most orders of the threads, not only under one that is lucky."""
    wrong = [not reversed_in_blocks(kernels, fence, threads, seed) for seed in SEEDS]
    assert sum(wrong) > len(wrong) / 2


def test_same_seed_same_order(kernels):
    """Even what a missing barrier leaves to the order is the same again, and differs between seeds."""
    x, outs = torch.randn(96), []
    for seed in (1, 1, 2):
        outs.append(torch.empty(96))
        kernels.reverse("none", x.data_ptr(), outs[-1].data_ptr(), 1, 96, seed)
    stale = [out.isnan() for out in outs]  # shared memory that was not written yet
    assert stale[0].any() and torch.equal(stale[0], stale[1]) and not torch.equal(stale[0], stale[2])


def test_indices_and_vectors(kernels):
    """Blocks and threads of two dimensions, one float4 each."""
    x, out = torch.randn(3 * 2 * 8 * 5, 4), torch.full((3 * 2 * 8 * 5, 4), float("nan"))
    kernels.copy_vectors(x.data_ptr(), out.data_ptr(), (3, 2), (8, 5), 0)
    assert torch.equal(out, x)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("flip", "source"), [(1, 0), (16, 15), (21, 6)])
def test_warp_calls(kernels, flip, source, seed):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))  # halves of warps
    x[1] = x[1].abs() + 1
    x[2] = -x[2].abs()
    flipped, read, votes = torch.empty(64), torch.empty(4, 16), torch.empty(4, 16, 3, dtype=torch.int32)
    kernels.warp_calls(
        x.data_ptr(), flipped.data_ptr(), read.data_ptr(), votes.data_ptr(), flip, source, seed
    )
    assert torch.equal(flipped, x.flatten()[torch.arange(64) ^ flip])
    assert torch.equal(read, x[:, source : source + 1].expand(4, 16))
    positive = x > 0
    ballots = (positive * 2 ** torch.arange(16)).sum(1) << 16 * (torch.arange(4) % 2)
    assert torch.equal(votes[..., 0].long() & 0xFFFFFFFF, ballots[:, None].expand(4, 16))
    assert torch.equal(votes[..., 1].bool(), positive.any(1, keepdim=True).expand(4, 16))
    assert torch.equal(votes[..., 2].bool(), positive.all(1, keepdim=True).expand(4, 16))


@pytest.mark.parametrize("seed", SEEDS)
def test_atomics(kernels, seed):
    x, bins = torch.randint(-9, 9, (3, 40)).float(), torch.randint(0, 5, (3, 40), dtype=torch.int32)
    total, counts = torch.zeros(()), torch.zeros(5, dtype=torch.int32)
    kernels.histogram(x.data_ptr(), bins.data_ptr(), total.data_ptr(), counts.data_ptr(), 3, 40, seed)
    assert total == x.sum() and torch.equal(counts, bins.flatten().bincount(minlength=5).int())


@pytest.mark.parametrize("copied", [16, 6, 0])
def test_asynchronous_copies(kernels, copied):
    x, out = torch.randint(1, 255, (32, 16), dtype=torch.uint8), torch.empty(32, 16, dtype=torch.uint8)
    kernels.copy_through_shared(True, x.data_ptr(), out.data_ptr(), copied, 0)
    assert torch.equal(out, x * (torch.arange(16) < copied))
    kernels.copy_through_shared(False, x.data_ptr(), out.data_ptr(), copied, 0)
    arrived, missing = (out == x * (torch.arange(16) < copied)).all(1), (out == 0xFF).all(1)
    assert (arrived ^ missing).all() and arrived.any() and missing.any()  # not waited for: there, or not


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrix_fragments(kernels, dtype):
    """The layout of registers as the PTX ISA writes it, against a product of matrices."""
    depth, pair = (8, 1) if dtype == torch.float32 else (16, 2)
    a, b, c = (torch.randint(-8, 9, shape) for shape in ((16, depth), (depth, 8), (16, 8)))  # exact sums
    lane = torch.arange(32)
    group, member = lane // 4, lane % 4
    if pair == 1:
        a_places = [(group if i in (0, 2) else group + 8, member if i < 2 else member + 4) for i in range(4)]
        b_places = [(member if i == 0 else member + 4, group) for i in range(2)]
    else:
        a_places = [
            (group if i < 2 or 4 <= i < 6 else group + 8, member * 2 + (i & 1) + (8 if i >= 4 else 0))
            for i in range(8)
        ]
        b_places = [(member * 2 + (i & 1) + (8 if i >= 2 else 0), group) for i in range(4)]
    accumulator = [(group if i < 2 else group + 8, member * 2 + (i & 1)) for i in range(4)]
    a_registers, b_registers = (
        torch.stack([matrix[place] for place in places], 1).to(dtype).view(torch.int32)  # [lane, register]
        for matrix, places in ((a, a_places), (b, b_places))
    )
    d = torch.empty(32, 4)
    for i, place in enumerate(accumulator):
        d[:, i] = c[place]
    name = str(dtype).removeprefix("torch.")
    kernels.multiply(name, a_registers.data_ptr(), b_registers.data_ptr(), d.data_ptr(), 0)
    for i, place in enumerate(accumulator):
        assert torch.equal(d[:, i], (c + a @ b)[place].float())


@pytest.mark.parametrize(
    ("start", "product", "expected"),
    [
        (1.0, 2.0**-25, 1.0),  # below the bit after the last place of the largest term: none of them counts
        (1.0, 2.0**-24, 1 + 2.0**-21),  # half a place each, eight of them: four places
        (-1.0, 2.0**-24 + 2.0**-30, -1 + 2.0**-21),
        (3.0, 1.0, 11.0),
        (0.0, 2.0**-130, 2.0**-127),
        (float("inf"), 1.0, float("inf")),
        (float("nan"), 1.0, float("nan")),
    ],
)
def test_matrix_instructions_cut_sums_off(kernels, start, product, expected):
    a, b = torch.zeros(32, 4), torch.full((32, 2), 2.0 ** (math.frexp(product)[1] // 2))
    a[:] = product / b[0, 0]  # of every k
    d = torch.full((32, 4), start)
    kernels.multiply("float32", a.data_ptr(), b.data_ptr(), d.data_ptr(), 0)
    torch.testing.assert_close(d, torch.full((32, 4), expected), rtol=0, atol=0, equal_nan=True)


def test_loading_matrices(kernels):
    x, lane = torch.randint(0, 1 << 15, (4, 8, 8), dtype=torch.int16), torch.arange(32)
    words, transposed = torch.empty(2, 32, 4, dtype=torch.int32)
    kernels.load_matrices(x.data_ptr(), words.data_ptr(), transposed.data_ptr(), 0)
    for loaded, matrices in ((words, x), (transposed, x.mT)):
        pairs = matrices[:, lane // 4].unflatten(-1, (4, 2))[:, lane, lane % 4]  # [matrix, lane, 2]
        assert torch.equal(loaded.view(torch.int16).view(32, 4, 2), pairs.transpose(0, 1))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_packing(kernels, dtype):
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-8, -6e-5, 65519, 65520, 3.4e38]
    x = torch.cat([torch.tensor(special), torch.randn(54) * 10.0 ** torch.arange(-27, 27)])
    packed = torch.empty(32, dtype=torch.int32)
    kernels.pack(str(dtype).removeprefix("torch."), x.data_ptr(), packed.data_ptr(), 32, 0)
    torch.testing.assert_close(packed.view(dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)


# --- planted faults ------------------------------------------------------------------------------

THREAD, BARRIER, SHUFFLE = (
    r"thread \(\d+, 0, 0\)",
    r"__syncthreads \(probes.cuh:",
    r"__shfl_xor_sync \(probes.cuh:",
)
FAULTS = {
    "some_threads_leave": rf"{THREAD} waits at {BARRIER}\d+\), but {THREAD} has finished",
    "two_barriers": rf"{THREAD} waits at {BARRIER}(\d+)\), but {THREAD} waits at {BARRIER}(?!\1)\d+\)",
    "lanes_stay_away": rf"{THREAD} waits at {SHUFFLE}\d+\), but thread \(5, 0, 0\) has finished",
    "lanes_that_do_not_exist": rf"{THREAD} waits at {SHUFFLE}\d+\), but lane 4 of its mask does not exist",
    "mask_without_caller": r"__shfl_sync \(probes.cuh:\d+\): the mask does not name the calling lane",
    "source_outside_mask": r"lane \d+ reads lane 20, which the mask of its shuffle does not name",
    "misaligned_copy": r"copy_async needs addresses that are multiples of 16",
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_gpu_would_hang_on_is_an_error(kernels, name):
    out = torch.zeros(64)
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=FAULTS[name]) as error:
            kernels.fault(name, out.data_ptr(), seed)
        assert re.match(r"block \([01], 0, 0\)(: |, )thread \(\d+, 0, 0\)", str(error.value))
    assert reversed_in_blocks(kernels, "block", 96, 0)  # the harness is whole again


WRITE = """
import ctypes
out = (ctypes.c_float * {size})()
kernels.fault("{name}", ctypes.addressof(out), 0)
print("came to the end")
"""


@pytest.mark.parametrize("name", ["write_past_tensor", "write_past_shared"])
def test_access_out_of_bounds_is_found(name):
    code, output = host_kernels.run_sanitized(WRITE.format(name=name, size=32))
    assert code != 0 and "came to the end" not in output
    assert "AddressSanitizer: heap-buffer-overflow" in output and "WRITE of size 4" in output
    assert re.search(rf"{name}.*probes.cuh:\d+", output)


def test_access_within_bounds_passes():
    code, output = host_kernels.run_sanitized(WRITE.format(name="write_past_tensor", size=33))
    assert code == 0 and "came to the end" in output, output

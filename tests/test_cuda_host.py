"""CUDA kernels on the host: the harness that executes them, the faults that it finds, and the kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import host_kernels
import pytest
import torch
from arrangements import ARRANGEMENTS, arrange
from conformance import judge
from torch import Tensor

pytestmark = pytest.mark.skipif(host_kernels.why_not() is not None, reason=f"{host_kernels.why_not()}")

SEEDS = range(8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def binding(tmp_path_factory):
    return host_kernels.compile_binding(tmp_path_factory.mktemp("binding"))


@pytest.fixture(scope="module")
def kernels(binding, tmp_path_factory):
    directory = tmp_path_factory.mktemp("cuda_host")
    return host_kernels.load(host_kernels.build(binding, directory, host_kernels.CHECK))


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


@pytest.fixture(scope="module")
def sanitized(binding, tmp_path_factory):
    """Runs Python code with the kernels' AddressSanitizer build as ``kernels``; its exit code and output."""
    libraries = [host_kernels.library("g++", name) for name in ("libasan.so", "libstdc++.so")]
    if None in libraries:
        pytest.skip("no libasan")
    directory = tmp_path_factory.mktemp("cuda_host_sanitized")
    built = host_kernels.build(binding, directory, host_kernels.SANITIZE)

    def run(code: str) -> tuple[int, str]:
        environment = {
            **os.environ, "LD_PRELOAD": " ".join(map(str, libraries)), "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONMALLOC": "malloc", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent),
        }  # fmt: skip
        load = (
            "import importlib.util\n"
            f"spec = importlib.util.spec_from_file_location({host_kernels.NAME!r}, {str(built)!r})\n"
            "kernels = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(kernels)\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", load + code], env=environment, capture_output=True, text=True, timeout=120
        )
        return result.returncode, result.stdout + result.stderr

    return run


WRITE = """
import ctypes
out = (ctypes.c_float * {size})()
kernels.fault("{name}", ctypes.addressof(out), 0)
print("came to the end")
"""


@pytest.mark.parametrize("name", ["write_past_tensor", "write_past_shared"])
def test_access_out_of_bounds_is_found(sanitized, name):
    code, output = sanitized(WRITE.format(name=name, size=32))
    assert code != 0 and "came to the end" not in output
    assert "AddressSanitizer: heap-buffer-overflow" in output and "WRITE of size 4" in output
    assert re.search(rf"{name}.*probes.cuh:\d+", output)


def test_access_within_bounds_passes(sanitized):
    code, output = sanitized(WRITE.format(name="write_past_tensor", size=33))
    assert code == 0 and "came to the end" in output, output


# --- the kernels ---------------------------------------------------------------------------------


def gram_in(dtype: torch.dtype, q: Tensor, k: Tensor) -> dict[str, Tensor]:
    q, k = q.to(dtype), k.to(dtype)
    return {"gram": q @ k.mT, "q_squares": q.square().sum(-1), "k_squares": k.square().sum(-1)}


def check_gram(kernels, q: Tensor, k: Tensor, **options: int) -> bool:
    """As near the truth as float32 is, the same bits for any order of threads; whether tiles were copied."""
    results, copied = host_kernels.channel_gram(kernels, q, k, **options)
    magnitudes = gram_in(torch.float64, q.abs(), k.abs())
    judge(results, gram_in(torch.float32, q, k), gram_in(torch.float64, q, k), magnitudes)
    for seed in (1, 2):
        again, _ = host_kernels.channel_gram(kernels, q, k, **options, seed=seed)
        assert all(torch.equal(again[name], results[name]) for name in results)
    return copied


# Batch, heads, channels, pixels; more channels than a tile, and than half of one; the last chunk and
# the last tile not full.
SHAPES = [(1, 2, 48, 136), (2, 1, 7, 61), (1, 1, 50, 72), (2, 3, 5, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [32, 48])
def test_channel_gram(kernels, shape, dtype, tile):
    q, k = torch.randn(2, *shape).to(dtype)
    assert check_gram(kernels, q, k, tile=tile) == (shape[-1] % 8 == 0)


# Pixels are contiguous, and every row begins at a multiple of 16 bytes.
ROWS_ALIGN = {
    "contiguous", "qkv_slice", "token_major_qkv_slice", "batch_inside_heads",
    "shared_by_batch", "shared_by_heads",
}  # fmt: skip


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channel_gram_of_any_strides(kernels, arrangement, dtype):
    """q arranged as named, k in the next way: what lies between the elements is NaN."""
    names = list(ARRANGEMENTS)
    following = names[(names.index(arrangement) + 1) % len(names)]
    values = torch.randn(2, 2, 2, 9, 80).to(dtype)
    copied = check_gram(kernels, arrange(values[0], arrangement), arrange(values[1], following))
    assert copied == ({arrangement, following} <= ROWS_ALIGN)


@pytest.mark.parametrize("pixels", [330, 328], ids=["by elements", "by copies"])
def test_many_tiles_and_chunks(kernels, pixels):
    """More tiles than a block holds at a time; few and many chunks."""
    q, k = torch.randn(2, 1, 1, 20, pixels)
    for tiles_per_chunk in (1, 3, 100):
        check_gram(kernels, q, k, tile=32, tiles_per_chunk=tiles_per_chunk)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_shows_where_it_belongs(kernels, dtype):
    q, k = torch.randn(2, 1, 1, 6, 40).to(dtype)
    q[..., 2, 33] = torch.tensor(-1, dtype=torch.int32 if dtype == torch.float32 else torch.int16).view(dtype)
    results, _ = host_kernels.channel_gram(kernels, q, k)
    assert results["gram"][..., 2, :].isnan().all() and results["q_squares"][..., 2].isnan().all()
    assert results["gram"].isnan().sum() == 6 and results["k_squares"].isfinite().all()


def test_channel_gram_stays_within_its_tensors(sanitized):
    """Tensors that end where their memory does, by 16-byte copies and by elements."""
    code, output = sanitized("""
import host_kernels, torch
for dtype in (torch.float32, torch.bfloat16):
    for shape, tile in (((1, 2, 33, 72), 32), ((1, 1, 5, 61), 48)):
        for swap in (False, True):
            q, k = (torch.ones(shape, dtype=dtype) for _ in "qk")
            if swap:
                q, k = q.mT.contiguous().mT, k.mT.contiguous().mT
            results, _ = host_kernels.channel_gram(kernels, q, k, tile=tile)
            assert all((x == shape[-1]).all() for x in results.values())
print("came to the end")
""")
    assert code == 0 and "came to the end" in output, output


# --- on a device ---------------------------------------------------------------------------------

# Of a processor: 32-bit registers, and bytes of shared memory, of which every block takes 1 KiB besides.
REGISTERS, SHARED = 65536, {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
BLOCKS_OF_TILE = {32: 4, 48: 3}  # of 128 threads, at once on one processor
PRODUCTS = {"f": "HMMA.1688.F32.TF32", "13__nv_bfloat16": "HMMA.16816.F32.BF16", "6__half": "HMMA.16816.F32"}
GRAM = re.compile(rf"channel_gram_kernelI({'|'.join(PRODUCTS)})Li(\d+)ELb([01])E")  # dtype, TILE, COPY


@pytest.fixture(scope="module", params=[80, 90, 100])
def compiled(request, tmp_path_factory) -> tuple[int, list[str], Path]:
    """Architecture, the assembler's report on every kernel (its name first), machine code."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    cubin = tmp_path_factory.mktemp("device") / "device.cubin"
    command = ["nvcc", "-std=c++20", "-O3", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings"]
    command += [f"-arch=sm_{request.param}", f"-I{host_kernels.ROOT / 'csrc/cuda'}"]
    result = subprocess.run(
        [*command, host_kernels.SOURCES / "device.cu", "-o", cubin], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return request.param, result.stderr.split("Compiling entry function '")[1:], cubin


def test_resources_on_devices(compiled):
    """No kernel spills, and as many blocks of the Gram kernel run at once as its header says."""
    architecture, reports, _ = compiled
    for report in reports:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, report
    grams = [(match, report) for report in reports if (match := GRAM.search(report))]
    assert len(grams) == 3 * 2 * 2
    for match, report in grams:
        registers, shared = map(int, re.findall(r"Used (\d+) registers.*?(\d+) bytes smem", report)[0])
        granted = -(-registers // 8) * 8 * 128  # in units of eight a thread
        blocks = BLOCKS_OF_TILE[int(match[2])]
        assert REGISTERS // granted >= blocks and SHARED[architecture] // (shared + 1024) >= blocks, report


def test_instructions_on_devices(compiled):
    """The Gram kernel multiplies by matrix instructions, no more than it needs, and copies 16 bytes."""
    triton = pytest.importorskip("triton")  # whose package has a disassembler; nvcc may come without
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, "--dump-sass", compiled[2]]
    dumped = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kernels = [(match, code) for code in dumped.split("Function : ") if (match := GRAM.search(code))]
    assert len(kernels) == 3 * 2 * 2
    for match, code in kernels:
        tile, terms = int(match[2]), 3 if match[1] == "f" else 1
        expected = [PRODUCTS[match[1]]] * (tile // 16 * (tile // 8) * terms)
        assert re.findall(r"\bHMMA\S*", code) == expected, match[0]
        assert ("LDGSTS.E.BYPASS.128" in code) == (match[3] == "1"), match[0]

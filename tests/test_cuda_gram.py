"""The Gram kernel of channel attention, run on the host."""

from __future__ import annotations

from types import ModuleType

import host_kernels
import pytest
import torch
from arrangements import ARRANGEMENTS, arrange
from conformance import judge
from torch import Tensor

pytestmark = pytest.mark.skipif(host_kernels.why_not() is not None, reason=f"{host_kernels.why_not()}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE_BYTES = 128  # of pixels: kTilePixels


@pytest.fixture(scope="module")
def kernels():
    return host_kernels.load(host_kernels.build("check"))


def channel_gram(
    kernels: ModuleType, q: Tensor, k: Tensor, *, tiles_per_chunk: int = 2, seed: int = 0
) -> tuple[dict[str, Tensor], bool]:
    """The Gram matrices q kᵀ (B, H, C, C) and squared norms (B, H, C) of q and k (B, H, C, N).

    tiles_per_chunk: how many times 128 bytes of pixels a block owns. Says also whether the tiles were
    copied 16 bytes at a time.
    """
    batch, heads, channels, pixels = q.shape
    chunks = -(-pixels * q.element_size() // (tiles_per_chunk * TILE_BYTES))
    size = channels * (channels + 2)
    partials = torch.full((batch * heads, chunks, size), float("nan"))
    sums = torch.full((batch, heads, size), float("nan"))
    copied = kernels.gram(
        str(q.dtype).removeprefix("torch."), q.data_ptr(), q.stride(), k.data_ptr(), k.stride(),
        q.shape, tiles_per_chunk, partials.data_ptr(), sums.data_ptr(), seed,
    )  # fmt: skip
    gram, q_squares, k_squares = sums.split([channels * channels, channels, channels], dim=-1)
    results = {
        "gram": gram.unflatten(-1, (channels, channels)),
        "q_squares": q_squares,
        "k_squares": k_squares,
    }
    return results, copied


def gram_in(dtype: torch.dtype, q: Tensor, k: Tensor) -> dict[str, Tensor]:
    q, k = q.to(dtype), k.to(dtype)
    return {"gram": q @ k.mT, "q_squares": q.square().sum(-1), "k_squares": k.square().sum(-1)}


def check_gram(kernels, q: Tensor, k: Tensor, **options: int) -> bool:
    """As near the truth as float32 is, the same bits for any order of threads; whether tiles were copied."""
    results, copied = channel_gram(kernels, q, k, **options)
    magnitudes = gram_in(torch.float64, q.abs(), k.abs())
    judge(results, gram_in(torch.float32, q, k), gram_in(torch.float64, q, k), magnitudes)
    for seed in (1, 2):
        again, _ = channel_gram(kernels, q, k, **options, seed=seed)
        assert all(torch.equal(again[name], results[name]) for name in results)
    return copied


# Batch, heads, channels, pixels; more channels than a tile, and than half of one; the last chunk and
# the last tile not full.
SHAPES = [(1, 2, 48, 136), (2, 1, 7, 61), (1, 1, 50, 72), (2, 3, 5, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_channel_gram(kernels, shape, dtype):
    q, k = torch.randn(2, *shape).to(dtype)
    assert check_gram(kernels, q, k) == (shape[-1] % 8 == 0)


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
        check_gram(kernels, q, k, tiles_per_chunk=tiles_per_chunk)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_shows_where_it_belongs(kernels, dtype):
    q, k = torch.randn(2, 1, 1, 6, 40).to(dtype)
    q[..., 2, 33] = torch.tensor(-1, dtype=torch.int32 if dtype == torch.float32 else torch.int16).view(dtype)
    results, _ = channel_gram(kernels, q, k)
    assert results["gram"][..., 2, :].isnan().all() and results["q_squares"][..., 2].isnan().all()
    assert results["gram"].isnan().sum() == 6 and results["k_squares"].isfinite().all()


def test_channel_gram_stays_within_its_tensors():
    """Tensors that end where their memory does, by 16-byte copies and by elements."""
    code, output = host_kernels.run_sanitized("""
import test_cuda_gram, torch
for dtype in (torch.float32, torch.bfloat16):
    for shape in ((1, 2, 33, 72), (1, 1, 5, 61)):
        for swap in (False, True):
            q, k = (torch.ones(shape, dtype=dtype) for _ in "qk")
            if swap:
                q, k = q.mT.contiguous().mT, k.mT.contiguous().mT
            results, _ = test_cuda_gram.channel_gram(kernels, q, k)
            assert all((x == shape[-1]).all() for x in results.values())
print("came to the end")
""")
    assert code == 0 and "came to the end" in output, output

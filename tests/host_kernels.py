"""The CUDA kernels, compiled by g++ to run on the host, and called with tensors."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "tests/cuda_host"
NAME = "cuda_host_kernels"
COMPILE = ("g++", "-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden")
CHECK = ("-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
SANITIZE = ("-O0", "-fsanitize=address")
TILE_BYTES = 128  # of pixels: kTilePixels


def why_not() -> str | None:
    """Why the kernels cannot be built here, or None."""
    if shutil.which("g++") is None:
        return "no g++"
    if importlib.util.find_spec("pybind11") is None:
        return "no pybind11"
    return None


def compile_binding(directory: Path) -> Path:
    """The object file that binds the kernels to Python, for any build of them."""
    import pybind11

    includes = [f"-I{path}" for path in (sysconfig.get_paths()["include"], pybind11.get_include())]
    output = directory / "binding.o"
    subprocess.run([*COMPILE, "-O0", *includes, "-c", SOURCES / "binding.cpp", "-o", output], check=True)
    return output


def build(binding: Path, directory: Path, flags: Sequence[str]) -> Path:
    """The extension module, in a directory of its own; flags are CHECK or SANITIZE."""
    output = directory / f"{NAME}.so"
    include = f"-I{ROOT / 'csrc/cuda'}"
    subprocess.run(
        [*COMPILE, *flags, include, "-shared", SOURCES / "kernels.cpp", binding, "-o", output], check=True
    )
    return output


def load(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def library(tool: str, name: str) -> str | None:
    """The path of a shared library that comes with the compiler."""
    path = subprocess.run([tool, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return path if "/" in path else None


def channel_gram(
    kernels: ModuleType, q: Tensor, k: Tensor, *, tile: int = 48, tiles_per_chunk: int = 2, seed: int = 0
) -> tuple[dict[str, Tensor], bool]:
    """The Gram matrices q kᵀ (B, H, C, C) and squared norms (B, H, C) of q and k (B, H, C, N).

    tile: rows and columns of a block's product, 32 or 48. tiles_per_chunk: how many times 128 bytes of
    pixels a block owns. Says also whether the tiles were copied 16 bytes at a time.
    """
    batch, heads, channels, pixels = q.shape
    chunks = -(-pixels * q.element_size() // (tiles_per_chunk * TILE_BYTES))
    size = channels * (channels + 2)
    partials = torch.full((batch * heads, chunks, size), float("nan"))
    sums = torch.full((batch, heads, size), float("nan"))
    copied = kernels.gram(
        str(q.dtype).removeprefix("torch."), tile, q.data_ptr(), q.stride(), k.data_ptr(), k.stride(),
        q.shape, tiles_per_chunk, partials.data_ptr(), sums.data_ptr(), seed,
    )  # fmt: skip
    gram, q_squares, k_squares = sums.split([channels * channels, channels, channels], dim=-1)
    results = {
        "gram": gram.unflatten(-1, (channels, channels)),
        "q_squares": q_squares,
        "k_squares": k_squares,
    }
    return results, copied

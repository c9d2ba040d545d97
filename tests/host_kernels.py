"""The CUDA kernels, compiled by g++ to run on the host."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
BUILDS = ROOT / "build/cuda_host"
NAME = "cuda_host_kernels"
COMPILE = (
    "g++", "-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)  # fmt: skip
# Each build of the kernels and its flags.
FLAGS = {
    "check": ("-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    "sanitize": ("-O0", "-fsanitize=address"),
}


def why_not() -> str | None:
    """Why the kernels cannot be built here, or None."""
    if shutil.which("g++") is None:
        return "no g++"
    if importlib.util.find_spec("pybind11") is None:
        return "no pybind11"
    return None


def sources() -> list[Path]:
    return sorted([*(ROOT / "csrc/cuda").glob("*.cu"), *(ROOT / "tests/cuda_host").glob("*.cpp")])


def build(name: str) -> Path:
    """The extension module of the build of that name, made where it is not up to date."""
    folder = BUILDS / name
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: _object(source, folder, FLAGS[name]), sources()))
        library = folder / f"{NAME}.so"
        if not library.exists() or any(x.stat().st_mtime_ns > library.stat().st_mtime_ns for x in objects):
            _run([*COMPILE, *FLAGS[name], "-shared", *objects, *_torch_libraries(), "-o", library])
    return library


def build_library(folder: Path, names: Sequence[str], library: Path) -> None:
    """A library of some sources of a copy of csrc/cuda, without the tests' own."""
    sources = ["-x", "c++", *(folder / name for name in names), "-x", "none"]
    _run([*COMPILE, f"-I{folder}", *_includes(), "-shared", *sources, *_torch_libraries(), "-o", library])


def up_to_date(name: str) -> Path | None:
    """The extension module of the build of that name if nothing would have to be compiled."""
    folder = BUILDS / name
    library = folder / f"{NAME}.so"
    objects = [_object_path(source, folder, FLAGS[name]) for source in sources()]
    return library if library.exists() and all(x.exists() for x in objects) else None


@contextmanager
def _alone(folder: Path):
    """One process at a time builds in this folder."""
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _object_path(source: Path, folder: Path, flags: Sequence[str]) -> Path:
    """Named by all that it is made of, so that it is there or not, and never out of date."""
    headers = [*(ROOT / "csrc/cuda").rglob("*.h"), *(ROOT / "csrc/cuda").rglob("*.cuh")]
    headers += [*(ROOT / "tests/cuda_host").glob("*.h"), *(ROOT / "tests/cuda_host").glob("*.cuh")]
    content = hashlib.sha256(" ".join((*COMPILE, *flags, torch.__version__)).encode())
    for file in (source, *sorted(headers)):
        content.update(file.read_bytes())
    return folder / f"{source.stem}-{content.hexdigest()[:16]}.o"


def _object(source: Path, folder: Path, flags: Sequence[str]) -> Path:
    output = _object_path(source, folder, flags)
    if not output.exists():
        for old in folder.glob(f"{source.stem}-*.o"):
            old.unlink()
        _run([*COMPILE, *flags, *_includes(), "-x", "c++", "-c", source, "-o", output.with_suffix(".tmp")])
        output.with_suffix(".tmp").rename(output)
    return output


def _includes() -> list[str]:
    import pybind11

    package = Path(torch.__file__).parent / "include"
    # pybind11 first: PyTorch brings one of its own, which refuses some builds (2.11: TORCH_TARGET_VERSION).
    system = [Path(pybind11.get_include()), package, Path(sysconfig.get_paths()["include"])]
    return [f"-I{ROOT / 'csrc/cuda'}", *(f"-isystem{path}" for path in system)]


def _torch_libraries() -> list[str]:
    folder = Path(torch.__file__).parent / "lib"
    return [f"-L{folder}", f"-Wl,-rpath,{folder}", "-ltorch_cpu", "-lc10"]


def _run(command: Sequence[object]) -> None:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stderr}")


def load(library: Path | str) -> ModuleType:
    return _loaded(str(library))


@functools.cache  # a second module of the same file would register its operators again
def _loaded(library: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_sanitized(code: str) -> tuple[int, str]:
    """Exit code and output of Python code that has the AddressSanitizer build as ``kernels``."""
    library = build("sanitize")
    environment = {**os.environ, **sanitizer_environment()}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    load = f"import host_kernels\nkernels = host_kernels.load({str(library)!r})\n"
    result = subprocess.run(
        [sys.executable, "-c", load + code], env=environment, capture_output=True, text=True, timeout=120
    )
    return result.returncode, result.stdout + result.stderr


def sanitizer_environment() -> dict[str, str]:
    """What a Python process needs that loads the AddressSanitizer build."""
    libraries = [_runtime_library(name) for name in ("libasan.so", "libstdc++.so")]
    if None in libraries:
        pytest.skip("no libasan")
    return {
        "LD_PRELOAD": " ".join(map(str, libraries)), "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def _runtime_library(name: str) -> str | None:
    """The path of a shared library that comes with the compiler."""
    command = ["g++", f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return path if os.sep in path else None

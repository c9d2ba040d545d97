"""Builds the compiled libraries wherever a compiler is; everything else is in pyproject.toml.

The CPU library is compiled once per instruction set, and the right one is chosen at run time.
Without a C++ compiler the package installs as pure Python and says which backend is missing.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprfchw"],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mprfchw"],
} if X86 else {"default": []}  # fmt: skip


def compiled_extensions():
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        sys.exit("restore_kernels is built against PyTorch: install it first (pip install torch), "
                 "then run: pip install --no-build-isolation -e .")  # fmt: skip

    class BuildPerInstructionSet(BuildExtension):
        """Keeps the objects of the same source apart, one build directory per instruction set."""

        def build_extension(self, ext):
            shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
            try:
                super().build_extension(ext)
            finally:
                self.build_temp = shared

    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.cpp"))
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.h"))
    extensions = []
    for name, flags in INSTRUCTION_SETS.items():
        capability = name.upper()
        flags = [
            "-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
            "-fvisibility=hidden",
            "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas", "-Wno-ignored-qualifiers",
            f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}",
            f"-DRESTORE_KERNELS_FLAGS=\"{' '.join(flags)}\"", *flags,
        ]  # fmt: skip
        extensions.append(CppExtension(
            f"restore_kernels._cpu_{name}", sources, depends=headers, include_dirs=[str(ROOT / "csrc/cpu")],
            extra_compile_args=flags, extra_link_args=["-fopenmp", "-Wl,--strip-debug"],
        ))  # fmt: skip
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildPerInstructionSet}}


def has_compiler():
    return (
        shutil.which(os.environ.get("CXX", "c++").split()[0])
        or shutil.which("g++")
        or shutil.which("clang++")
    )


if has_compiler():
    setup(**compiled_extensions())
else:
    print("restore_kernels: no C++ compiler found, installing without the cpu backend", file=sys.stderr)
    setup()

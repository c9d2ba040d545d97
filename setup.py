"""Builds the compiled libraries wherever a compiler is; everything else is in pyproject.toml.

The CPU library is compiled once per instruction set, and the right one is chosen at run time.
Without a C++ compiler the package installs as pure Python and says which backend is missing.

Where nvcc is, also without a GPU and for a CPU build of PyTorch, the CUDA library is compiled on PyTorch's
stable ABI, for TORCH_CUDA_ARCH_LIST or else for Ampere, Hopper and Blackwell.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprfchw"],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mprfchw"],
} if X86 else {"default": []}  # fmt: skip
CUDA_LIBRARY = "restore_kernels._cuda"
CUDA_ARCHITECTURES = "8.0;9.0a;10.0+PTX"
OLDEST_NVCC = (12, 8)  # the first that knows compute capability 10.0


def compiled_extensions():
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        sys.exit("restore_kernels is built against PyTorch: install it first (pip install torch), "
                 "then run: pip install --no-build-isolation -e .")  # fmt: skip

    class BuildPerInstructionSet(BuildExtension):
        """Keeps the objects of the same source apart, one build directory per instruction set."""

        def get_ext_filename(self, name):
            # The CUDA library is no module of one Python's: its name does not say for which Python it is.
            if name.split(".")[-1] == CUDA_LIBRARY.split(".")[-1]:
                return f"{name.replace('.', '/')}.so"
            return super().get_ext_filename(name)

        def build_extension(self, ext):
            if ext.name == CUDA_LIBRARY:
                return build_cuda_library(Path(self.get_ext_fullpath(ext.name)))
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
            "-O3", "-g0", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
            "-ffp-contract=off", "-fvisibility=hidden",
            "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas", "-Wno-ignored-qualifiers",
            f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}",
            f"-DRESTORE_KERNELS_FLAGS=\"{' '.join(flags)}\"", *flags,
        ]  # fmt: skip
        extensions.append(CppExtension(
            f"restore_kernels._cpu_{name}", sources, depends=headers, include_dirs=[str(ROOT / "csrc/cpu")],
            extra_compile_args=flags, extra_link_args=["-fopenmp"],
        ))  # fmt: skip
    if has_nvcc():
        extensions.append(Extension(CUDA_LIBRARY, []))
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildPerInstructionSet}}


def has_nvcc():
    if shutil.which("nvcc") is None:
        return False
    output = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    version = tuple(map(int, re.search(r"release (\d+)\.(\d+)", output).groups()))
    if version < OLDEST_NVCC:
        needed, found = (".".join(map(str, x)) for x in (OLDEST_NVCC, version))
        print(f"restore_kernels: installing without the cuda backend, which needs nvcc {needed}; "
              f"found {found}", file=sys.stderr)  # fmt: skip
        return False
    return True


def architecture_flags():
    """nvcc's flags for a list such as "8.0;9.0a;10.0+PTX"."""
    flags = []
    for name in (os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES).replace(" ", ";").split(";"):
        number = name.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if name.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def build_cuda_library(library):
    """One object a source, by ninja; the assembler's report on every kernel lies beside each."""
    import ninja
    import torch

    package = Path(torch.__file__).parent
    folder = ROOT / "build/cuda"
    folder.mkdir(parents=True, exist_ok=True)
    flags = [
        "-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-isystem={package / 'include'}",
        f"-I{ROOT / 'csrc/cuda'}", *architecture_flags(),
    ]  # fmt: skip
    # The one that takes longest first, so that no core waits for it in the end.
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"), key=lambda p: (p.stem != "topk_attention", p))
    objects = [f"{source.stem}.o" for source in sources]
    libraries = f"-L{package / 'lib'} -ltorch_cpu -lc10"
    (folder / "build.ninja").write_text("\n".join([
        "rule compile",
        f"  command = nvcc {' '.join(flags)} -MD -MF $out.d -c $in -o $out 2> $out.txt "
        "|| (cat $out.txt; false)",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = nvcc -shared $in {libraries} -o $out",
        *(f"build {name}: compile {source}" for name, source in zip(objects, sources, strict=True)),
        f"build _cuda.so: link {' '.join(objects)}",
        "",
    ]))  # fmt: skip
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder, *jobs], check=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "_cuda.so", library)


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

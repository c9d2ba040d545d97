"""Builds the compiled libraries wherever a compiler is; everything else is in pyproject.toml.

The CPU library's kernels are compiled once per instruction set, and the right ones are chosen at run time.
Without a C++ compiler the package installs as pure Python and says which backend is missing.

Where nvcc is, also without a GPU and for a CPU build of PyTorch, the CUDA library is compiled on PyTorch's
stable ABI, for TORCH_CUDA_ARCH_LIST or else for Ampere, Hopper and Blackwell.

RESTORE_KERNELS_BUILD=native builds for this machine alone, in a fifth of the time: one instruction set, and
the CUDA library only for the GPUs that are here. RESTORE_KERNELS_BUILD=tests is the same with
every instruction set that this machine has. Both give CUDA kernels the line numbers that profilers show.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
BUILD = ROOT / "build"
CXX = os.environ.get("CXX", "c++")
X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprfchw"],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mprfchw"],
} if X86 else {"default": []}  # fmt: skip
# Sources of the CPU library that compute nothing: compiled once, for any processor, and linked to every set.
WITHOUT_KERNELS = ("autograd", "calls", "result_memory")
CHOICES = ("all", "tests", "native")
CUDA_ARCHITECTURES = "8.0;9.0a;10.0+PTX"
OLDEST_NVCC = (12, 8)  # the first that knows compute capability 10.0


def compiled_extensions():
    """What setup() is to build."""
    try:
        import torch
    except ImportError:
        sys.exit("restore_kernels is built against PyTorch: install it first "
                 "(pip install torch ninja pybind11), then run: "
                 "pip install --no-build-isolation -e .")  # fmt: skip
    choice = os.environ.get("RESTORE_KERNELS_BUILD", "all")
    if choice not in CHOICES:
        sys.exit(f"RESTORE_KERNELS_BUILD must be one of {', '.join(CHOICES)}; got {choice!r}")
    gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    found = ";".join(f"{major}.{minor}" + "a" * (major == 9) for major, minor in sorted(gpus))
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or (
        CUDA_ARCHITECTURES if choice == "all" else found
    )
    # What takes longest first, so that no core waits for it in the end.
    libraries = (
        {"_cuda": cuda_library(architectures, choice != "all")} if architectures and has_nvcc() else {}
    )
    libraries |= {f"_cpu_{x}": cpu_library(x) for x in instruction_sets(choice)}
    extensions = [Extension(f"restore_kernels.{name}", []) for name in libraries]
    parts = [cpu_objects(), *libraries.values()]
    return {"ext_modules": extensions, "cmdclass": {"build_ext": ninja_build(parts)}}


def instruction_sets(choice):
    """Those to build for, the richest first: all, or what this machine has, or the best of that."""
    import torch

    every = list(INSTRUCTION_SETS)
    if choice == "all":
        return every
    best = torch.backends.cpu.get_cpu_capability().lower() if X86 else "default"
    had = every[every.index(best) :] if best in every else []
    return had[:1] if choice == "native" else had


def ninja_build(parts):
    """A command that builds what is wanted of these parts of a ninja file, and only what changed since."""

    class NinjaBuild(build_ext):
        def get_ext_filename(self, fullname):
            # The CUDA library is no module of one Python's: its name does not say for which Python it is.
            if fullname.endswith("_cuda"):
                return f"{fullname.replace('.', '/')}.so"
            return super().get_ext_filename(fullname)

        def build_extensions(self):
            import ninja

            BUILD.mkdir(exist_ok=True)
            (BUILD / "build.ninja").write_text("".join(parts))
            jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
            wanted = [f"{extension.name.split('.')[-1]}.so" for extension in self.extensions]
            subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", BUILD, *jobs, *wanted], check=True)
            for extension, library in zip(self.extensions, wanted, strict=True):
                path = Path(self.get_ext_fullpath(extension.name))
                path.parent.mkdir(parents=True, exist_ok=True)
                # A new file: a process that has the old one loaded keeps it.
                path.unlink(missing_ok=True)
                shutil.copyfile(BUILD / library, path)

    return NinjaBuild


def cpu_objects():
    """The part of the ninja file that compiles what every CPU library has in common."""
    return objects("_cpu", cpu_sources(without_kernels=True), cpu_compiler())


def cpu_library(name):
    """The part of the ninja file that builds the library for that instruction set."""
    own = [
        f"-DCPU_CAPABILITY={name.upper()}", f"-DCPU_CAPABILITY_{name.upper()}",
        f"-DTORCH_EXTENSION_NAME=_cpu_{name}",
        f"'-DRESTORE_KERNELS_FLAGS=\"{' '.join(INSTRUCTION_SETS[name])}\"'", *INSTRUCTION_SETS[name],
    ]  # fmt: skip
    common = [f"_cpu/{source.stem}.o" for source in cpu_sources(without_kernels=True)]
    return library(
        f"_cpu_{name}", cpu_sources(without_kernels=False), compile=f"{cpu_compiler()} {' '.join(own)}",
        link=f"{CXX} -fopenmp", libraries="-lc10 -ltorch -ltorch_cpu -ltorch_python", common=common,
    )  # fmt: skip


def cpu_sources(without_kernels):
    sources = (ROOT / "csrc/cpu").glob("*.cpp")
    return sorted(source for source in sources if (source.stem in WITHOUT_KERNELS) == without_kernels)


def cpu_compiler():
    """The command, but for what an instruction set adds."""
    import torch
    from torch.utils.cpp_extension import include_paths

    flags = [
        "-O3", "-g0", "-DNDEBUG", "-std=c++20", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
        "-ffp-contract=off", "-fvisibility=hidden",
        # The last two: GCC 12 says it of its own AVX-512 intrinsics.
        "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas", "-Wno-ignored-qualifiers",
        "-Wno-uninitialized", "-Wno-maybe-uninitialized",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-isystem '{path}'" for path in [*include_paths(), sysconfig.get_path("include")]),
    ]  # fmt: skip
    return f"{CXX} {' '.join(flags)}"


def cuda_library(architectures, line_numbers):
    """The part of the ninja file that builds the CUDA library for such a list as "8.0;9.0a;10.0+PTX".

    Profilers and compute-sanitizer find lines of the source by numbers that make the library twice as large.
    The assembler's report on every kernel lies beside each object.
    """
    from torch.utils.cpp_extension import include_paths

    flags = [
        "-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden",
        *(["-lineinfo"] if line_numbers else []),
        *(f"-isystem '{path}'" for path in include_paths()),
    ]  # fmt: skip
    for name in architectures.replace(" ", ";").split(";"):
        number = name.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if name.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    # torch brings a CUDA build's torch_cuda, of which only a weak symbol is wanted, the current stream.
    return library(
        "_cuda", (ROOT / "csrc/cuda").glob("*.cu"), compile=f"nvcc {' '.join(flags)}",
        link="nvcc", libraries="-Xlinker --no-as-needed -ltorch -lc10 -ltorch_cpu",
        report=" > $out.txt 2>&1 || (cat $out.txt; false)",
    )  # fmt: skip


def library(name, sources, *, compile, link, libraries, common=(), report=""):
    """A part of the ninja file: objects of these sources, and a library of them and of common ones."""
    from torch.utils.cpp_extension import library_paths

    sources = sorted(sources)
    own = [f"{name}/{source.stem}.o" for source in sources]
    paths = " ".join(f"-L'{path}'" for path in library_paths())
    return objects(name, sources, compile, report) + "\n".join([
        f"rule link{name}",
        f"  command = {link} -shared $in {paths} {libraries} -o $out",
        "  description = $out",
        f"build {name}.so: link{name} {' '.join([*own, *common])}",
        "", "",
    ])  # fmt: skip


def objects(name, sources, compile, report=""):
    return "\n".join([
        f"rule compile{name}",
        f"  command = {compile} -MD -MF $out.d -c $in -o $out{report}",
        "  description = $out",
        "  depfile = $out.d",
        "  deps = gcc",
        *(f"build {name}/{x.stem}.o: compile{name} {os.path.relpath(x, BUILD)}" for x in sources),
        "",
    ])  # fmt: skip


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


def has_compiler():
    return shutil.which(CXX.split()[0]) or shutil.which("g++") or shutil.which("clang++")


if has_compiler():
    setup(**compiled_extensions())
else:
    print("restore_kernels: no C++ compiler found, installing without the cpu backend", file=sys.stderr)
    setup()

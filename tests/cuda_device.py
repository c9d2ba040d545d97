"""What the CUDA kernels take of a device: the assembler's report, their instructions, the table of both.

``python tests/cuda_device.py`` writes the table, csrc/cuda/resources.json, from the library as it is built.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
TABLE = ROOT / "csrc/cuda/resources.json"

DISASSEMBLED = "sm_90a"  # the one architecture whose instructions are looked at: that takes long

# Matrix products, asynchronous copies to shared memory, loads of matrix fragments.
INSTRUCTIONS = re.compile(r"\b(?:HMMA|HGMMA|UTCHMMA|LDGSTS|UTMALDG|LDSM)\b\S*")
REPORT = re.compile(
    r"Compiling entry function '(\w+)' for '(sm_\w+)'\n.*\n"
    r" *(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r".*Used (\d+) registers(?:.*?(\d+) bytes smem)?"
)

Kernels = dict[str, dict[str, dict[str, Any]]]  # {kernel: {architecture: what it takes}}


def compiler() -> str | None:
    """The version of nvcc."""
    if shutil.which("nvcc") is None:
        return None
    output = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"release (\S+),", output)[0]


def disassembler() -> Path | None:
    """That of Triton's package: nvcc may come without one."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    path = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    return path if path.exists() else None


def brought_up_to_date() -> bool:
    """Whether the library was built here; if it was, its objects are those of the sources now."""
    if not (BUILD / "_cuda.so").exists() or "_cuda.so" not in (BUILD / "build.ninja").read_text():
        return False
    import ninja

    subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", BUILD, "_cuda.so"], check=True, capture_output=True)
    return True


def measured() -> Kernels:
    """What the kernels of the built library take."""
    kernels: Kernels = {}
    for report in sorted((BUILD / "_cuda").glob("*.o.txt")):
        found = {(m[1], m[2]): m for m in REPORT.finditer(report.read_text())}
        used = _instructions(report.with_suffix(""))
        for key, name in zip(found, _demangled([name for name, _ in found]), strict=True):
            stack, *spills, registers, shared = (int(x or 0) for x in found[key].groups()[2:])
            taken = kernels.setdefault(name, {})[key[1]] = {
                "registers": registers, "shared": shared, "stack": stack, "spilled": sum(spills),
            }  # fmt: skip
            if key[1] == DISASSEMBLED:
                taken["instructions"] = used[key]
    return dict(sorted(kernels.items()))


def _instructions(library: Path) -> dict[tuple[str, str], list[str]]:
    """{(mangled name, architecture): what there is of INSTRUCTIONS}."""
    command = [str(disassembler()), "--dump-sass", "--gpu-architecture", DISASSEMBLED, str(library)]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    used: dict[tuple[str, str], list[str]] = {}
    for part in re.split(r"(?=code for sm_\w+)", output)[1:]:
        architecture = re.match(r"code for (sm_\w+)", part)
        assert architecture is not None
        for code in part.split("Function : ")[1:]:
            name = code.split(maxsplit=1)[0]
            used[name, architecture[1]] = sorted(set(INSTRUCTIONS.findall(code)))
    return used


def _demangled(names: list[str]) -> list[str]:
    """Namespaces and template arguments, without the parameters."""
    if not names:
        return []
    output = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout
    return [_short(name) for name in output.splitlines()]


def _short(name: str) -> str:
    name = name.removeprefix("void ").replace("restore_kernels::", "")
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0 and not name.startswith("(anonymous", i):
            return name[:i]
    return name


if __name__ == "__main__":
    if not brought_up_to_date():
        raise SystemExit("build the library first: python setup.py build_ext --inplace")
    table = {"nvcc": compiler(), "kernels": measured()}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")

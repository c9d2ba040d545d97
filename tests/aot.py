"""Compiles the Triton kernels of top-k attention ahead of time, for GPUs that are not here.

``python tests/aot.py`` prints a table: every kernel that the networks' shapes launch, per
architecture and dtype, with what the assembler and the disassembler say of it. The launchers run on
tensors without storage and the launches are recorded, so what is compiled is what is launched.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

ARCHITECTURES = (80, 90, 100)
DTYPES = ("float32", "bfloat16", "float16")
# Bytes of shared memory that a block may have (CUDA C++ programming guide, compute capabilities).
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MATRIX_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "FFMA")
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


@dataclass(frozen=True)
class Row:
    """One compiled kernel: where it is launched from, and its resources."""

    case: str
    kernel: str
    architecture: int
    dtype: str
    warps: int
    registers: int
    spilled_bytes: int  # of local memory per thread
    shared_bytes: int
    instructions: dict[str, int]  # matrix instructions (and FFMA) in the machine code


@dataclass(frozen=True)
class Launch:
    case: str
    dtype: str
    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


# --- what the networks launch -------------------------------------------------------------------


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _qkv(batch: int, heads: int, channels: int, pixels: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Slices of one qkv image."""
    qkv = _empty((batch, 3 * heads * channels, pixels), dtype)
    return tuple(x.unflatten(1, (heads, channels)) for x in qkv.chunk(3, dim=1))


def _channel(launchers: Any, heads: int, projected: bool, dtype: torch.dtype) -> None:
    batch, channels, pixels = 2, 48, 4096
    q, k, v = _qkv(batch, heads, channels, pixels, dtype)
    temperature, weights = _empty((heads,), torch.float32).expand(batch, heads), _empty((4,), torch.float32)
    weights = weights.expand(batch, heads, 4)
    out_proj = _empty((heads * channels, heads * channels), dtype) if projected else None
    call = (q, k, v, temperature, weights, out_proj)
    topk = (24, 32, 36, 38)
    out, *saved = launchers.topk_attention_channel(*call, topk, True)
    launchers.topk_attention_channel_backward(out, *call, *saved, topk, True)


def _token(launchers: Any, tokens: int, depth: int, dtype: torch.dtype) -> None:
    batch, heads = 4, 2
    q, k, v = (_empty((batch, heads, tokens, depth), dtype) for _ in "qkv")
    temperature = _empty((heads,), torch.float32).expand(batch, heads)
    weights = _empty((batch, heads, 2), torch.float32)
    call = (q, k, v, temperature, weights)
    topk = (tokens, tokens // 2)
    out, *saved = launchers.topk_attention_token(*call, topk, True)
    launchers.topk_attention_token_backward(out, *call, *saved, topk, True)


CASES: dict[str, Callable[[Any, torch.dtype], None]] = {
    "channel heads=1": lambda launchers, dtype: _channel(launchers, 1, False, dtype),
    "channel heads=1 out_proj": lambda launchers, dtype: _channel(launchers, 1, True, dtype),
    "channel heads=8 out_proj": lambda launchers, dtype: _channel(launchers, 8, True, dtype),
    "token D=32 M=64": lambda launchers, dtype: _token(launchers, 64, 32, dtype),
    "token D=48 M=64": lambda launchers, dtype: _token(launchers, 64, 48, dtype),
    "token D=32 M=4096": lambda launchers, dtype: _token(launchers, 4096, 32, dtype),
}


def launches(case: str, dtype: str, architecture: int) -> list[Launch]:
    """What a forward and backward pass of the case launches, in order, each specialisation once."""
    from restore_kernels.topk_attention import triton_launch

    recorded: dict[str, Launch] = {}

    def record(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        launch = Launch(case, dtype, kernel, args, {"num_warps": 4, "enable_fp_fusion": True, **options})
        signature, constants, _ = specialisation(launch)
        recorded.setdefault(f"{kernel.__name__} {signature} {constants}", launch)

    with (
        patch.object(triton_launch, "launch", record),
        patch.object(triton_launch, "_capability", lambda device: architecture // 10),
    ):
        CASES[case](triton_launch, getattr(torch, dtype))
    return list(recorded.values())


# --- compiling ----------------------------------------------------------------------------------


def specialisation(launch: Launch) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Signature, constants and attributes as Triton derives them from the arguments of a launch."""
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}

    def specialise(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(specialise(x, (*path, i)) for i, x in enumerate(value))
        if isinstance(value, Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32"}
            return "*" + names[str(value.dtype).removeprefix("torch.")]
        if value == 1:
            constants[path] = 1
            return "constexpr"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    names = launch.kernel.arg_names
    signature = {}
    for i, (parameter, value) in enumerate(zip(launch.kernel.params, launch.args)):  # noqa: B905
        signature[parameter.name] = "i32" if parameter.do_not_specialize else specialise(value, (i,))
    for name, value in launch.options.items():
        if name not in OPTIONS:
            signature[name] = "constexpr"
            constants[(names.index(name),)] = value
    return signature, constants, attributes


def compile_launch(launch: Launch, architecture: int) -> Row:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, *specialisation(launch))
    options = {name: launch.options[name] for name in OPTIONS if name in launch.options}
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    resources, machine_code = _inspect(kernel.asm["cubin"])
    counts = {x: len(re.findall(rf"\b{x}\b", machine_code)) for x in MATRIX_INSTRUCTIONS}
    return Row(
        launch.case, launch.kernel.__name__, architecture, launch.dtype, kernel.metadata.num_warps,
        resources["REG"], resources["STACK"] + resources["LOCAL"], kernel.metadata.shared,
        {name: count for name, count in counts.items() if count},
    )  # fmt: skip


def _inspect(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resource usage and machine code, by the tools in Triton's package."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        machine_code = _output(tools / "cuobjdump", "--dump-sass", file.name)
    return {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}, machine_code


def _output(*command: Any) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


def _compile_job(job: tuple[str, str, int]) -> list[Row]:
    case, dtype, architecture = job
    return [compile_launch(launch, architecture) for launch in launches(case, dtype, architecture)]


def table(
    cases: Sequence[str], dtypes: Sequence[str], architectures: Sequence[int], processes: int
) -> Iterator[Row]:
    """Compiles every combination; rows come in order as they are ready."""
    jobs = [(case, dtype, arch) for arch in architectures for case in cases for dtype in dtypes]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for rows in pool.map(_compile_job, jobs):
            yield from rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--architectures", nargs="+", type=int, default=ARCHITECTURES)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one row per line as JSON")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    form = "{:<26}{:<26}{:>5}  {:<9}{:>6}{:>11}{:>8}{:>9}  {}"
    if not options.json:
        print(
            form.format(
                "case", "kernel", "arch", "dtype", "warps", "registers", "spills", "shared", "instructions"
            )
        )
    for row in table(options.cases, options.dtypes, options.architectures, options.processes):
        if options.json:
            print(json.dumps(asdict(row)), flush=True)
            continue
        instructions = " ".join(f"{name}:{count}" for name, count in row.instructions.items())
        print(form.format(*list(asdict(row).values())[:-1], instructions), flush=True)


if __name__ == "__main__":
    main()

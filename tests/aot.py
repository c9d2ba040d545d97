"""Compiles the Triton kernels of every operator ahead of time, for GPUs that are not here.

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
MATRIX_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA")
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
    square_roots: int  # in PTX
    instructions: dict[str, int]  # matrix instructions in the machine code

    @property
    def on_matrix_units(self) -> bool:
        return bool(self.instructions)


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


def _temperature(batch: int, heads: int) -> Tensor:
    return _empty((heads,), torch.float32).expand(batch, heads)


def _channel(dtype: torch.dtype, heads: int, projected: bool) -> tuple[Tensor | None, ...]:
    """q, k, v, temperature and out_proj."""
    batch, channels, pixels = 2, 48, 4096
    out_proj = _empty((heads * channels, heads * channels), dtype) if projected else None
    return (*_qkv(batch, heads, channels, pixels, dtype), _temperature(batch, heads), out_proj)


def _topk_channel(dtype: torch.dtype, heads: int = 1, projected: bool = False) -> None:
    from restore_kernels.topk_attention import triton_launch as launchers

    q, k, v, temperature, out_proj = _channel(dtype, heads, projected)
    call = (q, k, v, temperature, _empty((4,), torch.float32).expand(2, heads, 4), out_proj)
    topk = (24, 32, 36, 38)
    out, *saved = launchers.topk_attention_channel(*call, topk, True)
    launchers.topk_attention_channel_backward(out, *call, *saved, topk, True)


def _topk_token(dtype: torch.dtype, tokens: int, depth: int) -> None:
    from restore_kernels.topk_attention import triton_launch as launchers

    batch, heads = 4, 2
    q, k, v = (_empty((batch, heads, tokens, depth), dtype) for _ in "qkv")
    call = (q, k, v, _temperature(batch, heads), _empty((batch, heads, 2), torch.float32))
    topk = (tokens, tokens // 2)
    out, *saved = launchers.topk_attention_token(*call, topk, True)
    launchers.topk_attention_token_backward(out, *call, *saved, topk, True)


def _masked_channel(dtype: torch.dtype, heads: int, rows: int, projected: bool) -> None:
    from restore_kernels.masked_attention import triton_launch as launchers

    q, k, v, temperature, out_proj = _channel(dtype, heads, projected)
    mask = _empty((q.shape[0], 1, rows, q.shape[3]), torch.float32).expand(-1, heads, -1, -1)
    call = (q, k, v, mask, temperature, out_proj)
    out, *saved = launchers.masked_attention_channel(*call, True)
    launchers.masked_attention_channel_backward(out, *call, *saved, True)


def _masked_token(dtype: torch.dtype, queries: int, keys: int, depth: int, batch: int = 1) -> None:
    from restore_kernels.masked_attention import triton_launch as launchers

    heads = 2
    q, k, v = (_empty((batch, heads, rows, depth), dtype) for rows in (queries, keys, keys))
    mask = _empty((batch, 1, keys), torch.float32).expand(-1, heads, -1)
    call = (q, k, v, mask, _temperature(batch, heads))
    out, log_sum_exp, wide_out = launchers.masked_attention_token(*call, True)
    saved = (wide_out if wide_out.numel() else out, log_sum_exp)
    launchers.masked_attention_token_backward(out, *call, *saved, True)


def _pyramid(dtype: torch.dtype, patch_size: int, depth: int, width: int, hard: bool = False) -> None:
    from restore_kernels.pyramid_attention import triton_launch as launchers

    query, *keys = (_empty((2, depth, size, size), dtype) for size in (64, 64, 58))
    values = [_empty((2, width, *key.shape[2:]), dtype) for key in keys]
    call = (query, keys, values)
    if hard:
        out, index = launchers.pyramid_attention_hard(*call, patch_size, 10.0, 1e-4, 0.25)
        launchers.pyramid_attention_hard_backward(out, values, index, patch_size, 0.25)
        return
    out, log_sum_exp = launchers.pyramid_attention(*call, patch_size, 10.0, 1e-4, 0.25)
    launchers.pyramid_attention_backward(out, *call, log_sum_exp, patch_size, 10.0, 1e-4, 0.25)


def _channel_gate(dtype: torch.dtype, channels: int, hidden: int, pixel_major: bool = False) -> None:
    from restore_kernels.channel_gate import triton_launch as launchers

    x = _empty((2, channels, 64, 64), dtype)
    x = x.contiguous(memory_format=torch.channels_last) if pixel_major else x
    down, up = (_empty((*sides, 1, 1), torch.float32) for sides in ((hidden, channels), (channels, hidden)))
    biases = (_empty((size,), torch.float32) for size in (hidden, channels))
    out, *saved = launchers.channel_gate(x, down, up, *biases, x)
    launchers.channel_gate_backward(out, x, down, up, *saved)


def _bilinear_resize(dtype: torch.dtype, doubles: bool, pixel_major: bool = False) -> None:
    from restore_kernels.bilinear_resize import triton_launch as launchers

    small, large = (_empty((2, 48, size, size), dtype) for size in (64, 128))
    if pixel_major:
        small, large = (x.contiguous(memory_format=torch.channels_last) for x in (small, large))
    x, residual = (small, large) if doubles else (large, small)
    out = launchers.bilinear_resize(x, residual, doubles, *residual.shape[2:])
    launchers.bilinear_resize_backward(out, doubles, *x.shape[2:])


def _channel_norm(dtype: torch.dtype, channels: int, biased: bool, pixel_major: bool = False) -> None:
    from restore_kernels.channel_norm import triton_launch as launchers

    x = _empty((2, channels, 64, 64), dtype)
    x = x.contiguous(memory_format=torch.channels_last) if pixel_major else x
    weight = _empty((channels,), torch.float32)
    out, *saved = launchers.channel_norm(x, weight, weight if biased else None, 1e-5)
    launchers.channel_norm_backward(out, x, weight, *saved, biased)


def _depthwise(
    dtype: torch.dtype, size: int, inputs: int = 1, dilation: int = 1, activation: str | None = None,
    gated: bool = False, last: bool = False,
) -> None:  # fmt: skip
    from restore_kernels.depthwise_conv import triton_launch as launchers

    channels = 127 if gated else 254
    layout = torch.channels_last if last else torch.contiguous_format
    x = _empty((2, channels * inputs, 128, 128), dtype).to(memory_format=layout)
    weight, bias = _empty((channels, inputs, size, size), dtype), _empty((channels,), dtype)
    # Halves of an odd number of channels: groups of two inputs straddle them.
    images = x.tensor_split(inputs, dim=1) if gated else [x]
    slope = bias[:1] if activation == "prelu" else None
    call = (images, weight, bias, slope, x[:, :channels] if gated else None)
    out = launchers.depthwise_conv(*call, dilation, activation)
    kept = out if activation == "relu" and not gated else None
    wanted = [True] * (len(images) + 1) + [gated]
    launchers.depthwise_conv_backward(out, *call, kept, dilation, activation, wanted)


def _pointwise(
    dtype: torch.dtype, channels: tuple[int, ...], outputs: int, last: bool = False, per_image: bool = False,
    cropped: bool = False,
) -> None:  # fmt: skip
    from restore_kernels.pointwise_conv import triton_launch as launchers

    layout = torch.channels_last if last else torch.contiguous_format
    images = [_empty((2, count, 130, 128), dtype).to(memory_format=layout) for count in channels]
    images = [image[:, :, :, :126] if cropped else image for image in images]
    weight = _empty((2,) * per_image + (outputs, sum(channels), 1, 1), dtype)
    out = launchers.pointwise_conv(images, weight, _empty((outputs,), dtype))
    launchers.pointwise_conv_backward(out, images, weight, [True] * (len(images) + 2))


CASES: dict[str, Callable[[torch.dtype], None]] = {
    "channel heads=1": lambda dtype: _topk_channel(dtype),
    "channel heads=1 out_proj": lambda dtype: _topk_channel(dtype, projected=True),
    "channel heads=8 out_proj": lambda dtype: _topk_channel(dtype, heads=8, projected=True),
    "token D=32 M=64": lambda dtype: _topk_token(dtype, 64, 32),
    "token D=48 M=64": lambda dtype: _topk_token(dtype, 64, 48),
    "token D=32 M=4096": lambda dtype: _topk_token(dtype, 4096, 32),
    "masked channel heads=1 gated": lambda dtype: _masked_channel(dtype, 1, 48, False),
    "masked channel out_proj per-pixel mask": lambda dtype: _masked_channel(dtype, 2, 1, True),
    "masked token 16x65536 D=48": lambda dtype: _masked_token(dtype, 16, 65536, 48),
    "masked token 65536x16 D=48": lambda dtype: _masked_token(dtype, 65536, 16, 48),
    "masked token window 64x64 D=32": lambda dtype: _masked_token(dtype, 64, 64, 32, batch=64),
    "pyramid 3x3 Cq=32 Cv=64": lambda dtype: _pyramid(dtype, 3, 32, 64),
    "pyramid 3x3 Cq=32 Cv=64 hard": lambda dtype: _pyramid(dtype, 3, 32, 64, hard=True),
    "pyramid 3x3 Cq=32 Cv=256": lambda dtype: _pyramid(dtype, 3, 32, 256),
    "pyramid 7x7 Cq=32 Cv=64": lambda dtype: _pyramid(dtype, 7, 32, 64),
    "channel gate C=48": lambda dtype: _channel_gate(dtype, 48, 12),
    "channel gate C=64 channels_last": lambda dtype: _channel_gate(dtype, 64, 4, pixel_major=True),
    "channel gate C=512": lambda dtype: _channel_gate(dtype, 512, 32),
    "resize to twice the size": lambda dtype: _bilinear_resize(dtype, True),
    "resize to half the size channels_last": lambda dtype: _bilinear_resize(dtype, False, pixel_major=True),
    "channel norm C=1": lambda dtype: _channel_norm(dtype, 1, True),  # to Triton a size of 1 is a constant
    "channel norm C=48": lambda dtype: _channel_norm(dtype, 48, True),
    "channel norm C=48 channels_last": lambda dtype: _channel_norm(dtype, 48, True, pixel_major=True),
    "channel norm C=384 without bias": lambda dtype: _channel_norm(dtype, 384, False),
    "pyramid 1x1 Cq=5 Cv=3": lambda dtype: _pyramid(dtype, 1, 5, 3),
    "depthwise 3x3": lambda dtype: _depthwise(dtype, 3),
    "depthwise 3x3 channels_last": lambda dtype: _depthwise(dtype, 3, last=True),
    "depthwise 5x5 paired relu": lambda dtype: _depthwise(dtype, 5, inputs=2, activation="relu"),
    "depthwise 5x5 relu channels_last": lambda dtype: _depthwise(dtype, 5, activation="relu", last=True),
    "depthwise 7x7 dilated": lambda dtype: _depthwise(dtype, 7, dilation=2),
    "depthwise 3x3 prelu gated": lambda dtype: _depthwise(dtype, 3, activation="prelu", gated=True),
    "depthwise 3x3 gelu gated channels_last": lambda dtype: _depthwise(
        dtype, 3, activation="gelu", gated=True, last=True
    ),
    "depthwise 5x5 paired gelu gated": lambda dtype: _depthwise(
        dtype, 5, inputs=2, activation="gelu", gated=True
    ),
    "pointwise 96 to 510": lambda dtype: _pointwise(dtype, (96,), 510),
    "pointwise 768 to 96 channels_last": lambda dtype: _pointwise(dtype, (768,), 96, last=True),
    "pointwise 48+48 to 48 per image": lambda dtype: _pointwise(dtype, (48, 48), 48, per_image=True),
    "pointwise 8 images to 96, crops": lambda dtype: _pointwise(dtype, (96,) * 8, 96, cropped=True),
    "pointwise 3 to 12": lambda dtype: _pointwise(dtype, (3,), 12),
}


def launches(case: str, dtype: str, architecture: int) -> list[Launch]:
    """What a forward and backward pass of the case launches, in order, each specialisation once."""
    from triton.runtime.jit import JITFunction

    from restore_kernels.triton_common import token_launch

    recorded: dict[str, Launch] = {}

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launch = Launch(case, dtype, kernel, args, options)
        signature, constants, _ = specialisation(launch)
        recorded.setdefault(f"{kernel.__name__} {signature} {constants}", launch)

    with (
        patch.object(JITFunction, "run", record),
        patch.object(token_launch, "capability", lambda device: architecture // 10),
    ):
        CASES[case](getattr(torch, dtype))
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
            names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32", "int64": "i64"}
            return "*" + names[str(value.dtype).removeprefix("torch.")]
        if isinstance(value, float):
            return "fp32"
        if value is None or value == 1:
            constants[path] = value
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
    # Half a second each; without a matrix product in PTX there is none in the machine code.
    resources, machine_code = _inspect(kernel.asm["cubin"], disassemble="mma" in kernel.asm["ptx"])
    counts = {x: len(re.findall(rf"\b{x}\b", machine_code)) for x in MATRIX_INSTRUCTIONS}
    return Row(
        launch.case, launch.kernel.__name__, architecture, launch.dtype, kernel.metadata.num_warps,
        resources["REG"], resources["STACK"] + resources["LOCAL"], kernel.metadata.shared,
        len(re.findall(r"\bsqrt\.", kernel.asm["ptx"])),
        {name: count for name, count in counts.items() if count},
    )  # fmt: skip


def _inspect(cubin: bytes, disassemble: bool) -> tuple[dict[str, int], str]:
    """Resource usage and, if wanted, machine code, by the tools in Triton's package."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        machine_code = _output(tools / "cuobjdump", "--dump-sass", file.name) if disassemble else ""
    return {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}, machine_code


def _output(*command: Any) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


Job = tuple[str, str, int]  # case, dtype, architecture


def jobs(
    cases: Sequence[str], dtypes: Sequence[str], architectures: Sequence[int], in_turn: bool = False
) -> list[Job]:
    """Every case and dtype for every architecture, or for one of them, in turn."""
    pairs = [(case, dtype) for case in cases for dtype in dtypes]
    if in_turn:
        return [(*pair, architectures[(i + 1) % len(architectures)]) for i, pair in enumerate(pairs)]
    return [(*pair, architecture) for architecture in architectures for pair in pairs]


def _compile_job(job: Job) -> list[Row]:
    case, dtype, architecture = job
    return [compile_launch(launch, architecture) for launch in launches(case, dtype, architecture)]


def table(jobs: Sequence[Job], processes: int) -> Iterator[Row]:
    """Compiles; rows come in order as they are ready."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for rows in pool.map(_compile_job, jobs):
            yield from rows


def compile_apart(jobs: Sequence[Job]) -> list[Row]:
    """The table in a process of its own: interpreted and compiled kernels do not mix in one."""
    command = [sys.executable, __file__, "--json", "--jobs", json.dumps(jobs)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent)
    assert run.returncode == 0, run.stderr
    return [Row(**json.loads(line)) for line in run.stdout.splitlines()]


def assert_fits(rows: Sequence[Row]) -> None:
    """Nothing spills to local memory, and registers and shared memory are within the limits."""
    limits = SHARED_MEMORY_LIMIT
    assert [row for row in rows if row.spilled_bytes] == []
    assert [row for row in rows if row.registers > 255] == []
    assert [row for row in rows if row.shared_bytes > limits[row.architecture]] == []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--architectures", nargs="+", type=int, default=ARCHITECTURES)
    parser.add_argument("--jobs", type=json.loads, help="a list of [case, dtype, architecture] instead")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one row per line as JSON")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    form = "{:<40}{:<26}{:>5}  {:<9}{:>6}{:>11}{:>8}{:>9}  {}"
    if not options.json:
        print(
            form.format(
                "case", "kernel", "arch", "dtype", "warps", "registers", "spills", "shared", "instructions"
            )
        )
    todo = options.jobs or jobs(options.cases, options.dtypes, options.architectures)
    for row in table(todo, options.processes):
        if options.json:
            print(json.dumps(asdict(row)), flush=True)
            continue
        instructions = " ".join(f"{name}:{count}" for name, count in row.instructions.items())
        print(form.format(*list(asdict(row).values())[:-2], instructions), flush=True)


if __name__ == "__main__":
    main()

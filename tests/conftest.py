"""Options of the test run, device and backends that it may not do without, and a fixture of two files."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("conformance")

import conformance  # noqa: E402
import host_kernels  # noqa: E402
import triton_interpreter  # noqa: E402

from restore_kernels.backends import NAMES  # noqa: E402
from restore_kernels.native import CUDA_HOST_VARIABLE  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", choices=("cpu", "cuda"), help="where the conformance suite runs"
    )
    parser.addoption(
        "--require-backends", default="", metavar="NAME,NAME",
        help="backends that must run: one that cannot fails the run instead of being skipped",
    )  # fmt: skip
    parser.addoption(
        "--all-architectures", action="store_true",
        help="compile every Triton kernel for every architecture, not for one each",
    )  # fmt: skip
    parser.addoption(
        "--cuda-host", default="check", choices=tuple(host_kernels.FLAGS),
        help="the build of the CUDA kernels that runs them on the host",
    )  # fmt: skip


# Files of a minute or so: they compile kernels or whole networks, interpret kernels, train, or start many
# processes. They come first, the longest before the others, or the last would keep one worker busy alone.
LONG = (
    "triton_compiled", "compiling", "cuda_sanitizer", "demo", "topk_attention", "step_profile", "integration",
    "instruction_sets", "depthwise_conv", "loss_curves", "models",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if conformance.DEVICE == "cuda":  # in turns through all files: time may be up before the end
        seen: Counter[str] = Counter()
        rank: dict[pytest.Item, int] = {}
        for item in items:
            rank[item] = seen[item.path.stem]
            seen[item.path.stem] += 1
        items.sort(key=rank.__getitem__)
        return
    order = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_configure(config: pytest.Config) -> None:
    conformance.DEVICE = config.getoption("--device")
    conformance.REQUIRED = tuple(filter(None, config.getoption("--require-backends").split(",")))
    if unknown := set(conformance.REQUIRED) - set(NAMES):
        raise pytest.UsageError(f"--require-backends takes {', '.join(NAMES)}; got {', '.join(unknown)}")
    if conformance.DEVICE == "cpu":
        # Before anything imports Triton: interpreted and compiled kernels do not mix in one process.
        os.environ["TRITON_INTERPRET"] = "1"
        triton_interpreter.mend()
        name = config.getoption("--cuda-host")
        # Compiling takes a minute or two: only where it must run.
        build = host_kernels.build if "cuda" in conformance.REQUIRED else host_kernels.up_to_date
        if host_kernels.why_not() is None and (library := build(name)) is not None:
            os.environ[CUDA_HOST_VARIABLE] = str(library)
    else:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # eager's products, deterministically
        torch.backends.cudnn.allow_tf32 = False  # errors are measured against eager's own: in float32
    if hasattr(config, "workerinput"):  # pytest-xdist: the workers share the cores
        torch.set_num_threads(1)
    os.environ.pop("RESTORE_KERNELS_BACKEND", None)  # the tests name their backends


@pytest.fixture
def recipe_file(tmp_path):
    """Writes a recipe of a tiny network, with these keys changed, or left out where they are None."""
    from test_training import TINY, photo

    from restore_nets.images import write_image

    (tmp_path / "photos").mkdir()
    write_image(tmp_path / "photos" / "a.png", photo().float() / 255)

    def write(**changes: str | None) -> Path:
        lines = {
            "model": json.dumps(TINY),
            "data": f"{{photos: {tmp_path / 'photos'}}}",
            "out": str(tmp_path / "out"),
            "steps": "5",
            "batch": "2",
            "crop": "16",
            "checkpoint_every": "2",
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items() if value is not None))
        return path

    return write

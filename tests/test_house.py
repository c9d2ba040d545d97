"""The rules of the house: who may import whom, and what an import may load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from restore_kernels.native import CUDA_HOST_VARIABLE

ROOT = Path(__file__).parents[1]


def python(*args: str, **environment: str) -> str:
    """The output of a fresh interpreter in which both packages can be found."""
    own = ("TRITON_INTERPRET", CUDA_HOST_VARIABLE)  # set by the tests for themselves
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    path = os.pathsep.join((str(ROOT), str(ROOT / "python")))
    result = subprocess.run(
        [sys.executable, *args], cwd=ROOT, env={**inherited, "PYTHONPATH": path, **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_arrows_point_one_way():
    pytest.importorskip("importlinter")
    python("-c", "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))")


def test_every_operator_has_its_arrows():
    """A layers contract names each operator's modules, so that none is outside of the rules."""
    linter = pytest.importorskip("importlinter.api")
    contracts = linter.read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"]
    layered = {layer for contract in contracts for layer in contract.get("layers", ())}
    operators = [path.parent.name for path in (ROOT / "restore_kernels").glob("*/ops.py")]
    assert {"topk_attention", "masked_attention", "pyramid_attention"} <= set(operators)
    for operator in operators:
        for module in ("api", "autograd", "ops", "reference"):
            assert f"restore_kernels.{operator}.{module}" in layered


def test_import_loads_no_backend():
    loaded = python(
        "-c",
        "import sys, torch; before = set(sys.modules); import restore_kernels, restore_kernels.nn\n"
        "print(*set(sys.modules) - before, torch.cuda.is_initialized())",
    ).split()
    assert loaded.pop() == "False"
    assert "restore_kernels.topk_attention.api" in loaded
    foreign = [name for name in loaded if name.split(".")[0] in ("triton", "restore_nets")]
    backends = [name for name in loaded if "triton" in name or name.startswith("restore_kernels._")]
    assert foreign == backends == []


WITHOUT_LIBRARIES = """
import importlib.machinery, sys

class PythonFilesExceptTriton(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] != "triton" and not name.startswith("restore_kernels._c"):
            return super().find_spec(name, path, target)

sys.meta_path[:] = [
    PythonFilesExceptTriton if finder is importlib.machinery.PathFinder else finder
    for finder in sys.meta_path if "editable" not in repr(finder)
]
"""


def test_works_with_torch_alone():
    """No compiled library, no Triton: eager runs, and what is missing is said."""
    output = python("-c", WITHOUT_LIBRARIES + """
import torch, restore_kernels, restore_kernels.nn, runpy
q = torch.randn(1, 2, 4, 8, requires_grad=True)
restore_kernels.topk_attention(q, q, q, [2, None]).sum().backward()
assert q.grad is not None
restore_kernels.masked_attention(q, q, q, torch.rand(8)).sum().backward()
restore_kernels.pyramid_attention(q, [q], [q]).sum().backward()
restore_kernels.nn.TopKSparseAttention(8, 2)(torch.randn(1, 8, 5, 7)).sum().backward()
print(restore_kernels.explain(restore_kernels.topk_attention, q, q, q, [2]))
try:
    restore_kernels.topk_attention(q, q, q, [2], backend="cpu")
except RuntimeError as error:
    print(error)
runpy.run_module("restore_kernels", run_name="__main__")
""")  # fmt: skip
    assert "runs on eager" in output
    assert "the package triton is not installed" in output
    assert "backend 'cpu' cannot run this call: the compiled library" in output
    assert "pip install --no-build-isolation -e ." in output
    assert "  eager: available" in output


def test_info_command_names_versions_and_backends():
    output = python("-m", "restore_kernels")
    for line in ("restore_kernels: ", "torch: ", "backends:", "  eager: available", "  cpu: ", "  triton: "):
        assert line in output

"""Writes restore_kernels/choices.json from the results of GPUs: of two backends, which was faster at what.

``python benchmarks/choices.py [FOLDER ...]``: of benchmarks/results and of these, which get a copy.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from restore_kernels.profiling.cases import GPU_CASES, BenchmarkCase

ROOT = Path(__file__).parent.parent
BACKENDS = ("cuda", "triton")


def entries(results: dict[str, Any], cases: Iterable[BenchmarkCase] = GPU_CASES) -> list[dict[str, Any]]:
    """One for every case of a GPU's results that both backends ran and got right."""
    calls = {str(case): call(case) for case in cases}
    found = []
    for row in results["cases"]:
        alternatives = row["alternatives"]
        if not all(name in alternatives for name in BACKENDS):
            continue
        chosen = calls[f"{row['case']}, {row['pass']}"]
        found.append({
            "operator": f"{chosen.operator} {chosen.kind}", "dtype": row["dtype"],
            "capability": results["machine"]["compute_capability"], "shape": list(chosen.tensors[0].shape),
            "seconds": {name: alternatives[name]["median"] for name in BACKENDS},
        })  # fmt: skip
    return found


def call(case: BenchmarkCase):
    """What the choice of a backend sees of the case."""
    args, kwargs = case.arguments(case.inputs(torch.bfloat16, "cpu"))
    return type(case).operator.plan(*args, **kwargs)  # type: ignore[attr-defined]


def main() -> None:
    known = (ROOT / "benchmarks/results").resolve()
    others = [folder for folder in map(Path, sys.argv[1:]) if folder.resolve() != known]
    # Partial ones too: what was measured in a run that was cut short, after what is complete.
    files = {file.name: file for folder in (known, *others) for file in sorted(folder.glob("*.json*"))}
    results = [json.loads(file.read_text()) for name, file in files.items() if name != "choices.json"]
    table = [entry for result in results if result["machine"]["gpu"] for entry in entries(result)]
    for folder in (ROOT / "restore_kernels", *others):
        (folder / "choices.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()

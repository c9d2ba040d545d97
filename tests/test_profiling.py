"""What the benchmarks count, how they judge correctness, and what is drawn of their results."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from restore_kernels.profiling import machine, run
from restore_kernels.profiling.cases import CPU_CASES, GPU_CASES, GROWTH_CASES, PyramidCase, TopKCase

ROOT = Path(__file__).parents[1]
CASE = PyramidCase((2, 4, 5, 20, 22))


def script(name: str) -> ModuleType:
    """A driver in benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_operations_of_pyramid_attention():
    """Multiply-adds per pair of positions with 32 channels of queries and keys and 64 of values."""
    forward, both = (PyramidCase((1, 32, 64, 10, 20), backward=backward) for backward in (False, True))
    levels = 10 * 20 + 9 * 18 + 8 * 16 + 7 * 14 + 6 * 12
    assert forward.pairs == both.pairs == 200 * levels
    assert [case.flops / (2 * case.pairs) for case in (forward, both)] == [128, 448]
    assert [case.published_flops / (2 * case.pairs) for case in (forward, both)] == [9 * 96, 3 * 9 * 96]


def test_every_case_has_a_name_of_its_own():
    for cases in (CPU_CASES, GPU_CASES, GROWTH_CASES):
        assert len({str(case) for case in cases}) == len(cases)


@pytest.mark.parametrize("case", {type(case): case.small for case in CPU_CASES}.values(), ids=str)
def test_the_published_computation_is_the_operator(case):
    x = case.inputs(torch.float32, "cpu").double()
    ours = x.results(lambda x: case.ours(x, "eager"))
    published = x.results(case.published)
    for name, result in ours.items():
        torch.testing.assert_close(published[name], result, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("height", [3, 9, 20])
@pytest.mark.parametrize("width", [3, 22, 70])
def test_an_excerpt_is_part_of_the_whole(height, width):
    case = replace(CASE, shape=(2, 4, 5, height, width))
    excerpt = case.excerpt(case.inputs(torch.float32, "cpu"))
    whole, part = (
        excerpt.cut(x.double().results(lambda x: case.ours(x, "eager")))
        for x in (excerpt.whole, excerpt.part)
    )
    assert whole.keys() == part.keys()
    for name, x in part.items():
        assert x.numel() and x.any()
        torch.testing.assert_close(whole[name], x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fault", ["out", "grad query", "grad keys[1]", "grad values[4]"])
def test_no_speed_for_a_wrong_result(monkeypatch, fault):
    """Not even where only a corner of the excerpt is wrong."""
    results = run.Inputs.results

    def faulty(x, forward, backward=True):
        found = {name: result.detach().clone() for name, result in results(x, forward, backward).items()}
        if x.tensors["query"].shape[2] == 20 and x.grad_out.dtype == torch.float32:  # of the whole
            found[fault][..., -1, 8] *= 1.01
        return found

    assert run.wrong(CASE, "eager", "cpu", torch.float32) is None
    monkeypatch.setattr(run.Inputs, "results", faulty)
    assert fault in (run.wrong(CASE, "eager", "cpu", torch.float32) or "")


def test_ceilings_are_measured():
    limits = machine.ceilings("cpu", torch.float32, seconds=0.0)
    assert 1e8 < limits["copy_bytes_per_second"] < 1e13 and 1e8 < limits["flops_per_second"] < 1e15


@pytest.fixture(scope="module")
def row() -> dict:
    return run.measure(replace(CASE, backward=False), "cpu", torch.float32, seconds=0.0)


def test_a_row_of_the_results(row):
    assert row["pass"] == "forward" and row["pairs"] == CASE.pairs
    eager = row["alternatives"]["eager"]
    assert eager["runs"] >= 5 and 0 < eager["p20"] <= eager["median"] <= eager["p80"]
    assert eager["flops"] == replace(CASE, backward=False).published_flops


def test_pages_show_the_results():
    """What CI checks: README.md and docs/performance.md as benchmarks/results has it."""
    tables = script("tables")
    for path, own in tables.PAGES.items():
        text = path.read_text()
        assert tables.filled(text, own) == text, f"run python benchmarks/tables.py: {path.name} is outdated"


def test_a_changed_result_shows():
    tables = script("tables")
    text = (ROOT / "README.md").read_text()
    assert tables.filled(text, {"summary": lambda: "other"}) != text


def test_results_count_what_the_registry_counts():
    """Names, sizes, operations and bytes; what has been measured is another matter."""
    cases = {str(case): case for case in (*CPU_CASES, *GPU_CASES, *GROWTH_CASES)}
    for result in script("tables").results():
        for row in (*result["cases"], *result["growth"]):
            case = cases[f"{row['case']}, {row['pass']}"]
            size = getattr(torch, row["dtype"]).itemsize
            counted = (case.series, case.size, case.flops, case.elements * size)
            assert (row["series"], row["size"], row["flops"], row["bytes"]) == counted
            for name, entry in row["alternatives"].items():
                published = name in ("eager", "torch.compile")
                assert entry["flops"] == (case.published_flops if published else case.flops)


def test_tables_and_the_plot(row, tmp_path):
    pytest.importorskip("matplotlib")
    machine = {"gpu": None, "processor": "a processor", "threads": 2, "torch": "2"}
    growth = []
    for side in (24, 48, 96):
        entry = {"median": 1e-9 * side**4, "p20": 0.0, "p80": 0.0, "flops": 1, "peak_extra_bytes": side**2}
        growth.append(
            {**row, "size": side**2, "series": "pyramid_attention HxW", "alternatives": {"cpu": entry}}
        )
    ceilings = {"float32": {"flops_per_second": 1e11, "copy_bytes_per_second": 1e10}}
    result = {"machine": machine, "ceilings": ceilings, "cases": [row], "growth": growth}
    tables = script("tables")
    assert "| pyramid_attention 2x4+5x20x22, float32, forward | eager |" in tables.time_table(result)
    (line,) = tables.summary_table([result, {**result, "cases": []}]).splitlines()[2:]
    assert line.startswith("| pyramid_attention 2x4+5x20x22, float32, forward | ")
    assert "x | not measured | " in line
    cuda, ours = row["alternatives"]["cpu"], {**row, "wrong": {"triton": "out: relative error 1"}}
    gpu = {**ours, "alternatives": {**row["alternatives"], "cuda": {**cuda, "median": 1e-9}}}
    assert tables.summary_cell(ours).endswith("x (cpu); triton wrong")
    assert tables.summary_cell(gpu).startswith(
        "1e-06 ms, "
    ) and "x (cuda); triton wrong" in tables.summary_cell(gpu)
    none = {**ours, "alternatives": {}, "wrong": {"triton": "out", "cuda": "out"}}
    assert tables.summary_cell(none) == "triton wrong, cuda wrong"
    (line,) = tables.growth_table(result).splitlines()[4:]
    assert "| 576 pixels | 9216 |" in line and "| 2.00 |" in line and line.endswith("| 1.00 |")
    drawing = script("growth")
    for picture in (tmp_path / "a.svg", tmp_path / "b.svg"):
        assert drawing.draw([result], picture) == 1
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "a processor, 2 threads" in (tmp_path / "a.svg").read_text()


def test_pytest_benchmark_drives_the_cases(tmp_path):
    """With its options: a JSON file says what ran, and how much work it was."""
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "out.json"
    options = ["-k", "8x48x256 and eager", f"--benchmark-json={path}", "--benchmark-max-time=0.01"]
    # Not as a worker of pytest-xdist, where nothing is timed.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "benchmarks", *options]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (found,) = json.loads(path.read_text())["benchmarks"]
    assert found["extra_info"]["flops"] > 0 and found["stats"]["median"] > 0
    assert found["extra_info"]["backend"] == "eager" and "topk_attention channel" in found["group"]


def test_a_row_that_rounding_decides_is_not_judged():
    """One near tie at the end of a branch: its row counts neither in the output nor in the gradients."""
    case = TopKCase("token", (1, 1, 8, 4), (3, None))
    x = case.inputs(torch.float32, "cpu")
    assert case._decided(x).all()
    with torch.no_grad():
        order = (F.normalize(x.tensors["q"], dim=-1) @ F.normalize(x.tensors["k"], dim=-1).mT)[
            0, 0, 5
        ].argsort()
        kept, dropped = order[-3], order[-4]
        x.tensors["k"][0, 0, dropped] = x.tensors["k"][0, 0, kept] * (1 + 1e-6)
        x.tensors["k"][0, 0, dropped, 0] += 1e-6
    excerpt = case.excerpt(x)
    judged = excerpt.whole.grad_out.abs().sum(-1)[0, 0] > 0
    assert not judged[5] and judged.sum() >= 4
    results = excerpt.cut(x.results(lambda x: case.ours(x, "eager")))
    assert (results["out"][0, 0, 5] == 0).all() and (results["out"][0, 0, judged] != 0).any()

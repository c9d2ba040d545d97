"""The command line restore-kernels profile: what it measures, writes and refuses."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from restore_kernels import native
from restore_kernels.profiling import cli, machine, run
from restore_kernels.profiling.cases import OPERATORS, BenchmarkCase
from restore_kernels.topk_attention import autograd

ROOT = Path(__file__).parents[1]
SHAPES = {
    "topk_attention": ["--shape", "2,1,8,64", "--branches", "4,none"],
    "masked_attention": ["--shape", "2,1,8,64"],
    "pyramid_attention": ["--shape", "1,4,5,10,11", "--levels", "3"],
    "dense_conv2d": ["--shape", "1,6,10,11", "--outputs", "4"],
    "depthwise_conv2d": ["--shape", "1,6,10,11", "--activation", "prelu", "--gate", "with"],
    "pointwise_conv2d": ["--shape", "1,6,10,11", "--outputs", "4", "--images", "2"],
    "channel_gate": ["--shape", "1,6,10,11"],
    "bilinear_resize": ["--shape", "1,6,40,44", "--factor", "0.5"],
    "channel_norm": ["--shape", "1,6,10,11"],
}
SHORT = ["--seconds", "0.05"]

needs_cpu_library = pytest.mark.skipif(
    native.why_no_cpu_library() is not None, reason="the compiled CPU library is not built"
)


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    """Measured elsewhere: that takes seconds."""
    limits = {"copy_bytes_per_second": 2e10, "flops_per_second": 1e11}
    monkeypatch.setattr(cli, "ceilings", lambda *_: limits)


@pytest.fixture(autouse=True)
def known_memory_of_eager(monkeypatch):
    """Each alternative's is measured in a process that imports PyTorch; test_profiling has both."""
    measure = run.cpu_memory
    monkeypatch.setattr(run, "cpu_memory", lambda *call: 4096 if call[-1] == "eager" else measure(*call))


def profile(*arguments: str) -> int:
    return cli.run([*arguments, *SHORT])


@pytest.mark.parametrize("operator", OPERATORS)
def test_measures_one_case(operator, tmp_path, capsys):
    """Every operator has its options; the files say the same as the table."""
    pytest.importorskip("rich")
    found, lines, trace = (tmp_path / name for name in ("a.json", "a.csv", "a.trace"))
    outputs = ["--json", str(found), "--csv", str(lines), "--trace", str(trace)]
    assert profile(operator, *SHAPES[operator], *outputs) == 0
    results = json.loads(found.read_text())
    (row,) = results["cases"]
    assert row["case"].startswith(operator) and row["pass"] == "forward and backward"
    assert row["wrong"] == {} and results["growth"] == []
    names = ["eager"] if native.why_no_cpu_library() else ["eager", "cpu"]
    assert list(row["alternatives"]) == names
    with lines.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [line["alternative"] for line in written] == names
    for line in written:
        entry = row["alternatives"][line["alternative"]]
        limits = results["ceilings"]["float32"]
        floors = {
            "arithmetic": entry["flops"] / limits["flops_per_second"],
            "memory": row["bytes"] / limits["copy_bytes_per_second"],
        }
        assert float(line["median_seconds"]) == entry["median"] > 0
        assert entry["peak_extra_bytes"] > 0
        assert line["bound"] == max(floors, key=lambda bound: floors[bound])
        assert float(line["of_roof"]) == pytest.approx(max(floors.values()) / entry["median"])
    shown = capsys.readouterr().out
    assert row["case"] in shown and "of roof" in shown
    events = json.loads(trace.read_text())["traceEvents"]
    assert {f"{row['case']}, {row['pass']}: {name}" for name in names} <= {event["name"] for event in events}


def test_a_page_has_growing_sizes(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    page, found = tmp_path / "a.html", tmp_path / "a.json"
    shape = ["--shape", "1,1,8,256"]
    assert profile("masked_attention", *shape, "--html", str(page), "--json", str(found)) == 0
    results = json.loads(found.read_text())
    assert [row["size"] for row in results["growth"]] == [16, 64]
    for entry in results["cases"][0]["alternatives"].values():
        assert list(entry["passes"]) == ["forward", "backward", "rest"] and min(entry["passes"].values()) >= 0
        assert entry["passes"]["forward"] > 0
    text = page.read_text()
    for plot in ("time", "memory", "roofline", "breakdown"):
        assert f'id="{plot}:' in text


def wrong_output(q, k, v, *args):
    return right(q, k, v, *args) * 1.001


def wrong_gradient(q, k, v, *args):
    out = right(q, k, v, *args)
    if q.requires_grad:
        out = out + 0.01 * (q.sum() - q.sum().detach())  # is zero, its gradient is not
    return out


right = autograd.channel


@needs_cpu_library
@pytest.mark.parametrize(
    ("kernel", "what"), [(wrong_output, "out"), (wrong_gradient, "grad q")], ids=["output", "gradient"]
)
def test_a_wrong_kernel_gets_no_speed(kernel, what, monkeypatch, tmp_path, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(autograd, "channel", kernel)
    monkeypatch.setattr(native, "loaded_cpu_module", None)
    found, lines = tmp_path / "a.json", tmp_path / "a.csv"
    options = ["topk_attention", *SHAPES["topk_attention"]]
    assert profile(*options, "--json", str(found), "--csv", str(lines)) == 0
    (row,) = json.loads(found.read_text())["cases"]
    assert list(row["alternatives"]) == ["eager"] and what in row["wrong"]["cpu"]
    with lines.open(newline="") as file:
        (line,) = [line for line in csv.DictReader(file) if line["alternative"] == "cpu"]
    assert what in line["wrong"] and not line["median_seconds"] and not line["of_roof"]
    shown = capsys.readouterr().out
    assert "cpu is WRONG and gets no speed" in shown
    assert not any(line.startswith("cpu ") and "ms" in line for line in shown.splitlines())


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["topk_atention"], "'topk_attention'"),
        (["topk_attention", "--dtype", "bf61"], "'bf16'"),
        (["topk_attention", "--shpe", "1,1,8,64"], "--shape"),
        (["masked_attention", "--branch", "3"], "--branches"),
        (["masked_attention", "--layout", "chanel"], "'channel'"),
        (["masked_attention", "--mask", "shard"], "'shared'"),
        (["topk_attention", "--device", "cdua"], "'cuda'"),
        (["topk_attention", "--shape", "8,48,16"], "1x8x48x16"),
        (["topk_attention", "--shape", "0,1,8,16"], "1x1x8x16"),
        (["masked_attention", "--layout", "token", "--shape", "1,2,3,4,5,6"], "2x3x4x5x6"),
        (["topk_attention", "--shape", "1,1,24,64", "--branches", "30"], "nearest is 24"),
        (["topk_attention", "--branches", "0"], "nearest is 1"),
        (["pyramid_attention", "--levels", "12"], "nearest is 9"),
        (["pyramid_attention", "--branches", "3"], "--levels"),
        (["topk_attention", "--shape", "1,b,3,4"], "whole numbers"),
        (["topk_attention", "--seconds", "-1"], "positive"),
        (["topk_attention", "--json", "/no/such/folder/a.json"], "no folder /no/such/folder"),
        (["--all", "--shape", "1,1,8,64"], "--shape is for one operator"),
        (["--all", "--quick", "--out", "x"], "every case"),
        ([], "--all"),
        (["topk_attention", "--all"], "--all"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_mistakes_are_told_in_one_line(arguments, nearest, capsys):
    assert cli.run(arguments) == 2
    output = capsys.readouterr()
    assert nearest in output.err and output.err.count("\n") == 1 and not output.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(capsys):
    assert cli.run(["--all", "--device", "cuda"]) == 2
    assert "nearest is cpu" in capsys.readouterr().err


def test_given_options_fill_up_from_the_registry():
    args = cli._parse(["masked_attention", "--layout", "token", "--forward-only"])
    (case,), growth = cli._chosen(args)
    assert (case.layout, len(case.shape), case.backward) == ("token", 5, False)  # type: ignore[attr-defined]
    assert growth == []
    everything, growth = cli._chosen(cli._parse(["--all"]))
    assert len(everything) == len(cli.CPU_CASES) and growth
    quick, growth = cli._chosen(cli._parse(["--all", "--quick"]))
    assert {type(case) for case in quick} == set(OPERATORS.values()) and not growth
    assert len(quick) < len(everything)


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [("rich", []), ("matplotlib", ["--html", "a.html"]), ("jinja2", ["--html", "a.html"])],
)
def test_a_missing_library_is_said_before_anything_is_measured(missing, arguments, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    assert cli.run(["topk_attention", *arguments]) == 2
    error = capsys.readouterr().err
    assert f"this needs {missing}: pip install {missing}" in error and error.count("\n") == 1


def test_results_of_a_cpu_do_not_go_by_the_name_of_a_gpu_beside_it(monkeypatch):
    monkeypatch.setattr(machine, "info", lambda: {"gpu": "A GPU", "compute_capability": "9.0"})
    assert machine.machine("cuda")["gpu"] == "A GPU"
    described = machine.machine("cpu")
    assert (described["gpu"], described["compute_capability"]) == (None, None)
    assert described["processor"] == machine.processor_name()


def small(operator: str) -> BenchmarkCase:
    args = cli._parse([operator, *SHAPES[operator]])
    (case,), _ = cli._chosen(args)
    return case


@pytest.fixture
def clock(monkeypatch):
    """Every case takes ten seconds of this clock."""
    now = [0.0]
    measure = run.measure

    def slow(*args, **kwargs):
        now[0] += 10
        return measure(*args, **kwargs)

    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(cli, "measure", slow)


def test_a_limit_leaves_something_of_each_operator(clock, monkeypatch, tmp_path, capsys):
    norm, gate = small("channel_norm"), small("channel_gate")
    other = dataclasses.replace(norm, shape=(1, 4, 5, 6))  # type: ignore[call-arg]
    monkeypatch.setitem(cli.CASES, "cpu", (norm, other, gate))
    monkeypatch.setattr(cli, "GROWTH_CASES", (norm,))
    assert profile("--all", "--limit", "15", "--out", str(tmp_path)) == 0
    (path,) = tmp_path.iterdir()
    results = json.loads(path.read_text())
    assert [row["case"] for row in results["cases"]] == [norm.name, gate.name] and not results["growth"]
    output = capsys.readouterr().err
    assert "15 s are over: 1 left out (case)" in output and "1 left out (growing)" in output
    trace = tmp_path / "a.trace"
    assert profile("--all", "--out", str(tmp_path), "--trace", str(trace)) == 0
    results = json.loads(path.read_text())
    assert [row["case"] for row in results["cases"]] == [norm.name, other.name, gate.name]
    assert f"{gate}: eager" in trace.read_text()
    whole = path.read_text()
    assert profile("--all", "--limit", "15", "--out", str(tmp_path)) == 0
    assert path.read_text() == whole  # what was cut short does not replace it
    partial = path.with_suffix(".json.partial")
    assert len(json.loads(partial.read_text())["cases"]) == 2
    assert profile("--all", "--out", str(tmp_path)) == 0
    assert not partial.exists()  # it is of an earlier run


def test_an_interrupted_run_keeps_what_it_measured(monkeypatch, tmp_path):
    norm, gate = small("channel_norm"), small("channel_gate")
    measure = run.measure

    def interrupted(case, *args, **kwargs):
        if case is gate:
            raise KeyboardInterrupt
        return measure(case, *args, **kwargs)

    monkeypatch.setitem(cli.CASES, "cpu", (norm, gate))
    monkeypatch.setattr(cli, "measure", interrupted)
    out, data, table = tmp_path / "out", tmp_path / "a.json", tmp_path / "a.csv"
    data.write_text("of an earlier run")
    with pytest.raises(KeyboardInterrupt):
        profile("--all", "--out", str(out), "--json", str(data), "--csv", str(table))
    link = tmp_path / "link.csv"
    link.symlink_to(tmp_path / "nothing.csv")
    with pytest.raises(KeyboardInterrupt):
        profile("--all", "--csv", str(link))
    assert link.is_symlink() and not link.with_suffix(".csv.partial").exists()
    (path,) = out.iterdir()
    assert path.name.endswith(".json.partial")
    (row,) = json.loads(path.read_text())["cases"]
    assert row["case"] == norm.name
    assert data.read_text() == "of an earlier run"
    assert data.with_suffix(".json.partial").read_text() == path.read_text()
    assert norm.name in table.with_suffix(".csv.partial").read_text() and not table.exists()


def test_a_link_stays_a_link(monkeypatch, tmp_path):
    norm = small("channel_norm")
    monkeypatch.setitem(cli.CASES, "cpu", (norm,))
    monkeypatch.setattr(cli, "GROWTH_CASES", ())
    link, table = tmp_path / "link.csv", tmp_path / "table.csv"
    link.symlink_to(table)
    assert profile("--all", "--csv", str(link)) == 0
    assert link.is_symlink() and norm.name in table.read_text()


def test_a_case_that_fails_is_said_and_left_out(monkeypatch, tmp_path, capsys):
    norm, gate = small("channel_norm"), small("channel_gate")
    measure = run.measure

    def out_of_memory(case, *args, **kwargs):
        if case is norm:
            raise RuntimeError("out of memory")
        return measure(case, *args, **kwargs)

    monkeypatch.setitem(cli.CASES, "cpu", (norm, gate))
    monkeypatch.setattr(cli, "measure", out_of_memory)
    monkeypatch.setattr(cli, "GROWTH_CASES", (norm,))
    assert profile("--all", "--out", str(tmp_path)) == 1
    (path,) = tmp_path.iterdir()
    (row,) = json.loads(path.read_text())["cases"]
    assert row["case"] == gate.name
    assert capsys.readouterr().err.count("failed: RuntimeError: out of memory") == 2


def test_a_backend_that_fails_gets_no_time(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of\nregisters")

    monkeypatch.setattr(run, "wrong", broken)
    monkeypatch.setattr(run, "runnable_backends", lambda *_: ["cpu"])
    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    row = run.measure(small("channel_norm"), "cpu", torch.float32, 0.05, compiled=True)
    why = "fails: RuntimeError: out of registers"
    assert row["wrong"] == {"cpu": why, "torch.compile": why} and list(row["alternatives"]) == ["eager"]


def test_files_of_data_need_no_library(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(native, "why_no_triton", lambda *_: "not asked here")
    path = tmp_path / "a.json"
    assert profile("masked_attention", *SHAPES["masked_attention"], "--json", str(path)) == 0
    assert json.loads(path.read_text())["cases"] and not capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [(["--help"], 0, "profile"), (["profile", "--help"], 0, "--branches"), (["profle"], 2, "'profile'")],
)
def test_the_command(arguments, status, text):
    path = os.pathsep.join((str(ROOT), str(ROOT / "python")))
    result = subprocess.run(
        [sys.executable, "-m", "restore_kernels", *arguments], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert result.returncode == status and text in result.stdout + result.stderr

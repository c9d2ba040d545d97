"""The profile of a training step: whose time is whose, and that nothing is lost or counted twice."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from restore_kernels.nn import DenseConv2d, DepthwiseConv2d, PointwiseConv2d
from restore_nets import cli, list_models, profiling
from restore_nets.attribution import KINDS, OUTSIDE, break_down, convolution_kind
from restore_nets.flops import step_flops, utilisation
from restore_nets.loss_curves import loss_curves
from restore_nets.profile_report import kind_seconds, mfu, notes, page, tables, title
from restore_nets.profiling import (
    COMPILED,
    EAGER,
    EAGER_LAST,
    OURS,
    OURS_BF16,
    Alternative,
    Step,
    baseline,
    profile_step,
)
from restore_nets.training import PHASES

ROOT = Path(__file__).parents[1]
_U = {"dim": 8, "num_blocks": [1, 1, 1, 1], "heads": [1, 1, 1, 1], "ffn_expansion": 1.0}
TINY = {
    "association": {"n_feat": 4, "heads": 1, "num_blocks": 1, "tokens": 2, "token_layers": 1},
    "ddsa": _U,
    "drsformer": {**_U, "mefc": False},
    "elf": {"n_feat": 4},
    "pa_edsr": {"n_resblocks": 2, "n_feats": 8, "scale": 3},
    "panet": {"n_resblocks": 2, "n_feats": 4},
}
OPERATOR = {
    "association": "masked_attention", "ddsa": "topk_attention", "drsformer": "topk_attention",
    "elf": "masked_attention", "pa_edsr": "pyramid_attention", "panet": "pyramid_attention",
}  # fmt: skip


def tiny(name: str, **others) -> Step:
    return Step(name, 16, options=TINY[name], **others)


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("steps", ROOT / "benchmarks" / "steps.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def result() -> dict:
    return profile_step(tiny("drsformer"), seconds=0.0)


@pytest.mark.parametrize("name", list_models())
def test_every_second_of_a_step_is_attributed_once(name):
    breakdown = Alternative(tiny(name), OURS).profiled(steps=2)
    assert breakdown.phases.keys() == set(PHASES)
    ways = {
        "phases": sum(breakdown.phases.values()),
        "kinds": sum(sum(kind.values()) for kind in breakdown.kinds.values()),
        "modules": sum(module.exclusive for module in breakdown.modules.values()),
        "operators": sum(seconds for _, seconds in breakdown.operators.values()),
    }
    for way, seconds in ways.items():
        assert seconds == pytest.approx(breakdown.seconds, rel=1e-6), way
    attention = breakdown.modules[OPERATOR[name]]
    assert attention.calls and attention.forward and attention.backward
    assert breakdown.kinds["attention"].keys() == {"forward", "backward"}
    assert breakdown.kinds["dense convolution"].keys() == {"forward", "backward"}
    whole = breakdown.modules[type(Alternative(tiny(name), OURS).trainer.model).__name__]
    assert whole.calls == 1 and whole.inclusive < breakdown.seconds
    assert all(0 <= m.exclusive <= m.inclusive * (1 + 1e-9) for m in breakdown.modules.values())


class Mixed(nn.Module):
    """One of each: with an input that needs no gradient, and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 4, 3, groups=4)
        self.last = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 1))

    def forward(self, x):
        return self.last(self.grouped(self.depthwise(self.first(x))))


def test_work_is_that_of_its_module_and_kind():
    model, image = Mixed(), torch.rand(1, 3, 16, 16)

    def step(ranges):
        with ranges.of("forward"):
            y = model(image)
        with ranges.of("loss"):
            loss = y.mul(2).square().mean()
        with ranges.of("backward"):
            loss.backward()

    found = break_down(step, model, steps=2)
    for kind in ("depthwise", "grouped", "pointwise", "dense"):
        assert found.kinds[f"{kind} convolution"].keys() == {"forward", "backward"}
    assert found.kinds["activation, gate"].keys() == {"forward", "backward"}  # ReLU; the loss's mul is not
    assert found.operators["aten::convolution_backward"][0] == 4
    assert {name: module.calls for name, module in found.modules.items() if name[0] != "("} == {
        "Mixed": 1, "Conv2d": 4, "Sequential": 1, "ReLU": 1,
    }  # fmt: skip
    convolutions = sum(sum(found.kinds[f"{kind} convolution"].values()) for kind in (
        "depthwise", "grouped", "pointwise", "dense",
    ))  # fmt: skip
    assert convolutions <= found.modules["Conv2d"].exclusive <= 1.0001 * found.modules["Mixed"].inclusive
    assert found.modules["(loss)"].backward > 0
    assert not model._forward_hooks and not model.first._forward_pre_hooks


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (DepthwiseConv2d(8, 8, 3), "depthwise"),
        (DepthwiseConv2d(8, 4, 3), "grouped"),
        (PointwiseConv2d(8, 4), "pointwise"),
        (DenseConv2d(8, 4), "dense"),
    ],
)
def test_own_convolutions_are_of_their_kind(model, kind):
    image = torch.rand(1, 8, 40, 40, requires_grad=True)

    def step(ranges):
        with ranges.of("forward"):
            y = model(image)
        with ranges.of("backward"):
            y.sum().backward()

    found = break_down(step, model, steps=2)
    assert found.kinds[f"{kind} convolution"].keys() == {"forward", "backward"}


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        ((8, 1, 5, 5), "depthwise"),
        ((4, 2, 3, 3), "grouped"),
        ((6, 8, 1, 1), "pointwise"),
        ((6, 8, 3, 3), "dense"),
    ],
)
def test_convolution_kinds(weight, kind):
    assert convolution_kind((2, 8, 9, 9), weight) == f"{kind} convolution"


def test_a_result(result):
    assert result["wrong"] == {} and list(result["alternatives"]) == [EAGER, EAGER_LAST, OURS]
    rows = result["alternatives"]
    ours, eager = rows[OURS], rows[baseline(rows)]
    assert eager["median"] == min(rows[EAGER]["median"], rows[EAGER_LAST]["median"])
    assert [row["memory_format"] for row in rows.values()] == ["NCHW", "channels_last", "NCHW"]
    for row in rows.values():
        assert row["loss"] == pytest.approx(ours["loss"], rel=1e-6)
        assert row["runs"] >= profiling.MIN_RUNS and 0 < row["p20"] <= row["median"] <= row["p80"]
        assert sum(phase["share"] for phase in row["phases"].values()) == pytest.approx(1)
        together = sum(phase["median"] for phase in row["phases"].values())
        assert row["phases"].keys() == set(PHASES) and together < 1.5 * row["p80"]
        assert row["peak_extra_bytes"] is None or row["peak_extra_bytes"] > 0
    kernels = [
        [name for name in row["breakdown"]["operators"] if name.startswith("restore_kernels::")]
        for row in (eager, ours)
    ]
    assert kernels[0] == []
    assert kernels[1] or result["machine"]["backends"]["cpu"] != "available"


def test_the_report_shows_all_of_it(result):
    text = page(result)
    assert text.count("<svg") == 2 and not re.search(r'(src|href)="(?!#|data:)', text)
    assert "1x3x16x16" in title(result)
    steps, kinds, modules, operators = tables(result)
    rows = result["alternatives"]
    assert [row[0] for row in steps.rows] == [EAGER, EAGER_LAST, OURS]
    assert {row[0] for row in kinds.rows} == set(kind_seconds(rows[baseline(rows)]["breakdown"]))
    assert {"TransformerBlock", "topk_attention"} <= {row[0] for row in modules.rows}
    assert OUTSIDE in {row[0] for row in operators.rows}
    for table in (steps, kinds, modules, operators):
        assert {len(row) for row in table.rows} == {len(table.columns)}


@pytest.mark.parametrize("dtype", profiling.DTYPES)
def test_a_wrong_gradient_gets_no_times(dtype, monkeypatch):
    """A thousandth of one tensor's gradient is enough in float32; bf16 itself rounds by more."""
    step = tiny("panet", dtype=dtype)
    fault = {"float32": 1e-3, "bf16": 1.0}[dtype]
    call = Alternative.__call__
    monkeypatch.setattr(profiling, "_memory", lambda *_: None)

    def faulty(self):
        loss = call(self)
        if self.backend == "auto":
            self.trainer.model.head[0].weight.grad.mul_(1 + fault)
        return loss

    assert profiling._check(step, {n: Alternative(step, n) for n in (EAGER, OURS)})[1] == {}
    monkeypatch.setattr(Alternative, "__call__", faulty)
    result = profile_step(step, seconds=0.0)
    assert list(result["alternatives"]) == [EAGER, EAGER_LAST]
    assert "gradient differs" in result["wrong"][OURS]
    assert "wrong: gradient" in tables(result)[0].rows[2][1]


@pytest.mark.parametrize(("draws", "right"), [(2, False), (3, True)])
def test_rounding_is_drawn_until_it_does_as_much(draws, right, monkeypatch):
    """As where it decides between two equal scores: here the third draw jumps as our step does."""
    step, call, move = tiny("panet"), Alternative.__call__, Alternative.move_weights
    jumping = set()

    def move_weights(self, epsilon, seed):
        move(self, epsilon, seed)
        if seed == 2:
            jumping.add(self)

    monkeypatch.setattr(profiling, "MOST_DRAWS", draws)
    monkeypatch.setattr(Alternative, "move_weights", move_weights)
    monkeypatch.setattr(
        Alternative, "__call__",
        lambda self: call(self) * (1.01 if self.backend == "auto" or self in jumping else 1),
    )  # fmt: skip
    wrong = profiling._check(step, {name: Alternative(step, name) for name in (EAGER, OURS)})[1]
    assert (wrong == {}) == right and wrong.keys() <= {OURS}


@pytest.mark.parametrize("name", list_models())
def test_bf16_beside_float32_is_judged_by_what_bf16_does_in_eager(name, monkeypatch):
    """A gradient half as large again is wrong; what bf16 itself does to one is not."""
    step = tiny(name)
    alternatives = {which: Alternative(step, which) for which in (EAGER, OURS_BF16)}
    losses, wrong = profiling._check(step, alternatives)
    assert wrong == {} and losses[OURS_BF16] != losses[EAGER]
    right = Alternative.gradient
    monkeypatch.setattr(
        Alternative, "gradient", lambda self: right(self) * (1.5 if self.backend == "auto" else 1)
    )
    assert "gradient differs" in profiling._check(step, alternatives)[1][OURS_BF16]


def test_eager_is_measured_in_both_memory_formats():
    seen = {}

    def keep(name):
        def hook(module, args, output):
            seen[name] = args[0].is_contiguous(memory_format=torch.channels_last)

        return hook

    for name in (EAGER, EAGER_LAST, OURS):
        alternative = Alternative(tiny("panet"), name)
        alternative.trainer.model.body[0].register_forward_hook(keep(name))
        alternative()
    assert seen == {EAGER: False, EAGER_LAST: True, OURS: False}


def test_compiled_eager_is_an_alternative(monkeypatch):
    monkeypatch.setattr(profiling, "_memory", lambda *_: None)
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: setattr(self, "was_compiled", True))
    result = profile_step(tiny("panet"), (EAGER, OURS, COMPILED), seconds=0.0)
    assert list(result["alternatives"]) == [EAGER, OURS, COMPILED]
    assert "breakdown" not in result["alternatives"][COMPILED]
    assert result["alternatives"][COMPILED]["peak_extra_bytes"] is None
    assert len(tables(result)[0].rows) == 3


OPTIONS = [part for key, value in TINY["panet"].items() for part in ("--option", f"{key}={value}")]


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(profiling, "SECONDS", 0.0)
    memory = profiling._memory  # which takes a process for each alternative: of one it shows as much
    monkeypatch.setattr(profiling, "_memory", lambda step, name: memory(step, name) if name == OURS else None)
    out, html = tmp_path / "step.json", tmp_path / "step.html"
    arguments = ["--model", "panet", "--size", "12", "--batch", "2", "--dtype", "bf16", *OPTIONS]
    assert cli.run(["profile", *arguments, "--out", str(out), "--html", str(html)]) == 0
    shown = capsys.readouterr().out
    assert "panet" in shown and "2x3x12x12, bf16" in shown and "attention, backward" in shown
    result = json.loads(out.read_text())
    assert result["step"]["batch"] == 2 and result["alternatives"].keys() == {EAGER, EAGER_LAST, OURS}
    assert result["alternatives"][OURS]["peak_extra_bytes"] > 0
    assert html.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--model'"),
        (["--model", "drsfomer"], "got 'drsfomer', did you mean drsformer?"),
        (["--model", "panet", "--dtype", "float23"], "got 'float23', did you mean float32"),
        (["--model", "panet", "--dtype", "bf61"], "got 'bf61', did you mean bf16"),
        (["--model", "panet", "--size", "0"], "size must be at least 1; got 0"),
        (["--model", "panet", "--size", "big"], "Invalid value for '--size'"),
        (["--model", "panet", "--batch", "-1"], "batch must be at least 1; got -1"),
        (["--model", "panet", "--siez", "48"], "No such option: --siez (Possible options: --size)"),
        (["--model", "panet", "--option", "n_feat=4"], "did you mean n_feats"),
        (["--model", "panet", "--out", "absent/a.json"], "there is no folder absent"),
        (["--model", "panet", "--html", "."], "it is a folder"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["profile", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "ways"),
    [
        ([], [EAGER, EAGER_LAST, OURS, OURS_BF16]),
        (["--compile"], [EAGER, EAGER_LAST, COMPILED, OURS, OURS_BF16]),
        (["--no-bf16"], [EAGER, EAGER_LAST, OURS]),
    ],
)
def test_the_driver_measures_what_it_is_told(arguments, ways, tmp_path, monkeypatch):
    """Each step in these ways, and the losses of a network at the first of its sizes only."""
    steps, measured, curves = script(), [], []

    class Curves:
        def data(self) -> list:
            return []

    def profile(step, names, **_):
        measured.append((step.model, step.size, list(names)))
        return {"step": asdict(step)}

    def losses(step, **_):
        curves.append(step.model)
        return Curves()

    monkeypatch.setattr(steps, "profile_step", profile)
    monkeypatch.setattr(steps, "loss_curves", losses)
    monkeypatch.setattr(steps, "RESULTS", tmp_path)
    monkeypatch.setattr(steps, "write_page", lambda: None)
    monkeypatch.setattr("sys.argv", ["steps.py", "panet:96", "elf", *arguments])
    steps.main()
    assert measured == [("elf", 128, ways), ("panet", 96, ways)] and curves == ["elf"]
    (path,) = tmp_path.iterdir()
    assert ["losses" in result for result in json.loads(path.read_text())] == [True, False]
    assert steps.chosen([]) == list(steps.STEPS)
    assert [step.size for step in steps.chosen(["panet"])] == [48, 96]


@pytest.mark.parametrize("name", ["panet:50", "pant", "elf:"])
def test_the_driver_names_the_steps_there_are(name, monkeypatch, capsys):
    steps = script()
    monkeypatch.setattr("sys.argv", ["steps.py", name])
    with pytest.raises(SystemExit):
        steps.main()
    assert (
        f"elf, elf:128, pa_edsr, pa_edsr:48, panet, panet:48, panet:96; got {name}" in capsys.readouterr().err
    )


def test_the_page_of_training_shows_the_results():
    steps = script()
    assert steps.PAGE.read_text() == steps.page(), "run python benchmarks/steps.py --table"


def test_the_page_has_all_of_a_result(result):
    """Also what is wrong and what was not measured, and a second size of the same network."""
    steps = script()
    curves = loss_curves(tiny("panet"), steps=2)
    wrong = {**result, "step": {**result["step"], "size": 24}, "wrong": {OURS_BF16: "loss differs"}}
    text = steps.machine_tables([{**result, "losses": curves.data()}, wrong])
    assert all(kind.split(" ")[0] in text for kind in KINDS)
    rows = [line for line in text.splitlines() if line.startswith("| drsformer")]
    assert rows[0].startswith("| drsformer 16x16 |") and rows[0].count("NCHW") == 2
    assert rows[0].count("not measured") == 2 and rows[1].count("wrong") == 1
    times = result["alternatives"]
    assert rows[0].split(" | ")[4] == f"{times[EAGER]['median'] / times[OURS]['median']:.2f}x"
    assert "- drsformer 24x24, ours, bf16: loss differs" in text
    (losses,) = (line for line in rows if f"{curves.ours[0]:.4f}" in line)
    assert " follows " in losses
    assert {line.count("|") for line in text.splitlines() if line.startswith("| panet ")} == {10, 13}


def test_operations_of_a_step_are_three_times_those_of_forward():
    flops = step_flops("panet", {"n_resblocks": 2, "n_feats": 8}, 1, 16)
    twice = step_flops("panet", {"n_resblocks": 2, "n_feats": 8}, 2, 16)
    assert flops > 0 and flops % 3 == 0 and twice == 2 * flops
    more = step_flops("panet", {"n_resblocks": 4, "n_feats": 8}, 1, 16) - flops
    assert more == 3 * 4 * (2 * 8 * 8 * 9 * 16 * 16)  # of two blocks with two 3x3 convolutions each


def with_rates(result: dict, ours: float, eager: float) -> dict:
    """The result of a machine on which ours, and eager PyTorch in both formats, reach these utilisations."""
    alternatives = {name: dict(row) for name, row in result["alternatives"].items()}
    for name, row in alternatives.items():
        row["median"] = result["flops"] / (1e9 * (ours if name == OURS else eager))
    machine = {**result["machine"], "flops_per_second": 1e9}
    return {**result, "machine": machine, "alternatives": alternatives}


def test_utilisation_is_of_the_highest_rate_of_the_machine(result):
    steps = script()
    measured = with_rates(result, 0.83, 0.44)
    measured["alternatives"][OURS_BF16] = dict(measured["alternatives"][OURS])
    assert [mfu(measured, name) for name in (OURS, EAGER, OURS_BF16, COMPILED)] == ["83%", "44%", "", ""]
    older = {name: value for name, value in measured.items() if name != "flops"}
    older["machine"] = {**measured["machine"], "flops_per_second": None}
    slower = {**measured, "machine": {**measured["machine"], "flops_per_second": 5e8}}
    for others in ([], [slower], [older]):
        lines = steps.machine_tables([measured, *others]).splitlines()
        assert next(line for line in lines if line.startswith("| drsformer")).endswith("| 83% | 44% |")
        assert "MFU is of 1 GFLOP/s." in lines
    assert "MFU" not in " ".join(notes({**result, "machine": older["machine"]}))


def test_the_rate_of_products_is_measured(result):
    assert result["flops"] == step_flops("drsformer", TINY["drsformer"], 1, 16)
    assert result["machine"]["flops_per_second"] == pytest.approx(tiny("drsformer").peak_flops(), rel=0.9)
    assert utilisation(6, 2.0, 10.0) == pytest.approx(0.3)

"""The profile of a training step on a GPU: whose the kernels are. Most of it shows without a GPU."""

from __future__ import annotations

import gc
import weakref
from dataclasses import asdict, replace

import pytest
import torch
from test_step_profile import script, tiny
from torch.autograd.profiler_util import FunctionEvent

from restore_nets import cli, list_models, profiling
from restore_nets.attribution import Breakdown, Ranges, attribute
from restore_nets.loss_curves import loss_curves
from restore_nets.profile_report import page, tables, title
from restore_nets.profiling import EAGER, EAGER_LAST, OURS, Alternative, profile_step
from restore_nets.training import PHASES, Trainer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def event(name: str, kernels: tuple[tuple[str, float], ...] = (), inside: tuple[FunctionEvent, ...] = ()):
    """An event of the CPU that started kernels of so many microseconds."""
    made = FunctionEvent(id=0, name=name, thread=0, start_us=0, end_us=1000)
    made.input_shapes = [[1, 4, 8, 8], [4, 4, 1, 1]]
    for kernel, microseconds in kernels:
        made.append_kernel(kernel, 0, microseconds)
    for child in inside:
        made.append_cpu_child(child)
    return made


def test_a_kernel_counts_where_it_was_started():
    ranges = Ranges()
    with ranges.of("forward"), ranges.of("Net"), ranges.of("Conv2d"):
        pass
    forward, net, conv = (f"restore_nets::range {i}" for i in range(3))
    aten = event(
        "aten::conv2d", (("pad", 2.0),), (event("aten::cudnn_convolution", (("implicit_gemm", 40.0),)),)
    )
    inside = event(net, (), (event(conv, (), (aten,)), event("aten::add", (("add", 8.0),))))
    found = attribute(ranges, [event(forward, (), (inside,))], on_gpu=True)
    assert found.seconds == pytest.approx(50e-6) and found.phases == {"forward": pytest.approx(50e-6)}
    assert found.kinds["pointwise convolution"] == {"forward": pytest.approx(42e-6)}
    assert found.kinds["other"] == {"forward": pytest.approx(8e-6)}
    assert found.modules["Conv2d"].exclusive == pytest.approx(42e-6)
    assert found.modules["Net"].exclusive == pytest.approx(8e-6)
    assert found.operators["aten::cudnn_convolution"] == (1, pytest.approx(40e-6))
    on_cpu = attribute(ranges, [event(forward)])
    assert on_cpu.seconds == pytest.approx(1e-3)


class Reached:
    """As torch.cuda.Event: when the device got there, in milliseconds."""

    now = 0.0

    def __init__(self) -> None:
        Reached.now += 2.0
        self.at = Reached.now

    def elapsed_time(self, later: Reached) -> float:
        return later.at - self.at


def test_phases_are_between_events_of_the_device(monkeypatch):
    monkeypatch.setattr(profiling.recording, "now", lambda device: Reached())
    alternative = Alternative(tiny("panet"), OURS)
    for _ in range(3):
        alternative()
    phases = alternative.phases(runs=2)
    assert phases.keys() == set(PHASES)
    for phase in phases.values():
        assert phase["median"] == pytest.approx(2e-3) and phase["runs"] == 2
        assert phase["share"] == pytest.approx(0.25)


def test_rounding_of_float32_is_that_of_the_products(monkeypatch):
    monkeypatch.setattr(profiling, "available_device", torch.device)
    assert tiny("panet").epsilon == torch.finfo(torch.float32).eps
    on_gpu = tiny("panet", device="cuda")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert on_gpu.epsilon == 2.0**-10
    assert replace(on_gpu, dtype="bf16").epsilon == torch.finfo(torch.bfloat16).eps
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert on_gpu.epsilon == torch.finfo(torch.float32).eps


def test_the_driver_has_every_network_in_bf16(monkeypatch):
    monkeypatch.setattr(profiling, "available_device", torch.device)
    steps = script()
    found = steps.chosen([], "cuda")
    assert [step.model for step in found] == list_models()
    assert {(step.size, step.batch, step.dtype, step.device) for step in found} == {(128, 8, "bf16", "cuda")}


def test_out_of_memory_loses_one_alternative_only(monkeypatch):
    monkeypatch.setattr(profiling, "_memory", lambda *_: None)
    call = Alternative.__call__

    def full(self):
        if self.memory_format == torch.channels_last:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(self)

    monkeypatch.setattr(Alternative, "__call__", full)
    result = profile_step(tiny("panet"), seconds=0.0)
    assert list(result["alternatives"]) == [EAGER, OURS]
    assert result["wrong"] == {EAGER_LAST: "it ran out of memory"}


def test_no_network_outlives_its_alternative():
    """Without waiting for the garbage collector, which sees nothing of a GPU's memory."""
    gc.disable()
    try:
        alternative = Alternative(tiny("panet"), OURS)
        alternative()
        model = weakref.ref(alternative.trainer.model)
        del alternative
        assert model() is None
    finally:
        gc.enable()


def test_losses_are_compared_without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen, train = [], Trainer.train

    def look(self, *args, **options):
        seen.append(torch.backends.cudnn.allow_tf32)
        return train(self, *args, **options)

    monkeypatch.setattr(Trainer, "train", look)
    loss_curves(tiny("panet"), steps=1, first_steps=1)
    assert len(seen) == 6 and not any(seen) and torch.backends.cudnn.allow_tf32


def test_out_of_memory_loses_one_step_only(tmp_path, monkeypatch, capsys):
    steps = script()

    def profile(step, names, **_):
        if step.model == "panet":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"step": asdict(step)}

    monkeypatch.setattr(steps, "profile_step", profile)
    monkeypatch.setattr(steps, "RESULTS", tmp_path)
    monkeypatch.setattr(steps, "write_page", lambda: None)
    monkeypatch.setattr(steps, "loss_curves", lambda step, **_: pytest.fail("the second size has none"))
    path = steps.measure([steps.Step("panet", 96), steps.Step("pa_edsr", 96)], (EAGER,))
    assert "pa_edsr" in path.read_text() and '"panet"' not in path.read_text()
    assert "panet 96x96: not measured: CUDA out of memory" in capsys.readouterr().out


def test_results_of_a_gpu_name_it():
    result = profile_step(tiny("panet", dtype="bf16"), (EAGER, OURS), seconds=0.0)
    result["machine"]["gpu"] = "NVIDIA H200"
    result["step"] |= {"batch": 8, "size": 128}
    assert "8x3x128x128, bf16, on NVIDIA H200, torch" in title(result)
    text = script().machine_tables([result])
    rows = [line for line in text.splitlines() if line.startswith("| drsformer")]
    assert rows[0].startswith("| drsformer 8x128x128, bf16 | not measured |")
    assert "| panet 8x128x128, bf16 | " in text and "## NVIDIA H200" in text


def test_a_device_that_cannot_be_profiled_has_no_breakdown(monkeypatch):
    nothing = Breakdown(0.0, {}, {}, {}, {})
    monkeypatch.setattr(Alternative, "profiled", lambda self, steps: nothing)
    monkeypatch.setattr(profiling, "_memory", lambda *_: None)
    result = profile_step(tiny("panet"), (EAGER, OURS), seconds=0.0)
    assert not any("breakdown" in row for row in result["alternatives"].values())
    assert [len(table.rows) for table in tables(result)] == [2, 0, 0, 0]
    assert page(result).count("<svg") == 1 and "| panet 16x16 |" in script().machine_tables([result])


def test_no_gpu_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cli.run(["profile", "--model", "panet", "--device", "cuda"]) == 2
    assert "torch finds 0 CUDA devices" in capsys.readouterr().err


@needs_gpu
@pytest.mark.parametrize("dtype", profiling.DTYPES)
def test_a_step_on_the_gpu(dtype):
    result = profile_step(tiny("drsformer", dtype=dtype, device="cuda"), (EAGER, OURS), seconds=0.0)
    assert result["wrong"] == {} and result["machine"]["gpu"]
    for row in result["alternatives"].values():
        assert row["peak_extra_bytes"] > 0 and row["median"] > 0
        assert sum(phase["median"] for phase in row["phases"].values()) < 1.5 * row["p80"]
    breakdown = result["alternatives"][OURS]["breakdown"]
    assert 0 < breakdown["seconds"] < 10 * result["alternatives"][OURS]["p80"]
    assert sum(breakdown["phases"].values()) == pytest.approx(breakdown["seconds"])
    assert breakdown["kinds"]["attention"].keys() == {"forward", "backward"}
    assert all(breakdown["kinds"]["attention"].values())
    assert all(len(set(map(len, table.rows))) == 1 for table in tables(result))

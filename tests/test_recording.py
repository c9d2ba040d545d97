"""restore_kernels.record(): what it counts, that it changes nothing, and what it costs when off."""

from __future__ import annotations

import json
import threading
import time
import timeit
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import restore_kernels
from restore_kernels import native, recording

BACKENDS = ["eager"] if native.why_no_cpu_library() else ["eager", "cpu"]
IMAGE = (1, 4, 6, 7)

OPERATORS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "topk_attention_channel": (restore_kernels.topk_attention, {"topk": [2, None]}),
    "topk_attention_token": (restore_kernels.topk_attention, {"topk": [2], "layout": "token"}),
    "masked_attention_channel": (restore_kernels.masked_attention, {}),
    "masked_attention_token": (restore_kernels.masked_attention, {"layout": "token"}),
    "pyramid_attention": (restore_kernels.pyramid_attention, {}),
    "pyramid_attention_hard": (restore_kernels.pyramid_attention, {"hard": True}),
}


def call(name: str, q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    operator, options = OPERATORS[name]
    levels = operator is restore_kernels.pyramid_attention
    return operator(q, [k] if levels else k, [v] if levels else v, **options, backend=backend)


def leaves(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(IMAGE, generator=generator).requires_grad_() for _ in "qkv"]


def step(name: str, backend: str, x: list[Tensor]) -> Tensor:
    out = call(name, *x, backend=backend)
    out.backward(torch.ones_like(out))
    return out.detach()


def counted(records: recording.Records) -> dict[tuple[str, str, str], int]:
    return {(x.operator, x.direction, x.backend): x.calls for x in records}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATORS)
def test_counts_calls_time_and_bytes_of_both_passes(name, backend):
    x = leaves()
    with restore_kernels.record() as records:
        for _ in range(3):
            step(name, backend, x)
        with torch.no_grad():
            call(name, *x, backend=backend)
    assert counted(records) == {(name, "forward", backend): 4, (name, "backward", backend): 3}
    for found in records:
        assert found.seconds > 0
        assert found.bytes >= found.calls * 4 * x[0].nbytes * (0.5 if "hard" in name else 1)
        assert f"{found.operator} " in str(records)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATORS)
def test_results_are_the_same(name, backend):
    plain, seen = leaves(), leaves()
    expected = step(name, backend, plain)
    with restore_kernels.record():
        found = step(name, backend, seen)
    assert torch.equal(found, expected)
    for a, b in zip(plain, seen, strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_time_is_that_of_the_call():
    """Not that of anything around it."""

    def wait(_: Tensor | None = None) -> None:
        time.sleep(0.2)

    q, k, v = (torch.randn(1, 1, 32, 4096, requires_grad=True) for _ in "qkv")
    for backend in BACKENDS:
        with restore_kernels.record() as records:
            out = restore_kernels.topk_attention(q, k, v, [16], backend=backend)
            wait()
            y = out * 2
            y.register_hook(wait)
            q.register_hook(wait)
            y.sum().backward()
        assert len(records) == 2 and all(x.seconds < 0.15 for x in records)


def test_nothing_is_recorded_outside():
    x = leaves()
    before = call("masked_attention_channel", *x)
    with restore_kernels.record() as records:
        pass
    before.sum().backward()
    step("masked_attention_channel", "eager", x)
    assert counted(records) == {} and len(records) == 0


def test_recordings_nest_and_end_on_errors():
    x = leaves()
    with restore_kernels.record() as outer:
        step("masked_attention_channel", "eager", x)
        with pytest.raises(ValueError, match="layout"), restore_kernels.record() as inner:
            step("masked_attention_channel", "eager", x)
            restore_kernels.masked_attention(*x, layout="chanel")
    key = ("masked_attention_channel", "forward", "eager")
    assert counted(outer)[key] == 2 and counted(inner)[key] == 1
    assert recording.active == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_count_into_one_recording(backend):
    def work(seed: int) -> None:
        x = leaves(seed)
        for _ in range(20):
            step("topk_attention_channel", backend, x)

    with restore_kernels.record() as records:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(counted(records).values()) == {80}


@pytest.mark.parametrize("backend", BACKENDS)
def test_passes_are_ranges_of_the_profiler(backend, tmp_path):
    x = leaves()
    with restore_kernels.record(), torch.profiler.profile() as profiler:
        step("topk_attention_channel", backend, x)
    path = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(path))
    names = {event["name"] for event in json.loads(path.read_text())["traceEvents"]}
    assert f"restore_kernels::topk_attention_channel ({backend})" in names
    if backend != "eager":
        assert f"restore_kernels::topk_attention_channel_backward ({backend})" in names


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_graphs_are_whole_and_not_recorded(backend):
    """Neither a break nor a second compilation because of a recording."""
    compilations = []

    def compiler(graph, _):
        compilations.append(graph)
        return graph.forward

    torch.compiler.reset()
    function = torch.compile(
        lambda q, k, v: restore_kernels.topk_attention(q, k, v, [2], backend=backend) * 2,
        fullgraph=True, backend=compiler,
    )  # fmt: skip
    x = [leaf.detach() for leaf in leaves()]
    expected = function(*x)
    with restore_kernels.record() as records:
        found = function(*x)
    assert torch.equal(found, expected) and len(compilations) == 1 and len(records) == 0
    torch.compiler.reset()
    with restore_kernels.record() as records:
        assert torch.equal(function(*x), expected)
    assert len(compilations) == 2 and len(records) == 0


def test_eager_can_still_be_differentiated_twice():
    x = [leaf.detach().double().requires_grad_() for leaf in leaves()]
    with restore_kernels.record() as records:
        assert torch.autograd.gradgradcheck(
            lambda *x: call("masked_attention_channel", *x, backend="eager"), x
        )
    assert counted(records)[("masked_attention_channel", "backward", "eager")] > 0


def test_function_transforms_work():
    x = [leaf.detach() for leaf in leaves()]
    for backend in BACKENDS:

        def loss(q, k, v, backend=backend):
            return call("topk_attention_channel", q, k, v, backend=backend).sum()

        expected = torch.func.grad(loss)(*x)
        with restore_kernels.record():
            assert torch.allclose(torch.func.grad(loss)(*x), expected, rtol=1e-5, atol=1e-6)


class FakeEvent:
    """Of a GPU that is done with everything after a synchronization, one millisecond per event."""

    count = 0
    waits = 0

    def __init__(self) -> None:
        FakeEvent.count += 1
        self.time = FakeEvent.count

    def query(self) -> bool:
        return FakeEvent.waits > 0

    def synchronize(self) -> None:
        FakeEvent.waits += 1

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.time - self.time


def test_gpu_times_are_read_late(monkeypatch):
    """Nothing waits for the device before the records are read; then every call counts."""
    monkeypatch.setattr(recording, "now", lambda _: FakeEvent())
    monkeypatch.setattr(FakeEvent, "waits", 0)
    x = leaves()
    calls = 2 * recording._PENDING
    with restore_kernels.record() as records, torch.no_grad():
        for _ in range(calls):
            call("masked_attention_channel", *x, backend="eager")
    assert FakeEvent.waits == 0
    (found,) = records
    assert FakeEvent.waits == calls
    assert found.calls == calls and found.seconds == pytest.approx(calls * 1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    x = [leaf.detach().cuda().requires_grad_() for leaf in leaves()]
    with restore_kernels.record() as records:
        step("topk_attention_channel", "auto", x)
    assert sum(found.calls for found in records) == 2 and all(found.seconds > 0 for found in records)


def test_costs_next_to_nothing_when_off():
    """What is asked when nothing records takes less than a hundredth of the smallest call."""
    x = [leaf.detach() for leaf in leaves()]
    question = "not torch.compiler.is_compiling() and recording.active"
    asking = min(timeit.repeat(question, globals=globals(), number=10_000, repeat=7)) / 10_000
    calling = min(timeit.repeat(lambda: call("topk_attention_channel", *x), number=200, repeat=7)) / 200
    assert asking < 1e-2 * calling

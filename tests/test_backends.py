"""Which backend runs a call, and what is said of the others."""

from __future__ import annotations

import json
import threading

import pytest
import torch

import restore_kernels
from restore_kernels import (
    backends,
    choices,
    coverage,
    explain,
    masked_attention,
    native,
    pyramid_attention,
    topk_attention,
    use_backend,
)
from restore_kernels.topk_attention import api, autograd


@pytest.fixture
def qkv() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 2, 4, 9, generator=generator) for _ in range(3))


@pytest.fixture
def without_libraries(monkeypatch) -> None:
    monkeypatch.setattr(native, "why_no_cpu_library", lambda: "it was not built")
    monkeypatch.setattr(native, "loaded_cpu_module", None)
    monkeypatch.setattr(native, "why_no_triton", lambda *_: "it is not installed")
    monkeypatch.setattr(native, "why_no_cuda", lambda *_: "there is no GPU")


@pytest.fixture
def everything_runs(monkeypatch) -> list[str]:
    """Every backend seems to run; the names of those called are collected instead of calling them."""
    called: list[str] = []

    def record(q, k, v, *rest):
        called.append(rest[-1])
        return v

    monkeypatch.setattr(api.autograd, "channel", record)
    monkeypatch.setattr(api.reference, "channel", lambda q, k, v, *_: called.append("eager") or v)
    monkeypatch.setattr(native, "loaded_cpu_module", None)
    monkeypatch.setattr(backends, "_REASONS", dict.fromkeys(backends._REASONS, lambda _: None))
    return called


def test_the_call_wins_over_the_block_and_the_block_over_the_process(everything_runs, qkv, monkeypatch):
    monkeypatch.setenv("RESTORE_KERNELS_BACKEND", "triton")
    topk_attention(*qkv, [2])
    with use_backend("cpu"):
        topk_attention(*qkv, [2])
        with use_backend("eager"):
            topk_attention(*qkv, [2])
            topk_attention(*qkv, [2], backend="cuda")
        topk_attention(*qkv, [2])
    topk_attention(*qkv, [2])
    assert everything_runs == ["triton", "cpu", "eager", "cuda", "cpu", "triton"]


def test_auto_takes_the_first_that_can(everything_runs, qkv):
    topk_attention(*qkv, [2])
    assert everything_runs == [next(iter(backends._REASONS))]


def test_auto_in_a_block_undoes_the_process_wide_choice(everything_runs, qkv, monkeypatch):
    monkeypatch.setenv("RESTORE_KERNELS_BACKEND", "eager")
    with use_backend("auto"):
        topk_attention(*qkv, [2])
    assert everything_runs != ["eager"]


def test_a_block_ends_after_an_error(qkv):
    before = list(backends._requested)
    with pytest.raises(ZeroDivisionError), use_backend("eager"):
        raise ZeroDivisionError
    assert backends._requested == before


def test_backward_runs_where_forward_ran(qkv, monkeypatch):
    """Also outside of the block, and in autograd's own threads."""
    ran = []
    monkeypatch.setattr(native, "why_no_cpu_library", lambda: None)

    def overload(name, backend):
        import topk_attention_contract

        ran.append((name.removeprefix("topk_attention_"), backend))
        return getattr(topk_attention_contract, name.removeprefix("topk_attention_"))

    monkeypatch.setattr(autograd, "overload", overload)
    monkeypatch.setattr(native, "loaded_cpu_module", None)
    q = qkv[0].requires_grad_()
    with use_backend("cpu"):
        out = topk_attention(q, *qkv[1:], [2])
    with use_backend("eager"):
        thread = threading.Thread(target=lambda: out.sum().backward())
        thread.start()
        thread.join()
    assert q.grad is not None
    assert ran == [("channel", "cpu"), ("channel_backward", "cpu")]


@pytest.mark.parametrize("source", ["argument", "block", "process"])
def test_unknown_names(qkv, monkeypatch, source):
    with pytest.raises(ValueError, match="must be one of auto, eager, cpu, triton, cuda; got 'gpu'"):
        if source == "argument":
            topk_attention(*qkv, [2], backend="gpu")
        elif source == "block":
            with use_backend("gpu"):
                pass
        else:
            monkeypatch.setenv("RESTORE_KERNELS_BACKEND", "gpu")
            topk_attention(*qkv, [2])


@pytest.mark.parametrize("name", ["cpu", "triton", "cuda"])
def test_a_named_backend_never_falls_back(without_libraries, qkv, name):
    reason = {"cpu": "it was not built", "triton": "it is not installed", "cuda": "there is no GPU"}[name]
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run this call: .*{reason}"):
        topk_attention(*qkv, [2], backend=name)
    with use_backend(name), pytest.raises(RuntimeError, match=reason):
        topk_attention(*qkv, [2])


def test_of_several_the_first_that_can_runs(everything_runs, qkv, monkeypatch):
    monkeypatch.setitem(backends._REASONS, "cuda", lambda call: "no kernel")
    monkeypatch.setenv("RESTORE_KERNELS_BACKEND", "triton, cpu")
    topk_attention(*qkv, [2])
    topk_attention(*qkv, [2], backend=("cuda", "eager", "cpu"))
    with use_backend("cuda", "cpu"):
        topk_attention(*qkv, [2])
        topk_attention(*qkv, [2], backend=["cuda", "triton"])
        topk_attention(*qkv, [2], backend="eager")
    with use_backend("cuda", "auto"):
        topk_attention(*qkv, [2])
    assert everything_runs == ["triton", "eager", "cpu", "triton", "eager", "cpu"]


def test_of_several_that_cannot_each_says_why(without_libraries, qkv):
    message = (
        "^topk_attention: backend 'cuda' cannot run this call: there is no GPU; "
        "backend 'triton' cannot run this call: it is not installed$"
    )
    with pytest.raises(RuntimeError, match=message), use_backend("cuda", "triton"):
        topk_attention(*qkv, [2])
    explanation = explain(topk_attention, *qkv, [2], backend=["cuda", "triton"])
    assert (explanation.requested, explanation.chosen) == ("cuda, triton", None)
    assert explain(topk_attention, *qkv, [2], backend=("cuda", "auto")).chosen == "eager"
    assert explain(topk_attention, *qkv, [2], backend=("cuda", "eager", "triton")).chosen == "eager"


@pytest.mark.parametrize("names", [(), []])
def test_no_name_at_all(qkv, names):
    with pytest.raises(ValueError, match="backend must name at least one of auto, eager, cpu"):
        topk_attention(*qkv, [2], backend=names)
    with pytest.raises(ValueError, match=r"use_backend\(name\) must name at least one of"), use_backend():
        pass


@pytest.mark.parametrize("backend", [None, 3, ("cpu", "gpu"), ["cpu", None], "cpu,eager"])
def test_what_is_no_name(qkv, backend):
    with pytest.raises(ValueError, match="backend must be one of auto, eager, cpu, triton, cuda; got"):
        topk_attention(*qkv, [2], backend=backend)


def test_without_any_library_everything_runs_in_eager(without_libraries, qkv):
    q, k, v = (x.requires_grad_() for x in qkv)
    topk_attention(q, k, v, [2, None]).sum().backward()
    assert all(x.grad is not None for x in (q, k, v))


def test_explain(without_libraries, qkv):
    explanation = explain(topk_attention, *qkv, [2])
    assert (explanation.requested, explanation.chosen) == ("auto", "eager")
    assert explanation.why_not["cpu"] == "it was not built"
    assert explanation.why_not["triton"] == "it is not installed"
    assert explanation.why_not["eager"] is None
    text = str(explanation)
    assert text.splitlines()[0] == "topk_attention: requested auto, runs on eager"
    assert "no: it was not built" in text and "chosen" in text


def test_explain_says_when_the_requested_backend_cannot_run(without_libraries, qkv):
    with use_backend("cpu"):
        explanation = explain(topk_attention, *qkv, [2])
    assert (explanation.requested, explanation.chosen) == ("cpu", None)
    assert "runs on nothing" in str(explanation)


def test_explain_names_the_dtype_and_the_device(qkv):
    double = [x.double() for x in qkv]
    assert "float64" in (explain(topk_attention, *double, [2]).why_not["triton"] or "")
    meta = [x.to("meta") for x in qkv]
    assert "meta" in (explain(topk_attention, *meta, [2]).why_not["cpu"] or "")


def test_explain_of_masked_attention(without_libraries, qkv):
    mask = torch.ones(9, dtype=torch.bool)
    explanation = explain(masked_attention, *qkv, mask, backend="cpu")
    assert (explanation.operator, explanation.requested, explanation.chosen) == (
        "masked_attention",
        "cpu",
        None,
    )
    assert explanation.why_not["eager"] is None
    assert explanation.why_not["cpu"] == "it was not built"
    assert explain(masked_attention, *qkv).chosen == "eager"
    with pytest.raises(
        RuntimeError, match="masked_attention: backend 'cpu' cannot run this call: it was not"
    ):
        masked_attention(*qkv, mask, backend="cpu")


def test_explain_of_pyramid_attention(without_libraries, qkv):
    query, key, value = qkv
    levels = ([key, key[..., :3, :]], [value, value[..., :3, :]])
    explanation = explain(pyramid_attention, query, *levels, hard=True, backend="cpu")
    assert (explanation.operator, explanation.requested, explanation.chosen) == (
        "pyramid_attention",
        "cpu",
        None,
    )
    assert explanation.why_not["cpu"] == "it was not built"
    assert explain(pyramid_attention, query, *levels).chosen == "eager"
    with pytest.raises(
        RuntimeError, match="pyramid_attention: backend 'cpu' cannot run this call: it was not"
    ):
        pyramid_attention(query, *levels, backend="cpu")
    meta = [[x.to("meta") for x in level] for level in ([query], *levels)]
    assert "meta" in (explain(pyramid_attention, meta[0][0], *meta[1:]).why_not["cpu"] or "")


def test_explain_checks_the_call_and_the_operator(qkv):
    with pytest.raises(ValueError, match=r"topk\[0\] must be between 1 and 4"):
        explain(topk_attention, *qkv, [5])
    with pytest.raises(TypeError, match="operator must be a restore_kernels operator"):
        explain(torch.relu, *qkv)


def test_a_library_that_does_not_load_is_a_reason_and_no_crash(monkeypatch):
    """Such as one built for another version of PyTorch."""

    def fail(name):
        raise ImportError("undefined symbol:\n  _ZN2at4_ops")

    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(native.importlib, "import_module", fail)
    library = native.cpu_library.__wrapped__()
    assert library.module is None
    assert library.why_not is not None and "\n" not in library.why_not
    assert "undefined symbol: _ZN2at4_ops" in library.why_not and torch.__version__ in library.why_not


def test_triton_runs_on_a_gpu_or_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: object())
    assert "CUDA tensor" in (native.why_no_triton("cpu", None) or "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert native.why_no_triton("cpu", None) is None
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in (native.why_no_triton("cpu", None) or "")


def test_info_names_every_backend():
    info = restore_kernels.info()
    assert set(info["backends"]) == set(backends.NAMES) - {"auto"}
    assert info["backends"]["eager"] == "available"
    assert info["torch"] == torch.__version__


MEASURED = [
    {"operator": "topk_attention channel", "dtype": "bfloat16", "capability": "9.0", "shape": shape,
     "seconds": {"cuda": cuda, "triton": 1e-4}}
    for shape, cuda in (([8, 1, 48, 16384], 5e-5), ([8, 8, 48, 256], 2e-4))
]  # fmt: skip


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A table of measurements on GPUs of compute capability 9.0, and such a GPU."""
    (tmp_path / "choices.json").write_text(json.dumps(MEASURED))
    monkeypatch.setattr(choices, "__file__", str(tmp_path / "choices.py"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    choices._table.cache_clear()
    yield
    choices._table.cache_clear()


@pytest.mark.parametrize(
    ("shape", "faster"),
    [((8, 1, 48, 16384), "cuda"), ((1, 1, 32, 4096), "cuda"), ((4, 8, 64, 100), "triton")],
)
def test_the_nearest_measurement_decides(measured, shape, faster):
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    assert choices.faster("topk_attention channel", x) == faster


def reasons(layout, dtype, *shape):
    q = torch.empty(shape, dtype=dtype)
    return explain(masked_attention, q, q, q, layout=layout).why_not


def test_rows_too_long_for_shared_memory_are_refused(monkeypatch):
    """CUDA's, on a GPU of 99 KiB a block, and Triton's float32."""
    monkeypatch.setattr(coverage.native, "why_little_shared_memory", lambda *_: "little shared memory")
    monkeypatch.setitem(backends._REASONS, "cuda", lambda call: None)
    monkeypatch.setitem(backends._REASONS, "triton", lambda call: None)
    for layout, short, long in (
        ("channel", (1, 1, 48, 4), (1, 1, 49, 4)),
        ("token", (1, 1, 4, 64), (1, 1, 4, 65)),
    ):
        assert reasons(layout, torch.float32, *short)["cuda"] is None
        assert reasons(layout, torch.float32, *long)["cuda"] == "little shared memory"
    assert reasons("token", torch.float32, 1, 1, 4, 256)["triton"] is None
    assert "at most 256 in float32, got 257" in reasons("token", torch.float32, 1, 1, 4, 257)["triton"]
    assert reasons("token", torch.bfloat16, 1, 1, 4, 257)["triton"] is None


@pytest.mark.parametrize(("pixels", "scale"), [(16384, 2), (300, 3)])
def test_the_compiler_takes_a_choice_in(measured, pixels, scale):
    """cuda's at many pixels, triton's at few."""
    factors = {"cuda": 2, "triton": 3}

    def scaled(x):
        return x * factors[choices.faster("topk_attention channel", x)]

    x = torch.ones(8, 8, 48, pixels, dtype=torch.bfloat16)
    compiled = torch.compile(scaled, backend="eager", fullgraph=True)
    assert compiled(x)[0, 0, 0, 0] == scaled(x)[0, 0, 0, 0] == scale


def test_what_was_not_measured_gets_the_default(measured, monkeypatch):
    x = torch.empty(8, 1, 48, 16384, dtype=torch.bfloat16, device="meta")
    assert choices.faster("topk_attention token", x) == choices.DEFAULT
    assert choices.faster("topk_attention channel", x.float()) == choices.DEFAULT
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choices.faster("topk_attention channel", x) == choices.DEFAULT


@pytest.mark.parametrize("faster", ["cuda", "triton"])
def test_the_faster_one_comes_first(monkeypatch, faster):
    class OnGPU:
        device = torch.device("cuda", 0)
        dtype = torch.float32

    asked = []
    monkeypatch.setattr(choices, "faster", lambda operator, x: asked.append(operator) or faster)
    monkeypatch.setattr(native, "why_no_cuda", lambda *_: None)
    monkeypatch.setattr(native, "why_no_triton", lambda *_: None)
    call = backends.Call("topk_attention", "channel", (OnGPU(),))  # type: ignore[arg-type]
    assert backends.choose(call, "auto") == faster
    assert asked == ["topk_attention channel"]
    refused = backends.Call("topk_attention", "channel", (OnGPU(),), {"cuda": "too large"})  # type: ignore[arg-type]
    assert backends.choose(refused, "auto") == "triton"
    assert backends.why_not(refused)["cuda"] == "too large"

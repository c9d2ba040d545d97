"""Calls that the compiled library takes whole: results as by way of Python, and none that it should leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import restore_kernels
from restore_kernels import (
    channel_gate,
    channel_norm,
    depthwise_conv2d,
    masked_attention,
    native,
    pointwise_conv2d,
    topk_attention,
)
from restore_kernels.functions import plain_calls

pytestmark = pytest.mark.skipif(native.why_no_cpu_library() is not None, reason="no compiled library")

# What the functions of the library are called with where the caller says nothing.
DEFAULTS: dict[Callable[..., Tensor], dict[str, Any]] = {
    channel_gate: {
        "x": None, "down": None, "up": None, "down_bias": None, "up_bias": None, "residual": None,
    },
    channel_norm: {"x": None, "weight": None, "bias": None, "eps": 1e-5},
    depthwise_conv2d: {
        "x": None, "weight": None, "bias": None, "dilation": 1, "activation": None, "slope": None,
        "gate": None,
    },
    pointwise_conv2d: {"x": None, "weight": None, "bias": None},
    topk_attention: {
        "q": None, "k": None, "v": None, "topk": None, "weights": None, "temperature": None,
        "normalize": True, "layout": "channel", "out_proj": None,
    },
    masked_attention: {
        "q": None, "k": None, "v": None, "mask": None, "temperature": None, "normalize": True,
        "layout": "channel", "out_proj": None,
    },
}  # fmt: skip


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def qkv(**options: Any) -> dict[str, Any]:
    return {**{name: randn(2, 3, 4, 5) for name in "qkv"}, **options}


IMAGE, HALF = randn(2, 4, 5, 6), randn(2, 2, 5, 6)
ATTENTION = qkv(topk=[2, None])
GATE = {"x": IMAGE, "down": randn(3, 4, 1, 1), "up": randn(4, 3, 1, 1)}
NORM = {"x": IMAGE, "weight": randn(4)}
DEPTHWISE = {"x": IMAGE, "weight": randn(4, 1, 3, 3)}
POINTWISE = {"x": IMAGE, "weight": randn(7, 4, 1, 1)}

PLAIN: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
    (channel_gate, GATE),
    (channel_gate, {**GATE, "down_bias": randn(3), "up_bias": randn(4), "residual": IMAGE}),
    (channel_gate, {**GATE, "x": IMAGE.bfloat16(), "residual": IMAGE.bfloat16(), "up_bias": randn(4)}),
    (channel_norm, NORM),
    (channel_norm, {**NORM, "bias": randn(4), "eps": 1e-3}),
    (channel_norm, {**NORM, "x": randn(2, 4, 5, 6, dtype=torch.bfloat16)}),
    (depthwise_conv2d, {**DEPTHWISE, "bias": randn(4), "dilation": 2, "activation": "gelu"}),
    (depthwise_conv2d, {**DEPTHWISE, "activation": "prelu", "slope": randn(1), "gate": IMAGE}),
    (depthwise_conv2d, {**DEPTHWISE, "activation": "prelu", "slope": randn(4)}),
    (depthwise_conv2d, {"x": (HALF, HALF), "weight": randn(2, 2, 5, 5), "activation": "relu"}),
    (pointwise_conv2d, {**POINTWISE, "bias": randn(7)}),
    (pointwise_conv2d, {"x": [HALF, IMAGE], "weight": randn(2, 7, 6, 1, 1)}),
    (pointwise_conv2d, {"x": IMAGE.detach()[:0], "weight": randn(7, 4, 1, 1)}),
    (pointwise_conv2d, {"x": IMAGE.bfloat16(), "weight": randn(7, 4, 1, 1).bfloat16()}),
    (pointwise_conv2d, {"x": IMAGE.double(), "weight": randn(7, 4, 1, 1).double()}),
    (topk_attention, ATTENTION),
    (topk_attention, {**ATTENTION, "weights": randn(3, 2), "temperature": randn(3, 1, 1)}),
    (topk_attention, {**ATTENTION, "topk": (4,), "normalize": False, "out_proj": randn(5, 12)}),
    (masked_attention, qkv()),
    (masked_attention, qkv(mask=randn(5), temperature=randn(1))),
    (masked_attention, qkv(mask=randn(2, 1, 4, 5, dtype=torch.float64), out_proj=randn(5, 12))),
]  # fmt: skip

# What Python runs, and what it refuses.
LEFT: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
    *((function, {**plain, name: wrong})
      for function, plain, names in (
          (channel_gate, {**GATE, "down_bias": randn(3), "up_bias": randn(4), "residual": IMAGE},
           ("x", "down", "up", "down_bias", "up_bias", "residual")),
          (channel_norm, {**NORM, "bias": randn(4)}, ("x", "weight", "bias")),
          (depthwise_conv2d, {**DEPTHWISE, "bias": randn(4), "gate": IMAGE}, ("x", "weight", "bias", "gate")),
          (pointwise_conv2d, {**POINTWISE, "bias": randn(7)}, ("x", "weight", "bias")),
          (topk_attention, {**ATTENTION, "weights": randn(2), "out_proj": randn(5, 12)},
           ("q", "k", "v", "weights", "temperature", "out_proj")),
          (masked_attention, qkv(mask=randn(5)), ("q", "k", "v", "mask", "temperature")),
      )
      for name in names
      for wrong in (
          randn(2, 3, 1, 7, 1, 1), torch.ones(2, 3, 4, 5, dtype=torch.int64), "x", 1,
          torch.ones(2, 4, 5, 6, device="meta"), torch.nn.Buffer(torch.ones(2, 4, 5, 6)).to_sparse(),
      )),
    (channel_gate, {**GATE, "down": randn(3, 4)}),
    (channel_gate, {**GATE, "down": randn(0, 4, 1, 1), "up": randn(4, 0, 1, 1)}),
    (channel_gate, {**GATE, "up": randn(3, 4, 1, 1)}),
    (channel_gate, {**GATE, "residual": IMAGE.double()}),
    (channel_norm, {**NORM, "weight": randn(5)}),
    (channel_norm, {**NORM, "eps": 0.0}),
    (channel_norm, {**NORM, "eps": float("nan")}),
    (channel_norm, {**NORM, "x": IMAGE[:, :, :0]}),
    (depthwise_conv2d, {**DEPTHWISE, "dilation": 3}),
    (depthwise_conv2d, {**DEPTHWISE, "dilation": 1 << 70}),
    (depthwise_conv2d, {**DEPTHWISE, "dilation": True}),
    (depthwise_conv2d, {**DEPTHWISE, "activation": "swish"}),
    (depthwise_conv2d, {**DEPTHWISE, "activation": "prelu"}),
    (depthwise_conv2d, {**DEPTHWISE, "activation": "relu", "slope": randn(4)}),
    (depthwise_conv2d, {**DEPTHWISE, "weight": randn(4, 1, 3, 5)}),
    (depthwise_conv2d, {**DEPTHWISE, "weight": randn(4, 1, 4, 4)}),
    (depthwise_conv2d, {**DEPTHWISE, "weight": randn(4, 1, 3, 3, dtype=torch.float64)}),
    (depthwise_conv2d, {**DEPTHWISE, "gate": HALF}),
    (pointwise_conv2d, {**POINTWISE, "x": []}),
    (pointwise_conv2d, {**POINTWISE, "x": [IMAGE] * 9}),
    (pointwise_conv2d, {**POINTWISE, "x": [IMAGE, randn(2, 4, 6, 5)]}),
    (pointwise_conv2d, {**POINTWISE, "weight": randn(3, 7, 4, 1, 1)}),
    (pointwise_conv2d, {**POINTWISE, "weight": randn(0, 4, 1, 1)}),
    (pointwise_conv2d, {**POINTWISE, "x": IMAGE.double()}),
    (topk_attention, {**ATTENTION, "topk": []}),
    (topk_attention, {**ATTENTION, "topk": [5]}),
    (topk_attention, {**ATTENTION, "topk": [1 << 70]}),
    (topk_attention, {**ATTENTION, "topk": [True]}),
    (topk_attention, {**ATTENTION, "topk": "2"}),
    (topk_attention, {**ATTENTION, "normalize": 1}),
    (topk_attention, {**ATTENTION, "layout": "token"}),
    (topk_attention, {**ATTENTION, "weights": randn(2, 3, 3)}),
    (topk_attention, {**ATTENTION, "temperature": 2.0}),
    (topk_attention, {**ATTENTION, "out_proj": randn(5, 11)}),
    (masked_attention, qkv(mask=randn(4))),
    (masked_attention, qkv(mask=torch.ones(5, dtype=torch.bool))),
]  # fmt: skip


def library_call(function: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor | None:
    calls = plain_calls("auto")
    assert calls is not None
    return getattr(calls, f"{function.__name__}_call")(*{**DEFAULTS[function], **arguments}.values())


def tensors_of(arguments: dict[str, Any]) -> list[Tensor]:
    found = [x for each in arguments.values() for x in (each if isinstance(each, (list, tuple)) else [each])]
    return [x for x in found if isinstance(x, Tensor) and x.requires_grad]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("function", "arguments"), PLAIN)
def test_the_same_as_by_way_of_python(function, arguments, autocast):
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        whole = library_call(function, arguments)
        by_python = function(**arguments, backend=("cpu",))  # a preference list goes that way
    assert whole is not None
    assert torch.equal(whole, by_python)
    assert whole.dtype == by_python.dtype
    assert whole.stride() == by_python.stride()
    inputs = tensors_of(arguments)
    grad = torch.randn_like(whole)
    for mine, theirs in zip(*(torch.autograd.grad(x, inputs, grad) for x in (whole, by_python)), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("function", "arguments"), LEFT)
def test_leaves_what_is_not_clearly_right(function, arguments):
    assert library_call(function, arguments) is None


@pytest.mark.parametrize("function", DEFAULTS, ids=lambda function: function.__name__)
def test_public_functions_use_it(function, monkeypatch):
    arguments = next(arguments for plain, arguments in PLAIN if plain is function)
    function(**arguments)  # loads the library
    assert native.loaded_cpu_module is native.cpu_library().module
    taken = []

    class Library:
        def __getattr__(self, name):
            return lambda *args: taken.append(name) or getattr(native.cpu_library().module, name)(*args)

    monkeypatch.setattr(native, "loaded_cpu_module", Library())
    function(**arguments)
    function(**arguments, backend="cpu")
    with restore_kernels.use_backend("auto"):
        function(**arguments)
    assert taken == [f"{function.__name__}_call"] * 3


def test_not_where_something_else_is_asked_for(monkeypatch):
    assert plain_calls("auto") is not None
    for backend in ("eager", "triton", ("cpu",), "nonsense"):
        assert plain_calls(backend) is None
    with restore_kernels.use_backend("eager"):
        assert plain_calls("auto") is None
    with restore_kernels.record():
        assert plain_calls("auto") is None
    monkeypatch.setenv("RESTORE_KERNELS_BACKEND", "eager")
    assert plain_calls("auto") is None


def test_leaves_subclasses():
    class Other(Tensor):
        pass

    for function, arguments in PLAIN:
        if isinstance(first := next(iter(arguments.values())), Tensor):
            name = next(iter(arguments))
            assert library_call(function, {**arguments, name: first.detach().as_subclass(Other)}) is None

"""The autograd nodes of the compiled library do what the Functions in Python do, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import restore_kernels
from restore_kernels import native

pytestmark = pytest.mark.skipif(native.why_no_cpu_library() is not None, reason="no compiled library")

Call = Callable[..., Tensor]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def topk_channel(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    tensors = [*(normal(2, 3, 6, 20, dtype=dtype) for _ in "qkv"), normal(2), normal(3, 1, 1)]
    return lambda q, k, v, w, t: restore_kernels.topk_attention(
        q, k, v, [2, None], weights=w, temperature=t, backend="cpu"
    ), tensors  # fmt: skip


def topk_channel_projected(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    tensors = [
        *(normal(2, 3, 6, 20, dtype=dtype) for _ in "qkv"),
        normal(2, 1, 2),
        normal(5, 18, dtype=dtype),
    ]
    return lambda q, k, v, w, proj: restore_kernels.topk_attention(
        q, k, v, [2, None], weights=w, out_proj=proj, backend="cpu"
    ), tensors  # fmt: skip


def topk_token(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    tensors = [normal(2, 3, n, d, dtype=dtype) for n, d in ((9, 4), (12, 4), (12, 5))]
    return lambda q, k, v, w, t: restore_kernels.topk_attention(
        q, k, v, [2, None], weights=w, temperature=t, normalize=False, layout="token", backend="cpu"
    ), [*tensors, normal(2, 3, 2), normal(1)]  # fmt: skip


def masked_channel(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    tensors = [
        *(normal(2, 3, 6, 20, dtype=dtype) for _ in "qkv"),
        normal(2, 1, 1, 20),
        normal(3, 1, 1, dtype=dtype),
    ]
    return lambda q, k, v, m, t: restore_kernels.masked_attention(
        q, k, v, m.sigmoid(), temperature=t, backend="cpu"
    ), tensors  # fmt: skip


def masked_channel_projected(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    tensors = [*(normal(2, 3, 6, 20, dtype=dtype) for _ in "qkv"), normal(5, 18, dtype=dtype)]
    return lambda q, k, v, proj: restore_kernels.masked_attention(
        q, k, v, out_proj=proj, backend="cpu"
    ), tensors


def masked_token(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    tensors = [normal(2, 3, n, d, dtype=dtype) for n, d in ((9, 4), (12, 4), (12, 5))]
    return lambda q, k, v, m, t: restore_kernels.masked_attention(
        q, k, v, m.sigmoid(), temperature=t, layout="token", backend="cpu"
    ), [*tensors, normal(2, 1, 12), normal(2, 1, 1, 1)]  # fmt: skip


def norm_with_bias(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    tensors = [normal(2, 6, 5, 7, dtype=dtype), normal(6), normal(6, dtype=dtype)]
    return lambda x, weight, bias: restore_kernels.channel_norm(x, weight, bias, backend="cpu"), tensors


def norm_without_bias(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    tensors = [normal(2, 6, 5, 7, dtype=dtype), normal(6)]
    return lambda x, weight: restore_kernels.channel_norm(x, weight, backend="cpu"), tensors


def gate_with_residual(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    tensors = [normal(2, 6, 5, 7, dtype=dtype), normal(3, 6, 1, 1, dtype=dtype), normal(6, 3, 1, 1)]
    return lambda x, down, up, down_bias, up_bias, residual: restore_kernels.channel_gate(
        x, down, up, down_bias, up_bias, residual, backend="cpu"
    ), [*tensors, normal(3), normal(6, dtype=dtype), normal(2, 6, 5, 7, dtype=dtype)]  # fmt: skip


def gate_alone(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    tensors = [normal(2, 6, 5, 7, dtype=dtype), normal(3, 6, 1, 1), normal(6, 3, 1, 1, dtype=dtype)]
    return lambda x, down, up: restore_kernels.channel_gate(x, down, up, backend="cpu"), tensors


def resize_twice(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    tensors = [normal(2, 3, 5, 4, dtype=dtype), normal(2, 3, 9, 8, dtype=dtype)]
    return lambda x, residual: restore_kernels.bilinear_resize(x, 2, residual, backend="cpu"), tensors


def resize_half(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    tensors = [normal(2, 3, 5, 4, dtype=dtype), normal(2, 3, 3, 2, dtype=dtype)]
    return lambda x, residual: restore_kernels.bilinear_resize(x, 0.5, residual, backend="cpu"), tensors


def dense_conv(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32  # what it computes
    tensors = [normal(2, 3, 5, 7, dtype=wide), normal(4, 3, 3, 3, dtype=wide), normal(4, dtype=wide)]
    return lambda x, weight, bias: restore_kernels.dense_conv2d(x, weight, bias, backend="cpu"), tensors


def pointwise_conv(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    shapes = ((2, 3, 5, 4), (2, 6, 5, 4), (7, 9, 1, 1), (7,))
    return lambda a, b, weight, bias: restore_kernels.pointwise_conv2d(
        [a, b], weight, bias, backend="cpu"
    ), [normal(*shape, dtype=dtype) for shape in shapes]  # fmt: skip


def pointwise_conv_per_image(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    shapes = ((2, 2, 5, 4), (2, 1, 5, 4), (2, 7, 3, 1, 1))
    return lambda a, b, weight: restore_kernels.pointwise_conv2d(
        [a, b], weight, backend="cpu"
    ), [normal(*shape, dtype=dtype) for shape in shapes]  # fmt: skip


def depthwise_gated(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    shapes = (2, 1, 7, 5), (2, 5, 7, 5), (3, 2, 3, 3), (3,), (1,), (2, 3, 7, 5)
    return lambda a, b, w, bias, slope, gate: restore_kernels.depthwise_conv2d(
        (a, b), w, bias, activation="prelu", slope=slope, gate=gate, backend="cpu"
    ), [normal(*shape, dtype=dtype) for shape in shapes]  # fmt: skip


def depthwise_rectified(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    shapes = (2, 6, 7, 5), (6, 1, 3, 3), (6,)
    return lambda x, w, bias: restore_kernels.depthwise_conv2d(
        x, w, bias, activation="relu", backend="cpu"
    ), [normal(*shape, dtype=dtype) for shape in shapes]  # fmt: skip


CASES = [
    topk_channel, topk_channel_projected, topk_token,
    masked_channel, masked_channel_projected, masked_token,
    norm_with_bias, norm_without_bias, gate_with_residual, gate_alone, resize_twice, resize_half,
    dense_conv, pointwise_conv, pointwise_conv_per_image,
    depthwise_gated, depthwise_rectified,
]  # fmt: skip


def results(call: Call, tensors: list[Tensor]) -> list[Tensor]:
    out = call(*tensors)
    return [out, *torch.autograd.grad(out, tensors, torch.ones_like(out))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_equal_the_functions(case, dtype, monkeypatch):
    call, tensors = case(dtype)
    compiled = results(call, tensors)
    assert "CppNode" in type(call(*tensors).grad_fn).__name__ or "CppNode" in call(*tensors).grad_fn.name()
    monkeypatch.setattr(native, "loaded_cpu_module", None)
    in_python = results(call, tensors)
    for got, want, x in zip(compiled, in_python, [compiled[0], *tensors], strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype) == (x.shape, x.dtype)
        assert torch.equal(got, want)


@pytest.mark.parametrize("case", CASES)
def test_a_traced_graph_computes_the_same(case):
    call, tensors = case(torch.float32)
    graph = make_fx(lambda *x: results(call, list(x)))(*tensors)
    for got, want in zip(graph(*tensors), results(call, tensors), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("case", CASES)
def test_gradients_not_needed_are_not_asked_for(case):
    call, tensors = case(torch.float32)
    tensors = [x.detach() for x in tensors]
    assert not call(*tensors).requires_grad
    tensors[1].requires_grad_()
    call(*tensors).sum().backward()
    assert [x.grad is not None for x in tensors] == [i == 1 for i in range(len(tensors))]


@pytest.mark.parametrize("case", CASES)
def test_second_derivative_is_an_error(case):
    call, tensors = case(torch.float32)
    (grad,) = torch.autograd.grad(call(*tensors).sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative on backend 'cpu'"):
        grad.sum().backward()


def test_batched_gradients():
    """A backward pass under vmap, of a forward pass that was not."""
    call, tensors = topk_channel(torch.float32)
    out = call(*tensors)
    vectors = torch.randn(3, *out.shape)
    batched = torch.autograd.grad(out, tensors, vectors, is_grads_batched=True, retain_graph=True)
    for i, vector in enumerate(vectors):
        single = torch.autograd.grad(out, tensors, vector, retain_graph=True)
        for got, want in zip(batched, single, strict=True):
            torch.testing.assert_close(got[i], want)

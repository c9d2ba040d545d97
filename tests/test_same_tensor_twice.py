"""One tensor as several arguments, as in self-attention: its gradients add up, also under torch.compile."""

from __future__ import annotations

import pytest
import torch

import restore_kernels

_WEIGHT = torch.randn(4, 8, 1, 1, generator=torch.Generator().manual_seed(1))
_TAPS = _WEIGHT.view(4, 2, 4, 1)[:, :, :3].expand(-1, -1, 3, 3)
_DOWN, _UP = _WEIGHT[:2, :4], _WEIGHT.view(8, 4)[:4, :2, None, None]

CALLS = {
    "top-k, channel": lambda q, k, v: restore_kernels.topk_attention(
        *(x.flatten(2)[:, None] for x in (q, k, v)), topk=[2, 4]
    ),
    "top-k, token": lambda q, k, v: restore_kernels.topk_attention(q, k, v, topk=[2, 4], layout="token"),
    "masked, channel": lambda q, k, v: restore_kernels.masked_attention(q, k, v),
    "masked, token": lambda q, k, v: restore_kernels.masked_attention(q, k, v, layout="token"),
    "pyramid": lambda q, k, v: restore_kernels.pyramid_attention(q, [k], [v], patch_size=3),
    "pointwise": lambda x, y, _: restore_kernels.pointwise_conv2d([x, y], _WEIGHT),
    "depthwise": lambda x, y, _: restore_kernels.depthwise_conv2d([x, y], _TAPS),
    "gate of depthwise": lambda x, y, _: restore_kernels.depthwise_conv2d(
        x, _WEIGHT[:, :1].expand(4, 1, 3, 3), gate=y, activation="gelu"
    ),
    "channel gate": lambda x, y, _: restore_kernels.channel_gate(x, _DOWN, _UP, residual=y),
}  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_gradients_add_up(name, compiled):
    x = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    apart = [x.detach().clone().requires_grad_() for _ in range(3)]
    separate = CALLS[name](*apart)
    grad = torch.randn(separate.shape, generator=torch.Generator().manual_seed(2))
    expected = [g for g in torch.autograd.grad(separate, apart, grad, allow_unused=True) if g is not None]
    call = CALLS[name]
    if compiled:
        call = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=False)
    out = call(x, x, x)
    assert len(expected) > 1
    torch.testing.assert_close(out, separate)
    torch.testing.assert_close(*torch.autograd.grad(out, x, grad), sum(expected))

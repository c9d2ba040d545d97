"""The public function: semantic checks, backend choice."""

from __future__ import annotations

from torch import Tensor

from restore_kernels import checks, coverage
from restore_kernels.backends import Backend, Call, choose
from restore_kernels.channel_gate import autograd, reference
from restore_kernels.functions import plain_calls


def channel_gate(
    x: Tensor, down: Tensor, up: Tensor, down_bias: Tensor | None = None, up_bias: Tensor | None = None,
    residual: Tensor | None = None, *, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Every channel times a number in (0, 1) that the averages of all channels give, and a residual added.

    Also known as squeeze and excitation, or, in restoration networks, as channel attention::

        hidden = relu(down mean(x) + down_bias)     mean over the pixels of every channel
        gate = sigmoid(up hidden + up_bias)
        out = x * gate + residual

    Source: squeeze-and-excitation networks (arXiv 1709.01507, equations 2 to 4), in image restoration since
    RCAN (arXiv 1807.02758, equations 9 to 11).

    Args:
        x: (B, C, H, W). float32, bfloat16, float16 or float64; any strides.
        down: (R, C, 1, 1), as the weight of a convolution of size 1, on x's device, of any of these dtypes.
        up: (C, R, 1, 1), the same.
        down_bias: (R,), the same, or None.
        up_bias: (C,), the same, or None.
        residual: like x, or None for nothing added.
        backend: ``auto``, ``eager``, ``cpu`` or ``triton``; or several of them, best first.

    Returns:
        (B, C, H, W) in x's dtype, under autocast too, channels_last where x is. Averages, gates and
        arithmetic are in float32 (float64 for float64), rounded once.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: no backend asked for by name can run this call; the message says why.
    """
    args = (x, down, up, down_bias, up_bias, residual)
    if (calls := plain_calls(backend)) and (out := calls.channel_gate_call(*args)) is not None:
        return out
    _check(*args)
    chosen = choose(_call(x), backend)
    if chosen != "eager":
        return autograd.channel_gate(*args, chosen)
    with checks.no_autocast(x.device.type):
        return reference.channel_gate(*args)


def _check(x, down, up, down_bias, up_bias, residual) -> None:
    """Every semantic check of a call."""
    checks.floating_tensor("x", x, ("B", "C", "H", "W"))
    channels = x.shape[1]
    checks.floating_tensor("down", down, ("R", "C", "1", "1"))
    hidden = down.shape[0]
    checks.parameter("down", down, x, (hidden, channels, 1, 1))
    checks.parameter("up", up, x, (channels, hidden, 1, 1))
    if down_bias is not None:
        checks.parameter("down_bias", down_bias, x, (hidden,))
    if up_bias is not None:
        checks.parameter("up_bias", up_bias, x, (channels,))
    if residual is not None:
        checks.like("residual", residual, x, tuple(x.shape), "x")


def _call(x: Tensor) -> Call:
    return Call("channel_gate", "gate", (x,), coverage.NO_CUDA)


def _plan(x, down, up, down_bias=None, up_bias=None, residual=None, *, backend="auto"):
    _check(x, down, up, down_bias, up_bias, residual)
    return _call(x)


channel_gate.plan = _plan  # type: ignore[attr-defined]

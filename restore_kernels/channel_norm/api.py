"""The public function: semantic checks, backend choice."""

from __future__ import annotations

import math

from torch import Tensor

from restore_kernels import checks, coverage
from restore_kernels.backends import Backend, Call, choose
from restore_kernels.channel_norm import autograd, reference
from restore_kernels.functions import plain_calls


def channel_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5, backend: Backend = "auto"
) -> Tensor:
    """Layer normalisation of every pixel over its channels.

    With the mean and the biased variance of a pixel's channels::

        out = (x - mean) / sqrt(variance + eps) * weight + bias     with a bias
        out =  x         / sqrt(variance + eps) * weight            without

    Source: layer normalisation (arXiv 1607.06450) as Restormer has it for images (arXiv 2111.09881),
    ``WithBias`` and ``BiasFree``.

    Args:
        x: (B, C, H, W). float32, bfloat16, float16 or float64; any strides.
        weight: (C,), on x's device, of any of these dtypes.
        bias: (C,), the same, or None, which also leaves the mean in.
        eps: added to the variance.
        backend: ``auto``, ``eager``, ``cpu`` or ``triton``; or several of them, best first.

    Returns:
        (B, C, H, W) in x's dtype, under autocast too, channels_last where x is. Statistics and arithmetic
        are in float32 (float64 for float64), rounded once.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: no backend asked for by name can run this call; the message says why.
    """
    if (calls := plain_calls(backend)) and (out := calls.channel_norm_call(x, weight, bias, eps)) is not None:
        return out
    _check(x, weight, bias, eps)
    chosen = choose(_call(x, bias), backend)
    if chosen != "eager":
        return autograd.channel_norm(x, weight, bias, eps, chosen)
    with checks.no_autocast(x.device.type):
        return reference.channel_norm(x, weight, bias, eps)


def _check(x, weight, bias, eps) -> None:
    """Every semantic check of a call."""
    checks.floating_tensor("x", x, ("B", "C", "H", "W"))
    checks.parameter("weight", weight, x, (x.shape[1],))
    if bias is not None:
        checks.parameter("bias", bias, x, (x.shape[1],))
    if not isinstance(eps, (int, float)) or not 0 < eps < math.inf:
        raise ValueError(f"eps must be a positive finite number; got {eps!r}")


def _call(x: Tensor, bias: Tensor | None) -> Call:
    kind = "without bias" if bias is None else "with bias"
    return Call("channel_norm", kind, (x,), coverage.NO_CUDA)


def _plan(x, weight, bias=None, *, eps=1e-5, backend="auto"):
    _check(x, weight, bias, eps)
    return _call(x, bias)


channel_norm.plan = _plan  # type: ignore[attr-defined]

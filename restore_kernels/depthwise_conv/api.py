"""The public function: semantic checks, backend choice."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from restore_kernels import checks
from restore_kernels.backends import Backend, Call, choose
from restore_kernels.depthwise_conv import autograd, reference

SIZES = (1, 3, 5, 7)
DILATIONS = (1, 2)
INPUTS = (1, 2)  # input channels of a group
ACTIVATIONS = (None, "relu")


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: int = 1,
    activation: str | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Convolution in which every output channel sees one input channel of its own, or two.

    ``torch.nn.functional.conv2d`` with as many groups as output channels, stride 1 and the zero padding that
    keeps the size, followed by the activation.

    Source: the depthwise convolutions of Restormer (arXiv 2111.09881), and with two inputs those of the
    mixed-scale feed-forward network of DRSformer (Chen et al., CVPR 2023).

    Args:
        x: (B, C, H, W). float32, bfloat16, float16 or float64; any strides, channels_last among them.
            Under autocast x, weight and bias are cast as for a convolution.
        weight: (C_out, C / C_out, k, k) with k 1, 3, 5 or 7, and 1 or 2 input channels per output channel;
            same dtype and device as x.
        bias: (C_out), or None.
        dilation: 1 or 2, of the taps.
        activation: None or ``"relu"``.
        backend: ``auto``, ``eager``, ``cpu``, ``triton`` or ``cuda``; or several of them, best first.

    Returns:
        (B, C_out, H, W), channels_last where x is.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: no backend asked for by name can run this call; the message says why.
    """
    x, weight, bias = checks.autocast(x, weight, bias)
    _check(x, weight, bias, dilation, activation)
    chosen = choose(_call(x, weight, bias), backend)
    inputs = (x, weight, bias, dilation, activation == "relu")
    if chosen != "eager":
        return autograd.depthwise_conv(*inputs, chosen)
    with checks.no_autocast(x.device.type):
        return reference.depthwise_conv(*inputs)


def _check(x: Any, weight: Any, bias: Any, dilation: Any, activation: Any) -> None:
    """Every semantic check of a call."""
    checks.floating_tensor("x", x, ("B", "C", "H", "W"))
    checks.floating_tensor("weight", weight, ("C_out", "C / C_out", "k", "k"))
    outputs, inputs, size, _ = weight.shape
    if inputs not in INPUTS:
        raise ValueError(f"weight must have 1 or 2 input channels per output channel; got {inputs}")
    if size not in SIZES:
        raise ValueError(f"weight must be of size 1, 3, 5 or 7; got {tuple(weight.shape)}")
    if x.shape[1] != outputs * inputs:
        raise ValueError(
            f"x must have {outputs * inputs} channels to fit weight {tuple(weight.shape)}; "
            f"got {tuple(x.shape)}"
        )
    checks.like("weight", weight, x, (outputs, inputs, size, size), "x")
    if bias is not None:
        checks.like("bias", bias, x, (outputs,), "x")
    if isinstance(dilation, bool) or dilation not in DILATIONS:
        raise ValueError(f"dilation must be 1 or 2; got {dilation!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or 'relu'; got {activation!r}")


def _call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Call:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    kind = "x".join(map(str, weight.shape[2:]))
    return Call("depthwise_conv2d", kind, tensors, "it has no kernels for this operator")


def _plan(x, weight, bias=None, *, dilation=1, activation=None, backend="auto"):
    x, weight, bias = checks.autocast(x, weight, bias)
    _check(x, weight, bias, dilation, activation)
    return _call(x, weight, bias)


depthwise_conv2d.plan = _plan  # type: ignore[attr-defined]

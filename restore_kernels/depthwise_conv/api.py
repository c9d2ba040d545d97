"""The public function: semantic checks, backend choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from restore_kernels import checks, coverage
from restore_kernels.backends import Backend, Call, choose
from restore_kernels.depthwise_conv import autograd, reference
from restore_kernels.functions import plain_calls

SIZES = (1, 3, 5, 7)
DILATIONS = (1, 2)
INPUTS = (1, 2)  # input channels of a group
ACTIVATIONS = (None, "relu", "gelu", "prelu")


def depthwise_conv2d(
    x: Tensor | Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, *, dilation: int = 1,
    activation: str | None = None, slope: Tensor | None = None, gate: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Convolution in which every output channel sees one input channel of its own, or two.

    ``activation(conv(x) + bias) * gate``, with ``torch.nn.functional.conv2d`` of as many groups as output
    channels, stride 1 and the zero padding that keeps the size.

    Source: the depthwise convolutions of Restormer and its gated feed-forward network (arXiv 2111.09881), and
    with two inputs those of the mixed-scale feed-forward network of DRSformer (Chen et al., CVPR 2023).

    Args:
        x: (B, C, H, W), or 1 to 8 such images with C channels together, which count as concatenated along
            channels. float32, bfloat16, float16 or float64; any strides, channels_last among them.
            Under autocast all tensors are cast as for a convolution.
        weight: (C_out, C / C_out, k, k) with k 1, 3, 5 or 7, and 1 or 2 input channels per output channel;
            same dtype and device as x.
        bias: (C_out), or None.
        dilation: 1 or 2, of the taps.
        activation: None, ``"relu"``, ``"gelu"`` (exact, with the error function) or ``"prelu"``.
        slope: (1) or (C_out), of ``"prelu"`` below zero.
        gate: (B, C_out, H, W) that multiplies the activated result, or None.
        backend: ``auto``, ``eager``, ``cpu`` or ``triton``; or several of them, best first.

    Returns:
        (B, C_out, H, W), channels_last where (the first) x is.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: no backend asked for by name can run this call; the message says why.
    """
    if calls := plain_calls(backend):
        out = calls.depthwise_conv2d_call(x, weight, bias, dilation, activation, slope, gate)
        if out is not None:
            return out
    images, weight, bias, slope, gate = _autocast(x, weight, bias, slope, gate)
    _check(images, weight, bias, dilation, activation, slope, gate)
    chosen = choose(_call(images, weight, bias, slope, gate), backend)
    inputs = (images, weight, bias, slope, gate, dilation, activation)
    if chosen != "eager":
        return autograd.depthwise_conv(*inputs, chosen)
    with checks.no_autocast(weight.device.type):
        return reference.depthwise_conv(*inputs)


def _autocast(x: Any, *others: Any) -> tuple[Any, ...]:
    """The images of x as a list and the other tensors, as autocast casts those of a convolution."""
    images = checks.as_images(x)
    tensors = checks.autocast(*images, *others)
    return list(tensors[: len(images)]), *tensors[len(images) :]


def _check(
    x: list[Any], weight: Any, bias: Any, dilation: Any, activation: Any, slope: Any, gate: Any
) -> None:
    """Every semantic check of a call."""
    channels = checks.joined_images("x", x)
    checks.floating_tensor("weight", weight, ("C_out", "C / C_out", "k", "k"))
    outputs, inputs, size, _ = weight.shape
    if inputs not in INPUTS:
        raise ValueError(f"weight must have 1 or 2 input channels per output channel; got {inputs}")
    if size not in SIZES:
        raise ValueError(f"weight must be of size 1, 3, 5 or 7; got {tuple(weight.shape)}")
    if channels != outputs * inputs:
        raise ValueError(
            f"x must have {outputs * inputs} channels to fit weight {tuple(weight.shape)}; "
            f"got {', '.join(str(tuple(image.shape)) for image in x)}"
        )
    checks.like("weight", weight, x[0], (outputs, inputs, size, size), "x")
    if bias is not None:
        checks.like("bias", bias, x[0], (outputs,), "x")
    if isinstance(dilation, bool) or dilation not in DILATIONS:
        raise ValueError(f"dilation must be 1 or 2; got {dilation!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be {activation_names()}; got {activation!r}")
    if (slope is None) == (activation == "prelu"):
        raise ValueError(
            f"slope must be given with activation='prelu' and with no other; got slope={_kind(slope)}, "
            f"activation={activation!r}"
        )
    if slope is not None:
        is_one = isinstance(slope, Tensor) and slope.numel() == 1
        checks.like("slope", slope, x[0], (1,) if is_one else (outputs,), "x")
    if gate is not None:
        checks.like("gate", gate, x[0], (x[0].shape[0], outputs, *x[0].shape[2:]), "x")


def activation_names() -> str:
    """What there is to choose from, for messages."""
    *names, last = map(repr, ACTIVATIONS)
    return f"{', '.join(names)} or {last}"


def _kind(x: Any) -> str:
    return "None" if x is None else "a tensor" if isinstance(x, Tensor) else repr(x)


def _call(x: list[Tensor], weight: Tensor, *others: Tensor | None) -> Call:
    tensors = (*x, weight, *(tensor for tensor in others if tensor is not None))
    kind = "x".join(map(str, weight.shape[2:]))
    return Call("depthwise_conv2d", kind, tensors, coverage.NO_CUDA)


def _plan(
    x, weight, bias=None, *, dilation=1, activation=None, slope=None, gate=None, backend="auto"
):  # fmt: skip
    x, *tensors = _autocast(x, weight, bias, slope, gate)
    weight, bias, slope, gate = tensors
    _check(x, weight, bias, dilation, activation, slope, gate)
    return _call(x, *tensors)


depthwise_conv2d.plan = _plan  # type: ignore[attr-defined]

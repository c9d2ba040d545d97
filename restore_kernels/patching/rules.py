"""Which replacements of a module are worth a comparison; guesses are allowed, for they are checked."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from torch import nn

import restore_kernels.nn as ours
from restore_kernels.patching.swapping import Refused, parameter_shapes

Rule = Callable[[nn.Module], "nn.Module | None"]

OURS = tuple(getattr(ours, name) for name in ours.__all__)
DECLARED = "restore_kernels_swap"  # a method by which a class brings its own rule
ATTENTIONS = (ours.TopKSparseAttention, ours.MultiDconvAttention, ours.MultiInputAttention)
EPSILONS = (1e-5, 1e-6)  # of a normalisation that does not say its own
PYRAMID_OPTIONS = ("levels", "patch_size", "softmax_scale", "res_scale", "hard")


def propose(module: nn.Module, rules: Mapping[type[nn.Module], Rule | None]) -> Sequence[nn.Module]:
    """Replacements, newly made, in order of preference; none for a module that is none of our business.

    Raises:
        Refused: a module that comes near; the message says what is in the way.
    """
    known = type(module) in rules
    if isinstance(module, OURS) and not known:
        return ()
    rule = rules[type(module)] if known else getattr(type(module), DECLARED, None)
    try:
        if rule is None:
            return () if known else _built_in(module)
        proposal = rule(module)
    except ValueError as error:
        raise Refused(str(error)) from None
    if proposal is None:
        return ()
    if not isinstance(proposal, nn.Module):
        raise TypeError(f"the rule of {type(module).__name__} must return a module or None; got {proposal!r}")
    return (proposal,)


def _built_in(module: nn.Module) -> Sequence[nn.Module]:
    if isinstance(module, nn.Conv2d):
        return _convolution(module)
    if isinstance(module, nn.Upsample):
        return _upsample(module)
    if type(module).__module__.startswith("torch."):
        return ()  # none of torch's own classes is one of the others
    shapes = parameter_shapes(module)
    if "temperature" in shapes and any(name.startswith("project_out.") for name in shapes):
        return _attention(shapes)
    if {"conv_match.0.weight", "conv_match_L_base.0.weight", "conv_assembly.0.weight"} <= shapes.keys():
        return _pyramid_attention(module, shapes)
    if {"conv_du.0.weight", "conv_du.2.weight"} <= shapes.keys():
        return _channel_gate(module, shapes)
    return _channel_norm(module, shapes)


def _convolution(conv: nn.Conv2d) -> Sequence[nn.Module]:
    pointwise = conv.groups == 1 and conv.kernel_size == (1, 1)
    dense = conv.groups == 1 and (conv.kernel_size, conv.stride, conv.dilation) == ((3, 3), (1, 1), (1, 1))
    depthwise = conv.groups > 1 and conv.groups in (conv.in_channels, conv.out_channels)
    if not (pointwise or dense or depthwise):
        return ()
    if type(conv) is not nn.Conv2d:
        raise ValueError("it may compute something else than nn.Conv2d; a rule can say that it does not")
    _require("stride", conv.stride, (1, 1))
    bias = conv.bias is not None
    if pointwise:
        replacement = ours.PointwiseConv2d(conv.in_channels, conv.out_channels, bias=bias)
    elif dense:
        replacement = ours.DenseConv2d(conv.in_channels, conv.out_channels, bias=bias)
    else:
        (size, _), (dilation, _) = conv.kernel_size, conv.dilation
        _require("kernel_size", conv.kernel_size, (size, size))
        _require("dilation", conv.dilation, (dilation, dilation))
        replacement = ours.DepthwiseConv2d(
            conv.in_channels, conv.out_channels, size, dilation=dilation, bias=bias
        )
    if replacement.padding != (0, 0):
        _require("padding_mode", conv.padding_mode, "zeros")
    elif conv.padding == "valid":
        return (replacement,)
    if conv.padding != "same":
        _require("padding", conv.padding, replacement.padding)
    return (replacement,)


def _upsample(module: nn.Upsample) -> Sequence[nn.Module]:
    if module.mode != "bilinear" or module.scale_factor not in (2, (2, 2)):
        return ()
    _require("align_corners", bool(module.align_corners), False)
    if type(module) is not nn.Upsample:
        raise ValueError("it may compute something else than nn.Upsample; a rule can say that it does not")
    return (ours.BilinearResize(2),)


def _require(name: str, value: object, expected: object) -> None:
    if value != expected:
        raise ValueError(f"{name} must be {expected!r}; got {value!r}")


def _channel_norm(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Sequence[nn.Module]:
    """Of a module with a weight and at most a bias, each (C,): its own, or those of a module within."""
    path = next(iter(shapes), "").rpartition(".")[0]
    prefix = f"{path}." if path else ""
    weight = shapes.get(f"{prefix}weight", ())
    names = {f"{prefix}weight": weight, f"{prefix}bias": weight}
    if len(weight) != 1 or not shapes.items() <= names.items() or any(True for _ in module.buffers()):
        return ()
    norm = "WithBias" if len(shapes) == 2 else "BiasFree"
    own = [eps for part in module.modules() if isinstance(eps := getattr(part, "eps", None), float)]
    proposals = [ours.ChannelNorm(*weight, norm, eps=eps) for eps in own or EPSILONS]
    return [_within(path, proposal) for proposal in proposals]


def _within(path: str, module: nn.Module) -> nn.Module:
    """A module that calls this one, which has this name in it."""
    for name in reversed(path.split(".") if path else ()):
        module = nn.Sequential(OrderedDict({name: module}))
    return module


def _channel_gate(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Sequence[nn.Module]:
    parts = list(module.get_submodule("conv_du").children())
    kinds = (nn.Conv2d, nn.ReLU, nn.Conv2d, nn.Sigmoid)
    # Another rectifier may differ where the trial's random numbers do not reach.
    if len(parts) != len(kinds) or not all(map(isinstance, parts, kinds)):
        raise ValueError(f"its conv_du must be {', '.join(kind.__name__ for kind in kinds)}; got {parts}")
    hidden, dim = shapes["conv_du.0.weight"][:2]
    replacement = ours.ChannelGate(dim, dim // hidden, "conv_du.0.bias" in shapes)
    if parameter_shapes(replacement) != shapes:
        raise ValueError(f"its parameters are not those of ChannelGate: {', '.join(shapes)}")
    return (replacement,)


def _attention(shapes: Mapping[str, tuple[int, ...]]) -> Sequence[nn.Module]:
    if "project_out.weight" in shapes and shapes["temperature"]:
        dim, heads = shapes["project_out.weight"][0], shapes["temperature"][0]
        for attention in ATTENTIONS:
            replacement = attention(dim, heads, "project_out.bias" in shapes)
            if parameter_shapes(replacement) == shapes:
                return (replacement,)
    names = ", ".join(x.__name__ for x in ATTENTIONS)
    raise ValueError(f"its parameters are those of none of {names}: {', '.join(shapes)}")


def _pyramid_attention(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Sequence[nn.Module]:
    channels, reduced = shapes["conv_assembly.0.weight"][0], shapes["conv_match.0.weight"][0]
    options = {name: getattr(module, name) for name in PYRAMID_OPTIONS if hasattr(module, name)}
    return (ours.PyramidAttention(channels, channels // reduced, **options),)

"""Where training begins: networks that predict the photo itself, begun near what they are given.

PANet and PA-EDSR add nothing to their input: what they return, they must produce. From random weights,
hundreds of steps pass before they reproduce a photo at all. The weights set here are some that they
could learn: three of the features carry the colours from the first convolution to the last, past what
the body adds. All weights go on learning, and what the networks compute is untouched.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COLOURS = 3
BODY_SHARE = 0.1  # of the body's untrained result that is added at first


def pass_input_through(model: nn.Module, kernels: Tensor | None = None) -> None:
    """Change the untrained weights of a PANet or PA-EDSR, so that it begins near its input.

    PA-EDSR begins near its input enlarged by the middle 3x3 of the bicubic kernel.

    Args:
        model: has ``head[0]``, ``body[-1]`` and ``tail[-1]``, 3x3 convolutions with biases, and for a
            ``scale`` above 1 an upsampler of 3x3 convolutions and ``nn.PixelShuffle`` in ``tail[0]``;
            at least 3 features.
        kernels: 3x3 filters, one per colour (3, 3, 3), through which the input passes; None for none.
    """
    parts = {name: cast(nn.Sequential, getattr(model, name)) for name in ("head", "body", "tail")}
    head, body, tail = (_conv(parts["head"][0]), _conv(parts["body"][-1]), _conv(parts["tail"][-1]))
    with torch.no_grad():
        _carry(head, torch.eye(COLOURS), same_pixel() if kernels is None else kernels)
        body.weight *= BODY_SHARE
        cast(Tensor, body.bias).zero_()
        for conv, factor in _upsampling(parts["tail"]):
            colours = torch.eye(COLOURS).repeat_interleave(factor**2, dim=0)
            _carry(conv, colours, bicubic_kernels(factor).repeat(COLOURS, 1, 1))
        tail.weight *= BODY_SHARE
        _carry(tail, torch.eye(COLOURS), same_pixel(), alone=False)


def same_pixel() -> Tensor:
    """The 3x3 kernels that copy, one per colour: (3, 3, 3)."""
    kernel = torch.zeros(COLOURS, 3, 3)
    kernel[:, 1, 1] = 1
    return kernel


def bicubic_kernels(factor: int) -> Tensor:
    """What each of the factor^2 pixels made of one takes of the 3x3 around that: (factor^2, 3, 3)."""
    around = F.pad(torch.eye(9).view(9, 1, 3, 3), (1, 1, 1, 1))
    enlarged = F.interpolate(around, scale_factor=factor, mode="bicubic", antialias=True)
    middle = slice(2 * factor, 3 * factor)
    kernels = enlarged[:, 0, middle, middle].flatten(1).T.view(factor**2, 3, 3)
    return kernels / kernels.sum(dim=(1, 2), keepdim=True)


def _upsampling(tail: nn.Sequential) -> list[tuple[nn.Conv2d, int]]:
    """The convolutions before pixel shuffles, and by how much these enlarge."""
    steps = list(cast(nn.Sequential, tail[0])) if len(tail) > 1 else []
    shuffles = cast(list[nn.PixelShuffle], steps[1::2])
    return [(_conv(conv), shuffle.upscale_factor) for conv, shuffle in zip(steps[::2], shuffles, strict=True)]


def _conv(module: nn.Module) -> nn.Conv2d:
    return cast(nn.Conv2d, module)


def _carry(conv: nn.Conv2d, colours: Tensor, kernels: Tensor, alone: bool = True) -> None:
    """Let the first outputs, one per row of colours, be the filtered colours: alone, or beside the rest."""
    outputs = len(colours)
    if alone:
        conv.weight[:outputs].zero_()
    cast(Tensor, conv.bias)[:outputs].zero_()
    conv.weight[:outputs, :COLOURS] = colours[:, :, None, None] * kernels[:, None]

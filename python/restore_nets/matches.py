"""Where pyramid attention found the matches of one pixel: its probabilities on every level."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restore_kernels.nn import PyramidAttention

TEXTURE = 9  # side of the window whose texture counts, in pixels


@dataclass(frozen=True)
class Matches:
    """The matches of one pixel.

    Args:
        pixel: its row and column.
        probabilities: of every level's positions, (h_i, w_i) each; all of them together sum to 1.
    """

    pixel: tuple[int, int]
    probabilities: list[Tensor]

    @property
    def shares(self) -> list[float]:
        """Of every level in the sum."""
        return [float(level.sum()) for level in self.probabilities]


def find_matches(model: nn.Module, image: Tensor, pixel: tuple[int, int]) -> Matches:
    """The probabilities with which pyramid attention mixes a pixel's result.

    The network runs until its first pyramid attention and no further. Of that only the one row of the
    softmax is computed, exactly, in float64: work and memory for one score per position.

    Args:
        model: contains a ``PyramidAttention``, which sees features of the size of the image.
        image: (3, H, W), float32 in [0, 1].
        pixel: row and column.

    Raises:
        ValueError: no such module, or a pixel outside of the image.
    """
    row, column = pixel
    height, width = image.shape[1:]
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"pixel must be in an image of {height} rows and {width} columns; got {pixel}")
    attention = pyramid_attention_of(model)
    if attention is None:
        raise ValueError(f"model must contain a PyramidAttention; got {type(model).__name__}")
    model.eval()
    with torch.inference_mode():
        query, keys, _ = attention.project(_input_of(attention, model, image))
        reach = attention.patch_size // 2
        patch = F.pad(query.double(), [reach] * 4)[:, :, row:, column:]
        patch = patch[:, :, : attention.patch_size, : attention.patch_size]
        scores = [_scores(patch, key.double(), attention) for key in keys]
        flat = torch.cat([level.flatten() for level in scores])
        best = F.one_hot(flat.argmax(), len(flat)).double()
        parts = (best if attention.hard else flat.softmax(dim=0)).split([level.numel() for level in scores])
    levels = zip(parts, scores, strict=True)
    return Matches((row, column), [part.view_as(level).float().cpu() for part, level in levels])


def pyramid_attention_of(model: nn.Module) -> PyramidAttention | None:
    """The first pyramid attention of a network, or None."""
    return next((module for module in model.modules() if isinstance(module, PyramidAttention)), None)


def _scores(patch: Tensor, key: Tensor, attention: PyramidAttention) -> Tensor:
    """Of a query patch (1, C, p, p) against all patches of a level (1, C, h, w): (h, w)."""
    reach = attention.patch_size // 2
    products = F.conv2d(key, patch, padding=reach)
    squares = F.conv2d(key.square().sum(dim=1, keepdim=True), torch.ones_like(patch[:, :1]), padding=reach)
    return (attention.softmax_scale * products / squares.sqrt().clamp(min=attention.eps))[0, 0]


class _Reached(Exception):
    """Carries what a module is about to see, out of the network."""


def _input_of(module: nn.Module, model: nn.Module, image: Tensor) -> Tensor:
    """What a module of a network sees when the network sees the image; nothing after it runs."""

    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise _Reached(inputs[0])

    handle = module.register_forward_pre_hook(stop)
    device = next(model.parameters(), image).device
    try:
        model(image[None].to(device))
    except _Reached as reached:
        return reached.args[0]
    finally:
        handle.remove()
    raise ValueError(f"{type(model).__name__} does not use its {type(module).__name__}")


def textured_pixel(image: Tensor) -> tuple[int, int]:
    """The row and column around which an image (C, H, W) varies most in every direction.

    The smaller eigenvalue of the structure tensor (Shi and Tomasi, 1994): large for texture and
    corners, small along a straight edge. A border of an eighth of the image is left out.
    """
    height, width = image.shape[1:]
    grey = F.pad(image.double().mean(dim=0)[None, None], (1, 1, 1, 1), mode="replicate")
    down = grey[:, :, 2:, 1:-1] - grey[:, :, :-2, 1:-1]
    right = grey[:, :, 1:-1, 2:] - grey[:, :, 1:-1, :-2]
    products = torch.cat((down * down, down * right, right * right))
    a, b, c = F.avg_pool2d(products, TEXTURE, stride=1, padding=TEXTURE // 2)[:, 0]
    smaller = (a + c) / 2 - ((a - c).square() / 4 + b.square()).sqrt()
    top, left = height // 8, width // 8
    inside = smaller[top : height - top, left : width - left]
    row, column = divmod(int(inside.argmax()), inside.shape[1])
    return top + row, left + column

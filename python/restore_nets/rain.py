"""Synthetic rain: several layers of motion-blurred drops, blended over a clean photo.

During the exposure a falling drop covers a pixel for a fraction alpha of the time and sends it the
light of the surroundings instead of the background (Garg and Nayar, "Vision and Rain", IJCV 2007):

    rainy = (1 - alpha) * clean + alpha * light

Drops lie in layers by their distance: a far layer has many short, thin, faint streaks, a near one few
long, wide, bright ones. A layer is sparse noise (one impulse per drop, of random strength) convolved
with one streak: a line of the layer's length and angle with a Gaussian cross-section. Layers
cover each other: 1 - alpha = product over layers of (1 - alpha_layer).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Range = tuple[float, float]
MAX_OPACITY = 0.95
STRENGTHS = (0.4, 1.0)  # of the drops within a layer, relative to the brightest


@dataclass(frozen=True)
class RainLayer:
    """Streaks at one distance from the camera.

    Args:
        angle: direction of fall in degrees from the vertical, positive towards the right.
        length: of a streak, in pixels.
        width: of a streak (full width at half maximum), in pixels.
        density: expected share of the picture that streaks cover, were there no overlaps.
        brightness: opacity in the middle of the brightest streak, in [0, 1].
    """

    angle: float
    length: float
    width: float
    density: float
    brightness: float


@dataclass(frozen=True)
class Rain:
    """One rainfall: its layers, and the light (in [0, 1]) that its drops send to the camera."""

    layers: tuple[RainLayer, ...]
    light: float


@dataclass(frozen=True)
class _LayerRanges:
    length: Range
    width: Range
    density: Range
    brightness: Range


# Heavy rain: about 20 dB (PSNR, luminance) on everyday photos.
_HEAVY = (
    _LayerRanges(length=(8, 14), width=(1.0, 1.4), density=(0.10, 0.20), brightness=(0.25, 0.45)),
    _LayerRanges(length=(16, 26), width=(1.4, 2.0), density=(0.06, 0.12), brightness=(0.4, 0.65)),
    _LayerRanges(length=(30, 44), width=(1.8, 2.6), density=(0.02, 0.05), brightness=(0.5, 0.8)),
)
_ANGLE: Range = (-30, 30)
_ANGLE_SPREAD = 4.0  # degrees; gusts between the layers
_LIGHT: Range = (0.8, 1.0)


def random_rain(rng: np.random.Generator) -> Rain:
    """A random heavy rainfall of three layers that fall in about the same direction."""
    angle = rng.uniform(*_ANGLE)
    layers = tuple(
        RainLayer(
            angle=angle + rng.uniform(-_ANGLE_SPREAD, _ANGLE_SPREAD),
            length=rng.uniform(*ranges.length),
            width=rng.uniform(*ranges.width),
            density=rng.uniform(*ranges.density),
            brightness=rng.uniform(*ranges.brightness),
        )
        for ranges in _HEAVY
    )
    return Rain(layers, rng.uniform(*_LIGHT))


def add_rain(clean: Tensor, rain: Rain, rng: np.random.Generator) -> Tensor:
    """A photo in the rain.

    Args:
        clean: (3, H, W), float32 in [0, 1].
        rain: what falls.
        rng: places the drops; the same state gives the same picture.

    Returns:
        (3, H, W), float32 in [0, 1].
    """
    if clean.dim() != 3 or clean.shape[0] != 3:
        raise ValueError(f"clean must have shape (3, H, W); got {tuple(clean.shape)}")
    return cover(clean, rain_opacity(rain, clean.shape[1], clean.shape[2], rng), rain.light)


def cover(clean: Tensor, opacity: Tensor, light: float) -> Tensor:
    """A photo (3, H, W) behind drops of this opacity (H, W) that send this light to the camera."""
    return torch.lerp(clean, torch.tensor(light), opacity)


def rain_opacity(rain: Rain, height: int, width: int, rng: np.random.Generator) -> Tensor:
    """alpha, the share of the exposure for which drops cover each pixel: (height, width) in [0, 1]."""
    transparency = torch.ones(height, width)
    for layer in rain.layers:
        transparency *= 1 - _layer_opacity(layer, height, width, rng)
    return 1 - transparency


def _layer_opacity(layer: RainLayer, height: int, width: int, rng: np.random.Generator) -> Tensor:
    streak = streak_kernel(layer.angle, layer.length, layer.width)
    margin = streak.shape[0] - 1  # drops outside the picture whose streaks reach into it
    shape = (height + margin, width + margin)
    # A streak covers length * width pixels.
    drops = rng.random(shape, dtype=np.float32) < layer.density / (layer.length * layer.width)
    strengths = rng.uniform(*STRENGTHS, size=shape).astype(np.float32) * layer.brightness
    impulses = torch.from_numpy(drops * strengths)
    opacity = F.conv2d(impulses[None, None], streak[None, None])[0, 0]
    return opacity.clamp_(max=MAX_OPACITY)


def streak_kernel(angle: float, length: float, width: float) -> Tensor:
    """The picture of one drop: a soft line through the centre with maximum 1, (K, K) with odd K.

    Across, the profile is a Gaussian of that full width at half maximum; along, it is flat and falls
    off at both ends like that Gaussian.
    """
    sigma = width / math.sqrt(8 * math.log(2))
    radius = math.ceil(length / 2 + 2 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    radians = math.radians(angle)
    along = x * math.sin(radians) + y * math.cos(radians)
    across = x * math.cos(radians) - y * math.sin(radians)
    beyond_end = (along.abs() - length / 2).clamp(min=0)
    return torch.exp(-(across.square() + beyond_end.square()) / (2 * sigma**2))

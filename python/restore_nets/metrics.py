"""PSNR and SSIM, by the conventions under which the field reports them.

Figures are only comparable under the same convention, so each is a named preset:

========== =============================== ==========================================================
preset     where it is used                what is compared
========== =============================== ==========================================================
derain     Rain100, Rain200, SPA-Data      Y of rounded 8-bit YCbCr
derain-did DID-Data, DDN-Data              Y, not rounded
denoise    denoising, demosaicing          RGB
jpeg       JPEG artifacts                  Y of rounded 8-bit YCbCr
sr-x2      super-resolution by 2           Y of rounded 8-bit YCbCr, without 2 pixels along the borders
sr-x3      super-resolution by 3           the same without 3 pixels
sr-x4      super-resolution by 4           the same without 4 pixels
========== =============================== ==========================================================

All compare pictures rounded to 8 bits as an image file holds them. YCbCr is that of BT.601
with Y in 16..235. SSIM is that of Wang et al. (2004): an 11x11 Gaussian window of sigma 1.5 where it
fits into the picture, K1 = 0.01, K2 = 0.03, averaged over pixels and channels. The peak is 255.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from restore_nets.models.options import suggestion

PEAK = 255.0
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
LUMA = (65481.0, 128553.0, 24966.0)  # thousandths, of BT.601, for R, G, B in [0, 1]
LUMA_OFFSET = 16.0


@dataclass(frozen=True)
class Preset:
    """A metric convention: which channels are compared, whether Y is rounded, how much border is left out."""

    name: str
    luma: bool
    round_luma: bool = True
    crop: int = 0  # pixels

    def __str__(self) -> str:
        channels = {
            (True, True): "Y channel of rounded 8-bit YCbCr (BT.601)",
            (True, False): "unrounded Y channel of YCbCr (BT.601)",
        }.get((self.luma, self.round_luma), "RGB")
        crop = f"without {self.crop} pixels along the borders" if self.crop else "no crop"
        return f"{channels}, {crop}, 11x11 Gaussian SSIM"


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            Preset("derain", luma=True),
            Preset("derain-did", luma=True, round_luma=False),
            Preset("denoise", luma=False),
            Preset("jpeg", luma=True),
            *(Preset(f"sr-x{scale}", luma=True, crop=scale) for scale in (2, 3, 4)),
        )
    }
)


@dataclass(frozen=True)
class Score:
    """How near a picture is to its target: PSNR in dB (infinite where equal) and SSIM in [-1, 1]."""

    psnr: float
    ssim: float


def score(image: Tensor, target: Tensor, preset: str) -> Score:
    """PSNR and SSIM of a picture against its target.

    Args:
        image, target: (3, H, W) with H, W >= 11 beside what the preset crops, values in [0, 1].
        preset: a name in ``PRESETS``.

    Raises:
        ValueError: an unknown preset, or pictures that do not fit.
    """
    if preset not in PRESETS:
        near = suggestion(preset, PRESETS)
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}{near}")
    smallest = SSIM_WINDOW + 2 * PRESETS[preset].crop
    if image.dim() != 3 or image.shape[0] != 3 or min(image.shape[1:]) < smallest:
        raise ValueError(f"image must have shape (3, H, W) with H, W >= {smallest}; got {tuple(image.shape)}")
    if target.shape != image.shape:
        raise ValueError(
            f"target must have the shape of image, {tuple(image.shape)}; got {tuple(target.shape)}"
        )
    x, y = (_channels(picture, PRESETS[preset]) for picture in (image, target))
    return Score(_psnr(x, y), float(ssim(x, y, PEAK)))


def _channels(image: Tensor, preset: Preset) -> Tensor:
    """What is compared: (1 or 3, H, W), float64 in [0, 255]."""
    height, width = image.shape[1:]
    inside = image[:, preset.crop : height - preset.crop, preset.crop : width - preset.crop]
    levels = (inside.detach().cpu().double().clamp(0, 1) * PEAK).round()
    if not preset.luma:
        return levels
    # Of whole numbers, so exact before it is divided: half a level is half a level on every machine.
    thousandths = sum(weight * channel for weight, channel in zip(LUMA, levels, strict=True))
    luma = cast(Tensor, thousandths)[None] / (1000 * PEAK) + LUMA_OFFSET
    return luma.round() if preset.round_luma else luma


def _psnr(x: Tensor, y: Tensor) -> float:
    error = float((x - y).square().mean())
    return 10 * math.log10(PEAK**2 / error) if error else math.inf


def ssim(x: Tensor, y: Tensor, peak: float) -> Tensor:
    """The mean SSIM of pictures, differentiable: x, y (..., H, W) with H, W >= 11 -> a scalar."""
    x, y = x.reshape(-1, *x.shape[-2:]), y.reshape(-1, *y.shape[-2:])
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    mean_x, mean_y, square_x, square_y, product = _window_means(torch.stack((x, y, x * x, y * y, x * y)))
    variance_x, variance_y = square_x - mean_x**2, square_y - mean_y**2
    covariance = product - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean()


def _window_means(x: Tensor) -> Tensor:
    """Gaussian means over the window, where it fits: (A, C, H, W) -> (A, C, H - 10, W - 10)."""
    offsets = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    gaussian = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    gaussian /= gaussian.sum()
    rows = F.conv2d(x.flatten(0, 1)[:, None], gaussian.view(1, 1, -1, 1))
    return F.conv2d(rows, gaussian.view(1, 1, 1, -1)).unflatten(0, x.shape[:2])[:, :, 0]

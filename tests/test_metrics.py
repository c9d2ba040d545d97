"""PSNR and SSIM against scikit-image, on pictures converted as each preset says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from restore_nets.metrics import PRESETS, score


def pictures(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth random picture and a noisy copy, of 8-bit levels."""
    generator = torch.Generator().manual_seed(height * width)
    coarse = torch.rand(1, 3, 5, 6, generator=generator)
    clean = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    noisy = (clean + 0.05 * torch.randn(clean.shape, generator=generator)).clamp(0, 1)
    return tuple((x * 255).round() / 255 for x in (noisy, clean))


def luma(image: torch.Tensor) -> np.ndarray:
    """Y of BT.601 in 16..235, from 8-bit levels."""
    red, green, blue = (image.double().numpy() * 255).round()
    return 16 + (65481 * red + 128553 * green + 24966 * blue) / 255_000  # a whole number until it is divided


def compared(image: torch.Tensor, preset: str) -> np.ndarray:
    if preset.startswith("sr-x"):
        border = int(preset[-1])
        image = image[:, border:-border, border:-border]
    if not PRESETS[preset].luma:
        return (image.double().numpy() * 255).round()
    y = luma(image)[None]
    return y if preset == "derain-did" else y.round()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [(11, 11), (47, 60), (64, 33)])
def test_agrees_with_scikit_image(preset, size):
    noisy, clean = pictures(*(side + 2 * PRESETS[preset].crop for side in size))
    x, y = compared(noisy, preset), compared(clean, preset)
    result = score(noisy, clean, preset)
    assert result.psnr == pytest.approx(peak_signal_noise_ratio(y, x, data_range=255), rel=1e-12)
    expected = structural_similarity(
        x, y, data_range=255, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert result.ssim == pytest.approx(expected, rel=1e-9)


def test_known_value():
    # One level of difference everywhere: 20 log10(255).
    image = torch.full((3, 16, 16), 100 / 255)
    assert score(image, image + 1 / 255, "denoise").psnr == pytest.approx(20 * math.log10(255), rel=1e-9)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_super_resolution_leaves_out_the_scale_along_the_borders(scale):
    image = pictures(40, 50)[0]
    spoilt = image.clone()
    for border in (spoilt[:, :scale], spoilt[:, -scale:], spoilt[..., :scale], spoilt[..., -scale:]):
        border.fill_(0)
    assert score(spoilt, image, f"sr-x{scale}").psnr == math.inf
    spoilt[:, scale, scale] = 0
    assert score(spoilt, image, f"sr-x{scale}").psnr < math.inf
    assert f"without {scale} pixels along the borders" in str(PRESETS[f"sr-x{scale}"])


def test_equal_pictures():
    image = pictures(20, 20)[0]
    result = score(image, image, "derain")
    assert result.psnr == math.inf
    assert result.ssim == pytest.approx(1, abs=1e-12)


def test_rounds_to_8_bits_as_a_file_would():
    image = pictures(20, 20)[0]
    assert score(image + 0.4 / 255, image, "denoise").psnr == math.inf


def test_bad_arguments():
    image = torch.zeros(3, 16, 16)
    with pytest.raises(ValueError, match=r"preset must be one of derain.*got 'rain'"):
        score(image, image, "rain")
    with pytest.raises(ValueError, match=r"H, W >= 11; got \(3, 10, 16\)"):
        score(image[:, :10], image[:, :10], "derain")
    with pytest.raises(ValueError, match=r"did you mean derain-did"):
        score(image, image, "derain-di")
    with pytest.raises(ValueError, match=r"H, W >= 17; got \(3, 16, 16\)"):
        score(image, image, "sr-x3")
    with pytest.raises(ValueError, match="target must have the shape of image"):
        score(image, image[:, :12], "derain")

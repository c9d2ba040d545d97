"""The rain model: its geometry, its physics, and that a seed decides it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from restore_nets.metrics import score
from restore_nets.photos import UNSEEN, shipped_photos
from restore_nets.rain import Rain, RainLayer, add_rain, rain_opacity, random_rain, streak_kernel
from restore_nets.tasks.derain import median_filter


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def layer(**changes: float) -> RainLayer:
    options = {"angle": 10.0, "length": 20.0, "width": 1.5, "density": 0.05, "brightness": 0.6, **changes}
    return RainLayer(**options)


@pytest.mark.parametrize("angle", [-30, 0, 20, 90])
def test_streak_points_where_it_falls(angle):
    kernel = streak_kernel(angle, length=21, width=1.5)
    radius = kernel.shape[0] // 2
    offsets = torch.arange(-radius, radius + 1.0)
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    # The principal axis of its second moments, as an angle from the vertical; y points down.
    xx, yy, xy = ((kernel * product).sum() for product in (x * x, y * y, x * y))
    axis = math.degrees(0.5 * math.atan2(2 * xy, yy - xx))
    assert (axis - angle + 90) % 180 - 90 == pytest.approx(0, abs=0.2)


@pytest.mark.parametrize("length", [9.0, 31.0])
@pytest.mark.parametrize("width", [1.2, 2.5])
def test_streak_has_its_length_and_width(length, width):
    kernel = streak_kernel(0, length, width)
    middle = kernel.shape[0] // 2
    assert kernel.max() == 1
    # A Gaussian of that full width at half maximum has this integral; the ends add one such in length.
    gaussian = width * math.sqrt(math.pi / math.log(2)) / 2
    assert kernel[middle].sum() == pytest.approx(gaussian, rel=0.02)  # sampled at whole pixels
    assert kernel[:, middle].sum() == pytest.approx(length + gaussian, rel=0.05)


def test_density_is_the_share_of_the_picture_covered():
    sparse = layer(density=0.02, brightness=0.5)
    opacity = rain_opacity(Rain((sparse,), light=1.0), 1000, 1000, rng())
    streaks = sparse.density / (sparse.length * sparse.width)  # per pixel, each covering length * width
    mean_strength = 0.7 * sparse.brightness
    kernel = streak_kernel(sparse.angle, sparse.length, sparse.width)
    # About 670 streaks of strengths 0.4 to 1: the sum varies by about 5 %.
    assert opacity.mean() == pytest.approx(float(streaks * mean_strength * kernel.sum()), rel=0.15)


def test_brightness_scales_a_layer():
    dim, bright = (rain_opacity(Rain((layer(brightness=b),), 1.0), 80, 80, rng()) for b in (0.2, 0.4))
    torch.testing.assert_close(bright, 2 * dim)


def test_layers_cover_each_other():
    first, second = layer(), layer(angle=-20.0, length=9.0)
    both = rain_opacity(Rain((first, second), 1.0), 50, 50, rng())
    generator = rng()
    alone = [rain_opacity(Rain((one,), 1.0), 50, 50, generator) for one in (first, second)]
    torch.testing.assert_close(1 - both, (1 - alone[0]) * (1 - alone[1]))


def test_rain_shows_the_light_instead_of_the_background():
    # Against a background as bright as the light, rain is invisible; on black it is light * opacity.
    rain = Rain((layer(density=0.3),), light=0.8)
    torch.testing.assert_close(
        add_rain(torch.full((3, 40, 40), 0.8), rain, rng()), torch.full((3, 40, 40), 0.8)
    )
    opacity = rain_opacity(rain, 40, 40, rng())
    torch.testing.assert_close(
        add_rain(torch.zeros(3, 40, 40), rain, rng()), (0.8 * opacity).expand(3, -1, -1)
    )


def test_streaks_enter_from_outside():
    # The expected coverage at the border is that of the middle: no dry margin.
    opacity = rain_opacity(Rain((layer(density=0.4, length=40.0),), 1.0), 300, 300, rng())
    border = torch.cat((opacity[:5].flatten(), opacity[-5:].flatten(), opacity[:, :5].flatten()))
    assert border.mean() == pytest.approx(float(opacity.mean()), rel=0.25)


def test_seed_decides():
    clean = torch.rand(3, 30, 40, generator=torch.Generator().manual_seed(0))
    first, again, other = (add_rain(clean, random_rain(g), g) for g in (rng(1), rng(1), rng(2)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.min() >= 0
    assert first.max() <= 1


def test_heavy_rain_on_photos_is_not_removed_by_simple_means():
    """The task is worth a network: a median filter, or the best constant shift, gains less than 2 dB."""
    gains = []
    for index, photo in enumerate(shipped_photos(UNSEEN).values()):
        generator = rng(index)
        clean = photo.float() / 255
        rainy = add_rain(clean, random_rain(generator), generator)
        before = score(rainy, clean, "derain").psnr
        assert 17 < before < 28
        shifted = rainy - (rainy - clean).mean()
        gains.append([score(x, clean, "derain").psnr - before for x in (median_filter(rainy), shifted)])
    assert np.mean(gains, axis=0).max() < 2


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"clean must have shape \(3, H, W\)"):
        add_rain(torch.zeros(1, 8, 8), Rain((layer(),), 1.0), rng())

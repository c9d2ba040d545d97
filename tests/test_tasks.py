"""The tasks: what each degradation is, that a seed decides it, and what a classical remedy gives."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import convolve
from scipy.ndimage import median_filter as scipy_median_filter

from restore_nets.data import degraded_pairs, values
from restore_nets.images import from_bytes
from restore_nets.metrics import PRESETS, score
from restore_nets.photos import shipped_photos
from restore_nets.tasks import create_task, list_tasks, task_at
from restore_nets.tasks.demosaic import bilinear, measured
from restore_nets.tasks.derain import median_filter
from restore_nets.tasks.jpeg import compress
from restore_nets.tasks.super_resolution import downscale, upscale


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def photo(height: int = 24, width: int = 36, seed: int = 0) -> torch.Tensor:
    """Smooth and of 8-bit levels."""
    coarse = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    return (smooth * 255).round() / 255


TASKS = [create_task(name) for name in list_tasks()]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_what_every_task_keeps(task):
    clean = photo()
    before = clean.clone()
    first, again = (task.degrade(clean, rng(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(clean, before)
    assert first.dtype == torch.float32
    assert first.shape == (3, 24 // task.scale, 36 // task.scale)
    assert first.shape != clean.shape or not torch.equal(first, clean)
    whole, _ = task.degrade_with_truth(clean, rng(1))
    assert torch.equal(whole, first)
    for shown in (task.before(first), task.classical(first)):
        assert shown is None or (shown.shape == clean.shape and shown.dtype == torch.float32)
    assert (task.classical(first) is None) == (task.labels.classical is None)
    assert task.metric in PRESETS
    assert create_task(**task.config()) == task
    with pytest.raises(ValueError, match=r"clean must have shape \(3, H, W\); got \(1, 8, 8\)"):
        task.degrade(torch.zeros(1, 8, 8), rng())


@pytest.mark.parametrize("name", ["derain", "denoise"])
def test_random_degradations_depend_on_the_seed(name):
    first, other = (create_task(name).degrade(photo(), rng(seed)) for seed in (1, 2))
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", ["demosaic", "jpeg", "sr"])
def test_eight_bits_lose_nothing(name):
    degraded = create_task(name).degrade(photo(), rng())
    torch.testing.assert_close((degraded * 255).round() / 255, degraded, rtol=0, atol=1e-7)


# Noise


@pytest.mark.parametrize("sigma", [10, 30, 50, 70, 12.5])
def test_noise_has_its_sigma_and_is_not_clipped(sigma):
    white = torch.ones(3, 200, 200)
    noise = 255 * (create_task("denoise", sigma=sigma).degrade(white, rng()) - 1).double()
    count = noise.numel()
    # Five standard errors of the mean, the deviation and the fourth moment of a normal distribution.
    assert float(noise.mean()) == pytest.approx(0, abs=5 * sigma / count**0.5)
    assert float(noise.std()) == pytest.approx(sigma, rel=5 / (2 * count) ** 0.5)
    assert float((noise / sigma).pow(4).mean()) == pytest.approx(3, abs=5 * (96 / count) ** 0.5)
    assert noise.max() > 3 * sigma
    # No two channels or neighbours share it.
    red, green = noise[0].flatten(), noise[1].flatten()
    for a, b in ((red, green), (red[:-1], red[1:]), (noise[0, :-1].flatten(), noise[0, 1:].flatten())):
        correlation = float(torch.corrcoef(torch.stack((a, b)))[0, 1])
        assert abs(correlation) < 5 / len(a) ** 0.5


# Mosaic


def test_mosaic_keeps_the_sites_of_rggb_and_nothing_else():
    clean = photo(5, 7) + 1  # no zeros of its own
    mosaic = create_task("demosaic").degrade(clean, rng())
    for y in range(5):
        for x in range(7):
            colour = {(0, 0): 0, (1, 1): 2}.get((y % 2, x % 2), 1)
            for channel in range(3):
                assert mosaic[channel, y, x] == (clean[channel, y, x] if channel == colour else 0)


def test_network_takes_the_mosaic_of_what_it_is_given():
    task, clean = create_task("demosaic"), photo()
    mosaic = task.degrade(clean, rng())
    sensor = mosaic.sum(dim=0).expand(3, -1, -1)  # one number per pixel, as a grey file
    for given in (clean, mosaic, sensor):
        assert torch.equal(task.network_input(given), mosaic)


def test_bilinear_interpolation_is_the_mean_of_the_nearest_neighbours():
    clean = photo(8, 10).double()
    mosaic = clean * measured(8, 10)
    filled = bilinear(mosaic.float()).numpy()
    cross = np.array([[0, 1, 0], [1, 4, 1], [0, 1, 0]]) / 4
    triangle = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 4
    for channel, kernel in enumerate((triangle, cross, triangle)):
        expected = convolve(mosaic[channel].numpy(), kernel, mode="constant")
        np.testing.assert_allclose(filled[channel, 1:-1, 1:-1], expected[1:-1, 1:-1], atol=1e-6)
    # A constant photo stays constant, at the borders too.
    torch.testing.assert_close(bilinear(0.7 * measured(7, 9)), torch.full((3, 7, 9), 0.7))
    assert bilinear(measured(1, 1)).tolist() == [[[1]], [[0]], [[0]]]


# JPEG


@pytest.mark.parametrize("quality", [10, 40])
def test_jpeg_is_that_of_a_file(quality):
    clean = photo(33, 50)
    file = io.BytesIO()
    pixels = (clean * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    decoded = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    degraded = create_task("jpeg", quality=quality).degrade(clean, rng())
    assert torch.equal((degraded * 255).round().byte(), decoded)


def test_lower_quality_loses_more():
    clean = from_bytes(shipped_photos(("chelsea.png",))["chelsea"])
    scores = [score(compress(clean, quality), clean, "jpeg").psnr for quality in (10, 20, 30, 40)]
    assert scores == sorted(scores)
    assert scores[0] < 32 < scores[-1] < math.inf


# Super-resolution


def imresize(picture: np.ndarray, scale: float) -> np.ndarray:
    """MATLAB's imresize(picture, scale) with the bicubic kernel: (C, H, W), float64.

    Its algorithm: weights of every output position in the input, normalised; positions beyond the
    borders are taken from the mirror image.
    """

    def cubic(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return np.where(x <= 1, near, np.where(x <= 2, far, 0))

    for axis in (1, 2):
        length = picture.shape[axis]
        stretch = min(scale, 1)
        width = 4 / stretch
        centres = np.arange(1, round(length * scale) + 1) / scale + 0.5 * (1 - 1 / scale)
        indices = np.floor(centres - width / 2)[:, None] + np.arange(math.ceil(width) + 2)
        weights = stretch * cubic(stretch * (centres[:, None] - indices))
        weights /= weights.sum(axis=1, keepdims=True)
        mirror = np.concatenate((np.arange(length), np.arange(length)[::-1]))
        sources = mirror[(indices.astype(int) - 1) % (2 * length)]  # (output, taps)
        matrix = np.zeros((len(centres), length))
        np.add.at(matrix, (np.arange(len(centres))[:, None], sources), weights)
        picture = np.moveaxis(np.tensordot(matrix, picture, axes=(1, axis)), 0, axis)
    return picture


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 10), (30, 41)])
def test_bicubic_is_matlabs_also_at_the_borders(scale, size):
    small = torch.rand(3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    large = torch.rand(
        3, *(scale * side for side in size), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    for ours, expected in (
        (downscale(large, scale), imresize(large.numpy(), 1 / scale)),
        (upscale(small, scale), imresize(small.numpy(), scale)),
    ):
        assert ours.shape == expected.shape
        np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_small_photos_are_rounded_to_8_bits(scale):
    clean = photo(24, 36)
    expected = np.clip(np.round(255 * imresize(clean.double().numpy(), 1 / scale)), 0, 255)
    degraded = 255 * create_task("sr", scale=scale).degrade(clean, rng()).double().numpy()
    # Halves round up in MATLAB and to the even number here, and float32 may fall on either side.
    assert np.abs(degraded - expected).max() < 1 + 1e-4
    assert (np.abs(degraded - expected) < 1e-4).mean() > 0.95


def test_photos_are_cropped_to_multiples_of_the_scale():
    task = create_task("sr", scale=3)
    with pytest.raises(ValueError, match="photo must have sides that are multiples of 3; got 36x25"):
        task.degrade(photo(25, 36), rng())
    clean = (255 * photo(25, 37)).byte()
    (pair,) = degraded_pairs(task, {"a": clean}, 0)
    assert torch.equal(pair.clean, clean[:, :24, :36])
    assert pair.degraded.shape == (3, 8, 12)


# Remedies without a network


@pytest.mark.parametrize(
    ("task", "least", "most"),
    [
        # The gain in dB over the degraded photo.
        (create_task("denoise", sigma=30), 9, 12),
        (create_task("denoise", sigma=70), 12, 16),
        (create_task("jpeg", quality=10), 0.3, 1),
        (create_task("derain"), 0.3, 2),
    ],
    ids=str,
)
def test_classical_remedies_help(task, least, most):
    (pair,) = degraded_pairs(task, shipped_photos(("chelsea.png",)), seed=0)
    degraded, clean = values(pair.degraded), from_bytes(pair.clean)
    remedy = task.classical(degraded)
    gain = score(remedy, clean, task.metric).psnr - score(degraded, clean, task.metric).psnr
    assert least < gain < most


def test_median_filter_is_that_of_scipy():
    image = photo(13, 17)
    expected = scipy_median_filter(image.numpy(), size=(1, 3, 3), mode="nearest")
    assert torch.equal(median_filter(image), torch.from_numpy(expected))


# Names and levels


def test_levels_as_numbers():
    assert task_at("denoise", 30.0) == create_task("denoise", sigma=30)
    assert task_at("denoise", 12.5) == create_task("denoise", sigma=12.5)
    assert task_at("jpeg", 40.0) == create_task("jpeg", quality=40)
    assert task_at("sr", 4.0) == create_task("sr", scale=4)
    assert task_at("derain", None) == create_task("derain")
    assert str(task_at("sr", 3)) == "sr (scale 3)"
    for task in TASKS:
        for level in task.usual_levels:
            assert getattr(task_at(task.name, level), task.level) == level


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("denoize", None), r"task must be one of derain, .*; got 'denoize', did you mean denoise"),
        (("derain", 3.0), r"task derain has no level; got 3\. Those with one: denoise \(sigma\), jpeg"),
        (("denoise", 0.0), "sigma must be positive and finite; got 0"),
        (("denoise", math.nan), "sigma must be positive and finite; got nan"),
        (("jpeg", 101.0), "quality must be at most 100; got 101"),
        (("jpeg", 0.0), "quality must be at least 1; got 0"),
        (("jpeg", 10.5), "quality must be an integer; got 10.5"),
        (("sr", 5.0), "scale must be one of 2, 3, 4; got 5"),
        (("sr", 2.5), "scale must be one of 2, 3, 4; got 2.5"),
    ],
)
def test_mistakes_name_what_is_valid(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        task_at(*arguments)


def test_unknown_options_are_refused():
    with pytest.raises(
        TypeError, match=r"task denoise has the option sigma; got 'sigmas', did you mean sigma"
    ):
        create_task("denoise", sigmas=3)
    with pytest.raises(TypeError, match="task demosaic has no options; got 'level'"):
        create_task("demosaic", level=3)
    with pytest.raises(TypeError, match="sigma must be a number; got 'much'"):
        create_task("denoise", sigma="much")

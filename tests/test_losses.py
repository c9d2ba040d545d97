"""Losses: against their formulas, their gradients, and how those of two outputs add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from restore_nets.losses import (
    PYRAMID_KERNEL,
    charbonnier,
    edge_loss,
    laplacian,
    outputs_of,
    ssim_loss,
    training_loss,
)
from restore_nets.models.subtasks import half_size


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_charbonnier_is_a_smooth_l1():
    x, y = torch.tensor([0.0, 3.0]), torch.tensor([0.0, 7.0])
    assert float(charbonnier(x, y)) == pytest.approx((1e-3 + 4) / 2, rel=1e-6)


def burt_and_adelson(image: np.ndarray) -> np.ndarray:
    """image - expand(reduce(image)), sum by sum as published; beyond a border its pixels repeat."""
    height, width = image.shape
    taps = range(-2, 3)
    weight = dict(zip(taps, PYRAMID_KERNEL, strict=True))

    def at(picture: np.ndarray, row: int, column: int) -> float:
        return picture[np.clip(row, 0, picture.shape[0] - 1), np.clip(column, 0, picture.shape[1] - 1)]

    reduced = np.array([
        [
            sum(weight[m] * weight[n] * at(image, 2 * i + m, 2 * j + n) for m in taps for n in taps)
            for j in range((width + 1) // 2)
        ]
        for i in range((height + 1) // 2)
    ])  # fmt: skip
    expanded = np.array([
        [
            4 * sum(
                weight[m] * weight[n] * at(reduced, (i - m) // 2, (j - n) // 2)
                for m in taps for n in taps if (i - m) % 2 == 0 and (j - n) % 2 == 0
            )
            for j in range(width)
        ]
        for i in range(height)
    ])  # fmt: skip
    return image - expanded


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (9, 8), (12, 13)])
def test_laplacian_follows_the_formula(size):
    image = images(2, 3, *size).double()
    expected = np.array([[burt_and_adelson(channel) for channel in x] for x in image.numpy()])
    np.testing.assert_allclose(laplacian(image).numpy(), expected, atol=1e-14)


def test_laplacian_sees_edges_alone():
    flat = torch.full((1, 3, 17, 20), 0.7)
    assert laplacian(flat).abs().max() < 1e-6
    ramp = torch.linspace(0, 1, 20).expand(1, 3, 17, 20)
    assert laplacian(ramp)[..., 3:-4].abs().max() < 1e-6
    step = (torch.arange(20) >= 10).float().expand(1, 3, 17, 20)
    assert laplacian(step).abs().argmax(dim=3).unique().tolist() in ([9], [10])


def test_edge_loss_ignores_what_has_no_edges():
    clean = images(1, 3, 16, 16)
    brighter, noisy = clean + 0.1, clean + 0.1 * images(1, 3, 16, 16, seed=1)
    assert float(edge_loss(brighter, clean)) == pytest.approx(1e-3, rel=1e-3)  # epsilon, as for equal ones
    difference = (laplacian(noisy) - laplacian(clean)).square() + 1e-6
    assert float(edge_loss(noisy, clean)) == pytest.approx(float(difference.sqrt().mean()), rel=1e-5)


def test_ssim_loss_agrees_with_scikit_image():
    x, y = images(2, 3, 20, 31), images(2, 3, 20, 31, seed=1)
    expected = [
        structural_similarity(
            a.numpy(), b.numpy(), data_range=1, channel_axis=0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(x.double(), y.double(), strict=True)
    ]  # fmt: skip
    assert float(ssim_loss(x, y)) == pytest.approx(1 - np.mean(expected), rel=1e-5)
    assert float(ssim_loss(x, x)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", [charbonnier, edge_loss, ssim_loss])
def test_gradients(loss):
    x, y = (images(1, 2, 12, 13, seed=n).double() for n in (0, 1))
    torch.autograd.gradcheck(lambda restored: loss(restored, y), x.requires_grad_())


def test_weighted_sum_of_two_outputs():
    clean = images(2, 3, 16, 16)
    restored, half = images(2, 3, 16, 16, seed=1), images(2, 3, 8, 8, seed=2)
    smaller = half_size(clean)
    full = float(charbonnier(restored, clean))
    assert float(training_loss(restored, clean, 0.8, 0, 0)) == pytest.approx(full)
    both = full + 0.8 * float(charbonnier(half, smaller))
    assert float(training_loss((restored, half), clean, 0.8, 0, 0)) == pytest.approx(both)
    assert float(training_loss((restored, half), clean, 0, 0, 0)) == pytest.approx(full)
    all_of_them = both + 0.3 * float(edge_loss(restored, clean)) + 0.2 * float(ssim_loss(restored, clean))
    assert float(training_loss((restored, half), clean, 0.8, 0.3, 0.2)) == pytest.approx(all_of_them)


def test_half_resolution_is_held_against_means_of_four_pixels():
    clean = images(1, 3, 6, 8)
    mean = clean.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5))
    assert float(training_loss((clean, mean), clean, 1.0, 0, 0)) == pytest.approx(2e-3, rel=1e-4)


def test_outputs():
    restored, half = images(1, 3, 4, 4), images(1, 3, 2, 2)
    assert outputs_of(restored) == (restored, None)
    assert outputs_of((restored, half)) == (restored, half)

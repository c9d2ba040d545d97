"""Degradation masks: their correlation with the true streaks, honestly computed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from restore_nets.masks import MaskCheck, check_mask, pearson


def picture(seed: int) -> torch.Tensor:
    return torch.rand(9, 13, generator=torch.Generator().manual_seed(seed))


def test_pearson_is_that_of_numpy():
    x, y = picture(0), picture(0) + picture(1)
    expected = np.corrcoef(x.numpy().ravel(), y.numpy().ravel())[0, 1]
    assert pearson(x, y) == pytest.approx(expected, rel=1e-6)
    assert pearson(x, 3 * x + 2) == pytest.approx(1)
    assert pearson(x, -x) == pytest.approx(-1)


def test_pearson_of_a_constant_is_undefined():
    assert math.isnan(pearson(picture(0), torch.full((9, 13), 0.1)))
    with pytest.raises(ValueError, match=r"x must have the shape of y, \(9, 13\); got \(13, 9\)"):
        pearson(picture(0).T, picture(0))


class Masked(nn.Module):
    """A network that calls what is red degraded, and drops out in training mode."""

    def degradation_mask(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return x[:, :1]


def test_masks_are_of_the_network_and_the_photo():
    rainy = torch.stack([picture(seed) for seed in range(3)])
    check = check_mask(Masked(), rainy, 0.5 * rainy, rainy[0])
    assert check is not None
    assert torch.equal(check.mask, rainy[0])
    assert check.correlation() == pytest.approx(1)
    assert check.correlation("brightness") == pytest.approx(pearson(rainy.mean(dim=0), rainy[0]))
    assert check.correlation("removed") == pytest.approx(check.correlation("brightness"), rel=1e-5)
    assert list(check.pictures()) == ["mask over the photo", "predicted mask", "true streaks"]
    red, green, _ = check.pictures()["mask over the photo"]
    torch.testing.assert_close(green, check.brightness * (1 - check.mask))
    torch.testing.assert_close(red - green, check.mask)


def test_networks_without_a_mask():
    assert check_mask(nn.Identity(), torch.rand(3, 4, 4), torch.rand(3, 4, 4), None) is None


def test_unknown_streaks():
    check = MaskCheck(picture(0), None, picture(1), picture(2))
    assert list(check.pictures()) == ["mask over the photo", "predicted mask"]
    with pytest.raises(ValueError, match="streaks must be known to correlate with; got None"):
        check.correlation()

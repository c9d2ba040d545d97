"""Bayer mosaic (RGGB): of the three colours of a pixel a sensor measures one, the others are 0.

    columns   0 1 2 3
    row 0     R G R G
    row 1     G B G B

The degraded photo keeps its three channels, as PANet takes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from restore_nets.tasks.task import Labels, Task, check_photo

TRIANGLE = torch.outer(torch.tensor([0.5, 1, 0.5]), torch.tensor([0.5, 1, 0.5]))


def measured(height: int, width: int) -> Tensor:
    """1 where the sensor measures a colour, otherwise 0: (3, height, width)."""
    sites = torch.zeros(3, height, width)
    sites[0, 0::2, 0::2] = 1
    sites[1, 0::2, 1::2] = 1
    sites[1, 1::2, 0::2] = 1
    sites[2, 1::2, 1::2] = 1
    return sites


def bilinear(mosaic: Tensor) -> Tensor:
    """Every missing colour as the mean of its nearest measured neighbours: (3, H, W) -> (3, H, W).

    Weights of a 3x3 triangle, normalised by those that meet a measured pixel: two or four neighbours
    inside, fewer at the border. A photo of a single row or column lacks colours altogether: they stay 0.
    """
    triangle = TRIANGLE.view(1, 1, 3, 3)
    sites = measured(*mosaic.shape[1:])
    weights = F.conv2d(sites[:, None], triangle, padding=1)[:, 0]
    spread = F.conv2d((mosaic * sites)[:, None], triangle, padding=1)[:, 0]
    return torch.where(sites > 0, mosaic, spread / weights.clamp(min=0.25))


@dataclass(frozen=True)
class Demosaic(Task):
    """Two thirds of the values of a photo are missing; there is no level."""

    name: ClassVar[str] = "demosaic"
    period: ClassVar[int] = 2

    def degrade(self, clean: Tensor, rng: np.random.Generator) -> Tensor:
        check_photo(clean)
        return self.network_input(clean)

    def network_input(self, photo: Tensor) -> Tensor:
        """The mosaic of a photo: of one with three channels, of a grey one (a sensor's), or itself."""
        return photo * measured(*photo.shape[1:])

    def before(self, degraded: Tensor) -> Tensor:
        """Bilinear interpolation."""
        return bilinear(degraded)

    def first_filter(self) -> Tensor:
        """Bilinear interpolation away from the borders."""
        cross = torch.tensor([[0, 0.25, 0], [0.25, 1, 0.25], [0, 0.25, 0]])
        return torch.stack((TRIANGLE, cross, TRIANGLE))

    @property
    def metric(self) -> str:
        return "denoise"

    @property
    def labels(self) -> Labels:
        return Labels(
            before="bilinear",
            title="Colours filled in",
            done="Colours of a Bayer mosaic filled in",
            cause="missing colours",
            where="Where bilinear interpolation is furthest off",
            made="The network gets one colour of every pixel, in the RGGB pattern of a sensor, and zeros for "
            "the others. The photos before are bilinear interpolations of the same values. These photos have "
            "been through a camera's own demosaicing; values straight from a sensor are linear and noisy.",
        )

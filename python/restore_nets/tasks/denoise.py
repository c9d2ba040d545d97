"""Gaussian noise: noisy = clean + sigma / 255 * n, with n independent and normal for every value.

The noise is that of the field's synthetic benchmarks (as for DnCNN, DRUNet and PANet): added in
floating point to the clean photo, of one known sigma on the scale 0 to 255, neither clipped to
[0, 1] nor rounded, so that its mean stays 0 on black and on white. A photo out of an 8-bit file is
clipped and rounded; networks trained on this noise take it well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from restore_nets.models.options import check_number
from restore_nets.tasks.task import Labels, Task, check_photo

_PEAK = 255.0


@dataclass(frozen=True)
class Denoise(Task):
    """Noise of one sigma.

    Args:
        sigma: standard deviation of the noise on the scale 0 to 255; any positive number.
    """

    sigma: float = 30

    name: ClassVar[str] = "denoise"
    level: ClassVar[str | None] = "sigma"
    usual_levels: ClassVar[tuple[int, ...]] = (10, 30, 50, 70)
    eight_bit: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("sigma", self.sigma)

    def degrade(self, clean: Tensor, rng: np.random.Generator) -> Tensor:
        check_photo(clean)
        noise = torch.from_numpy(rng.standard_normal(tuple(clean.shape), dtype=np.float32))
        return clean + self.sigma / _PEAK * noise

    def classical(self, degraded: Tensor) -> Tensor:
        """Non-local means (Buades et al., CVPR 2005) of scikit-image, told the sigma."""
        from skimage.restoration import denoise_nl_means

        sigma = self.sigma / _PEAK
        picture = degraded.permute(1, 2, 0).numpy()
        options = {"patch_size": 5, "patch_distance": 6, "h": 0.8 * sigma, "sigma": sigma}
        result = denoise_nl_means(picture, channel_axis=2, fast_mode=True, **options)
        return torch.from_numpy(np.ascontiguousarray(result)).permute(2, 0, 1).float()

    @property
    def metric(self) -> str:
        return "denoise"

    @property
    def labels(self) -> Labels:
        return Labels(
            before="noisy",
            title="Noise removed",
            done="Noise taken out of photos",
            cause="noise",
            where="Where the noise disturbs most",
            made=f"Each crop gets new Gaussian noise of sigma {self.sigma:g} (on the scale 0 to 255), not "
            "clipped and not rounded. The unseen photos get noise of the same kind, from another seed: "
            "a camera's noise depends on the light and is something else.",
            classical="non-local means",
        )

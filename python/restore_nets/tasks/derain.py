"""Rain: the synthetic streaks of ``restore_nets.rain``, each time another heavy rainfall."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from restore_nets.rain import add_rain, cover, rain_opacity, random_rain
from restore_nets.tasks.task import Labels, Task, check_photo


def median_filter(image: Tensor) -> Tensor:
    """The 3x3 median of every pixel and channel of (3, H, W), borders repeated."""
    padded = F.pad(image[None], (1, 1, 1, 1), mode="replicate")
    return F.unfold(padded.transpose(0, 1), 3).median(dim=1).values.view_as(image)


@dataclass(frozen=True)
class Derain(Task):
    """Heavy rain of random direction, density and brightness; there is no level."""

    name: ClassVar[str] = "derain"
    upright: ClassVar[bool] = True  # rain goes on falling downwards
    # Mostly darker: it rains at dusk too, and streaks show most on what is dark.
    exposures: ClassVar[tuple[float, float] | None] = (0.6, 2.2)

    def degrade(self, clean: Tensor, rng: np.random.Generator) -> Tensor:
        return add_rain(clean, random_rain(rng), rng)

    def degrade_with_truth(self, clean: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor | None]:
        """The rainy photo, and the opacity of the drops before every pixel."""
        check_photo(clean)
        rain = random_rain(rng)
        streaks = rain_opacity(rain, clean.shape[1], clean.shape[2], rng)
        return cover(clean, streaks, rain.light), streaks

    def classical(self, degraded: Tensor) -> Tensor:
        return median_filter(degraded)

    @property
    def metric(self) -> str:
        return "derain"

    @property
    def labels(self) -> Labels:
        return Labels(
            before="rainy",
            title="Rain removed",
            done="Rain taken out of photos",
            cause="rain",
            where="Where the rain is heaviest",
            made="Each crop gets a new exposure and a new synthetic rain: three layers of motion-blurred "
            "drops, far to near, of random direction (within 30° of the vertical), length, width, density "
            "and brightness, blended over the photo. The unseen photos get rain of the same kind, from "
            "another seed: this shows that the network learned that rain on few photos, not how it does on "
            "every real one.",
            classical="3×3 median",
        )

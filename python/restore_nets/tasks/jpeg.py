"""JPEG compression: a real encoder's and decoder's, Pillow's (libjpeg), with colours at half resolution."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from restore_nets.images import from_bytes, to_bytes
from restore_nets.models.options import check_integer
from restore_nets.tasks.task import Labels, Task, check_photo

_BLOCK = 8
_MOST = 100


def compress(photo: Tensor, quality: int) -> Tensor:
    """A photo (3, H, W), rounded to 8 bits, as it comes back from a JPEG file of this quality (1 to 100)."""
    buffer = io.BytesIO()
    pixels = to_bytes(photo).permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality, subsampling="4:2:0")
    with Image.open(buffer) as image:
        return from_bytes(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous())


def mean_of_shifted(photo: Tensor, quality: int, step: int = 2) -> Tensor:
    """The mean of a photo compressed again with its blocks in other places (Nosratinia, ICASSP 1999).

    A shift by whole pixels moves the photo against the blocks; every step-th of the 8x8 shifts is taken.
    """
    total = torch.zeros_like(photo)
    shifts = range(0, _BLOCK, step)
    for down in shifts:
        for right in shifts:
            compressed = compress(photo.roll((down, right), dims=(1, 2)), quality)
            total += compressed.roll((-down, -right), dims=(1, 2))
    return total / len(shifts) ** 2


@dataclass(frozen=True)
class Jpeg(Task):
    """Compression at one quality.

    Args:
        quality: of Pillow's encoder, 1 to 100; the field reports 10, 20, 30 and 40.
    """

    quality: int = 10

    name: ClassVar[str] = "jpeg"
    level: ClassVar[str | None] = "quality"
    usual_levels: ClassVar[tuple[int, ...]] = (10, 20, 30, 40)
    from_neighbours: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_integer("quality", self.quality)
        if self.quality > _MOST:
            raise ValueError(f"quality must be at most {_MOST}; got {self.quality}")

    def degrade(self, clean: Tensor, rng: np.random.Generator) -> Tensor:
        check_photo(clean)
        return compress(clean, self.quality)

    def classical(self, degraded: Tensor) -> Tensor:
        return mean_of_shifted(degraded, self.quality)

    @property
    def metric(self) -> str:
        return "jpeg"

    @property
    def labels(self) -> Labels:
        return Labels(
            before="compressed",
            title="JPEG artifacts removed",
            done="JPEG artifacts taken out of photos",
            cause="compression",
            where="Where the artifacts are strongest",
            made=f"The photos went through a real JPEG encoder at quality {self.quality}, colours at half "
            "resolution, whole, before crops were cut out of them. So did the unseen photos; at other "
            "qualities the network has not been tried.",
            classical="shifted again",
        )

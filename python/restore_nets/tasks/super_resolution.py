"""Super-resolution: photos made smaller by MATLAB's ``imresize``, as the field's benchmarks are.

``imresize`` takes the cubic kernel of Keys (a = -1/2), stretched by the scale against aliasing when it
makes photos smaller, and repeats photos beyond their borders as if in a mirror. PyTorch's antialiased
bicubic interpolation has the same kernel and the same positions, but cuts the kernel off at borders.
So photos are first continued by their mirror image and the result is cropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from restore_nets.images import from_bytes, to_bytes
from restore_nets.tasks.task import Labels, Task, check_photo

SCALES = (2, 3, 4)
_SUPPORT = 3  # pixels of the smaller photo; the kernel reaches 2, and half a pixel further at even scales


def downscale(photo: Tensor, scale: int) -> Tensor:
    """``imresize(photo, 1 / scale)``: (C, H, W) -> (C, H / scale, W / scale), not rounded or clipped.

    Raises:
        ValueError: a side that is no multiple of the scale.
    """
    if photo.shape[1] % scale or photo.shape[2] % scale:
        size = f"{photo.shape[2]}x{photo.shape[1]}"
        raise ValueError(f"photo must have sides that are multiples of {scale}; got {size}")
    around = _mirrored_around(photo, _SUPPORT * scale)
    size = [side // scale for side in around.shape[1:]]
    return _bicubic(around, size)[:, _SUPPORT:-_SUPPORT, _SUPPORT:-_SUPPORT]


def upscale(photo: Tensor, scale: int) -> Tensor:
    """``imresize(photo, scale)``: (C, H, W) -> (C, scale H, scale W), not rounded or clipped."""
    margin = _SUPPORT * scale
    around = _mirrored_around(photo, _SUPPORT)
    size = [side * scale for side in around.shape[1:]]
    return _bicubic(around, size)[:, margin:-margin, margin:-margin]


def _bicubic(photo: Tensor, size: list[int]) -> Tensor:
    # Without antialias, PyTorch takes another kernel (a = -3/4), also where it enlarges.
    return F.interpolate(photo[None], size=size, mode="bicubic", antialias=True)[0]


def _mirrored_around(photo: Tensor, margin: int) -> Tensor:
    """The photo continued by its mirror images, the outermost pixels repeated: ... b a | a b c | c b ..."""
    for axis in (1, 2):
        length = photo.shape[axis]
        positions = torch.arange(-margin, length + margin, device=photo.device) % (2 * length)
        photo = photo.index_select(axis, torch.minimum(positions, 2 * length - 1 - positions))
    return photo


@dataclass(frozen=True)
class SuperResolution(Task):
    """The small photo is rounded to 8 bits: benchmarks keep it in files.

    Args:
        scale: 2, 3 or 4.
    """

    scale: int = 2

    name: ClassVar[str] = "sr"
    level: ClassVar[str | None] = "scale"
    usual_levels: ClassVar[tuple[int, ...]] = SCALES
    from_neighbours: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.scale, int) or self.scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(map(str, SCALES))}; got {self.scale!r}")

    def degrade(self, clean: Tensor, rng: np.random.Generator) -> Tensor:
        check_photo(clean)
        return from_bytes(to_bytes(downscale(clean, self.scale)))

    def before(self, degraded: Tensor) -> Tensor:
        """Bicubic enlargement, also by ``imresize``."""
        return upscale(degraded, self.scale).clamp(0, 1)

    @property
    def metric(self) -> str:
        return f"sr-x{self.scale}"

    @property
    def labels(self) -> Labels:
        return Labels(
            before="bicubic",
            title=f"Enlarged {self.scale} times",
            done=f"Photos enlarged {self.scale} times",
            cause="lost detail",
            where="Where bicubic enlargement is furthest off",
            made=f"The photos were made {self.scale} times smaller, whole, by bicubic interpolation as "
            "MATLAB's imresize does it, and rounded to 8 bits; the network learns to undo that. The photos "
            "before are bicubic enlargements of the small ones. A camera makes small pictures in other ways.",
        )

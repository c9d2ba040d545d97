"""Training data: random crops of photos, degraded here or paired with a degraded photo.

A batch is a function of the seed and the number of the step alone. So training can resume at any
step, and any number of loader processes gives the same batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from restore_nets.images import from_bytes, is_image_name, read_image, to_bytes
from restore_nets.tasks import Task

Photos = Mapping[str, Tensor]  # name -> (3, H, W), uint8

# Seeds of different purposes must not meet: the first entry of every seed sequence says which it is.
_TRAINING_SEED, _DEGRADATION_SEED = 0, 1


@dataclass(frozen=True)
class Pair:
    """A degraded photo and the clean one.

    Args:
        name: of the photo.
        degraded: (3, H / scale, W / scale) for the scale of the task; uint8, or float32 where the
            degradation is none that an 8-bit file could hold (see ``Task.eight_bit``).
        clean: (3, H, W), uint8.
        truth: what is known about a degradation that was made here (see ``Task.degrade_with_truth``):
            of rain, the opacity of the drops before every pixel, (H, W), float32 in [0, 1].
    """

    name: str
    degraded: Tensor
    clean: Tensor
    truth: Tensor | None = None


@dataclass(frozen=True)
class Stage:
    """Part of a training run: the steps before ``until`` (counted from 0) that belong to no earlier stage.

    Args:
        batch: crops per batch.
        crop: side of the clean crops, in pixels.
    """

    until: int
    batch: int
    crop: int

    def __post_init__(self) -> None:
        for name in ("until", "batch", "crop"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")


class Crops(Dataset[tuple[Tensor, Tensor]], ABC):
    """Batches of crops: item ``step`` is (degraded, clean), float32, clean in [0, 1].

    Shapes: (batch, 3, crop / scale, crop / scale) and (batch, 3, crop, crop), for the task's scale.

    Attributes:
        stages: all of them; one of ``batch`` and ``crop``, if ``in_stages`` does not say otherwise.

    Args:
        task: what separates degraded from clean.
        sizes: (height, width) of every clean photo by name.
        steps: number of batches.
        batch: crops per batch.
        crop: side of the clean crops, in pixels; a multiple of the scale.
        seed: of everything random.

    Raises:
        ValueError: no photos, one smaller than the crop, or a crop that the scale does not divide.
    """

    def __init__(
        self, task: Task, sizes: Mapping[str, Sequence[int]], steps: int, batch: int, crop: int, seed: int
    ) -> None:
        if not sizes:
            raise ValueError("training needs at least one photo; got none")
        self.task, self.sizes, self.steps, self.seed = task, sizes, steps, seed
        self._set_stages([Stage(steps, batch, crop)])

    def in_stages(self, stages: Sequence[Stage]) -> Crops:
        """Crops of the same photos whose number and size change on the way, as in progressive learning.

        Raises:
            ValueError: stages that do not follow each other up to the last step, or as for the class.
        """
        ends = [stage.until for stage in stages]
        if sorted(set(ends)) != ends or ends[-1:] != [self.steps]:
            raise ValueError(
                f"stages must end one after the other, the last at step {self.steps}; got {ends}"
            )
        other = copy(self)
        other._set_stages(stages)
        return other

    def _set_stages(self, stages: Sequence[Stage]) -> None:
        for crop in (stage.crop for stage in stages):
            if crop % self.task.scale:
                raise ValueError(f"crop must be a multiple of the scale of {self.task}; got {crop}")
            for name, (height, width) in self.sizes.items():
                if min(height, width) < crop:
                    raise ValueError(
                        f"photo {name} ({width}x{height}) must be at least crop={crop} pixels wide and high"
                    )
        self.stages = tuple(stages)

    @property
    def crop(self) -> int:
        """The side of the smallest crops."""
        return min(stage.crop for stage in self.stages)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        if not 0 <= step < self.steps:
            raise IndexError(step)
        stage = next(stage for stage in self.stages if step < stage.until)
        rng = np.random.default_rng((_TRAINING_SEED, self.seed, step))
        degraded, clean = zip(*(self._sample(rng, stage.crop) for _ in range(stage.batch)), strict=True)
        return torch.stack(degraded), torch.stack(clean)

    @abstractmethod
    def _sample(self, rng: np.random.Generator, crop: int) -> tuple[Tensor, Tensor]:
        """One random crop of this side, degraded and clean."""


def _corner(photo: Tensor, crop: int, rng: np.random.Generator, unit: int = 1) -> tuple[int, int]:
    """Where in a photo (3, H, W) a crop begins: top and left, multiples of the unit."""
    top, left = (unit * int(rng.integers((side - crop) // unit + 1)) for side in photo.shape[1:])
    return top, left


class DegradedCrops(Crops):
    """Crops of clean photos, turned at random and degraded, each anew."""

    def __init__(self, task: Task, photos: Photos, steps: int, batch: int, crop: int, seed: int) -> None:
        sizes = {name: photo.shape[1:] for name, photo in photos.items()}
        super().__init__(task, sizes, steps, batch, crop, seed)
        self.photos = list(photos.values())

    def _sample(self, rng: np.random.Generator, crop: int) -> tuple[Tensor, Tensor]:
        photo = self.photos[rng.integers(len(self.photos))]
        picture = _square(photo, *_corner(photo, crop, rng), crop)
        clean = from_bytes(_oriented(self.task, rng, picture)[0])
        if self.task.exposures is not None:
            clean = clean ** float(rng.uniform(*self.task.exposures))
        return self.task.degrade(clean, rng), clean


class PairedCrops(Crops):
    """Crops of pairs, turned at random."""

    def __init__(
        self, task: Task, pairs: Sequence[Pair], steps: int, batch: int, crop: int, seed: int
    ) -> None:
        super().__init__(task, {pair.name: pair.clean.shape[1:] for pair in pairs}, steps, batch, crop, seed)
        self.pairs = list(pairs)

    def _sample(self, rng: np.random.Generator, crop: int) -> tuple[Tensor, Tensor]:
        pair, task = self.pairs[int(rng.integers(len(self.pairs)))], self.task
        top, left = _corner(pair.clean, crop, rng, unit=max(task.scale, task.period))
        small = (x // task.scale for x in (top, left, crop))
        crops = (_square(pair.degraded, *small), _square(pair.clean, top, left, crop))
        if task.period == 1:
            crops = _oriented(task, rng, *crops)
        degraded, clean = map(values, crops)
        return degraded, clean


def synthetic_crops(task: Task, photos: Photos, steps: int, batch: int, crop: int, seed: int) -> Crops:
    """Crops of clean photos and of what the task makes of them.

    Where a degraded pixel depends on its neighbours, whole photos are degraded: the border of a crop
    is then none of a photo, and JPEG's blocks begin anywhere in it.
    """
    if task.from_neighbours:
        return PairedCrops(task, degraded_pairs(task, photos, seed), steps, batch, crop, seed)
    return DegradedCrops(task, photos, steps, batch, crop, seed)


def _square(picture: Tensor, top: int, left: int, side: int) -> Tensor:
    return picture[:, top : top + side, left : left + side]


def _oriented(task: Task, rng: np.random.Generator, *pictures: Tensor) -> tuple[Tensor, ...]:
    """The pictures mirrored and, where the task allows it, turned, all in the same way."""
    if rng.random() < 0.5:
        pictures = tuple(x.flip(-1) for x in pictures)
    if not task.upright:
        quarters = int(rng.integers(4))
        pictures = tuple(x.rot90(quarters, (-2, -1)) for x in pictures)
    return pictures


def values(picture: Tensor) -> Tensor:
    """A picture of a ``Pair`` as float32: bytes in [0, 1], others as they are."""
    return from_bytes(picture) if picture.dtype == torch.uint8 else picture


def degraded_pairs(task: Task, photos: Photos, seed: int) -> list[Pair]:
    """Each photo degraded whole, from a seed of its own, and rounded to 8 bits where the task allows it.

    Photos are cropped at the bottom and on the right to multiples of the task's scale.
    """
    pairs = []
    for index, (name, photo) in enumerate(photos.items()):
        rng = np.random.default_rng((_DEGRADATION_SEED, seed, index))
        height, width = (side - side % task.scale for side in photo.shape[1:])
        clean = photo[:, :height, :width]
        degraded, truth = task.degrade_with_truth(from_bytes(clean), rng)
        pairs.append(Pair(name, to_bytes(degraded) if task.eight_bit else degraded, clean, truth))
    return pairs


def read_photos(folder: Path) -> dict[str, Tensor]:
    """The PNG and JPEG files of a folder by file name, in the order of their names.

    Raises:
        ValueError: the folder holds none, or one that cannot be read.
        OSError: the folder cannot be opened.
    """
    photos = {
        path.name: to_bytes(read_image(path)) for path in sorted(folder.iterdir()) if is_image_name(path)
    }
    if not photos:
        raise ValueError(f"{folder} holds no PNG or JPEG files")
    return photos


def read_pairs(folder: Path, scale: int = 1) -> list[Pair]:
    """Pairs of files of the same name in ``folder/input`` (degraded) and ``folder/target`` (clean).

    Args:
        scale: the clean photo is this many times as high and wide as the degraded one.

    Raises:
        ValueError: files without a partner, partners of other sizes, or none that can be read.
        OSError: a folder cannot be opened.
    """
    degraded, clean = read_photos(folder / "input"), read_photos(folder / "target")
    lonely = sorted(degraded.keys() ^ clean.keys())
    if lonely:
        where = "target" if lonely[0] in degraded else "input"
        raise ValueError(f"{folder}: {lonely[0]} is missing in {where}/ ({len(lonely)} without a partner)")
    for name in clean:
        expected = tuple(scale * side for side in degraded[name].shape[1:])
        if clean[name].shape[1:] != expected:
            must = "have one size in input/ and target/" if scale == 1 else (
                f"be {scale} times as wide and high in target/ as in input/"
            )  # fmt: skip
            sizes = " and ".join(f"{x.shape[2]}x{x.shape[1]}" for x in (degraded[name], clean[name]))
            raise ValueError(f"{folder}: {name} must {must}; got {sizes}")
    return [Pair(name, degraded[name], clean[name]) for name in clean]


def shrink(photo: Tensor, longer_side: int) -> Tensor:
    """A photo (3, H, W), uint8, scaled down until its longer side is at most this many pixels."""
    height, width = photo.shape[1:]
    scale = longer_side / max(height, width)
    if scale >= 1:
        return photo
    size = [max(1, round(side * scale)) for side in (height, width)]
    resized = F.interpolate(from_bytes(photo)[None], size=size, mode="bicubic", antialias=True)[0]
    return to_bytes(resized)


def middle(pair: Pair, longest_side: int, task: Task) -> Pair:
    """The middle of a pair: at most this many pixels a side of the clean photo, the task's pattern kept."""
    unit = max(task.scale, task.period)
    sides = [min(side, longest_side - longest_side % unit) for side in pair.clean.shape[1:]]
    starts = [
        (whole - side) // (2 * unit) * unit for whole, side in zip(pair.clean.shape[1:], sides, strict=True)
    ]

    def cut(picture: Tensor, scale: int = 1) -> Tensor:
        (top, left), (height, width) = ([x // scale for x in xs] for xs in (starts, sides))
        return picture[..., top : top + height, left : left + width]

    truth = None if pair.truth is None else cut(pair.truth)
    return Pair(pair.name, cut(pair.degraded, task.scale), cut(pair.clean), truth)

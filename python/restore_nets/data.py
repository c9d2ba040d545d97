"""Training data: random crops of photos, in synthetic rain or paired with a degraded photo.

A batch is a function of the seed and the number of the step alone. So training can resume at any
step, and any number of loader processes gives the same batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from restore_nets.images import from_bytes, is_image_name, read_image, to_bytes
from restore_nets.rain import add_rain, cover, rain_opacity, random_rain

Photos = Mapping[str, Tensor]  # name -> (3, H, W), uint8

# Seeds of different purposes must not meet: the first entry of every seed sequence says which it is.
_TRAINING_SEED, _RAIN_SEED = 0, 1
# Mostly darker: it rains at dusk too, and streaks show most on what is dark.
_GAMMA = (0.6, 2.2)


@dataclass(frozen=True)
class Pair:
    """A degraded photo and the clean one: (3, H, W), uint8, of one size.

    Where the rain was made here, ``streaks`` is the truth about it: the opacity of the drops before
    every pixel, (H, W), float32 in [0, 1].
    """

    name: str
    degraded: Tensor
    clean: Tensor
    streaks: Tensor | None = None


class Crops(Dataset[tuple[Tensor, Tensor]], ABC):
    """Batches of crops: item ``step`` is (degraded, clean), each (batch, 3, crop, crop), float32 in [0, 1].

    Args:
        sizes: (height, width) of every photo by name.
        steps: number of batches.
        batch: crops per batch.
        crop: side of the crops, in pixels.
        seed: of everything random.

    Raises:
        ValueError: no photos, or one smaller than the crop.
    """

    def __init__(
        self, sizes: Mapping[str, Sequence[int]], steps: int, batch: int, crop: int, seed: int
    ) -> None:
        if not sizes:
            raise ValueError("training needs at least one photo; got none")
        for name, (height, width) in sizes.items():
            if min(height, width) < crop:
                raise ValueError(
                    f"photo {name} ({width}x{height}) must be at least crop={crop} pixels wide and high"
                )
        self.steps, self.batch, self.crop, self.seed = steps, batch, crop, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        if not 0 <= step < self.steps:
            raise IndexError(step)
        rng = np.random.default_rng((_TRAINING_SEED, self.seed, step))
        degraded, clean = zip(*(self._sample(rng) for _ in range(self.batch)), strict=True)
        return torch.stack(degraded), torch.stack(clean)

    @abstractmethod
    def _sample(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """One random crop, degraded and clean: (3, crop, crop), float32 in [0, 1]."""

    def _window(self, height: int, width: int, rng: np.random.Generator) -> tuple[slice, slice]:
        top, left = (int(rng.integers(side - self.crop + 1)) for side in (height, width))
        return slice(top, top + self.crop), slice(left, left + self.crop)


class RainCrops(Crops):
    """Crops of clean photos, mirrored and brightened or darkened at random, each in a new synthetic rain."""

    def __init__(self, photos: Photos, steps: int, batch: int, crop: int, seed: int) -> None:
        super().__init__({name: photo.shape[1:] for name, photo in photos.items()}, steps, batch, crop, seed)
        self.photos = list(photos.values())

    def _sample(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        photo = self.photos[rng.integers(len(self.photos))]
        rows, columns = self._window(photo.shape[1], photo.shape[2], rng)
        clean = from_bytes(_mirrored(photo[:, rows, columns], rng)) ** float(rng.uniform(*_GAMMA))
        return add_rain(clean, random_rain(rng), rng), clean


class PairedCrops(Crops):
    """Crops of pairs, mirrored at random."""

    def __init__(self, pairs: Sequence[Pair], steps: int, batch: int, crop: int, seed: int) -> None:
        super().__init__({pair.name: pair.clean.shape[1:] for pair in pairs}, steps, batch, crop, seed)
        self.pairs = [torch.stack((pair.degraded, pair.clean)) for pair in pairs]

    def _sample(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        pair = self.pairs[rng.integers(len(self.pairs))]  # (2, 3, H, W)
        rows, columns = self._window(pair.shape[2], pair.shape[3], rng)
        degraded, clean = from_bytes(_mirrored(pair[:, :, rows, columns], rng))
        return degraded, clean


def _mirrored(x: Tensor, rng: np.random.Generator) -> Tensor:
    """x or its mirror image, left for right; rain goes on falling downwards."""
    return x.flip(-1) if rng.random() < 0.5 else x


def with_rain(photos: Photos, seed: int) -> list[Pair]:
    """Each photo in a rain of its own, rounded to 8 bits as a camera would, and where its streaks are."""
    pairs = []
    for index, (name, clean) in enumerate(photos.items()):
        rng = np.random.default_rng((_RAIN_SEED, seed, index))
        rain = random_rain(rng)
        streaks = rain_opacity(rain, clean.shape[1], clean.shape[2], rng)
        rainy = cover(from_bytes(clean), streaks, rain.light)
        pairs.append(Pair(name, to_bytes(rainy), clean, streaks))
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


def read_pairs(folder: Path) -> list[Pair]:
    """Pairs of files of the same name in ``folder/input`` (degraded) and ``folder/target`` (clean).

    Raises:
        ValueError: files without a partner, partners of different sizes, or none that can be read.
        OSError: a folder cannot be opened.
    """
    degraded, clean = read_photos(folder / "input"), read_photos(folder / "target")
    lonely = sorted(degraded.keys() ^ clean.keys())
    if lonely:
        where = "target" if lonely[0] in degraded else "input"
        raise ValueError(f"{folder}: {lonely[0]} is missing in {where}/ ({len(lonely)} without a partner)")
    for name in clean:
        if degraded[name].shape != clean[name].shape:
            sizes = " and ".join(f"{x.shape[2]}x{x.shape[1]}" for x in (degraded[name], clean[name]))
            raise ValueError(f"{folder}: {name} must have one size in input/ and target/; got {sizes}")
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

"""Restoring photos with a trained network, whole or in overlapping tiles of bounded size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from restore_nets.images import is_image_name, read_colour_profile, read_image, write_image
from restore_nets.losses import outputs_of
from restore_nets.tasks import Task

DEFAULT_TILE = 512
OVERLAP = 64  # pixels that neighbouring tiles share, over which one fades into the other
SMALLEST_TILE = 3 * OVERLAP  # so that no pixel lies in three tiles of a row


def scale_of(model: nn.Module) -> int:
    """How many times as high and wide as its input a network's output is: its attribute ``scale``, or 1."""
    return getattr(model, "scale", 1)


def restore(model: nn.Module, image: Tensor, tile: int = DEFAULT_TILE) -> Tensor:
    """Restore one photo.

    Where a side is longer than ``tile``, the photo is cut into tiles of at most ``tile`` pixels that
    overlap; in the overlap the result fades linearly from one tile to the next. The network then
    needs memory for one tile, whatever the size of the photo.

    Args:
        model: maps (1, 3, H, W) to (1, 3, s H, s W), where s is its attribute ``scale`` (1 if there is
            none), or to a pair of which that is the first; used on the device of its parameters.
        image: (3, H, W), float32; values in [0, 1], or beyond where noise was not clipped.
        tile: longest side that the network sees at once, in pixels, at least ``SMALLEST_TILE``; 0
            for the whole photo whatever its size.

    Returns:
        (3, s H, s W), float32 in [0, 1], on the device of image.
    """
    if image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(f"image must have shape (3, H, W); got {tuple(image.shape)}")
    check_tile(tile)
    device = next(model.parameters(), image).device
    height, width = image.shape[1:]
    scale = scale_of(model)
    restored = image.new_zeros(3, scale * height, scale * width)
    model.eval()
    with torch.inference_mode():
        for rows in spans(height, tile or height, scale):
            for columns in spans(width, tile or width, scale):
                piece = image[None, :, rows.inside, columns.inside]
                result, _ = outputs_of(model(piece.to(device)))
                weights = (rows.weights[:, None] * columns.weights).to(image.device)
                restored[:, rows.outside, columns.outside] += result[0].float().to(image.device) * weights
    return restored.clamp_(0, 1)


def check_tile(tile: int) -> None:
    if tile != 0 and tile < SMALLEST_TILE:
        raise ValueError(f"tile must be 0 (the whole photo) or at least {SMALLEST_TILE} pixels; got {tile}")


@dataclass(frozen=True)
class Span:
    """A part of a side of a photo.

    Args:
        start, end: in pixels of the photo.
        weights: of its pixels in the result, (scale * (end - start),); those on one pixel sum to 1.
        scale: pixels of the result for one of the photo.
    """

    start: int
    end: int
    weights: Tensor
    scale: int

    @property
    def inside(self) -> slice:
        return slice(self.start, self.end)

    @property
    def outside(self) -> slice:
        return slice(self.scale * self.start, self.scale * self.end)


def spans(length: int, tile: int, scale: int = 1) -> Iterator[Span]:
    """Cut a side into overlapping spans; all start at even pixels, as the pattern of a Bayer mosaic does."""
    count = 1 if length <= tile else math.ceil((length - OVERLAP) / (tile - OVERLAP))
    size = length if count == 1 else math.ceil((length + (count - 1) * OVERLAP) / count)
    size -= (length - size) % 2
    starts = [2 * round(i * (length - size) / max(1, count - 1) / 2) for i in range(count)]
    for i, start in enumerate(starts):
        weights = torch.ones(scale * size)
        if i > 0:
            shared = scale * (starts[i - 1] + size - start)
            weights[:shared] = _fade_in(shared)
        if i + 1 < count:
            shared = scale * (start + size - starts[i + 1])
            weights[scale * size - shared :] = 1 - _fade_in(shared)
        yield Span(start, start + size, weights, scale)


def _fade_in(length: int) -> Tensor:
    return (torch.arange(length) + 0.5) / length


@dataclass(frozen=True)
class Job:
    """A photo to restore and where to write the result."""

    source: Path
    destination: Path


@dataclass(frozen=True)
class Plan:
    """What will be restored, and the files of the given folders that are no photos."""

    jobs: list[Job]
    ignored: list[Path]


def plan(inputs: Sequence[Path], out: Path) -> Plan:
    """Find the photos among files and folders (with their subfolders, which are kept).

    Raises:
        FileNotFoundError: an input that does not exist.
        ValueError: a file that is no PNG or JPEG by its name, two results of one name, a result
            that would replace a photo to be restored, or no photos at all.
    """
    jobs, ignored = [], []
    for source in inputs:
        if source.is_dir():
            found = sorted(set(source.rglob("*")) - _earlier_results(source, out))
            files = [path for path in found if path.is_file()]
            jobs += [Job(path, out / path.relative_to(source)) for path in files if is_image_name(path)]
            ignored += [path for path in files if not is_image_name(path)]
        elif not source.exists():
            raise FileNotFoundError(f"{source} does not exist")
        elif not is_image_name(source):
            raise ValueError(f"{source} is no PNG or JPEG file by its name")
        else:
            jobs.append(Job(source, out / source.name))
    if not jobs:
        raise ValueError(f"no PNG or JPEG files in {', '.join(map(str, inputs))}")
    _check_destinations(jobs)
    return Plan(jobs, ignored)


def _earlier_results(source: Path, out: Path) -> set[Path]:
    """The files of an output folder that lies inside the input folder."""
    inside = source.resolve() in out.resolve().parents
    return {path for path in source.rglob("*") if inside and out.resolve() in path.resolve().parents}


def _check_destinations(jobs: Sequence[Job]) -> None:
    sources = {job.source.resolve(): job.source for job in jobs}
    taken: dict[Path, Path] = {}
    for job in jobs:
        destination = job.destination.resolve()
        if destination in sources:
            raise ValueError(
                f"restoring {job.source} would overwrite {sources[destination]}; choose another --out"
            )
        if destination in taken:
            raise ValueError(
                f"{taken[destination]} and {job.source} would both be written to {job.destination}"
            )
        taken[destination] = job.source


def restore_files(
    model: nn.Module, jobs: Sequence[Job], tile: int, on_file: Callable[[Job], None] | None = None,
    task: Task | None = None,
) -> dict[Path, str]:  # fmt: skip
    """Restore photos one by one; one that fails does not stop the others, and leaves no file.

    Args:
        on_file: called after each photo.
        task: that the network was trained for, if known: says how it takes a photo.

    Returns:
        Why photos failed: source -> one line.
    """
    failures = {}
    for job in jobs:
        try:
            photo = read_image(job.source)
            restored = restore(model, photo if task is None else task.network_input(photo), tile)
            job.destination.parent.mkdir(parents=True, exist_ok=True)
            write_image(job.destination, restored, read_colour_profile(job.source))
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            failures[job.source] = " ".join(str(error).split()) or type(error).__name__
        if on_file is not None:
            on_file(job)
    return failures

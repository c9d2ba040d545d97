"""Scores of a folder of restored photos against a folder of their targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean

from restore_nets.images import is_image_name, read_image
from restore_nets.metrics import Score, score


def evaluate(restored: Path, target: Path, preset: str) -> Iterator[tuple[str, Score]]:
    """Score photo after photo, in the order of their names, of which each is read when it is its turn.

    Args:
        restored: folder of PNG and JPEG files.
        target: folder that has a file of the same name, whatever its suffix, for each of them, and no others.
        preset: a name in ``metrics.PRESETS``.

    Raises:
        ValueError: files without a partner, partners of different sizes, or an unknown preset.
        OSError: a folder or file cannot be opened.
    """
    pairs = _pairs(restored, target)
    for name, (own, other) in pairs.items():
        try:
            yield name, score(read_image(own), read_image(other), preset)
        except ValueError as error:
            raise ValueError(f"{own} against {other}: {error}") from error


def mean(scores: Mapping[str, Score]) -> Score:
    """The means of PSNR and of SSIM over photos, as the field reports them."""
    return Score(fmean(s.psnr for s in scores.values()), fmean(s.ssim for s in scores.values()))


def table(scores: Mapping[str, Score]) -> str:
    """CSV: a line per photo, then their means."""
    rows = [*scores.items(), ("mean", mean(scores))]
    return "photo,psnr,ssim\n" + "".join(f"{name},{s.psnr:.6g},{s.ssim:.6g}\n" for name, s in rows)


def _pairs(restored: Path, target: Path) -> dict[str, tuple[Path, Path]]:
    own, other = (_photos(folder) for folder in (restored, target))
    lonely = sorted(own.keys() ^ other.keys())
    if lonely:
        where = target if lonely[0] in own else restored
        raise ValueError(f"{lonely[0]} is missing in {where} ({len(lonely)} without a partner)")
    return {name: (own[name], other[name]) for name in own}


def _photos(folder: Path) -> dict[str, Path]:
    """Its image files by their names without suffix."""
    photos: dict[str, Path] = {}
    for path in sorted(filter(is_image_name, folder.iterdir())):
        if path.stem in photos:
            raise ValueError(
                f"{folder} holds two photos named {path.stem}: {photos[path.stem].name}, {path.name}"
            )
        photos[path.stem] = path
    if not photos:
        raise ValueError(f"{folder} holds no PNG or JPEG files")
    return photos

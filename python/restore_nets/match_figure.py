"""The picture of where a pixel found its matches: the photo, and one heat map per level."""

from __future__ import annotations

import math

import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

from restore_nets import figures
from restore_nets.matches import Matches, find_matches, pyramid_attention_of, textured_pixel

COLUMNS = 3
COLOURS = "inferno"
DECADES = 3  # of probabilities that have a colour
MARKED = 1 / 80  # side of what a match is drawn as, as a share of the picture, so that it can be seen
_WIDTH = 9.0  # of the figure, in inches
_DIMMED = 0.4  # brightness of the photo under the colours
_MARK = {"color": "#35e0ff", "markersize": 9, "markeredgewidth": 1.2, "fillstyle": "none", "linestyle": ""}


def match_figure(model: nn.Module, image: Tensor, pixel: tuple[int, int] | None = None) -> Figure:
    """The photo with a pixel marked, and where on every level of the pyramid attention looked for it.

    Args:
        model: a network with pyramid attention, see ``find_matches``.
        image: (3, H, W), float32 in [0, 1], as the network takes it.
        pixel: row and column; by default where the image has the most texture.

    Returns:
        The photo in the first place, then every level over the dimmed photo: the best match of all is
        the brightest, and what has less than a thousandth of its probability has no colour.

    Raises:
        ValueError: see ``find_matches``.
    """
    matches = find_matches(model, image, pixel or textured_pixel(image))
    height, width = image.shape[1:]
    rows = math.ceil((1 + len(matches.probabilities)) / COLUMNS)
    panel = _WIDTH / COLUMNS * height / width + 0.3
    figure = Figure(figsize=(_WIDTH, rows * panel + 0.6), layout="constrained")
    first, *others = figure.subplots(rows, COLUMNS, squeeze=False).flat
    _photo(first, image, matches.pixel)
    best = max(float(level.max()) for level in matches.probabilities)
    colours = ScalarMappable(LogNorm(best / 10**DECADES, best), COLOURS)
    for axes, level, share in zip(others, matches.probabilities, matches.shares, strict=False):
        _level(axes, image, level, best)
        _mark(axes, matches, level)
        axes.set_title(f"{level.shape[1]} × {level.shape[0]} pixels: {share:.0%} of the weight", fontsize=10)
    for axes in figure.axes:
        axes.set_axis_off()
    figure.colorbar(colours, ax=figure.axes, location="bottom", aspect=60, shrink=0.6, label="probability")
    return figure


def match_picture(model: nn.Module, seen: Tensor, clean: Tensor) -> Tensor | None:
    """The picture (3, H', W') of the matches of the pixel where a clean photo has the most texture.

    Args:
        model: any network.
        seen: (3, H, W), as the network takes it.
        clean: (3, scale * H, scale * W): neither noise nor a mosaic pass for texture there.

    Returns:
        None for networks without pyramid attention.
    """
    if pyramid_attention_of(model) is None:
        return None
    scale = clean.shape[1] // seen.shape[1]
    row, column = textured_pixel(clean)
    return figures.png(match_figure(model, seen, (row // scale, column // scale)))


def _photo(axes: Axes, image: Tensor, pixel: tuple[int, int]) -> None:
    axes.imshow(image.permute(1, 2, 0).clamp(0, 1).cpu().numpy())
    axes.plot(*reversed(pixel), "s", **_MARK)
    axes.set_title("the pixel", fontsize=10)


def _level(axes: Axes, image: Tensor, level: Tensor, best: float) -> None:
    """A level's probabilities over the dimmed photo, each drawn large enough to be seen."""
    grey = F.interpolate(image.mean(dim=0)[None, None].cpu(), tuple(level.shape), mode="area")[0, 0]
    axes.imshow(_DIMMED * grey.numpy(), cmap="gray", vmin=0, vmax=1)
    reach = max(1, round(MARKED * max(level.shape) / 2))
    widened = F.max_pool2d(level[None, None], 2 * reach + 1, stride=1, padding=reach)[0, 0]
    colour = (1 + (widened / best).log10() / DECADES).clamp(0, 1).numpy()
    axes.imshow(colour, cmap=COLOURS, vmin=0, vmax=1, alpha=colour)


def _mark(axes: Axes, matches: Matches, level: Tensor) -> None:
    """Where the pixel itself lies on a level: the corners of both images coincide."""
    of_photo = matches.probabilities[0].shape
    row, column = (
        (place + 0.5) * side / whole - 0.5
        for place, side, whole in zip(matches.pixel, level.shape, of_photo, strict=True)
    )
    axes.plot(column, row, "s", **_MARK)

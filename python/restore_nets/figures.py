"""Pictures for reports: photos side by side, and curves."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from restore_nets.images import from_bytes, to_bytes

_GAP = 8  # pixels between pictures
_CAPTION = 24  # pixels above them
_JPEG_QUALITY = 90
_BLUE = "#0b6fa4"


def side_by_side(pictures: Mapping[str, Tensor]) -> Tensor:
    """Pictures in a row, each under its caption.

    Args:
        pictures: caption -> (3, H, W), float32 in [0, 1], of one size.

    Returns:
        (3, H', W'), float32 in [0, 1].
    """
    height, width = next(iter(pictures.values())).shape[1:]
    step = width + _GAP
    canvas = Image.new("RGB", (len(pictures) * step - _GAP, height + _CAPTION), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=16)
    for column, (caption, picture) in enumerate(pictures.items()):
        draw.text((column * step + 2, 2), caption, fill="black", font=font)
        canvas.paste(_to_pillow(picture), (column * step, _CAPTION))
    return from_bytes(torch.from_numpy(np.array(canvas)).permute(2, 0, 1))


def busiest_window(difference: Tensor, side: int) -> tuple[slice, slice]:
    """Rows and columns of the square of at most this side in which |difference| (3, H, W) is largest."""
    energy = difference.abs().mean(dim=0)  # (H, W)
    rows, columns = (min(side, length) for length in energy.shape)
    means = torch.nn.functional.avg_pool2d(energy[None, None], (rows, columns), stride=8)[0, 0]
    top, left = (8 * int(i) for i in np.unravel_index(int(means.argmax()), means.shape))
    return slice(top, top + rows), slice(left, left + columns)


def loss_curve(losses: Sequence[float]) -> Figure:
    """The loss of every step and its running mean, over the steps."""
    figure, axes = _axes()
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label="each step")
    span = max(2, len(losses) // 20)
    if len(losses) >= span:
        mean = np.convolve(losses, np.ones(span) / span, mode="valid")
        axes.plot(steps[span - 1 :], mean, color=_BLUE, linewidth=1.8, label=f"mean of {span} steps")
    axes.set(xlabel="step", ylabel="loss", yscale="log", xlim=(1, max(2, len(losses))))
    axes.legend(frameon=False)
    return figure


def agreement_curve(differences: Sequence[float], noise: Sequence[Sequence[float]]) -> Figure:
    """By how much the losses of each step differ, and by how much they do for rounding alone."""
    figure, axes = _axes()
    steps = np.arange(1, len(differences) + 1)
    smallest = np.finfo(np.float32).eps / 2  # equal losses have a place on the logarithmic axis too
    for number, run in enumerate(noise):
        label = None if number else "rounding errors added"
        axes.plot(steps, np.maximum(run, smallest), color="0.7", linewidth=1.2, label=label)
    kernel = np.maximum(differences, smallest)
    axes.plot(steps, kernel, "o-", color=_BLUE, markersize=4, linewidth=1.2, label="kernel")
    axes.set(xlabel="step", ylabel="difference from eager", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return figure


def loss_panels(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Losses over the steps, a panel for every network: name -> what computes it -> losses."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3 * columns + 1, 2.2 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, curves) in zip(grid, panels.items(), strict=False):
        # Curves that lie on each other are all seen: the first is the widest.
        for width, style, (label, losses) in zip(
            (4, 1.5, 1.5), ("-", "-", "--"), curves.items(), strict=True
        ):
            axes.plot(range(1, len(losses) + 1), losses, style, linewidth=width, label=label)
        axes.set_title(name, fontsize="medium")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in grid[len(panels) :]:
        axes.axis("off")
    figure.supxlabel("step", fontsize="medium")
    figure.supylabel("loss", fontsize="medium")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


def stacked_bars(seconds: Mapping[str, Mapping[str, float]]) -> Figure:
    """A horizontal bar for every alternative, made of its parts: name -> part -> seconds."""
    parts = list(dict.fromkeys(part for bar in seconds.values() for part in bar))
    figure = Figure(figsize=(7, 1.6 + 0.5 * len(seconds) + 0.11 * len(parts)), layout="constrained")
    axes = figure.subplots()
    names = list(seconds)[::-1]  # the first on top
    left = np.zeros(len(names))
    for number, part in enumerate(parts):
        widths = np.array([1e3 * seconds[name].get(part, 0.0) for name in names])
        color = colormaps["tab20"](number % 20)
        axes.barh(names, widths, left=left, label=part, color=color, height=0.6)
        left += widths
    axes.set(xlabel="ms")
    figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize="small")
    return figure


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.grid(which="major", color="0.92")
    return figure, axes


def svg(figure: Figure) -> str:
    """The figure as an <svg> element, to stand inside a page."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "restore_nets"}):  # the same figure is the same text every time
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def png(figure: Figure) -> Tensor:
    """The figure as a picture (3, H, W), float32 in [0, 1]."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    with Image.open(buffer) as image:
        return from_bytes(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))


def data_uri(picture: Tensor, magnify: int = 1) -> str:
    """A picture (3, H, W) in [0, 1] as a JPEG inside a URI, its pixels enlarged to squares."""
    image = _to_pillow(picture)
    image = image.resize((image.width * magnify, image.height * magnify), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _to_pillow(picture: Tensor) -> Image.Image:
    return Image.fromarray(to_bytes(picture).permute(1, 2, 0).contiguous().numpy())

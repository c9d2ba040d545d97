"""The demonstration's report: one HTML file that needs nothing beside it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from restore_kernels import __version__
from restore_kernels.profiling.machine import processor_name
from restore_nets import figures
from restore_nets.attention_calls import SAME_RESULT
from restore_nets.files import write_text
from restore_nets.kernel_checks import AGREE, NOISE_MULTIPLE, Agreement
from restore_nets.losses import HALF_WEIGHT
from restore_nets.masks import MaskCheck
from restore_nets.metrics import PRESETS

if TYPE_CHECKING:
    from restore_nets.demo import Demo, Result

DETAIL = 120  # side of the detail that is shown enlarged, in pixels
MAGNIFY = 3


def write(demo: Demo, path: Path) -> None:
    """Write the report, whole or not at all."""
    before = demo.options.task.labels.before
    environment = Environment(
        loader=PackageLoader("restore_nets"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("report.html").render(
        demo=demo,
        labels=demo.options.task.labels,
        photos=[_photo(result, before) for result in demo.results],
        mask_photos=[
            _mask(result, result.mask, before) for result in demo.results if result.mask is not None
        ],
        mask_correlation=demo.mask_correlation(),
        matches={r.name: figures.data_uri(r.matches) for r in demo.results if r.matches is not None},
        loss_curve=figures.svg(figures.loss_curve(demo.losses)),
        agreement_curve=_agreement_curve(demo.agreement),
        metric=f"{demo.metric}: {PRESETS[demo.metric]}",
        noise_multiple=NOISE_MULTIPLE,
        agree=AGREE,
        same_result=SAME_RESULT,
        half_weight=HALF_WEIGHT,
        machine=machine(),
    )
    write_text(path, page)


def _agreement_curve(agreement: Agreement | None) -> str:
    return (
        ""
        if agreement is None
        else figures.svg(figures.agreement_curve(agreement.differences, agreement.noise))
    )


def _photo(result: Result, before: str) -> dict[str, Any]:
    """A result and its pictures, whole and a detail where most was to be done."""
    rows, columns = figures.busiest_window(result.degraded - result.clean, DETAIL)
    pictures = {before: result.degraded, "restored": result.restored, "clean": result.clean}
    return {
        "result": result,
        "whole": {name: figures.data_uri(picture) for name, picture in pictures.items()},
        "detail": {
            name: figures.data_uri(picture[:, rows, columns], MAGNIFY) for name, picture in pictures.items()
        },
    }


def _mask(result: Result, check: MaskCheck, before: str) -> dict[str, Any]:
    """A result and the pictures of its mask by caption."""
    pictures = {before: result.degraded, **check.pictures()}
    return {
        "result": result,
        "mask": {name: figures.data_uri(picture) for name, picture in pictures.items()},
    }


def machine() -> dict[str, str]:
    """What the times were measured on."""
    return {
        "processor": processor_name(),
        "threads": str(torch.get_num_threads()),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "restore_kernels": __version__,
    }

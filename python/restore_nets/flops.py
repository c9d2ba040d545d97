"""How many floating-point operations a training step is, by the convention of papers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import restore_kernels
from restore_nets.models import create_model

# For a product of forward backward makes two: the gradients of its input and of its weight.
STEP_PER_FORWARD = 3


def step_flops(model: str, options: Mapping[str, Any], batch: int, size: int) -> int:
    """Operations of forward and backward: three times those of the convolutions and products of forward.

    Of the network as it is defined, whatever an implementation makes of it: a 3x3 convolution by minimal
    filtering counts as a convolution does. Nothing is computed, and nothing else is counted.

    Args:
        model, options: as for ``create_model``.
        batch: images.
        size: their height and width, in pixels.
    """
    with torch.device("meta"):
        network = create_model(model, **options)
        images = torch.empty(batch, 3, size, size)
    with restore_kernels.use_backend("eager"), FlopCounterMode(display=False) as counter:
        network(images)
    return STEP_PER_FORWARD * counter.get_total_flops()


def utilisation(flops: int, seconds: float, flops_per_second: float) -> float:
    """Model FLOPs utilisation (MFU; PaLM, arXiv 2204.02311).

    Args:
        flops: of a step, see ``step_flops``.
        seconds: that it takes.
        flops_per_second: what the machine can do at the most.
    """
    return flops / seconds / flops_per_second

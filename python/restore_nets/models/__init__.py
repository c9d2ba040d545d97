"""The networks by name. A new network is one file here and one line in ``_MODELS``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from restore_nets.models.association import AssociationNetwork
from restore_nets.models.checkpointing import apply_checkpointing
from restore_nets.models.ddsa import DDSANet
from restore_nets.models.drsformer import DRSformer
from restore_nets.models.elf import ELF
from restore_nets.models.options import suggestion
from restore_nets.models.pa_edsr import PAEDSR
from restore_nets.models.panet import PANet

__all__ = ["create_model", "list_models"]

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "association": AssociationNetwork,
    "ddsa": DDSANet,
    "drsformer": DRSformer,
    "elf": ELF,
    "pa_edsr": PAEDSR,
    "panet": PANet,
}


def list_models() -> list[str]:
    """The names that ``create_model`` takes."""
    return sorted(_MODELS)


def create_model(name: str, *, checkpointing: str = "none", **options: Any) -> nn.Module:
    """A network with freshly initialised weights.

    Args:
        name: one of ``list_models()``.
        checkpointing: what backward computes again instead of keeping it: ``"none"``, ``"attention"`` or
            ``"block"``, whole blocks.
        options: keywords of the network's class, for example ``dim=48``; see ``DRSformer``, ``DDSANet``,
            ``ELF``, ``AssociationNetwork``, ``PANet`` and ``PAEDSR``.

    Returns:
        The network, in training mode, float32, on the CPU.

    Raises:
        ValueError, TypeError: an unknown name or option, or a value that does not fit.

    Example:
        >>> model = create_model("drsformer", mefc=False)
    """
    if name not in _MODELS:
        raise ValueError(
            f"name must be one of {', '.join(list_models())}; got {name!r}{suggestion(name, _MODELS)}"
        )
    known = inspect.signature(_MODELS[name]).parameters
    for option in options:
        if option not in known:
            near = suggestion(option, (*known, "checkpointing"))
            raise TypeError(f"{name} has the options {', '.join(known)}; got {option!r}{near}")
    model = _MODELS[name](**options)
    apply_checkpointing(model, checkpointing)
    return model

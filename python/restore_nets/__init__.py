"""Complete networks for image restoration: training, restoring and evaluating them.

Importing this package loads no PyTorch: each name below is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from restore_nets.checkpoints import load_checkpoint, load_model, save_checkpoint
    from restore_nets.models import create_model, list_models

__all__ = ["create_model", "list_models", "load_checkpoint", "load_model", "save_checkpoint"]

_HOMES = {
    "create_model": "restore_nets.models",
    "list_models": "restore_nets.models",
    "load_checkpoint": "restore_nets.checkpoints",
    "load_model": "restore_nets.checkpoints",
    "save_checkpoint": "restore_nets.checkpoints",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # the next use finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

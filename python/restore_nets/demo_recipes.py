"""What the demonstration trains: one small network of each kind, each within its time on two CPU cores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class DemoRecipe:
    """The network's options, as for ``create_model``, and its training."""

    options: Mapping[str, Any]
    steps: int
    learning_rate: float = 2e-3
    batch: int = 8
    crop: int = 48


_SMALL_U: Mapping[str, Any] = {
    "dim": 16, "num_blocks": (1, 1, 1, 1), "heads": (1, 2, 4, 8), "ffn_expansion": 1.0,
}  # fmt: skip

DEFAULT_MODEL = "ddsa"
RECIPES: Mapping[str, DemoRecipe] = MappingProxyType({
    "association": DemoRecipe({"n_feat": 24, "num_blocks": 1, "token_layers": 1}, steps=1200),
    "ddsa": DemoRecipe(_SMALL_U, steps=450),
    "drsformer": DemoRecipe({**_SMALL_U, "mefc": False}, steps=450),
    "elf": DemoRecipe({"n_feat": 16}, steps=600),
})  # fmt: skip

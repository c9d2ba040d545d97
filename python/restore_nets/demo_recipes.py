"""What the demonstration trains: one small network of each kind, each within its time on two CPU cores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class DemoRecipe:
    """The network's options, as for ``create_model``, and its training.

    Args:
        enlarges: the network has an option ``scale``, that of the task.
        passes_input: training begins with ``starts.pass_input_through``.
        crop: side of the crops, in pixels of what the network sees.
        restored: longest side of the unseen photos, in pixels; what is longer is cut off around the middle.
    """

    options: Mapping[str, Any]
    steps: int
    learning_rate: float = 2e-3
    batch: int = 8
    crop: int = 48
    enlarges: bool = False
    passes_input: bool = False
    restored: int = 800


_SMALL_U: Mapping[str, Any] = {
    "dim": 16, "num_blocks": (1, 1, 1, 1), "heads": (1, 2, 4, 8), "ffn_expansion": 1.0,
}  # fmt: skip

DEFAULT_TASK = "derain"
DEFAULT_MODELS: Mapping[str, str] = MappingProxyType({
    "derain": "ddsa", "denoise": "panet", "demosaic": "panet", "jpeg": "panet", "sr": "pa_edsr",
})  # fmt: skip
RECIPES: Mapping[str, DemoRecipe] = MappingProxyType({
    "association": DemoRecipe({"n_feat": 24, "num_blocks": 1, "token_layers": 1}, steps=1200),
    "ddsa": DemoRecipe(_SMALL_U, steps=450),
    "drsformer": DemoRecipe({**_SMALL_U, "mefc": False}, steps=450),
    "elf": DemoRecipe({"n_feat": 16}, steps=600),
    "pa_edsr": DemoRecipe(
        {"n_resblocks": 8, "n_feats": 32, "reduction": 2}, steps=1500, learning_rate=1e-3, batch=4, crop=24,
        enlarges=True, passes_input=True, restored=384,
    ),
    "panet": DemoRecipe(
        {"n_resblocks": 8, "n_feats": 32}, steps=1200, batch=4, crop=32, passes_input=True, restored=192,
    ),
})  # fmt: skip

"""Which GPU backend a call gets where several can run it: the one that was faster when it was measured.

``choices.json`` has the measurements, one entry for a case, written from benchmark results by
``benchmarks/choices.py``. The entry nearest in shape decides, among those of the same operator and kind,
dtype and compute capability; without one it is Triton's turn.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restore_kernels import native

DEFAULT = "triton"


@functools.cache
def _table() -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """{(operator and kind, dtype, compute capability): entries}."""
    table: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for entry in json.loads(Path(__file__).with_name("choices.json").read_text()):
        table.setdefault((entry["operator"], entry["dtype"], entry["capability"]), []).append(entry)
    return table


@native.constant_to_the_compiler
def _entries(operator: str, dtype: torch.dtype, device_index: int | None) -> list[dict[str, Any]]:
    major, minor = torch.cuda.get_device_capability(device_index)
    return _table().get((operator, str(dtype).removeprefix("torch."), f"{major}.{minor}"), [])


def faster(operator: str, x: Tensor) -> str:
    """``"cuda"`` or ``"triton"`` for a call whose first tensor is x; operator: its name and kind."""
    entries = _entries(operator, x.dtype, x.device.index)
    if not entries:
        return DEFAULT
    # By hand: torch.compile does not trace min(key=...).
    nearest, least = entries[0], _distance(entries[0]["shape"], x.shape)
    for entry in entries[1:]:
        if (distance := _distance(entry["shape"], x.shape)) < least:
            nearest, least = entry, distance
    return "cuda" if nearest["seconds"]["cuda"] < nearest["seconds"]["triton"] else "triton"


def _distance(a: Sequence[int], b: Sequence[int]) -> float:
    """By how much the sizes differ, as the product of their ratios; what is empty counts as one."""
    distance = 1.0
    for m, n in zip(a, b, strict=True):
        distance *= max(m, n, 1) / max(min(m, n), 1)
    return distance

"""Checks of network options, with messages that name the option, what it must be and what it is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

NORMS = ("WithBias", "BiasFree")
LEVELS = 4


@dataclass(frozen=True)
class UShapeOptions:
    """The options that all networks of this shape share; making one checks them.

    Args:
        dim: channels at full resolution; even, and every level's width (dim, 2 dim, 4 dim, 8 dim) a
            multiple of its heads.
        num_blocks: transformer blocks of the levels 1 to 4.
        heads: attention heads of the levels 1 to 4.
        ffn_expansion: the feed-forward networks have int(dim * ffn_expansion) hidden channels.
        bias: whether convolutions of blocks, skip connections and output have a bias.
        norm: ``"WithBias"`` or ``"BiasFree"``, see ``ChannelNorm``.

    Raises:
        TypeError, ValueError: an option that does not fit; the message names it.
    """

    dim: int
    num_blocks: Sequence[int]
    heads: Sequence[int]
    ffn_expansion: float
    bias: bool
    norm: str

    def __post_init__(self) -> None:
        check_integer("dim", self.dim)
        check_levels("num_blocks", self.num_blocks)
        check_levels("heads", self.heads)
        check_number("ffn_expansion", self.ffn_expansion)
        check_flag("bias", self.bias)
        check_choice("norm", self.norm, NORMS)
        if self.dim % 2:
            raise ValueError(f"dim must be even; got {self.dim}")
        for level, heads in enumerate(self.heads):
            width = self.dim * 2**level
            if width % heads:
                raise ValueError(f"heads[{level}] must divide its level's width, {width}; got {heads}")
        if int(self.dim * self.ffn_expansion) < 1:
            raise ValueError(f"ffn_expansion must give at least 1 hidden channel; got {self.ffn_expansion}")


def check_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")


def check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite; got {value}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")


def check_levels(name: str, value: Any) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of {LEVELS} integers; got {value!r}")
    if len(value) != LEVELS:
        raise ValueError(f"{name} must have {LEVELS} entries, one per level; got {len(value)}: {value!r}")
    for level, entry in enumerate(value):
        check_integer(f"{name}[{level}]", entry)


def check_choice(name: str, value: Any, choices: Sequence[object]) -> None:
    if value not in choices:
        names = [str(choice) for choice in choices]
        raise ValueError(f"{name} must be one of {', '.join(names)}; got {value!r}{suggestion(value, names)}")


def suggestion(value: Any, choices: Iterable[str]) -> str:
    """``", did you mean ...?"`` with the choices that resemble value, or nothing."""
    by_lower_case = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(str(value).lower(), by_lower_case)
    return f", did you mean {' or '.join(by_lower_case[name] for name in near)}?" if near else ""


def check_association_options(n_feat: Any, heads: Any, kernel_size: Any, reduction: Any, bias: Any) -> None:
    """The options that the networks of association learning share."""
    for name, value in (("n_feat", n_feat), ("heads", heads), ("kernel_size", kernel_size)):
        check_integer(name, value)
    check_integer("reduction", reduction)
    check_flag("bias", bias)
    if n_feat % 2 or n_feat % heads:
        raise ValueError(f"n_feat must be even and a multiple of {heads} heads; got {n_feat}")
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd; got {kernel_size}")
    if reduction > n_feat:
        raise ValueError(f"reduction must be at most n_feat={n_feat}; got {reduction}")

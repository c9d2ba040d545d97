"""The cases that every attention operator is run with, as arguments of its ``Case``.

Each axis is walked in full with the others taking turns, rather than every combination being run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from arrangements import ARRANGEMENTS
from attention_problems import ALL_DTYPES, LAYOUTS

# Sizes that are and are not multiples of tiles, vectors and blocks.
CHANNELS = (1, 5, 16, 47, 48, 64, 100)
PIXELS = (1, 7, 64, 257, 1000)
TOKENS = (  # queries, keys, length of q and k, length of v
    (1, 1, 1, 1), (1, 7, 5, 3), (7, 1, 3, 5), (5, 16, 8, 16), (33, 65, 100, 7), (64, 64, 16, 16),
    (64, 257, 48, 64), (257, 129, 33, 17), (100, 1000, 32, 48), (1000, 64, 8, 8), (65, 300, 1, 1),
    (5, 140, 4, 3),
)  # fmt: skip
GRADS = ("contiguous", "transposed", "pixel_major", "every_other_element", "unaligned")


def turn(options: Sequence[Any], *counters: int) -> Any:
    """One of the options; by turns as the counters run."""
    return options[sum(counters) % len(options)]


def float32_and_another(*counters: int) -> tuple[torch.dtype, torch.dtype]:
    return torch.float32, turn((torch.bfloat16, torch.float64, torch.float16), *counters)


def sizes() -> Iterator[dict[str, Any]]:
    for i, (channels, pixels) in enumerate(product(CHANNELS, PIXELS)):
        batch, heads = turn(((1, 2), (2, 3), (1, 1), (3, 1)), i)
        for dtype in float32_and_another(i):
            yield {
                "layout": "channel", "shape": (batch, heads, channels, pixels), "dtype": dtype,
                "normalize": i % 3 != 0, "temperature": (heads, 1, 1),
            }  # fmt: skip
    for i, tokens in enumerate(TOKENS):
        batch, heads = turn(((1, 1), (2, 3), (1, 2)), i)
        for dtype in ALL_DTYPES:
            yield {
                "layout": "token", "shape": (batch, heads, *tokens), "dtype": dtype, "normalize": i % 3 != 0,
            }  # fmt: skip


def memory_layouts() -> Iterator[dict[str, Any]]:
    shapes = {"channel": (2, 2, 11, 35), "token": (2, 2, 35, 13, 10, 9)}
    for i, (layout, name) in enumerate(product(LAYOUTS, ARRANGEMENTS)):
        # With k constant along its rows, all of a row's scores would be equal but for rounding.
        first = "contiguous" if ARRANGEMENTS[name].shared == 3 else name
        for dtype in float32_and_another(i):
            yield {
                "layout": layout, "shape": shapes[layout], "dtype": dtype,
                "arrangements": (first, first, name), "grad": turn(GRADS, i),
            }  # fmt: skip
    for layout, dtype in product(LAYOUTS, ALL_DTYPES):
        yield {
            "layout": layout, "shape": shapes[layout], "dtype": dtype,
            "arrangements": ("every_other_element", "pixel_major", "contiguous"), "grad": "one_value",
        }  # fmt: skip


def projections() -> Iterator[dict[str, Any]]:
    shapes = ((2, 2, 12, 33), (1, 1, 48, 64), (1, 4, 6, 1), (3, 1, 5, 300))
    for i, (out, shape) in enumerate(product((1, 5, 24, 65), shapes)):
        placed = turn(("contiguous", "pixel_major", "qkv_slice", "pixel_major_qkv_slice"), i)
        for dtype in float32_and_another(i):
            yield {
                "layout": "channel", "shape": shape, "dtype": dtype, "out_proj": out,
                "arrangements": (placed,) * 3, "grad": turn(("contiguous", "pixel_major", "one_value"), i),
            }  # fmt: skip


# q and k times these: products of two entries stay within float32; below 1e-12 norms are clamped.
MAGNITUDES = [
    *((torch.float32, size) for size in (1e-15, 1e-9, 1e4, 1e15)),
    *((torch.bfloat16, size) for size in (1e-15, 1e4, 1e15)),
    *((torch.float16, size) for size in (1e-4, 4e3)),  # at 4e3 the sum of squares is beyond float16
]

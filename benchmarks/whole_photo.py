"""Measures what nobody does in chops here: pyramid attention over whole photos, in time and peak memory.

Writes benchmarks/results/whole_photo/<machine>.json, which benchmarks/tables.py shows in README.md. The
networks have the published size and random weights; time and memory do not depend on the weights.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from restore_kernels import pyramid_attention
from restore_kernels.profiling.machine import peak_extra_memory, processor_name
from restore_kernels.profiling.results import file_name
from restore_nets import create_model
from restore_nets.photos import UNSEEN, shipped_photos
from restore_nets.restoring import restore

RESULTS = Path(__file__).parent / "results" / "whole_photo"
CHANNELS, OF_VALUES, SCALES = 32, 64, (1, 0.9, 0.8, 0.7, 0.6)
FEATURE_SIDE, PHOTO = 256, (321, 481)  # the photos of BSD


def feature_map() -> Callable[[], object]:
    """Pyramid attention alone."""
    sizes = [2 * (int(FEATURE_SIDE * scale),) for scale in SCALES]
    query = torch.randn(1, CHANNELS, FEATURE_SIDE, FEATURE_SIDE)
    keys = [torch.randn(1, CHANNELS, *size) for size in sizes]
    values = [torch.randn(1, OF_VALUES, *size) for size in sizes]
    return lambda: pyramid_attention(query, keys, values, backend="cpu")


def photo() -> Callable[[], object]:
    """A noisy photo through PANet."""
    name = Path(UNSEEN[1]).stem
    clean = shipped_photos((UNSEEN[1],))[name].float() / 255
    noisy = clean[:, : PHOTO[0], : PHOTO[1]] + 30 / 255 * torch.randn(3, *PHOTO)
    model = create_model("panet")
    return lambda: restore(model, noisy, tile=0)


def measure(name: str, make: Callable[[], Callable[[], object]]) -> dict[str, Any]:
    """Once: these take a while, and nothing is cached between calls."""
    torch.manual_seed(0)
    call = make()
    started = time.perf_counter()
    memory = peak_extra_memory(call, "cpu")
    return {"case": name, "seconds": time.perf_counter() - started, "peak_extra_bytes": memory}


def main() -> None:
    with torch.inference_mode():
        warm = torch.ones(1, 1, 4, 4)
        pyramid_attention(warm, [warm], [warm], backend="cpu")
        rows = [
            measure(
                f"pyramid_attention of a {FEATURE_SIDE}x{FEATURE_SIDE} feature map, forward", feature_map
            ),
            measure(f"PANet, 80 blocks, a whole photo of {PHOTO[0]}x{PHOTO[1]}", photo),
        ]
    result = {"processor": processor_name(), "threads": torch.get_num_threads(), "rows": rows}
    path = RESULTS / file_name(processor_name())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

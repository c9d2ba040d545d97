"""Rebuilds the golden cases of ``tests/golden``; ``README.md`` there says how they are defined.

The largest cases are not part of the repository: ``LARGE`` is where they are looked for.
"""

from __future__ import annotations

import copy
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "golden"
LARGE = Path(__file__).parents[2] / "shared" / "golden"


@dataclass(frozen=True)
class Results:
    """What a module computes from a case; the gradients are those of sum_i (out_i * cotangent_i).sum()."""

    outputs: list[Tensor]
    input_gradients: list[Tensor]
    parameter_gradient_norms: dict[str, float]


@dataclass(frozen=True)
class GoldenCase:
    """One case: the module's options and parameters, what goes in, and what comes out.

    Attributes:
        parameters: by state-dict key; None for frozen ones, whose values the network defines.
        shared: further state-dict keys of a parameter, and the key under which ``parameters`` has it.
        buffers: shapes, by state-dict key.
    """

    name: str
    config: dict[str, Any]
    parameters: dict[str, Tensor | None]
    shared: dict[str, str]
    buffers: dict[str, Sequence[int]]
    inputs: list[Tensor]
    cotangents: list[Tensor]
    expected: Results

    @property
    def trained(self) -> dict[str, Tensor]:
        """The state dict of the module without frozen parameters and buffers."""
        parameters = {key: x for key, x in self.parameters.items() if x is not None}
        return parameters | {key: parameters[name] for key, name in self.shared.items()}


def load(name: str) -> GoldenCase:
    folder = next((folder for folder in (FOLDER, LARGE) if (folder / f"{name}.npz").exists()), None)
    if folder is None:
        pytest.skip(f"{name} is not at {LARGE}")
    case = json.loads((folder / f"{name}.json").read_text())
    with np.load(folder / f"{name}.npz") as arrays:
        expected = Results(
            outputs=[torch.from_numpy(arrays[f"out{i}"]) for i in range(len(case["outputs"]))],
            input_gradients=[
                torch.from_numpy(x) for key, x in arrays.items() if key.startswith("grad_input")
            ],
            parameter_gradient_norms=case.get("parameter_gradient_norms", {}),
        )
    return GoldenCase(
        name=name,
        config=case["config"],
        parameters={
            key: None if key in case["frozen"] else parameter(key, shape)
            for key, shape in case["parameters"].items()
        },
        shared=case["shared_parameters"],
        buffers=case["buffers"],
        inputs=[
            uniform(f"{name}/input{i}", shape, *case["input_range"]) for i, shape in enumerate(case["inputs"])
        ],
        cotangents=[uniform(f"{name}/cotangent{i}", shape) for i, shape in enumerate(case["outputs"])],
        expected=expected,
    )


def uniform(seed: str, shape: Sequence[int], low: float = -1.0, high: float = 1.0) -> Tensor:
    state = np.random.RandomState(zlib.crc32(seed.encode()))
    return torch.from_numpy(state.uniform(low, high, size=shape))


def parameter(name: str, shape: Sequence[int]) -> Tensor:
    """The value of the parameter of this name."""
    block = uniform(name, shape)
    leaf = name.rpartition(".")[2]
    if len(shape) >= 2 and leaf != "temperature":
        return block * (1 / math.prod(shape[1:])) ** 0.5
    return 0.1 * block if leaf == "bias" else 0.5 + 0.25 * block


def results(case: GoldenCase, module: nn.Module, dtype: torch.dtype) -> Results:
    """What a copy of the module in this dtype computes from the case's inputs and cotangents.

    Gradients are left out where the case holds none.
    """
    module = copy.deepcopy(module).to(dtype)
    inputs = [x.detach().to(dtype).requires_grad_() for x in case.inputs]
    result = module(*inputs)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    detached = [out.detach() for out in outputs]
    if not case.expected.input_gradients:
        return Results(detached, [], {})
    torch.autograd.backward(outputs, [x.to(dtype) for x in case.cotangents])
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    norms = {name: p.grad.double().norm().item() for name, p in trained.items()}
    return Results(detached, [x.grad for x in inputs], norms)


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest deviation as a share of the largest wanted value."""
    return ((got.double() - want).abs().max() / want.abs().max()).item()

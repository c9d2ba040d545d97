"""Plants faults in a backend that is otherwise right: an operator's contract in the compiled one's place."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import conformance
import pytest
import torch
from conformance import Problem, assert_conforms
from torch import Tensor

from restore_kernels import backends, native

Plant = Callable[[str, Callable[[Callable], Callable]], None]


def model(monkeypatch: pytest.MonkeyPatch, contract: ModuleType) -> Plant:
    """Runs the contract as backend ``cpu``; returns what wraps one of its functions."""
    operator = contract.__name__.removesuffix("_contract")
    autograd = importlib.import_module(f"restore_kernels.{operator}.autograd")

    def overload(name: str, backend: str) -> Callable:
        return getattr(contract, name.removeprefix(f"{operator}_"))

    monkeypatch.setattr(conformance, "DEVICE", "cpu")
    monkeypatch.setitem(backends._REASONS, "cpu", lambda _: None)
    monkeypatch.setattr(autograd, "overload", overload)
    monkeypatch.setattr(native, "loaded_cpu_module", None)

    def plant(name: str, wrap: Callable[[Callable], Callable]) -> None:
        monkeypatch.setattr(contract, name, wrap(getattr(contract, name)))

    return plant


def assert_caught(problem: Problem, match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        assert_conforms(problem, "cpu")


def changed_output(index: int, change: Callable[[Tensor], Tensor]) -> Callable[[Callable], Callable]:
    """Wraps an operator to change one of its results."""

    def wrap(operator: Callable) -> Callable:
        def faulty(*args):
            outputs = list(operator(*args))
            outputs[index] = change(outputs[index])
            return tuple(outputs)

        return faulty

    return wrap


def changed_input(index: int, change: Callable) -> Callable[[Callable], Callable]:
    """Wraps a function to change one of its arguments."""
    return lambda function: lambda *args: function(*args[:index], change(args[index]), *args[index + 1 :])


def with_last(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[..., -1, -1] = value
    return x


def rounded_to_tf32(x: Tensor) -> Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def as_if_contiguous(x: Tensor) -> Tensor:
    """What a kernel that ignores strides reads."""
    return x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())


def with_one_more(x: Tensor) -> Tensor:
    """What lies around an input is NaN; a sum that includes it, even times zero, is too."""
    beyond = x.as_strided((1,), (1,), x.storage_offset() + x.numel())
    return x + 0 * beyond

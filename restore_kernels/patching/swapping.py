"""Gives a module the class of another one, and checks beforehand that this changes no result.

The check compares copies of both, in float64 on the CPU, so that what they differ by is not rounding and no
top-k selection hangs by a thread; whoever rounds to float32 on the way is within what is allowed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from restore_kernels.backends import use_backend

# Allowed differences, as a share of the largest element of what is compared.
TOLERANCE = 64 * torch.finfo(torch.float32).eps
NEGLIGIBLE = 1e-6  # gradients so much smaller than the largest one may be rounding alone

IMAGE = (2, 5, 6)  # batch, height, width
ANY_CHANNELS = 3  # of an image for a module that takes any
# Modes, and the size of the images in each; the square of the small one is of the order of an epsilon.
TRIALS = {"training": 1.0, "evaluation": 3e-3}

# What every module has, or module.compile() gives it; everything else in its namespace is its own settings.
_STATE = vars(nn.Module()).keys() | {"_compiled_call_impl"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_STATE_DICT_METHODS = ("_save_to_state_dict", "_load_from_state_dict", "get_extra_state", "set_extra_state")


class Refused(Exception):
    """Why a module is not swapped, one line."""


@dataclass
class Swap:
    """A module that has got another class and, with it, settings.

    Attributes:
        old, new: its classes.
        settings: names of the settings that came with the new one.
        before: the values of those that it had already.
    """

    module: nn.Module
    old: type[nn.Module]
    new: type[nn.Module]
    settings: list[str]
    before: dict[str, Any]

    def undo(self) -> None:
        self.module.__class__ = self.old
        for name in self.settings:
            vars(self.module).pop(name, None)
        vars(self.module).update(self.before)


def graft(module: nn.Module, replacement: nn.Module) -> list[Swap]:
    """Give the module, and its parts by their names, the classes and settings of the replacement's."""
    swaps = []
    for name, part in replacement.named_modules():
        target = module.get_submodule(name)
        if type(target) is type(part):
            continue
        settings = {key: value for key, value in vars(part).items() if key not in _STATE}
        before = {key: vars(target)[key] for key in settings if key in vars(target)}
        swaps.append(Swap(target, type(target), type(part), list(settings), before))
        target.__class__ = type(part)
        vars(target).update(settings)
    return swaps


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of every parameter, under each of its names; of one that is not made yet, none."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: () if is_lazy(x) else tuple(x.shape) for name, x in named}


class Trials:
    """Checks of modules against their replacements; of modules that are alike, the first is compared."""

    def __init__(self) -> None:
        self._outcomes: list[tuple[list, Refused | set[str]]] = []

    def check(self, module: nn.Module, replacement: nn.Module) -> None:
        """The module computes the same with the classes and settings of the replacement.

        Raises:
            Refused: it does not, or it cannot be told; the message says what differs, and by how much.
        """
        key = [*_traits(module), *_traits(replacement)]
        outcome = next((outcome for known, outcome in self._outcomes if _equal(known, key)), None)
        if outcome is None:
            try:
                outcome = try_out(module, replacement)
            except Refused as refused:
                outcome = refused
            self._outcomes.append((key, outcome))
        if isinstance(outcome, Refused):
            raise outcome
        for name in outcome:
            if any(getattr(module.get_submodule(name), hooks) for hooks in _HOOKS):
                raise Refused(f"its {name} has hooks, which the replacement would not run")


def _traits(module: nn.Module) -> Iterator[Any]:
    """All that decides what a module computes but the values of its parameters."""
    for name, part in module.named_modules():
        yield name, type(part), {key: x for key, x in vars(part).items() if key not in _STATE}
    yield parameter_shapes(module), [name for name, _ in module.named_parameters()]
    yield list(module.named_buffers())


def _equal(a: list, b: list) -> bool:
    try:
        return a == b
    except Exception:  # of arrays, for one, whose elements are compared
        return False


def try_out(module: nn.Module, replacement: nn.Module) -> set[str]:
    """Compares the module with its replacement; returns the names of the parts that the latter does not call.

    Raises:
        Refused: it does not, or it cannot be told; the message says what differs, and by how much.
    """
    own, other = parameter_shapes(module), parameter_shapes(replacement)
    if own != other:
        raise Refused(f"its parameters are {own}, those of {type(replacement).__name__} are {other}")
    if any("forward" in vars(part) for part in module.modules()):
        raise Refused("its forward pass has been replaced already")
    for method in _STATE_DICT_METHODS:
        if getattr(type(module), method) is not getattr(type(replacement), method):
            raise Refused(f"its class has its own {method}")
    positional, required = _arguments(module)
    optional = slice(len(required), len(positional))  # not tried: they must mean the same by their names
    if positional[optional] != _arguments(replacement)[0][optional]:
        raise Refused(f"its forward pass takes {', '.join(positional)}")
    channels = _channels(replacement)
    with _isolated():
        try:
            return _compare(module, replacement, [channels] * len(required))
        except Refused:
            raise
        except Exception as error:  # of anyone's code
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise Refused(f"it could not be tried, {what}") from error


def _arguments(module: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the positional arguments of its forward pass, and of those that have no default."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = [x for x in inspect.signature(module.forward).parameters.values() if x.kind in kinds]
    return [x.name for x in found], [x.name for x in found if x.default is inspect.Parameter.empty]


def _channels(replacement: nn.Module) -> int:
    """Of the images that it takes."""
    for part in replacement.modules():
        for name in ("in_channels", "dim", "channels"):
            if isinstance(value := getattr(part, name, None), int):
                return value
    if not parameter_shapes(replacement):
        return ANY_CHANNELS
    raise Refused(f"{type(replacement).__name__} has no in_channels, dim or channels to try it with")


@contextmanager
def _isolated() -> Iterator[None]:
    """The caller's modes, and what could let one dtype meet another, remain outside."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        for context in (
            torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False),
            use_backend("eager"),
        ):  # fmt: skip
            stack.enter_context(context)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def _compare(module: nn.Module, replacement: nn.Module, channels: list[int]) -> set[str]:
    _seed(0)
    batch, height, width = IMAGE
    images = [1 + _uniform((batch, count, height, width)) for count in channels]
    before = _copy(module, {})
    after = copy.deepcopy(before)
    graft(after, replacement)
    called, still_called = _calls(before), _calls(after)
    for mode, scale in TRIALS.items():
        inputs = [scale * image for image in images]
        before.train(mode == "training")
        after.train(mode == "training")
        _judge(_results(before, inputs), _results(after, inputs), mode)
    return called - still_called


def _copy(module: nn.Module, known: dict[int, Any]) -> nn.Module:
    """A copy without hooks, on the CPU, in float64, with random parameters."""
    if id(module) in known:
        return known[id(module)]
    twin = known[id(module)] = type(module).__new__(type(module))
    vars(twin).update(vars(nn.Module()))
    for name, value in vars(module).items():
        if name not in _STATE:
            vars(twin)[name] = copy.deepcopy(value)
    twin._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    for name, x in module._parameters.items():
        if x is not None and id(x) not in known:
            known[id(x)] = nn.Parameter(_uniform(x.shape) / max(1, x[:1].numel()) ** 0.5)
        twin._parameters[name] = None if x is None else known[id(x)]
    for name, x in module._buffers.items():
        twin._buffers[name] = None if x is None else _on_cpu(x)
    for name, part in module._modules.items():
        twin._modules[name] = None if part is None else _copy(part, known)
    return twin


def _seed(seed: int) -> None:
    """Of the CPU alone; ``torch.manual_seed`` means every device."""
    torch.default_generator.manual_seed(seed)


def _uniform(shape: Sequence[int]) -> Tensor:
    return 2 * torch.rand(shape) - 1


def _on_cpu(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64 if x.is_floating_point() else x.dtype, copy=True)


def _calls(module: nn.Module) -> set[str]:
    """Fills with the names of the submodules that run."""
    called: set[str] = set()
    for name, part in module.named_modules():
        part.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    return called


def _results(module: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    """The output, and the gradients of the inputs and of every parameter."""
    _seed(1)
    leaves = {f"input {i}": x.clone().requires_grad_() for i, x in enumerate(inputs)}
    out = module(*leaves.values())
    if not isinstance(out, Tensor):
        raise Refused(f"it returns {type(out).__name__}")
    leaves |= dict(module.named_parameters())
    _seed(2)
    grads = torch.autograd.grad(out, list(leaves.values()), _uniform(out.shape).to(out), allow_unused=True)
    results = {
        name: torch.zeros_like(x) if g is None else g
        for (name, x), g in zip(leaves.items(), grads, strict=True)
    }
    return {"output": out.detach(), **results}


def _judge(before: dict[str, Tensor], after: dict[str, Tensor], mode: str) -> None:
    """Raises Refused where they differ by more than rounding."""
    largest = max(x.abs().max().item() for name, x in before.items() if name != "output")
    for name, expected in before.items():
        got, what = after[name], name if name == "output" else f"gradient of {name}"
        if (got.shape, got.dtype) != (expected.shape, expected.dtype):
            raise Refused(f"its {what} is {_kind(expected)}, the replacement's {_kind(got)}")
        size = expected.abs().max().item()
        difference = (got - expected).abs().max().item()
        floor = 0.0 if name == "output" else NEGLIGIBLE * largest
        if not difference <= TOLERANCE * (size + floor):
            raise Refused(
                f"its {what} differs by {difference:.1e}, where the largest is {size:.1e}, in {mode} mode"
            )


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"

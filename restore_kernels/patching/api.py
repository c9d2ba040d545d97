"""Swaps the eager modules of other people's networks for those of ``restore_kernels.nn``, in place.

A swapped module remains the same object: it takes the class and the settings of a replacement, and keeps its
parameters, buffers, submodules, hooks, mode, dtype and device. So optimizers, DDP, EMA and compiled models
keep working, the state dict keeps its keys and their order, and nothing need be told of the swap.

Rules propose replacements (``rules.py``); a comparison on small random images decides (``swapping.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

import torch
from torch import nn

from restore_kernels.patching.rules import Rule, propose
from restore_kernels.patching.swapping import Refused, Swap, Trials, graft

NAMES_SHOWN = 3  # of each kind, in print


class Replaced(NamedTuple):
    """A module that was swapped: its name in the model, the class it had, the class it has."""

    name: str
    old: type[nn.Module]
    new: type[nn.Module]

    def __str__(self) -> str:
        return f"{self.old.__name__} -> {self.new.__name__}"


class Skipped(NamedTuple):
    """A module that looked like one to be swapped, and why it was not."""

    name: str
    module_class: type[nn.Module]
    reason: str

    def __str__(self) -> str:
        return f"{self.module_class.__name__}: {self.reason}"


@dataclass
class Patched:
    """What ``patch`` has done to a model; prints as a summary. Undoes it, at the end of a block by itself.

    Attributes:
        replaced: the modules that were swapped, in the order of ``model.named_modules()``.
        skipped: those that came near, with the reason.
    """

    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    _swaps: list[Swap] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Give every swapped module its class back; what was trained or moved since stays so.

        Raises:
            RuntimeError: if something else has changed a module's class since; then nothing is undone.
        """
        for swap in self._swaps:
            if type(swap.module) is not swap.new:
                now, then = type(swap.module).__name__, swap.new.__name__
                raise RuntimeError(f"a {then} that was swapped in is now a {now}: undo that change first")
        while self._swaps:
            self._swaps.pop().undo()

    def __enter__(self) -> Patched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"replaced: {len(self.replaced)}", *_grouped(self.replaced)]
        if self.skipped:
            lines += [f"skipped: {len(self.skipped)}", *_grouped(self.skipped)]
        return "\n".join(lines)


def _grouped(entries: Sequence[Replaced | Skipped]) -> Iterator[str]:
    """A line per kind: how many, which."""
    kinds: dict[str, list[str]] = {}
    for entry in entries:
        kinds.setdefault(str(entry), []).append(entry.name or "(the model)")
    for kind, names in kinds.items():
        more = ", ..." if len(names) > NAMES_SHOWN else ""
        yield f"  {len(names):>4}  {kind}  ({', '.join(names[:NAMES_SHOWN])}{more})"


def patch(model: nn.Module, rules: Mapping[type[nn.Module], Rule | None] | None = None) -> Patched:
    """Swap the modules of a model for fused ones, in place, wherever that leaves the results the same.

    Swapped are ``nn.Conv2d`` that are depthwise, of size 1, or of size 3 and in one group; ``nn.Upsample``
    that doubles bilinearly; layer normalisations of images over their channels, whatever their class, with
    parameters ``weight`` or ``weight`` and ``bias``, their own or those of the module within; squeeze and
    excitation, and attention modules, with the parameters of ``ChannelGate``, ``TopKSparseAttention``,
    ``MultiDconvAttention``, ``MultiInputAttention`` or ``PyramidAttention`` of ``restore_kernels.nn``.

    A replacement is taken only if it computes what the module computes: the results and all gradients are
    compared on small random images with random parameters, in training and in evaluation mode, in float64
    on the CPU, on copies; neither the model nor the state of random numbers is touched.

    While swapped, a module's class and methods are those of its replacement, which counts where optimizers or
    initialisers tell modules by ``isinstance``, and it has no second derivative but with ``backend="eager"``.
    Hooks run as before; those registered later on ``project_out`` of an attention or on parts of a gate do
    not, for the replacement computes these itself. Undo before ``torch.jit`` or ONNX export.

    Args:
        model: any module; what DDP or ``torch.compile`` has wrapped is found inside.
        rules: how to replace modules of other classes: ``{TheirNorm: lambda m: ChannelNorm(m.dim)}``. A rule
            is given a module of exactly that class and returns its replacement, newly made, with the same
            names and shapes of parameters, or None for none; a ValueError it raises is the reason for none.
            The rule None leaves a class alone. A class may bring its own rule as a method,
            ``restore_kernels_swap(self)``.

    Returns:
        What was replaced, what was not and why; ``.undo()`` or the end of a ``with`` block takes it back.

    Raises:
        TypeError: if model, or what a rule returns, is not a module; if rules are not functions by classes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    for module_class, rule in (rules := dict(rules or {})).items():
        if not isinstance(module_class, type) or not (rule is None or callable(rule)):
            raise TypeError(f"rules must map classes to functions or None; got {module_class!r}: {rule!r}")
    patched = Patched()
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    registered, trials = Counter(_children(model)), Trials()
    for name, module in modules.items():
        try:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                replacement = _replacement(module, rules, registered, trials)
        except Refused as refused:
            patched.skipped.append(Skipped(name, type(module), str(refused)))
            continue
        if replacement is None:
            continue
        for swap in graft(module, replacement):
            patched.replaced.append(Replaced(names[id(swap.module)], swap.old, swap.new))
            patched._swaps.append(swap)
    order = {name: position for position, name in enumerate(modules)}
    patched.replaced.sort(key=lambda swapped: order[swapped.name])
    return patched


def _replacement(
    module: nn.Module, rules: Mapping[type[nn.Module], Rule | None], registered: Counter[int], trials: Trials
) -> nn.Module | None:
    """The first proposal that computes what the module does, or None if there is no proposal.

    Raises:
        Refused: there is none that does.
    """
    refusals = []
    for proposal in propose(module, rules):
        try:
            trials.check(module, proposal)
            _check_parts(module, proposal, registered)
            return proposal
        except Refused as refused:
            refusals.append(refused)
    if refusals:
        raise refusals[0]
    return None


def _check_parts(module: nn.Module, proposal: nn.Module, registered: Counter[int]) -> None:
    """No part of a module that is swapped with it may be of use elsewhere, where it does something else."""
    own = Counter(_children(module))
    for name, part in proposal.named_modules():
        target = module.get_submodule(name)
        if name and type(target) is not type(part) and registered[id(target)] != own[id(target)]:
            raise Refused(f"its {name} belongs to another module, too")


def _children(model: nn.Module) -> Iterator[int]:
    """Every module below the model, once for each of its names."""
    return (id(child) for module in model.modules() for child in module.children())

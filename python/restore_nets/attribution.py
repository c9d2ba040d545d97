"""Whose time a training step is: by phase, by module, by operator and by kind of operator.

Every module and attention operator opens a range in the profiler and notes the numbers that autograd
gives to the nodes made in it. So the backward pass, which knows nothing of modules, is attributed node by
node to the module whose forward pass made it, where backward hooks would only see intervals, would change
the graph by a node for every input and output, and would miss modules whose input needs no gradient.
"""

from __future__ import annotations

import gc
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch._C._profiler import _RecordFunctionFast  # a microsecond; record_function's eight would show
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from restore_nets.attention_calls import OPERATORS, wrapped_operators

# Kinds of work, as the tables list them. The optimizer's includes clipping the gradients.
KINDS = (
    "depthwise convolution", "grouped convolution", "pointwise convolution", "dense convolution", "attention",
    "normalisation", "activation, gate", "optimizer", "other",
)  # fmt: skip
OUTSIDE = "outside of operators"  # Python and autograd's engine

_RANGE = "restore_nets::range "
_ENGINE = "autograd::engine::evaluate_function: "
_CONVOLUTIONS = {  # where input and weight are among the arguments
    "aten::conv2d": (0, 1), "aten::convolution_backward": (1, 2),
}  # fmt: skip
# Convolutions of a group per output; where the weight is.
_DEPTHWISE = {"restore_kernels::depthwise_conv": 1, "restore_kernels::depthwise_conv_backward": 2}
_OWN_KINDS = {
    f"restore_kernels::{kind}_conv{suffix}": f"{kind} convolution"
    for kind in ("pointwise", "dense") for suffix in ("", "_backward")
}  # fmt: skip
# Modules of which everything is of one kind.
_MODULES = {
    "ChannelNorm": "normalisation", "LayerNorm": "normalisation", "ChannelGate": "activation, gate",
}  # fmt: skip
_ACTIVATIONS = {
    f"aten::{name}" for name in (
        "relu", "threshold_backward", "gelu", "gelu_backward", "prelu", "_prelu_kernel",
        "_prelu_kernel_backward", "sigmoid", "sigmoid_backward", "mul",
    )
}  # fmt: skip

Path = Sequence[str]  # the phase, then modules by class and operators by name, from the outermost


@dataclass
class Ranges:
    """What ran inside of what, by the profiler's ranges and by autograd's numbers of nodes."""

    paths: list[Path] = field(default_factory=list)
    _open: list[tuple[int, _RecordFunctionFast]] = field(default_factory=list)
    # From this node on, those that are made belong to this range: parallel lists.
    _nodes: list[int] = field(default_factory=list)
    _owners: list[int | None] = field(default_factory=list)

    def enter(self, name: str) -> None:
        around = self.paths[self._open[-1][0]] if self._open else ()
        self._open.append((len(self.paths), _RecordFunctionFast(f"{_RANGE}{len(self.paths)}")))
        self.paths.append((*around, name))
        self._change_owner()
        self._open[-1][1].__enter__()

    def leave(self) -> None:
        self._open.pop()[1].__exit__(None, None, None)
        self._change_owner()

    def _change_owner(self) -> None:
        self._nodes.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
        self._owners.append(self._open[-1][0] if self._open else None)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def path_of_node(self, number: int) -> Path:
        """Of the range in which autograd made the node of this number; () for none."""
        index = bisect_right(self._nodes, number) - 1
        owner = self._owners[index] if index >= 0 else None
        return () if owner is None else self.paths[owner]

    @contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        """A range for every module of the model and every attention operator, in the block."""

        def wrap(name: str, operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
            @wraps(operator)
            def call(*args: Any, **options: Any) -> Tensor:
                with self.of(name):
                    return operator(*args, **options)

            return call

        handles = []
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(lambda m, _: self.enter(type(m).__name__)))
            handles.append(module.register_forward_hook(lambda *_: self.leave()))
        try:
            with wrapped_operators(wrap):
                yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass
class ModuleTime:
    """Of one class of modules (or operator, or phase outside of modules), in seconds of a step.

    Args:
        calls: of the forward pass.
        forward, backward: everything inside of such modules.
        exclusive: what no module or operator inside of them takes, forward and backward.
    """

    calls: int = 0
    forward: float = 0.0
    backward: float = 0.0
    exclusive: float = 0.0

    @property
    def inclusive(self) -> float:
        return self.forward + self.backward


@dataclass
class Breakdown:
    """Where one step's seconds go; each of the four ways adds up to ``seconds``.

    Args:
        seconds: of the step under the profiler, which slows it a little; on a GPU, those in which the device
            computes for it.
        phases: name -> seconds.
        kinds: kind -> {"forward" or "backward": seconds}; of the optimizer all is "forward".
        modules: class -> its times; what belongs to no module stands under the phase, "(loss)".
        operators: name -> (calls, seconds in itself), and the rest under ``OUTSIDE``.
    """

    seconds: float
    phases: dict[str, float]
    kinds: dict[str, dict[str, float]]
    modules: dict[str, ModuleTime]
    operators: dict[str, tuple[int, float]]


def break_down(
    step: Callable[[Ranges], object], model: nn.Module, steps: int, device: str = "cpu"
) -> Breakdown:
    """Profile calls of ``step``, which opens a range around each of its phases; of these, the quickest.

    Args:
        device: ``"cpu"``, or ``"cuda"`` for the times of the kernels that a step starts.
    """
    ranges, on_gpu = Ranges(), device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    # In the thread that called it, as on the CPU, so that the backward pass lies inside of its range.
    one_thread = torch.autograd.set_multithreading_enabled(False)
    with one_thread, ranges.over(model), profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(steps):
            step(ranges)
        if on_gpu:
            torch.cuda.synchronize()
    gc.disable()  # the profiler makes 100,000 objects, and collecting garbage looks at each again and again
    try:
        events: Sequence[Any] = profiler.events() or []
    finally:
        gc.enable()
    on_cpu = (event for event in events if event.device_type == DeviceType.CPU and event.cpu_parent is None)
    phases = [event for event in on_cpu if event.name.startswith(_RANGE)]
    each = len(phases) // steps
    taken = [phases[start : start + each] for start in range(0, len(phases), each)]
    quickest = min(taken, key=lambda phases: sum(_with_inside(phase, on_gpu) for phase in phases))
    return attribute(ranges, quickest, on_gpu)


def _with_inside(event: FunctionEvent, on_gpu: bool) -> float:
    """Seconds of an event and all inside of it."""
    if not on_gpu:
        return event.cpu_time_total * 1e-6
    return _alone(event, on_gpu) + sum(_with_inside(child, on_gpu) for child in event.cpu_children)


def _alone(event: FunctionEvent, on_gpu: bool) -> float:
    """Seconds of an event without what is inside of it: on a GPU, of the kernels that it started itself."""
    if not on_gpu:
        return event.self_cpu_time_total * 1e-6
    return sum(kernel.duration for kernel in event.kernels) * 1e-6


@dataclass(frozen=True)
class _Where:
    """What is known of an event from those around it."""

    phase: str
    path: Path
    kind: str | None


def attribute(ranges: Ranges, events: Sequence[FunctionEvent], on_gpu: bool = False) -> Breakdown:
    """Of the phases of one step."""
    phases: dict[str, float] = defaultdict(float)
    kinds: dict[str, dict[str, float]] = {kind: defaultdict(float) for kind in KINDS}
    modules: dict[str, ModuleTime] = defaultdict(ModuleTime)
    operators: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    stack: list[tuple[Any, _Where]] = [(event, _Where("", (), None)) for event in events]
    while stack:
        event, around = stack.pop()
        where = _where(event, around, ranges)
        stack += [(child, where) for child in event.cpu_children]
        seconds = _alone(event, on_gpu)
        phases[where.phase] += seconds
        kinds[where.kind or "other"]["backward" if where.phase == "backward" else "forward"] += seconds
        _add_to_modules(modules, where, seconds)
        if event.name.startswith(_RANGE):
            modules[_module(where.path)].calls += 1
        operator = event.name if _is_operator(event.name) else OUTSIDE
        calls, so_far = operators[operator]
        operators[operator] = (calls + (operator != OUTSIDE), so_far + seconds)
    kinds = {kind: dict(seconds) for kind, seconds in kinds.items()}
    whole = sum(_with_inside(event, on_gpu) for event in events)
    return Breakdown(whole, dict(phases), kinds, dict(modules), dict(operators))


def _where(event: Any, around: _Where, ranges: Ranges) -> _Where:
    phase, path, kind = around.phase, around.path, around.kind
    if event.name.startswith(_RANGE):
        path = ranges.paths[int(event.name.removeprefix(_RANGE))]
        phase = path[0]
    elif event.name.startswith(_ENGINE):
        path = ranges.path_of_node(event.sequence_nr) or (phase,)
    return _Where(phase, path, kind or _kind(event, phase, path))


def _kind(event: Any, phase: str, path: Path) -> str | None:
    """Of an event and all inside of it; None leaves it to those inside."""
    if phase == "optimizer":
        return "optimizer"
    if not OPERATORS.keys().isdisjoint(path):
        return "attention"
    if path[-1] in _MODULES:
        return _MODULES[path[-1]]
    if event.name in _CONVOLUTIONS:
        image, weight = (event.input_shapes[i] for i in _CONVOLUTIONS[event.name])
        return convolution_kind(image, weight)
    if event.name in _OWN_KINDS:
        return _OWN_KINDS[event.name]
    if event.name in _DEPTHWISE:
        return _grouped_kind(event.input_shapes[_DEPTHWISE[event.name]])
    return "activation, gate" if event.name in _ACTIVATIONS and path[0] != "loss" else None


def convolution_kind(image: Sequence[int], weight: Sequence[int]) -> str:
    """Of a convolution of an image (B, C, H, W) with a weight (C_out, C / groups, kH, kW)."""
    groups = image[1] // weight[1]
    if groups == 1:
        return "pointwise convolution" if tuple(weight[2:]) == (1, 1) else "dense convolution"
    return _grouped_kind(weight)


def _grouped_kind(weight: Sequence[int]) -> str:
    return "depthwise convolution" if weight[1] == 1 else "grouped convolution"


def _is_operator(name: str) -> bool:
    own = name.startswith((_RANGE, _ENGINE, "torch::autograd::"))
    return "::" in name and not own


def _module(path: Path) -> str:
    return path[-1] if len(path) > 1 else f"({path[0]})"


def _add_to_modules(modules: Mapping[str, ModuleTime], where: _Where, seconds: float) -> None:
    inside = set(where.path[1:]) or {_module(where.path)}
    for name in inside:
        if where.phase == "backward":
            modules[name].backward += seconds
        else:
            modules[name].forward += seconds
    modules[_module(where.path)].exclusive += seconds

"""What every operator took in a script of one's own: ``with restore_kernels.record() as records: ...``.

Where an operator is called it asks whether ``active`` has a recording, and only then comes here. While one is
active, calls on the CPU go through the Python autograd nodes, whose passes can be seen one by one.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Of every thread: autograd runs backward passes in threads of its own.
active: list[Records] = []

# Events that are kept before those that have passed are read.
_PENDING = 256


@dataclass(frozen=True)
class Record:
    """All calls of one pass of an operator on one backend.

    Attributes:
        operator: as registered with PyTorch, for example ``topk_attention_channel``.
        direction: ``forward`` or ``backward``.
        backend: ``eager``, ``cpu``, ``triton`` or ``cuda``.
        calls: how many.
        seconds: that they took, together; on a GPU, that it worked for them.
        bytes: of their arguments and results, together: what they had to move at the least.
    """

    operator: str
    direction: str
    backend: str
    calls: int
    seconds: float
    bytes: int


class Records:
    """What a recording has found; iterates over ``Record``, prints as a table.

    Reading it waits for what a GPU still has to do; recording does not.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals: dict[tuple[str, str, str], list[Any]] = {}  # calls, seconds, bytes
        self._pending: deque[tuple[tuple[str, str, str], Any, Any]] = deque()  # between two events of a GPU

    def _add(self, key: tuple[str, str, str], start: Any, end: Any, moved: int, calls: int) -> None:
        with self._lock:
            totals = self._totals.setdefault(key, [0, 0.0, 0])
            totals[0] += calls
            totals[2] += moved
            if isinstance(start, float):
                totals[1] += end - start
                return
            self._pending.append((key, start, end))
            while len(self._pending) > _PENDING and self._pending[0][2].query():
                self._read()

    def _read(self) -> None:
        """Count the first pending time, waiting for it."""
        key, start, end = self._pending.popleft()
        end.synchronize()
        self._totals[key][1] += start.elapsed_time(end) * 1e-3

    def __iter__(self) -> Iterator[Record]:
        with self._lock:
            while self._pending:
                self._read()
            found = [Record(*key, *totals) for key, totals in self._totals.items()]
        return iter(found)

    def __len__(self) -> int:
        return len(self._totals)

    def __str__(self) -> str:
        lines = [
            f"{'operator':<32}{'pass':<10}{'backend':<9}{'calls':>7}{'ms':>12}{'ms per call':>13}{'GB/s':>8}"
        ]
        for x in sorted(self, key=lambda x: -x.seconds):
            rate = f"{x.bytes / x.seconds / 1e9:.1f}" if x.seconds else ""
            lines.append(
                f"{x.operator:<32}{x.direction:<10}{x.backend:<9}{x.calls:>7}{x.seconds * 1e3:>12.2f}"
                f"{x.seconds / x.calls * 1e3:>13.3f}{rate:>8}"
            )
        return "\n".join(lines)


@contextmanager
def record() -> Iterator[Records]:
    """Record the calls of all operators in the block, forward and backward, in every thread.

    Passes that run in the block are recorded if their forward pass did so too. Each is also a range of
    ``torch.profiler``, for example ``restore_kernels::topk_attention_channel_backward (cpu)``. What
    ``torch.compile`` has compiled is not recorded: the operators are part of its graphs, where the profiler
    shows them under their own names. Nor is what a CUDA graph captures.

    Example:
        >>> with restore_kernels.record() as records:
        ...     train_one_epoch()
        >>> print(records)
    """
    records = Records()
    active.append(records)
    try:
        yield records
    finally:
        active.remove(records)


def recorded(name: str, backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A pass of an operator, recorded; its name ends in ``_backward`` if it is one."""

    def call(*args: Any) -> Any:
        device = next(_tensors(args)).device
        if _captured(device):
            return function(*args)
        with torch.profiler.record_function(f"restore_kernels::{name} ({backend})"):
            start = now(device)
            results = function(*args)
            _add(name, backend, start, now(device), _bytes(args) + _bytes([results]))
        return results

    return call


def recorded_eager(name: str, function: Callable[..., Tensor], args: Sequence[Any]) -> Tensor:
    """The eager definition of an operator, recorded, its backward pass too.

    That is whatever autograd does between the node of the result and the gradients of all arguments. They
    are those of views, which no one else uses.
    """
    device = next(_tensors(args)).device
    if _captured(device) or torch._C._are_functorch_transforms_active():
        return function(*args)
    args = [_views(x) for x in args]
    out = recorded(name, "eager", function)(*args)
    if out.grad_fn is not None:
        wanted = [x for x in _tensors(args) if x.requires_grad]
        moved = _bytes(args) + _bytes(wanted) + _bytes([out])
        started: list[Any] = []

        def from_here(_: Any) -> None:
            started[:] = [now(device)]

        def until_here(_: Any) -> None:
            """The first gradient counts the call, the others what they came later."""
            first = len(started) == 1
            started.append(now(device))
            start, end = started[-2:]
            _add(f"{name}_backward", "eager", start, end, moved if first else 0, calls=int(first))

        out.grad_fn.register_prehook(from_here)
        for x in wanted:
            x.register_hook(until_here)
    return out


def _add(name: str, backend: str, start: Any, end: Any, moved: int, calls: int = 1) -> None:
    operator = name.removesuffix("_backward")
    key = (operator, "forward" if operator == name else "backward", backend)
    for records in active:
        records._add(key, start, end, moved, calls)


def now(device: torch.device) -> Any:
    """Seconds, or on a GPU an event: the host does not wait for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _captured(device: torch.device) -> bool:
    """Whether calls become part of a CUDA graph, where events cannot be timed."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _tensors(values: Any) -> Iterator[Tensor]:
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


def _views(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return [_views(each) for each in x]
    return x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x


def _bytes(values: Any) -> int:
    """Of the tensors among the values; what is broadcast counts once."""
    total = 0
    for x in _tensors(values):
        elements = 1
        for size, stride in zip(x.shape, x.stride(), strict=True):
            elements *= size if stride or not size else 1
        total += elements * x.element_size()
    return total

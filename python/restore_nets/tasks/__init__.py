"""The restoration tasks by name. A new task is one file here and one line in ``_TASKS``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from restore_nets.models.options import suggestion
from restore_nets.tasks.demosaic import Demosaic
from restore_nets.tasks.denoise import Denoise
from restore_nets.tasks.derain import Derain
from restore_nets.tasks.jpeg import Jpeg
from restore_nets.tasks.super_resolution import SuperResolution
from restore_nets.tasks.task import Labels, Task

__all__ = ["Labels", "Task", "create_task", "list_tasks", "task_at"]

_TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Derain, Denoise, Demosaic, Jpeg, SuperResolution)
}


def list_tasks() -> list[str]:
    """The names that ``create_task`` takes."""
    return list(_TASKS)


def create_task(name: str, **options: Any) -> Task:
    """A task at a level.

    Args:
        name: one of ``list_tasks()``.
        options: ``sigma`` of ``denoise``, ``quality`` of ``jpeg``, ``scale`` of ``sr``; the others have none.

    Raises:
        ValueError, TypeError: an unknown name or option, or a value that does not fit.

    Example:
        >>> noisy = create_task("denoise", sigma=30).degrade(clean, np.random.default_rng(0))
    """
    kind = _kind(name)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            has = f"has the option {', '.join(known)}" if known else "has no options"
            raise TypeError(f"task {name} {has}; got {option!r}{suggestion(option, known)}")
    return kind(**options)


def task_at(name: str, level: float | None) -> Task:
    """A task at a level given as a number, for example on the command line; None for the default one.

    Raises:
        ValueError, TypeError: as ``create_task``; also for a level of a task that has none.
    """
    if level is None:
        return create_task(name)
    option = _kind(name).level
    if option is None:
        levels = ", ".join(f"{task.name} ({task.level})" for task in _TASKS.values() if task.level)
        raise ValueError(f"task {name} has no level; got {level:g}. Those with one: {levels}")
    return create_task(name, **{option: int(level) if float(level).is_integer() else level})


def _kind(name: Any) -> type[Task]:
    if not isinstance(name, str) or name not in _TASKS:
        raise ValueError(f"task must be one of {', '.join(_TASKS)}; got {name!r}{suggestion(name, _TASKS)}")
    return _TASKS[name]

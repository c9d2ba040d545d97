"""The losses of the first steps of training: with our operators, in eager PyTorch and in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from restore_kernels.profiling.measure import exact_products
from restore_nets.kernel_checks import Agreement, follow_losses
from restore_nets.profiling import Step
from restore_nets.training import Trainer

STEPS = 20
FIRST_STEPS = 16


@dataclass(frozen=True)
class LossCurves:
    """Losses of the same steps, from the same seed on the same crops.

    Args:
        ours: with our operators, in float32.
        narrow: with our operators, in bfloat16 (autocast).
        agreement: of ours with eager PyTorch, whose losses it has.
    """

    ours: list[float]
    narrow: list[float]
    agreement: Agreement

    @property
    def largest_narrow_difference(self) -> float:
        """Of bfloat16 from float32, relative to it."""
        return max(abs(a - b) / b for a, b in zip(self.narrow, self.ours, strict=True))

    def data(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, data: dict[str, Any]) -> LossCurves:
        return cls(data["ours"], data["narrow"], Agreement(**data["agreement"]))


@exact_products()
def loss_curves(
    step: Step, steps: int = STEPS, *, first_steps: int = FIRST_STEPS,
    on_stage: Callable[[str], object] = lambda stage: None,
) -> LossCurves:  # fmt: skip
    """Train by the recipe of a float32 ``step``, on real photos, for a whole schedule of ``steps`` steps.

    Args:
        step: the network, the size of its crops, and their number.
        steps: of training.
        first_steps: of eager PyTorch with rounding errors added, see ``follow_losses``.
        on_stage: called with a word or two before each part of the work.
    """

    def trainer(step: Step) -> Trainer:
        model = step.network()
        recipe = step.recipe(model, steps)
        return Trainer(model, recipe.crops(), recipe.training_config())

    ours, narrow = trainer(step), trainer(replace(step, dtype="bf16"))
    for name, run in (("losses of ours", ours), ("losses in bfloat16", narrow)):
        on_stage(name)
        run.train()
    on_stage("losses of eager PyTorch")
    agreement = follow_losses(ours.losses, lambda: trainer(step), lambda: None, first_steps)
    return LossCurves(ours.losses, narrow.losses, agreement)

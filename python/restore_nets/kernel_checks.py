"""Whether training with fused attention follows training with eager PyTorch, as far as rounding allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

import restore_kernels
from restore_nets.training import Trainer

# Losses that differ by less than this, relatively, agree: they are means of many float32 numbers.
AGREE = 8 * torch.finfo(torch.float32).eps
# Runs that differ by rounding part at a step that is a matter of luck, and from there on exponentially.
# So a backend may part from eager in half the time, and by a multiple of the difference, of such runs.
EAGER_RUNS = 3  # one as it is, the others with rounding errors added
PARTING_SHARE = 0.5
NOISE_MULTIPLE = 10.0
FIRST_MULTIPLE = 2.0  # at the first step, where nothing has grown yet


@dataclass(frozen=True)
class Agreement:
    """Whether training on a backend follows training on eager PyTorch, from the same seed.

    Args:
        differences: of the two losses of each step, relative to eager's.
        noise: such differences of eager runs to which rounding errors were added, one list per run.
        eager: eager's losses.
        first_noise: such differences of the first step alone, of further runs.
    """

    differences: list[float]
    noise: list[list[float]]
    eager: list[float]
    first_noise: list[float] = field(default_factory=list)

    @property
    def agreeing_steps(self) -> int:
        """Steps from the first on in which the losses agree."""
        return _agreeing_steps(self.differences)

    @property
    def noise_agreeing_steps(self) -> int:
        """The same for rounding errors alone, at the least."""
        return min(map(_agreeing_steps, self.noise))

    @property
    def largest_noise(self) -> float:
        return max(AGREE, *map(max, self.noise))

    @property
    def passed(self) -> bool:
        if self.agreeing_steps:
            in_time = self.agreeing_steps >= PARTING_SHARE * self.noise_agreeing_steps
        else:
            first = max([run[0] for run in self.noise] + self.first_noise)
            in_time = self.differences[0] <= FIRST_MULTIPLE * first
        return in_time and max(self.differences) <= NOISE_MULTIPLE * self.largest_noise


def _agreeing_steps(differences: list[float]) -> int:
    return next((step for step, difference in enumerate(differences) if difference > AGREE), len(differences))


def follow_losses(
    losses: list[float], make_trainer: Callable[[], Trainer], on_step: Callable[[], None],
    first_steps: int = 0,
) -> Agreement:  # fmt: skip
    """Repeat the first steps of a training run with eager attention and compare the losses.

    Two correct ways to compute one thing round differently, and training amplifies what begins as
    rounding, sooner or later. When and how much is measured: in further eager runs every weight is
    moved by one unit in the last place, up or down at random, before every step. Something wrong
    (a gradient off by a thousandth, say) parts from eager at once and not only after some steps.

    Args:
        losses: of the first steps of the run.
        make_trainer: the same run, not yet begun.
        on_step: called after each of the ``EAGER_RUNS * len(losses) + first_steps`` steps.
        first_steps: so many eager runs of one step beside, with rounding errors. Where two scores of a
            sparse attention lie as near to each other as rounding does, which one is kept is luck from the
            first step on, and two runs need not show it. They say by how much the first losses may differ.
    """
    generator = torch.Generator().manual_seed(0)

    def run(nudge: Callable[[nn.Module], None], steps: int = len(losses)) -> list[float]:
        trainer = make_trainer()

        def between_steps(_: float) -> None:
            nudge(trainer.model)
            on_step()

        nudge(trainer.model)
        trainer.train(between_steps, until=steps)
        return trainer.losses

    with restore_kernels.use_backend("eager"):
        eager = run(lambda model: None)

        def noisy(runs: int, steps: int) -> list[list[float]]:
            nudged = (run(lambda model: _nudge(model, generator), steps) for _ in range(runs))
            return [_differences(x, eager[:steps]) for x in nudged]

        noise, first = noisy(EAGER_RUNS - 1, len(losses)), noisy(first_steps, 1)
    return Agreement(_differences(losses, eager), noise, eager, [x[0] for x in first])


def _nudge(model: nn.Module, generator: torch.Generator) -> None:
    """Move every weight by one unit in the last place, up or down at random."""
    with torch.no_grad():
        for parameter in model.parameters():
            up = torch.rand(parameter.shape, generator=generator).to(parameter.device) < 0.5
            parameter.copy_(torch.nextafter(parameter, torch.where(up, torch.inf, -torch.inf)))


def _differences(losses: list[float], reference: list[float]) -> list[float]:
    return [abs(a - b) / b for a, b in zip(losses, reference, strict=True)]

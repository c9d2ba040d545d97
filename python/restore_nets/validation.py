"""Scores of a network, while it is trained, on photos that it is not trained on."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from restore_nets.data import Pair, values
from restore_nets.evaluation import mean
from restore_nets.files import write_text
from restore_nets.images import from_bytes, to_bytes
from restore_nets.metrics import Score, score
from restore_nets.restoring import restore
from restore_nets.tasks import Task


@dataclass
class Validation:
    """Mean scores by step of training, kept in a table; those of step 0 are of the degraded photos.

    Args:
        pairs: the photos.
        task: that they are degraded by; its ``metric`` says what is compared.
        table: the file, which is written whole at every step.

    Raises:
        ValueError: photos that cannot be scored; the message names the first.
    """

    pairs: Sequence[Pair]
    task: Task
    table: Path
    scores: dict[int, Score] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.scores[0] = self._mean(self.task.before)

    def resume(self, step: int) -> None:
        """Take up the table as it was at this step.

        Raises:
            ValueError: the file is no such table.
        """
        if not self.table.exists():  # the run stopped before there was one
            return
        try:
            with self.table.open(newline="", encoding="utf-8") as file:
                rows = [(int(row["step"]), row) for row in csv.DictReader(file)]
            known = {at: Score(float(row["psnr"]), float(row["ssim"])) for at, row in rows if 0 < at <= step}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.table} is no table of validation") from error
        self.scores |= known

    def add(self, step: int, model: nn.Module, on_best: Callable[[], object]) -> Score:
        """Score the network as it is after ``step`` steps.

        Args:
            on_best: called, before the table says so, where no earlier PSNR is higher.
        """
        found = self._mean(lambda degraded: restore(model, degraded))
        earlier = [scores.psnr for at, scores in self.scores.items() if at > 0]
        if not earlier or found.psnr > max(earlier):
            on_best()
        self.scores[step] = found
        rows = (f"{at},{scores.psnr!r},{scores.ssim!r}\n" for at, scores in sorted(self.scores.items()))
        write_text(self.table, "step,psnr,ssim\n" + "".join(rows))
        return found

    @property
    def best(self) -> int:
        """The step of the highest PSNR, of networks."""
        return max((step for step in self.scores if step > 0), key=lambda step: self.scores[step].psnr)

    def _mean(self, restored: Callable[[Tensor], Tensor]) -> Score:
        scores = {}
        for pair in self.pairs:
            picture = from_bytes(to_bytes(restored(values(pair.degraded))))  # as in the file that is written
            try:
                scores[pair.name] = score(picture, from_bytes(pair.clean), self.task.metric)
            except ValueError as error:
                raise ValueError(f"validation photo {pair.name}: {error}") from error
        return mean(scores)

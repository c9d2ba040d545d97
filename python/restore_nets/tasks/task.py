"""What a restoration task is: how clean photos are degraded, and what the result is compared with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Labels:
    """How reports speak of a task.

    Args:
        before: what photos are before restoring, in a word or two: ``"rainy"``.
        title: what was achieved: ``"Rain removed"``.
        done: the same of photos, as the beginning of a sentence: ``"Rain taken out of photos"``.
        cause: what the network takes out or fills in: ``"rain"``.
        where: a heading for the detail in which most is to be done: ``"Where the rain is heaviest"``.
        made: how training gets its degraded crops, in sentences.
        classical: what ``Task.classical`` does, or None where it does nothing.
    """

    before: str
    title: str
    done: str
    cause: str
    where: str
    made: str
    classical: str | None = None


class Task(ABC):
    """One degradation at one level, a frozen dataclass whose fields are the level.

    Photos are (3, H, W), float32, clean ones with values in [0, 1].

    Attributes:
        name: as in ``create_task``.
        level: the field that says how strong the degradation is, or None.
        usual_levels: at which the field reports results.
        scale: the clean photo is this many times as high and wide as the degraded one.
        eight_bit: degraded photos are what an 8-bit file holds; otherwise they are float32.
        from_neighbours: a degraded pixel depends on clean ones around it, so that training crops are
            cut out of degraded photos; otherwise crops are degraded, each anew.
        period: of the pattern that the degradation lays over the photo, in pixels; crops of degraded
            photos start at its multiples and keep their orientation.
        upright: photos must not be turned, only mirrored left for right, in training.
        exposures: training crops are brightened or darkened by a gamma from this range, if there is one.
    """

    name: ClassVar[str]
    level: ClassVar[str | None] = None
    usual_levels: ClassVar[tuple[int, ...]] = ()
    scale: int = 1
    eight_bit: ClassVar[bool] = True
    from_neighbours: ClassVar[bool] = False
    period: ClassVar[int] = 1
    upright: ClassVar[bool] = False
    exposures: ClassVar[tuple[float, float] | None] = None

    @abstractmethod
    def degrade(self, clean: Tensor, rng: np.random.Generator) -> Tensor:
        """The degraded photo (3, H / scale, W / scale); the same state of rng gives the same.

        Raises:
            ValueError: clean is no (3, H, W), or not divisible by the scale.
        """

    def degrade_with_truth(self, clean: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor | None]:
        """The degraded photo and, where there is such a map, how much covers each pixel (H, W) in [0, 1]."""
        return self.degrade(clean, rng), None

    def network_input(self, photo: Tensor) -> Tensor:
        """What a network of this task takes, from a photo that a user gives it."""
        return photo

    def before(self, degraded: Tensor) -> Tensor:
        """The degraded photo at the clean one's size: what there is to look at without a network."""
        return degraded

    def classical(self, degraded: Tensor) -> Tensor | None:
        """What one would do without a network; None where that is ``before``."""
        return None

    def first_filter(self) -> Tensor | None:
        """3x3 kernels, one per colour, that do what ``before`` does where such a filter can: (3, 3, 3).

        None where ``before`` leaves a degraded photo as it is, or is no such filter.
        """
        return None

    @property
    @abstractmethod
    def metric(self) -> str:
        """The preset (see ``metrics``) under which the field reports this task."""

    @property
    @abstractmethod
    def labels(self) -> Labels: ...

    def config(self) -> dict[str, Any]:
        """The keywords of ``create_task``."""
        return {"name": self.name, **asdict(self)}  # type: ignore[call-overload]

    def __str__(self) -> str:
        return self.name if self.level is None else f"{self.name} ({self.level} {getattr(self, self.level)})"


def check_photo(clean: Tensor) -> None:
    if clean.dim() != 3 or clean.shape[0] != 3:
        raise ValueError(f"clean must have shape (3, H, W); got {tuple(clean.shape)}")

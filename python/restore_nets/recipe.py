"""Recipes: YAML files that say what to train, on what, and where to write it."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from restore_nets.data import (
    Crops,
    Pair,
    PairedCrops,
    Photos,
    Stage,
    degraded_pairs,
    read_pairs,
    read_photos,
    synthetic_crops,
)
from restore_nets.models.options import suggestion
from restore_nets.photos import TRAINING, UNSEEN, shipped_photos
from restore_nets.tasks import Task, create_task
from restore_nets.training import TrainingConfig

SHIPPED = "scikit-image"


@dataclass(frozen=True)
class DataRecipe:
    """Where training data come from: exactly one of the two.

    Args:
        photos: a folder of clean photos, which the task degrades, or ``scikit-image`` for those
            inside that package.
        pairs: a folder with ``input/`` (degraded) and ``target/`` (clean) photos of the same names.
    """

    photos: str | None = None
    pairs: str | None = None

    def __post_init__(self) -> None:
        if (self.photos is None) == (self.pairs is None):
            given = "neither" if self.photos is None else "both"
            raise ValueError(f"there must be either photos or pairs; got {given}")

    def read(self, task: Task, shipped: tuple[str, ...]) -> Photos | list[Pair]:
        """The clean photos or the pairs; ``shipped`` names those of scikit-image that are meant.

        Raises:
            ValueError, OSError: one that cannot be read.
        """
        if self.pairs is not None:
            return read_pairs(Path(self.pairs), task.scale)
        return shipped_photos(shipped) if self.photos == SHIPPED else read_photos(Path(str(self.photos)))


@dataclass(frozen=True)
class Recipe:
    """A training run. Relative paths start at the current folder.

    Args:
        model: ``name`` and options, as for ``create_model``.
        data: see ``DataRecipe``.
        out: folder for the checkpoint, the weights and the losses.
        task: a name, or ``name`` and level, as for ``create_task``: ``{name: denoise, sigma: 30}``.
        weights: a checkpoint of the network to start from, see ``load_checkpoint``; None for random weights.
        validation: data as above, on which the network is scored at every checkpoint; None does without.
            Of scikit-image, photos that training on them does not see.
        steps, learning_rate, weight_decay, precision, device, workers, half_weight, edge_weight,
            ssim_weight, ema_decay: see ``TrainingConfig``.
        batch: crops per step.
        crop: their side, in pixels of the clean photo; a multiple of the task's scale.
        stages: instead of one batch and crop, several of both, each up to a step, the last up to ``steps``.
        seed: of the initial weights, the crops and the degradations.
        checkpoint_every: steps between checkpoints.
    """

    model: dict[str, Any]
    data: DataRecipe
    out: Path
    steps: int
    task: Task = field(default_factory=lambda: create_task("derain"))
    weights: str | None = None
    validation: DataRecipe | None = None
    learning_rate: float = TrainingConfig.learning_rate
    weight_decay: float = TrainingConfig.weight_decay
    batch: int = 8
    crop: int = 64
    stages: list[Stage] | None = None
    seed: int = 0
    precision: str = TrainingConfig.precision
    device: str = TrainingConfig.device
    workers: int = TrainingConfig.workers
    half_weight: float = TrainingConfig.half_weight
    edge_weight: float = TrainingConfig.edge_weight
    ssim_weight: float = TrainingConfig.ssim_weight
    ema_decay: float | None = TrainingConfig.ema_decay
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        if "name" not in self.model:
            raise ValueError("model must have the key name")
        if self.stages == []:
            raise ValueError("stages must not be empty")
        for name in ("batch", "crop", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative; got {self.seed}")

    @property
    def sizes(self) -> list[Stage]:
        """The stages, or the only one."""
        return [Stage(self.steps, self.batch, self.crop)] if self.stages is None else self.stages

    def training_config(self) -> TrainingConfig:
        return TrainingConfig(**{f.name: getattr(self, f.name) for f in fields(TrainingConfig)})

    def crops(self) -> Crops:
        """The training batches. Reads all photos, so that one that cannot be read is known at the start."""
        size = (self.steps, self.sizes[0].batch, self.sizes[0].crop, self.seed)
        data = self.data.read(self.task, TRAINING)
        paired = isinstance(data, list)
        crops = PairedCrops(self.task, data, *size) if paired else synthetic_crops(self.task, data, *size)
        return crops.in_stages(self.sizes)

    def validation_pairs(self) -> list[Pair]:
        """Of ``validation``, the same ones every time."""
        assert self.validation is not None
        data = self.validation.read(self.task, UNSEEN)
        return data if isinstance(data, list) else degraded_pairs(self.task, data, self.seed)

    def identity(self) -> dict[str, Any]:
        """What the result depends on besides the training config, as plain data."""
        what: dict[str, Any] = {
            "model": self.model, "data": asdict(self.data), "task": self.task.config(),
            "weights": self.weights, "seed": self.seed,
            "validation": None if self.validation is None else asdict(self.validation),
        }  # fmt: skip
        if self.stages is None:
            return {**what, "batch": self.batch, "crop": self.crop}
        return {**what, "stages": [asdict(stage) for stage in self.stages]}


def load_recipe(path: Path) -> Recipe:
    """Read a recipe; unknown keys and values of a wrong type are errors.

    Raises:
        ValueError: what is wrong, and where.
        OSError: the file cannot be opened.
    """
    with path.open("rb") as file:
        try:
            content = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    try:
        staged = isinstance(content, dict) and content.get("stages") is not None
        if staged and (beside := [key for key in ("batch", "crop") if key in content]):
            raise ValueError(f"stages say batch and crop; got {' and '.join(beside)} beside them")
        return _build(Recipe, content, "the recipe")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _build(kind: type[Any], content: Any, where: str) -> Any:
    """A dataclass from a mapping of its fields."""
    if not isinstance(content, dict):
        raise TypeError(f"{where} must be a mapping of keys to values; got {content!r}")
    types = get_type_hints(kind)
    for key in content:
        if key not in types:
            raise ValueError(f"{where} has no key {key!r}{suggestion(key, types)}; it has {', '.join(types)}")
    needed = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING]
    missing = [name for name in needed if name not in content]
    if missing:
        raise ValueError(f"{where} must have {', '.join(missing)}")
    inner = "" if kind is Recipe else f"{where}."
    values = {key: _convert(types[key], value, inner + key) for key, value in content.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(str(error) if kind is Recipe else f"{where}: {error}") from error


def _convert(kind: Any, value: Any, key: str) -> Any:
    if value is None and type(None) in get_args(kind):
        return None
    if kind in (DataRecipe, DataRecipe | None):
        return _build(DataRecipe, value, key)
    if kind == list[Stage] | None:
        if not isinstance(value, list):
            raise TypeError(f"{key} must be a list; got {value!r}")
        return [_build(Stage, stage, f"{key}[{i}]") for i, stage in enumerate(value)]
    if kind is Task:
        return _task(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind in (float, float | None):
        return _number(value, key)
    expected = {int: "an integer", Path: "a path", dict[str, Any]: "a mapping"}.get(kind, "text")
    python = {int: int, dict[str, Any]: dict}.get(kind, str)
    if kind is Path or not isinstance(value, python) or isinstance(value, bool):
        raise TypeError(f"{key} must be {expected}; got {value!r}")
    return value


def _task(value: Any) -> Task:
    options = {"name": value} if isinstance(value, str) else value
    if not isinstance(options, dict) or "name" not in options:
        raise TypeError(f"task must be a name, or a mapping of name and level; got {value!r}")
    return create_task(**options)


def _number(value: Any, key: str) -> float:
    try:
        return float(value if not isinstance(value, bool) else "")  # YAML reads 1e-3 as text
    except (TypeError, ValueError):
        raise TypeError(f"{key} must be a number; got {value!r}") from None

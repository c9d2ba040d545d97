"""The demonstration: train a small network on degraded photos, restore photos it never saw, report.

Everything happens here, in a few minutes on two CPU cores: no download, no weights from elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from restore_kernels.profiling.measure import exact_products
from restore_nets import figures, report
from restore_nets.attention_calls import AttentionTimes, attention_calls, time_attention
from restore_nets.checkpoints import save_checkpoint
from restore_nets.data import (
    Crops,
    Pair,
    PairedCrops,
    degraded_pairs,
    middle,
    read_pairs,
    read_photos,
    shrink,
    synthetic_crops,
    values,
)
from restore_nets.demo_recipes import DEFAULT_MODELS, RECIPES, DemoRecipe
from restore_nets.images import from_bytes, to_bytes, write_image
from restore_nets.kernel_checks import EAGER_RUNS, Agreement, follow_losses
from restore_nets.masks import MaskCheck, check_mask
from restore_nets.match_figure import match_picture
from restore_nets.metrics import Score, score
from restore_nets.models import create_model
from restore_nets.models.options import suggestion
from restore_nets.photos import TRAINING, UNSEEN, shipped_photos
from restore_nets.progress import progress
from restore_nets.restoring import restore
from restore_nets.starts import pass_input_through
from restore_nets.tasks import Task, create_task
from restore_nets.training import Trainer, TrainingConfig, available_device

UNSEEN_SHARE, MOST_UNSEEN = 0.2, 4  # of the user's own photos
LONGER_SIDE = 800  # to which the user's own photos are scaled down
TILE = 0  # whole photos: none is longer than that

REPEATED_STEPS = 20  # with eager attention
SECONDS_FOR_TIMES = 6.0  # of attention, all its calls together


@dataclass(frozen=True)
class Options:
    """What the command line says; photos or pairs, or the photos of scikit-image; steps or seconds.

    ``model`` None: the one that ``DEFAULT_MODELS`` names for the task.
    """

    out: Path
    photos: Path | None = None
    pairs: Path | None = None
    device: str = "cpu"
    steps: int | None = None
    seconds: float | None = None
    seed: int = 0
    model: str | None = None
    task: Task = field(default_factory=lambda: create_task("derain"))

    def __post_init__(self) -> None:
        if self.name not in RECIPES:
            near = suggestion(self.name, RECIPES)
            raise ValueError(f"model must be one of {', '.join(RECIPES)}; got {self.name!r}{near}")
        fitting = [name for name, recipe in RECIPES.items() if recipe.enlarges == (self.task.scale > 1)]
        if self.name not in fitting:
            does = "enlarges photos" if self.recipe.enlarges else "keeps the size of photos"
            raise ValueError(
                f"model must be one of {', '.join(fitting)} for the task {self.task}; {self.name} {does}"
            )
        if self.photos is not None and self.pairs is not None:
            raise ValueError("give either --photos or --data, not both")
        if self.steps is not None and self.seconds is not None:
            raise ValueError("give either --steps or --seconds, not both")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}")
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise ValueError(f"seconds must be positive; got {self.seconds}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative; got {self.seed}")

    @property
    def name(self) -> str:
        """Of the network."""
        return self.model or DEFAULT_MODELS[self.task.name]

    @property
    def recipe(self) -> DemoRecipe:
        return RECIPES[self.name]

    @property
    def network(self) -> dict[str, Any]:
        """The keywords of ``create_model``."""
        scale = {"scale": self.task.scale} if self.recipe.enlarges else {}
        return {"name": self.name, **self.recipe.options, **scale}

    @property
    def again(self) -> str:
        """The arguments that name task and network."""
        task = self.task
        level = "" if task.level is None else f" --level {getattr(task, task.level):g}"
        return f"--task {task.name}{level} --model {self.name}"


@dataclass(frozen=True)
class Material:
    """What is trained on (``crops(steps)``) and what is kept unseen."""

    crops: Callable[[int], Crops]
    training: list[str]
    unseen: list[Pair]
    synthetic: bool


@dataclass(frozen=True)
class Result:
    """One unseen photo: (3, H, W), and how near each picture is to the clean one.

    ``degraded`` is the photo at full size as it is without a network, see ``Task.before``.
    """

    name: str
    degraded: Tensor
    restored: Tensor
    clean: Tensor
    before: Score
    classical: Score | None  # of the classical remedy, where the task has one
    after: Score
    mask: MaskCheck | None = None  # of networks that predict one
    matches: Tensor | None = None  # picture of a pixel's, of networks with pyramid attention


@dataclass(frozen=True)
class Demo:
    """All that the report tells."""

    options: Options
    material: Material
    parameters: int
    losses: list[float]
    training_seconds: float
    results: list[Result]
    times: list[AttentionTimes]
    agreement: Agreement | None  # None where training itself ran on eager PyTorch

    @property
    def metric(self) -> str:
        """The preset of the task."""
        return self.options.task.metric

    @property
    def backend(self) -> str:
        """What runs the network's attention: one name, or several where calls differ."""
        return " and ".join(dict.fromkeys(time.backend for time in self.times))

    def mean(self, which: str, metric: str) -> float:
        """The mean over the photos, e.g. ``mean("after", "psnr")``."""
        return fmean(getattr(getattr(result, which), metric) for result in self.results)

    def mask_correlation(self, what: str = "mask") -> float | None:
        """The mean over the photos, see ``MaskCheck.correlation``; None without masks or true streaks."""
        masks = [r.mask for r in self.results if r.mask is not None and r.mask.streaks is not None]
        return fmean(mask.correlation(what) for mask in masks) if masks else None

    @property
    def gain(self) -> float:
        """Mean PSNR of the restored photos minus that of the photos before, in dB."""
        return self.mean("after", "psnr") - self.mean("before", "psnr")


def run(options: Options, console: Console) -> Demo:
    """Run the demonstration and write its files into ``options.out``.

    Raises:
        ValueError, OSError: photos or a device that cannot be used.
        RuntimeError: training diverged.
    """
    device = available_device(options.device)
    material = prepare(options)
    options.out.mkdir(parents=True, exist_ok=True)
    steps = options.steps or options.recipe.steps
    if options.seconds is not None:
        steps = steps_within(options.seconds, lambda: make_trainer(material, options, 10))

    def trainer_from_start() -> Trainer:
        return make_trainer(material, options, steps)

    trainer = trainer_from_start()
    console.print(f"Training on {len(material.training)} photos; {len(material.unseen)} stay unseen.")
    started = time.perf_counter()
    with exact_products(), progress(console, "training", steps) as advance:
        trainer.train(lambda loss: advance(f"loss {loss:.4f}"))
    training_seconds = time.perf_counter() - started
    weights = options.out / "model.safetensors"
    save_checkpoint(trainer.model, weights, options.network, options.task.config())

    results = []
    with progress(console, "restoring", len(material.unseen)) as advance:
        for pair in material.unseen:
            results.append(restore_pair(trainer.model, pair, options.task))
            advance(pair.name)
    calls = attention_calls(trainer.model, trainer.crops[0][0].to(device))
    times = []
    with exact_products(), progress(console, "timing attention", len(calls)) as advance:
        for call in calls:
            times.append(time_attention(call, device, SECONDS_FOR_TIMES / len(calls)))
            advance(str(call))
    agreement = None
    if any(time.backend != "eager" for time in times):
        repeated = trainer.losses[:REPEATED_STEPS]
        following = progress(console, "following eager", EAGER_RUNS * len(repeated))
        with exact_products(), following as advance:
            agreement = follow_losses(repeated, trainer_from_start, lambda: advance(""))

    parameters = sum(p.numel() for p in trainer.model.parameters())
    demo = Demo(options, material, parameters, trainer.losses, training_seconds, results, times, agreement)
    write(demo)
    return demo


def prepare(options: Options) -> Material:
    """Read the photos and keep some unseen."""
    task, recipe = options.task, options.recipe
    size = (recipe.batch, recipe.crop * task.scale, options.seed)
    if options.pairs is not None:
        pairs = read_pairs(options.pairs, task.scale)  # not shrunk: that would change the degradation
        count = len(pairs) - _unseen_count(len(pairs), options.pairs)
        training, unseen = pairs[:count], [middle(pair, recipe.restored, task) for pair in pairs[count:]]
        names = [pair.name for pair in training]
        return Material(lambda n: PairedCrops(task, training, n, *size), names, unseen, False)
    if options.photos is not None:
        photos = {name: shrink(photo, LONGER_SIDE) for name, photo in read_photos(options.photos).items()}
        count = len(photos) - _unseen_count(len(photos), options.photos)
        seen, kept = dict(list(photos.items())[:count]), dict(list(photos.items())[count:])
    else:
        seen, kept = shipped_photos(TRAINING), shipped_photos(UNSEEN)
    unseen = [middle(pair, recipe.restored, task) for pair in degraded_pairs(task, kept, options.seed)]
    return Material(lambda n: synthetic_crops(task, seen, n, *size), list(seen), unseen, True)


def _unseen_count(photos: int, folder: Path) -> int:
    if photos < 2:
        raise ValueError(
            f"{folder} must hold at least 2 photos, one to train on and one to keep unseen; got {photos}"
        )
    return min(MOST_UNSEEN, max(1, round(UNSEEN_SHARE * photos)))


def make_trainer(material: Material, options: Options, steps: int) -> Trainer:
    """The training run at its start; the seed decides all of it."""
    torch.manual_seed(options.seed)
    config = TrainingConfig(steps, options.recipe.learning_rate, device=options.device)
    model = create_model(**options.network)
    if options.recipe.passes_input:
        pass_input_through(model, options.task.first_filter())
    return Trainer(model, material.crops(steps), config)


def steps_within(seconds: float, make: Callable[[], Trainer]) -> int:
    """How many training steps take this long, by the time of a few on a trainer of their own."""
    trainer = make()
    times = [time.perf_counter()]
    trainer.train(lambda _: times.append(time.perf_counter()))
    durations = [end - start for start, end in pairwise(times)]
    return max(1, round(seconds / median(durations)))


def restore_pair(model: nn.Module, pair: Pair, task: Task) -> Result:
    degraded, clean = values(pair.degraded), from_bytes(pair.clean)
    before, classical = task.before(degraded), task.classical(degraded)
    restored = from_bytes(to_bytes(restore(model, degraded, TILE)))  # as in the file that is written

    def scored(picture: Tensor) -> Score:
        return score(picture, clean, task.metric)

    return Result(
        pair.name, before, restored, clean, scored(before),
        None if classical is None else scored(classical), scored(restored),
        check_mask(model, degraded, restored, pair.truth), match_picture(model, degraded, clean),
    )  # fmt: skip


def write(demo: Demo) -> None:
    """The pictures, the loss curve and the report."""
    out, before = demo.options.out, demo.options.task.labels.before
    for result in demo.results:
        name = Path(result.name).stem
        pictures = {
            f"{before} {result.before.psnr:.1f} dB": result.degraded,
            f"restored {result.after.psnr:.1f} dB": result.restored,
            "clean": result.clean,
        }
        write_image(out / f"{name}.png", figures.side_by_side(pictures))
        if result.mask is not None:
            write_image(out / f"{name}-mask.png", figures.side_by_side(result.mask.pictures()))
        if result.matches is not None:
            write_image(out / f"{name}-matches.png", result.matches)
    write_image(out / "loss.png", figures.png(figures.loss_curve(demo.losses)))
    report.write(demo, out / "report.html")

"""The demonstration: train a small network on rainy photos, restore photos it never saw, report.

Everything happens here, in a few minutes on two CPU cores: no download, no weights from elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from restore_nets import figures, report
from restore_nets.attention_calls import AttentionTimes, attention_calls, time_attention
from restore_nets.checkpoints import save_checkpoint
from restore_nets.data import Crops, Pair, PairedCrops, RainCrops, read_pairs, read_photos, shrink, with_rain
from restore_nets.demo_recipes import DEFAULT_MODEL, RECIPES, DemoRecipe
from restore_nets.images import from_bytes, to_bytes, write_image
from restore_nets.kernel_checks import EAGER_RUNS, Agreement, follow_losses
from restore_nets.masks import MaskCheck, check_mask
from restore_nets.metrics import Score, score
from restore_nets.models import create_model
from restore_nets.models.options import suggestion
from restore_nets.photos import TRAINING, UNSEEN, shipped_photos
from restore_nets.progress import progress
from restore_nets.restoring import restore
from restore_nets.training import Trainer, TrainingConfig, available_device

METRIC = "derain"
UNSEEN_SHARE, MOST_UNSEEN = 0.2, 4  # of the user's own photos
LONGER_SIDE = 800  # to which the user's own photos are scaled down
TILE = 0  # whole photos: none is longer than that

REPEATED_STEPS = 20  # with eager attention
SECONDS_FOR_TIMES = 6.0  # of attention, all its calls together


@dataclass(frozen=True)
class Options:
    """What the command line says; photos or pairs, or the photos of scikit-image; steps or seconds."""

    out: Path
    photos: Path | None = None
    pairs: Path | None = None
    device: str = "cpu"
    steps: int | None = None
    seconds: float | None = None
    seed: int = 0
    model: str = DEFAULT_MODEL

    def __post_init__(self) -> None:
        if self.model not in RECIPES:
            near = suggestion(self.model, RECIPES)
            raise ValueError(f"model must be one of {', '.join(RECIPES)}; got {self.model!r}{near}")
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
    def recipe(self) -> DemoRecipe:
        return RECIPES[self.model]


@dataclass(frozen=True)
class Material:
    """What is trained on (``crops(steps)``) and what is kept unseen."""

    crops: Callable[[int], Crops]
    training: list[str]
    unseen: list[Pair]
    synthetic: bool


@dataclass(frozen=True)
class Result:
    """One unseen photo: (3, H, W) in [0, 1], and how near each picture is to the clean one."""

    name: str
    rainy: Tensor
    restored: Tensor
    clean: Tensor
    before: Score
    filtered: Score  # by a 3x3 median, the classical remedy
    after: Score
    mask: MaskCheck | None = None  # of networks that predict one


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
    metric: str = METRIC

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
        """Mean PSNR of the restored photos minus that of the rainy ones, in dB."""
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
    with progress(console, "training", steps) as advance:
        trainer.train(lambda loss: advance(f"loss {loss:.4f}"))
    training_seconds = time.perf_counter() - started
    config = {"name": options.model, **options.recipe.options}
    save_checkpoint(trainer.model, options.out / "model.safetensors", config)

    results = []
    with progress(console, "restoring", len(material.unseen)) as advance:
        for pair in material.unseen:
            results.append(restore_pair(trainer.model, pair))
            advance(pair.name)
    calls = attention_calls(trainer.model, trainer.crops[0][0].to(device))
    times = []
    with progress(console, "timing attention", len(calls)) as advance:
        for call in calls:
            times.append(time_attention(call, device, SECONDS_FOR_TIMES / len(calls)))
            advance(str(call))
    agreement = None
    if any(time.backend != "eager" for time in times):
        repeated = trainer.losses[:REPEATED_STEPS]
        with progress(console, "following eager", EAGER_RUNS * len(repeated)) as advance:
            agreement = follow_losses(repeated, trainer_from_start, lambda: advance(""))

    parameters = sum(p.numel() for p in trainer.model.parameters())
    demo = Demo(options, material, parameters, trainer.losses, training_seconds, results, times, agreement)
    write(demo)
    return demo


def prepare(options: Options) -> Material:
    """Read the photos and keep some unseen."""
    size = (options.recipe.batch, options.recipe.crop, options.seed)
    if options.pairs is not None:
        pairs = [
            Pair(p.name, shrink(p.degraded, LONGER_SIDE), shrink(p.clean, LONGER_SIDE))
            for p in read_pairs(options.pairs)
        ]
        count = len(pairs) - _unseen_count(len(pairs), options.pairs)
        training, unseen = pairs[:count], pairs[count:]
        return Material(lambda n: PairedCrops(training, n, *size), [p.name for p in training], unseen, False)
    if options.photos is not None:
        photos = {name: shrink(photo, LONGER_SIDE) for name, photo in read_photos(options.photos).items()}
        count = len(photos) - _unseen_count(len(photos), options.photos)
        seen, kept = dict(list(photos.items())[:count]), dict(list(photos.items())[count:])
    else:
        seen, kept = shipped_photos(TRAINING), shipped_photos(UNSEEN)
    return Material(lambda n: RainCrops(seen, n, *size), list(seen), with_rain(kept, options.seed), True)


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
    model = create_model(options.model, **options.recipe.options)
    return Trainer(model, material.crops(steps), config)


def steps_within(seconds: float, make: Callable[[], Trainer]) -> int:
    """How many training steps take this long, by the time of a few on a trainer of their own."""
    trainer = make()
    times = [time.perf_counter()]
    trainer.train(lambda _: times.append(time.perf_counter()))
    durations = [end - start for start, end in pairwise(times)]
    return max(1, round(seconds / median(durations)))


def restore_pair(model: nn.Module, pair: Pair) -> Result:
    rainy, clean = from_bytes(pair.degraded), from_bytes(pair.clean)
    restored = from_bytes(to_bytes(restore(model, rainy, TILE)))  # as in the file that is written
    scores = [score(picture, clean, METRIC) for picture in (rainy, median_filter(rainy), restored)]
    mask = check_mask(model, rainy, restored, pair.streaks)
    return Result(pair.name, rainy, restored, clean, *scores, mask=mask)


def median_filter(image: Tensor) -> Tensor:
    """The 3x3 median of every pixel and channel of (3, H, W), borders repeated."""
    padded = F.pad(image[None], (1, 1, 1, 1), mode="replicate")
    return F.unfold(padded.transpose(0, 1), 3).median(dim=1).values.view_as(image)


def write(demo: Demo) -> None:
    """The pictures, the loss curve and the report."""
    out = demo.options.out
    for result in demo.results:
        name = Path(result.name).stem
        pictures = {
            f"rainy {result.before.psnr:.1f} dB": result.rainy,
            f"restored {result.after.psnr:.1f} dB": result.restored,
            "clean": result.clean,
        }
        write_image(out / f"{name}.png", figures.side_by_side(pictures))
        if result.mask is not None:
            write_image(out / f"{name}-mask.png", figures.side_by_side(result.mask.pictures()))
    write_image(out / "loss.png", figures.png(figures.loss_curve(demo.losses)))
    report.write(demo, out / "report.html")

"""The demonstration: train a small network on rainy photos, restore photos it never saw, report.

Everything happens here, in about two minutes on two CPU cores: no download, no weights from elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from restore_nets import figures, report
from restore_nets.checkpoints import save_checkpoint
from restore_nets.data import Crops, Pair, PairedCrops, RainCrops, read_pairs, read_photos, shrink, with_rain
from restore_nets.images import from_bytes, to_bytes, write_image
from restore_nets.kernel_checks import (
    EAGER_RUNS,
    Agreement,
    AttentionTimes,
    attention_backend,
    attention_sizes,
    follow_losses,
    time_attention,
)
from restore_nets.metrics import Score, score
from restore_nets.models import create_model
from restore_nets.photos import TRAINING, UNSEEN, shipped_photos
from restore_nets.progress import progress
from restore_nets.restoring import restore
from restore_nets.training import Trainer, TrainingConfig, available_device

# The largest network and the number of steps that train in about a minute on two cores.
MODEL: Mapping[str, Any] = {
    "name": "ddsa", "dim": 16, "num_blocks": (1, 1, 1, 1), "heads": (1, 2, 4, 8), "ffn_expansion": 1.0,
}  # fmt: skip
STEPS, BATCH, CROP, LEARNING_RATE = 450, 8, 48, 2e-3

METRIC = "derain"
UNSEEN_SHARE, MOST_UNSEEN = 0.2, 4  # of the user's own photos
LONGER_SIDE = 800  # to which the user's own photos are scaled down
TILE = 0  # whole photos: none is longer than that

REPEATED_STEPS = 20  # with eager attention
SECONDS_PER_SIZE = 1.5


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

    def __post_init__(self) -> None:
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
    backend: str
    metric: str = METRIC

    def mean(self, which: str, metric: str) -> float:
        """The mean over the photos, e.g. ``mean("after", "psnr")``."""
        return fmean(getattr(getattr(result, which), metric) for result in self.results)

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
    steps = options.steps or STEPS
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
    save_checkpoint(trainer.model, options.out / "model.safetensors", MODEL)

    results = []
    with progress(console, "restoring", len(material.unseen)) as advance:
        for pair in material.unseen:
            results.append(restore_pair(trainer.model, pair))
            advance(pair.name)
    backend = attention_backend(device)
    sizes = attention_sizes(trainer.model, trainer.crops[0][0].to(device))
    times = []
    with progress(console, "timing attention", len(sizes)) as advance:
        for size in sizes:
            times.append(time_attention(size, device, SECONDS_PER_SIZE))
            advance(str(size))
    agreement = None
    if backend != "eager":
        repeated = trainer.losses[:REPEATED_STEPS]
        with progress(console, "following eager", EAGER_RUNS * len(repeated)) as advance:
            agreement = follow_losses(repeated, trainer_from_start, backend, lambda: advance(""))

    parameters = sum(p.numel() for p in trainer.model.parameters())
    demo = Demo(
        options, material, parameters, trainer.losses, training_seconds, results, times, agreement, backend
    )
    write(demo)
    return demo


def prepare(options: Options) -> Material:
    """Read the photos and keep some unseen."""
    size = (BATCH, CROP, options.seed)
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
    config = TrainingConfig(steps, LEARNING_RATE, device=options.device)
    return Trainer(create_model(**MODEL), material.crops(steps), config)


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
    return Result(pair.name, rainy, restored, clean, *scores)


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
    write_image(out / "loss.png", figures.png(figures.loss_curve(demo.losses)))
    report.write(demo, out / "report.html")

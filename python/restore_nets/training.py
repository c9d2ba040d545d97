"""Training a restoration network: AdamW, cosine schedule, exact resuming."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.profiler import record_function
from torch.utils.data import DataLoader

from restore_nets.data import Crops
from restore_nets.files import written_whole
from restore_nets.losses import HALF_WEIGHT, training_loss
from restore_nets.metrics import SSIM_WINDOW
from restore_nets.models.options import check_choice
from restore_nets.restoring import scale_of

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
PHASES = ("forward", "loss", "backward", "optimizer")  # of a step
ADAM_BETAS = (0.9, 0.99)
MAX_GRADIENT_NORM = 1.0
WARMUP_SHARE = 0.05  # of all steps


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast to train, and where.

    Args:
        steps: number of optimizer steps.
        learning_rate: its highest value, after a linear warm-up; it then falls to 0 along a cosine.
        weight_decay: of AdamW, on matrices and kernels; not on biases, norms and temperatures.
        precision: ``"float32"``, or ``"bfloat16"`` or, on CUDA devices, ``"float16"`` for autocast, or their
            short names ``"fp32"``, ``"bf16"``, ``"fp16"``. float16 scales the loss, so that small gradients
            do not vanish, and skips steps whose gradients overflow.
        device: as for ``torch.device``.
        workers: processes that prepare batches; 0 prepares them in this one.
        half_weight: of the loss at half resolution, beside 1 at full resolution; without effect on
            networks that return no image at half resolution.
        edge_weight: of the edge loss, see ``losses.edge_loss``; 0 leaves it out.
        ssim_weight: of 1 - SSIM; 0 leaves it out.
        ema_decay: of an exponential moving average of the weights, which is then what training is for
            (``Trainer.trained``); None does without.
    """

    steps: int
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    precision: str = "float32"
    device: str = "cpu"
    workers: int = 0
    half_weight: float = HALF_WEIGHT
    edge_weight: float = 0.0
    ssim_weight: float = 0.0
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive; got {self.learning_rate}")
        for name in ("weight_decay", "half_weight", "edge_weight", "ssim_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}")
        object.__setattr__(self, "precision", SHORT_PRECISIONS.get(self.precision, self.precision))
        check_choice("precision", self.precision, (*PRECISIONS, *SHORT_PRECISIONS))
        if self.precision == "float16" and not self.device.startswith("cuda"):
            raise ValueError(
                "precision float16 needs a CUDA device, bfloat16 works on all; "
                f"got precision='float16' with device={self.device!r}"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be between 0 and 1; got {self.ema_decay}")
        if self.workers < 0:
            raise ValueError(f"workers must not be negative; got {self.workers}")


# What may differ between a run and its continuation: the result depends on it by rounding at most.
_FREE = {"device", "workers"}


class Trainer:
    """Trains a network on crops, step by step, and can stop and resume at every step.

    A run that is interrupted, saved and resumed on the same machine gives the weights of one that is not
    interrupted: bitwise on a CPU, and on a GPU as far as PyTorch's own operators repeat their results there.

    Args:
        model: maps degraded (B, 3, H, W) to restored (B, 3, s H, s W), where s is its attribute
            ``scale`` (1 if there is none), or to a pair of that and the restored image at half
            resolution; moved to the config's device.
        crops: the batches, of a task of that scale.
        config: see there.

    Attributes:
        losses: one per step taken; their number is the next step.
        skipped_steps: how many of them left the weights alone, because gradients in float16 overflowed.
        phase: ``with phase(name):`` surrounds each of the ``PHASES`` of a step; by default the ranges that
            torch.profiler shows under these names.

    Raises:
        ValueError, RuntimeError: a device that does not exist, or crops that do not fit.
    """

    def __init__(self, model: nn.Module, crops: Crops, config: TrainingConfig) -> None:
        if len(crops) < config.steps:
            raise ValueError(f"crops must hold a batch for each of {config.steps} steps; got {len(crops)}")
        if config.ssim_weight and crops.crop < SSIM_WINDOW:
            raise ValueError(
                f"crop must be at least {SSIM_WINDOW} where ssim_weight is not 0; got {crops.crop}"
            )
        if scale_of(model) != crops.task.scale:
            raise ValueError(
                f"model must enlarge photos {crops.task.scale} times for the task {crops.task}; "
                f"{type(model).__name__} enlarges {scale_of(model)} times"
            )
        self.device = available_device(config.device)
        self.model = model.to(self.device)
        self.crops, self.config = crops, config
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(model, config.weight_decay),
            lr=config.learning_rate,
            betas=ADAM_BETAS,
            fused=True,
        )
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.average: AveragedModel | None = None
        if config.ema_decay is not None:
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.losses: list[float] = []
        self.skipped_steps = 0
        self.phase: Callable[[str], AbstractContextManager[Any]] = record_function

    @property
    def trained(self) -> nn.Module:
        """The network that training is for: the model, or the average of what it was."""
        return self.model if self.average is None else self.average.module

    def train(self, on_step: Callable[[float], None] | None = None, until: int | None = None) -> None:
        """Take the remaining steps, or those up to step ``until``.

        Args:
            on_step: called after every step with its loss.

        Raises:
            RuntimeError: the loss is no longer finite.
        """
        end = min(until or self.config.steps, self.config.steps)
        start = len(self.losses)
        loader = DataLoader(
            self.crops, batch_size=None, sampler=range(start, end), num_workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        self.model.train()
        with collector_spared():
            for degraded, clean in loader:
                loss = self.step(degraded.to(self.device), clean.to(self.device))
                self.losses.append(loss)
                if on_step is not None:
                    on_step(loss)

    def step(self, degraded: Tensor, clean: Tensor) -> float:
        """One step on a batch (see ``Crops``) on the device, as ``train`` takes them; returns the loss."""
        step = len(self.losses)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * schedule(step, self.config.steps)
        dtype = PRECISIONS[self.config.precision]
        narrow = dtype != torch.float32
        with self.phase("forward"), torch.autocast(self.device.type, dtype, enabled=narrow):
            output = self.model(degraded)
        with self.phase("loss"):
            weights = (self.config.half_weight, self.config.edge_weight, self.config.ssim_weight)
            loss = training_loss(output, clean, *weights)
            value = loss.item()
        if not math.isfinite(value):
            raise RuntimeError(
                f"training diverged: the loss of step {step + 1} is {value}; try a lower learning rate"
            )
        with self.phase("backward"):
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
        with self.phase("optimizer"):
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, MAX_GRADIENT_NORM)
            self.scaler.step(self.optimizer)
            scale = self.scaler.get_scale()
            self.scaler.update()
            self.skipped_steps += self.scaler.get_scale() < scale  # after gradients that overflowed
            if self.average is not None:
                self.average.update_parameters(self.model)
        return value

    def save(self, path: Path, recipe: dict[str, Any]) -> None:
        """Write all that is needed to resume: the file is replaced whole, in the last moment.

        Args:
            recipe: plain data that says what is trained, on what; ``resume`` asks for the same.
        """
        state = {
            "recipe": recipe,
            "config": asdict(self.config),
            "losses": self.losses,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped_steps": self.skipped_steps,
            "average": None if self.average is None else self.average.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        with written_whole(path) as temporary:
            torch.save(state, temporary)

    def resume(self, path: Path, recipe: dict[str, Any]) -> None:
        """Take up the run that ``save`` wrote.

        Raises:
            ValueError: the file is no such checkpoint, or one of another recipe or config.
            OSError: the file cannot be opened.
        """
        state = _read_state(path)
        was = {**state["recipe"], **state["config"]}
        now = {**recipe, **asdict(self.config)}
        for name in sorted((was.keys() | now.keys()) - _FREE):
            if was.get(name) != now.get(name):
                raise ValueError(f"{path} was trained with {name} = {was.get(name)!r}; got {now.get(name)!r}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.losses = list(state["losses"])
        if self.scaler.is_enabled():  # checkpoints from before it existed are of other precisions
            self.scaler.load_state_dict(state["scaler"])
            self.skipped_steps = state["skipped_steps"]
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)


FROZEN_BY_PYTHON = 1000  # at the most: from 3.12 on a process begins with some hundreds


@contextmanager
def collector_spared() -> Iterator[None]:
    """Within, Python's garbage collector leaves alone what existed before.

    A step makes so many objects that it runs a dozen times, and would look through all of PyTorch's each
    time: 4 % of a step of a small network.
    """
    if gc.get_freeze_count() > FROZEN_BY_PYTHON:  # somebody sees to it who may not want an end of it
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _read_state(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged files trip the unpickler in many ways
            raise ValueError(f"{path} is not a readable checkpoint of a training run") from error
    if not isinstance(state, dict) or not {"recipe", "config", "losses", "optimizer"} <= state.keys():
        raise ValueError(f"{path} is not a checkpoint of a training run")
    return state


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay for what multiplies features, none for vectors and scalars."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    kernels = [p for p in parameters if p.squeeze().dim() > 1]
    others = [p for p in parameters if p.squeeze().dim() <= 1]
    return [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def schedule(step: int, steps: int) -> float:
    """The share of the highest learning rate at a step (counted from 0): linear warm-up, then a cosine."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def available_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: there is none.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:N; got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} does not exist here: torch finds {torch.cuda.device_count()} CUDA devices"
        )
    return device

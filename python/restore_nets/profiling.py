"""Profiles one training step of a network on this machine: our operators against eager PyTorch.

The step is the trainer's own: forward, loss, backward, clipping, AdamW, with the loss, the layout and the
precision of a recipe. The alternatives take turns in one process; a step whose loss or gradient is not
eager's, as far as rounding allows, gets no times. On a GPU all times are the device's.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

import restore_kernels
from restore_kernels import recording
from restore_kernels.profiling.machine import machine, peak_extra_memory, peak_flops
from restore_kernels.profiling.measure import Timing, interleave
from restore_nets.attribution import Breakdown, Ranges, break_down
from restore_nets.data import synthetic_crops
from restore_nets.demo_recipes import DEFAULT_MODELS, DEFAULT_TASK
from restore_nets.flops import step_flops
from restore_nets.kernel_checks import NOISE_MULTIPLE
from restore_nets.models import create_model
from restore_nets.models.options import check_choice, check_integer
from restore_nets.recipe import SHIPPED, DataRecipe, Recipe
from restore_nets.restoring import scale_of
from restore_nets.tasks import create_task
from restore_nets.training import PHASES, Trainer, available_device, collector_spared

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
OTHER_NAMES = {"fp32": "float32", "bfloat16": "bf16"}
EAGER, EAGER_LAST, COMPILED = "eager", "eager, channels_last", "torch.compile"
OURS, OURS_BF16 = "ours", "ours, bf16"

SECONDS, MIN_RUNS = 10.0, 3  # of measuring, all alternatives together; steps of each at the least
PROFILED_STEPS = 3  # of which the quickest counts: what disturbs the machine slows single operators
# Differences from eager below this many units of the precision's rounding are none.
FLOOR = 8.0
# Rounding is drawn until no difference is beyond what it does, at most so often: where it decides which of
# two equal scores counts, a draw makes no difference or a large one.
MOST_DRAWS = 5
# Ours and eager round to bfloat16 at other places, by errors of the same size.
BF16_MULTIPLE = 2.0
TF32_EPSILON = 2.0**-10
PEAK_SECONDS = 0.5  # of measuring what the machine multiplies at
# The recipe's number of steps: the first of that many moves the weights by next to nothing, so that all
# steps measured do the same work.
RECIPE_STEPS = 100_000
WARM_UP_SIDE = 32  # of the image of a step that loads libraries, starts threads and makes AdamW's state


@dataclass(frozen=True)
class Step:
    """A training step.

    Args:
        model: a network's name, as for ``create_model``.
        size: height and width of the image that the network sees, in pixels.
        batch: images.
        dtype: ``"float32"``, or ``"bf16"`` for autocast.
        options: of the network.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

    Raises:
        TypeError, ValueError: a value that does not fit; the message names it and one that is near.
    """

    model: str
    size: int = 128
    batch: int = 1
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    def __post_init__(self) -> None:
        available_device(self.device)
        check_integer("size", self.size)
        check_integer("batch", self.batch)
        object.__setattr__(self, "dtype", OTHER_NAMES.get(self.dtype, self.dtype))
        check_choice("dtype", self.dtype, tuple(DTYPES))
        with torch.device("meta"):
            create_model(self.model, **self.options)

    def recipe(self, model: nn.Module, steps: int) -> Recipe:
        """The recipe of the usual task of the network, on the photos of scikit-image."""
        task = next((task for task, name in DEFAULT_MODELS.items() if name == self.model), DEFAULT_TASK)
        level = {"scale": scale_of(model)} if scale_of(model) > 1 else {}
        return Recipe(
            {"name": self.model, **self.options}, DataRecipe(photos=SHIPPED), Path(), steps,
            create_task(task, **level), batch=self.batch, crop=self.size * scale_of(model),
            precision=self.dtype, device=self.device,
        )  # fmt: skip

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def epsilon(self) -> float:
        """Of rounding in the step's products. cuDNN multiplies float32 as TF32 unless it is told not to."""
        if self.dtype == "float32" and self.on_gpu and torch.backends.cudnn.allow_tf32:
            return TF32_EPSILON
        return torch.finfo(DTYPES[self.dtype]).eps

    def peak_flops(self) -> float | None:
        """What the machine multiplies at in this precision, measured; not known of TF32."""
        if self.epsilon == TF32_EPSILON:
            return None
        size = 8192 if self.on_gpu else 1024
        return peak_flops(self.device, DTYPES[self.dtype], size, PEAK_SECONDS)

    def network(self) -> nn.Module:
        """The same one every time."""
        torch.manual_seed(0)
        return create_model(self.model, **self.options)

    def trainer(self) -> Trainer:
        """A trainer by the recipe, but on noise; the same one every time."""
        model = self.network()
        recipe = self.recipe(model, RECIPE_STEPS)
        photo = torch.randint(256, (3, recipe.crop, recipe.crop), dtype=torch.uint8)
        data = (RECIPE_STEPS, recipe.batch, recipe.crop, recipe.seed)
        crops = synthetic_crops(recipe.task, {"noise": photo}, *data)
        return Trainer(model, crops, recipe.training_config())


@dataclass(frozen=True)
class Way:
    """How an alternative computes a step.

    Args:
        backend: of the operators.
        memory_format: of weights and images.
        compiled: by torch.compile.
        dtype: instead of the step's.
    """

    backend: str = "eager"
    memory_format: torch.memory_format = torch.contiguous_format
    compiled: bool = False
    dtype: str | None = None


WAYS = {
    EAGER: Way(),
    EAGER_LAST: Way(memory_format=torch.channels_last),
    COMPILED: Way(compiled=True),
    OURS: Way("auto"),
    OURS_BF16: Way("auto", dtype="bf16"),
}
FORMATS = {torch.contiguous_format: "NCHW", torch.channels_last: "channels_last"}


class Alternative:
    """One way to compute the step, called again and again on one batch; keeps the times of its phases."""

    def __init__(self, step: Step, name: str) -> None:
        way = WAYS[name]
        self.backend, self.memory_format = way.backend, way.memory_format
        self.trainer = replace(step, dtype=way.dtype or step.dtype).trainer()
        self.trainer.model.train()
        self.trainer.model.to(memory_format=way.memory_format)  # type: ignore[call-overload]
        if way.compiled:
            self.trainer.model.compile(dynamic=False)
        degraded, clean = self.trainer.crops[0]
        self.batch = self.in_format((degraded.to(self.device), clean.to(self.device)))
        # When each phase of each step began and ended.
        self.moments: dict[str, list[tuple[Any, Any]]] = {phase: [] for phase in PHASES}

    @property
    def device(self) -> torch.device:
        return self.trainer.device

    def in_format(self, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        degraded, clean = batch
        return degraded.contiguous(memory_format=self.memory_format), clean

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = recording.now(self.device)
        yield
        self.moments[phase].append((began, recording.now(self.device)))

    def __call__(self) -> float:
        return self._step(self._timed)

    def _step(self, phase: Callable[[str], AbstractContextManager[Any]]) -> float:
        usual, self.trainer.phase = self.trainer.phase, phase
        try:
            with restore_kernels.use_backend(self.backend):
                return self.trainer.step(*self.batch)
        finally:
            self.trainer.phase = usual  # which does not hold this object, and a network's memory, in a cycle

    def profiled(self, steps: int) -> Breakdown:
        def step(ranges: Ranges) -> None:
            self._step(ranges.of)

        return break_down(step, self.trainer.model, steps, self.device.type)

    def phases(self, runs: int) -> dict[str, dict[str, Any]]:
        """Of the last runs: each phase's times and its share of all phases' mean time."""
        last = {
            phase: [_seconds_between(*moments) for moments in taken[-runs:]]
            for phase, taken in self.moments.items()
        }
        total = sum(map(fmean, last.values()))
        return {p: {**asdict(Timing.of(s)), "share": fmean(s) / total} for p, s in last.items()}

    def gradient(self) -> torch.Tensor:
        """Of the last step, of all weights: (number of weights,)."""
        return torch.cat([p.grad.flatten() for p in self.trainer.model.parameters() if p.grad is not None])

    def move_weights(self, epsilon: float, seed: int) -> None:
        """Change every weight by one unit of rounding, up or down at random."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in self.trainer.model.parameters():
                up = torch.rand(weight.shape, generator=generator).to(weight.device) < 0.5
                weight.mul_(torch.where(up, 1 + epsilon, 1 - epsilon))


def _seconds_between(began: Any, ended: Any) -> float:
    """Of two moments of ``recording.now``; of events, once the device has got there."""
    return ended - began if isinstance(ended, float) else began.elapsed_time(ended) * 1e-3


def baseline(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The alternative that others are compared with: eager PyTorch in the memory format that is quicker."""
    return min((name for name in (EAGER, EAGER_LAST) if name in rows), key=lambda name: rows[name]["median"])


def profile_step(
    step: Step, names: Sequence[str] = (EAGER, EAGER_LAST, OURS), *,
    seconds: float = SECONDS, min_runs: int = MIN_RUNS,
    on_stage: Callable[[str], object] = lambda stage: None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a step with our operators and in eager PyTorch.

    Args:
        step: what to measure.
        names: the alternatives, of ``WAYS``; ``EAGER`` must be among them.
        seconds: of measuring, all alternatives together.
        min_runs: steps of each at the least.
        on_stage: called with a word or two before each part of the work.

    Returns:
        Plain data: the step, its ``step_flops``, the machine and its flops_per_second in the step's precision
        (None where cuDNN convolves in TF32), and per alternative the seconds of a step (median, p20, p80,
        runs), those of its phases, its loss, its memory format, and its peak memory beyond weights, gradients
        and AdamW's state (on the CPU None under torch.compile, where it would be that of compiling). Ours and
        the ``baseline`` have a ``Breakdown`` too, where the device can be profiled. An alternative that is
        wrong stands under "wrong", with the reason.
    """
    # Events and statistics are those of the current device.
    with torch.cuda.device(step.device) if step.on_gpu else nullcontext():
        return _profile_step(step, names, seconds, min_runs, on_stage)


def _profile_step(
    step: Step, names: Sequence[str], seconds: float, min_runs: int, on_stage: Callable[[str], object]
) -> dict[str, Any]:
    on_stage("comparing losses and gradients")
    alternatives = {name: Alternative(step, name) for name in names}
    losses, wrong = _check(step, alternatives)
    right = {name: alternative for name, alternative in alternatives.items() if name not in wrong}
    on_stage("timing")
    peak = step.peak_flops()
    with collector_spared():  # as in Trainer.train
        timings = interleave(
            right, seconds=seconds, min_runs=min_runs, warm_ups=1, device=step.device, head_start=False
        )
    if peak is not None:  # measured again: a machine that others share is now slower, now quicker
        peak = max(peak, step.peak_flops() or 0.0)
    result: dict[str, Any] = {
        "step": asdict(step),
        "parameters": sum(p.numel() for p in alternatives[EAGER].trainer.model.parameters()),
        "flops": step_flops(step.model, step.options, step.batch, step.size),
        "machine": {**machine(step.device), "flops_per_second": peak},
        "alternatives": {},
        "wrong": wrong,
    }
    for name, alternative in right.items():
        result["alternatives"][name] = {
            **asdict(timings[name]), "loss": losses[name], "phases": alternative.phases(timings[name].runs),
            "memory_format": FORMATS[alternative.memory_format],
        }  # fmt: skip
    for name in {baseline(result["alternatives"]), OURS} & right.keys():
        on_stage(f"profiling {name}")
        breakdown = right[name].profiled(PROFILED_STEPS)
        if breakdown.seconds:  # not every GPU lets itself be profiled
            result["alternatives"][name]["breakdown"] = asdict(breakdown)
    if step.on_gpu:
        for name, row in result["alternatives"].items():
            row["peak_extra_bytes"] = peak_extra_memory(right[name], step.device)
    del alternatives, alternative, right  # the next processes need their memory
    gc.collect()
    if not step.on_gpu:
        for name, row in result["alternatives"].items():
            on_stage(f"peak memory of {name}")
            row["peak_extra_bytes"] = None if WAYS[name].compiled else _memory(step, name)
    return result


def _check(step: Step, alternatives: Mapping[str, Alternative]) -> tuple[dict[str, float], dict[str, str]]:
    """The losses of a first step of each, and why those that are wrong are.

    What rounding alone does to loss and gradient is measured: by eager steps whose weights are moved
    by one unit of rounding, and for bfloat16 beside a step in float32 by an eager step in bfloat16.
    """
    losses: dict[str, float] = {}
    wrong: dict[str, str] = {}
    for name, alternative in alternatives.items():
        try:
            losses[name] = alternative()
        except torch.OutOfMemoryError:
            if name == EAGER:  # to which all are compared
                raise
            wrong[name] = "it ran out of memory"
    truth, loss = alternatives[EAGER].gradient(), losses[EAGER]

    def differences(other: Alternative, other_loss: float) -> dict[str, float]:
        gradient = (other.gradient() - truth).norm() / truth.norm()
        return {"loss": abs(other_loss - loss) / loss, "gradient": float(gradient)}

    found = {name: differences(alternatives[name], losses[name]) for name in losses if name != EAGER}

    def judge(dtype: str | None, rounding: Mapping[str, float], multiple: float, least: float) -> bool:
        """Whether all alternatives of a dtype (``Way.dtype``) are right."""
        for name in (name for name in found if WAYS[name].dtype == dtype):
            wrong.pop(name, None)
            for what, difference in found[name].items():
                if not difference <= max(multiple * rounding[what], least):
                    wrong[name] = (
                        f"{what} differs by {difference:.1e} from eager's, by rounding {rounding[what]:.1e}"
                    )
        return not any(WAYS[name].dtype == dtype for name in wrong)

    largest = {"loss": 0.0, "gradient": 0.0}
    for seed in range(MOST_DRAWS):
        moved = Alternative(step, EAGER)
        moved.move_weights(step.epsilon, seed)
        drawn = differences(moved, moved())
        del moved
        largest = {what: max(x, drawn[what]) for what, x in largest.items()}
        if judge(None, largest, NOISE_MULTIPLE, FLOOR * step.epsilon):
            break
    if OURS_BF16 in found:
        narrow = Alternative(replace(step, dtype="bf16"), EAGER)
        judge("bf16", differences(narrow, narrow()), BF16_MULTIPLE, torch.finfo(torch.bfloat16).eps)
    return losses, wrong


def _memory(step: Step, name: str) -> int | None:
    """Peak extra memory of a step on the CPU, in a process of its own."""
    script = "import sys; from restore_nets.profiling import print_memory; print_memory(*sys.argv[1:])"
    arguments = (json.dumps(asdict(step)), name, str(torch.get_num_threads()))
    run = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    if run.returncode:
        reason = run.stderr.strip().splitlines()[-1:] or [f"exit status {run.returncode}"]
        raise RuntimeError(f"measuring the memory of {name} failed: {reason[0]}")
    return json.loads(run.stdout.splitlines()[-1])


def print_memory(step: str, name: str, threads: str) -> None:
    """What the process of ``_memory`` does: bytes of the second step, after a small one, as JSON."""
    torch.set_num_threads(int(threads))
    whole = Step(**json.loads(step))
    alternative = Alternative(whole, name)
    batch = alternative.batch
    side = min(WARM_UP_SIDE, whole.size)
    scale = scale_of(alternative.trainer.model)
    small = (batch[0][..., :side, :side], batch[1][..., : side * scale, : side * scale])
    alternative.batch = alternative.in_format(small)
    alternative()
    alternative.batch = batch
    print(json.dumps(peak_extra_memory(alternative, "cpu")))

"""Running a recipe: training with checkpoints, from the start or from the last of them."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from restore_nets.checkpoints import load_checkpoint, save_checkpoint
from restore_nets.files import write_text
from restore_nets.metrics import Score
from restore_nets.models import create_model
from restore_nets.progress import progress
from restore_nets.recipe import Recipe
from restore_nets.training import Trainer
from restore_nets.validation import Validation

CHECKPOINT, WEIGHTS, LOSSES = "checkpoint.pt", "model.safetensors", "losses.csv"
SCORES, BEST = "validation.csv", "best.safetensors"


def run_recipe(recipe: Recipe, resume: bool, console: Console) -> Path:
    """Train; every ``checkpoint_every`` steps and at the end write checkpoint, weights and losses.

    With validation, also the scores of all of them and the weights of the highest PSNR.

    Returns:
        The file of weights, for ``load_model``: the last ones.

    Raises:
        ValueError, TypeError, OSError: a recipe that cannot be followed.
        FileExistsError: a checkpoint is there and is not to be resumed.
        RuntimeError: training diverged.
    """
    checkpoint, weights = recipe.out / CHECKPOINT, recipe.out / WEIGHTS
    if checkpoint.exists() and not resume:
        raise FileExistsError(f"{checkpoint} exists: resume it with --resume, or choose another out folder")
    torch.manual_seed(recipe.seed)
    model = create_model(**recipe.model)
    if recipe.weights is not None and not resume:
        load_checkpoint(model, recipe.weights)
    trainer = Trainer(model, recipe.crops(), recipe.training_config())
    validation = None
    if recipe.validation is not None:
        validation = Validation(recipe.validation_pairs(), recipe.task, recipe.out / SCORES)
        _say(console, "degraded", validation.scores[0])
    if resume:
        trainer.resume(checkpoint, recipe.identity())
        if validation is not None:
            validation.resume(len(trainer.losses))
    recipe.out.mkdir(parents=True, exist_ok=True)

    def write(name: str) -> None:
        save_checkpoint(trainer.trained, recipe.out / name, recipe.model, recipe.task.config())

    def validate() -> None:
        step = len(trainer.losses)
        if validation is not None and step not in validation.scores:
            found = validation.add(step, trainer.trained, lambda: write(BEST))
            _say(console, f"step {step}", found, " (best)" if validation.best == step else "")

    validate()  # if the run stopped before it could
    with progress(console, "training", recipe.steps, len(trainer.losses)) as advance:
        while len(trainer.losses) < recipe.steps:
            until = len(trainer.losses) + recipe.checkpoint_every
            trainer.train(lambda loss: advance(f"loss {loss:.4f}"), until - until % recipe.checkpoint_every)
            write(WEIGHTS)
            write_text(recipe.out / LOSSES, _table(trainer.losses))
            trainer.save(checkpoint, recipe.identity())
            validate()
    if trainer.skipped_steps:
        console.print(f"{trainer.skipped_steps} of {recipe.steps} steps skipped: float16 overflowed")
    return weights


def _say(console: Console, what: str, found: Score, more: str = "") -> None:
    console.print(f"Validation, {what}: {found.psnr:.2f} dB, SSIM {found.ssim:.4f}{more}", highlight=False)


def _table(losses: list[float]) -> str:
    return "step,loss\n" + "".join(f"{step},{loss!r}\n" for step, loss in enumerate(losses, start=1))

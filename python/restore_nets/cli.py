"""The command line: restore-nets demo, train, restore, evaluate, profile, models.

Modules that load PyTorch are imported by the commands that need them, so that --help is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from restore_nets.demo_recipes import DEFAULT_MODELS, DEFAULT_TASK, RECIPES

app = typer.Typer(
    help="Train and run networks that restore photos.",
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

# The base of everything typer raises for a wrong command line; it has no public name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # type: ignore[assignment]

USAGE, FAILED, INTERRUPTED = 2, 1, 130

Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda or cuda:N.")]
_LEVEL = "sigma of denoise (any), quality of jpeg (1 to 100), scale of sr (2, 3 or 4)"


@app.command()
def demo(
    task: Annotated[
        str, typer.Option(metavar="NAME", help=f"What to learn: one of {', '.join(DEFAULT_MODELS)}.")
    ] = DEFAULT_TASK,
    level: Annotated[
        float | None, typer.Option(help=f"Of the task: {_LEVEL}; by default 30, 10 and 2.")
    ] = None,
    photos: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Your own clean photos, instead of those of scikit-image."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Your own pairs: DIR/input and DIR/target, equal file names."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"The network, instead of the task's own: one of {', '.join(RECIPES)} (for sr: pa_edsr).",
        ),
    ] = None,
    device: Device = "cpu",
    steps: Annotated[
        int | None, typer.Option(help="Training steps, instead of the default of the network.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Train about this long, instead of --steps.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, crops and degradations.")] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where pictures, weights and report go.")] = Path(
        "out/demo"
    ),
) -> None:
    """Train a small network here, restore degraded photos, report.

    Trains for one to four minutes (by the network, on 2 cores) on photos that are degraded here (by rain,
    Gaussian noise, a Bayer mosaic, JPEG or bicubic shrinking), restores photos that it never saw, and
    writes pictures, weights, the loss curve and report.html.
    """
    from rich.console import Console

    from restore_nets.demo import Options, run
    from restore_nets.tasks import task_at

    console = Console()
    options = Options(out, photos, data, device, steps, seconds, seed, model, task_at(task, level))
    result = run(options, console)
    before, after = (result.mean(which, "psnr") for which in ("before", "after"))
    console.print(
        f"PSNR of unseen photos: {before:.2f} dB {options.task.labels.before}, {after:.2f} dB restored "
        f"({result.gain:+.2f} dB)."
    )
    if (correlation := result.mask_correlation()) is not None:
        console.print(f"Degradation mask and true streaks correlate by {correlation:.3f} (Pearson, mean).")
    if result.agreement is not None:
        verdict = "follow" if result.agreement.passed else "do NOT follow"
        console.print(f"Losses with attention on {result.backend} {verdict} those of eager PyTorch.")
    console.print(f"Report: {out / 'report.html'}", soft_wrap=True)


@app.command()
def train(
    config: Annotated[Path, typer.Option(metavar="FILE", help="The recipe, a YAML file.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint in the output folder.")
    ] = False,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help=f"What to learn, instead of the recipe's: {', '.join(DEFAULT_MODELS)}."
        ),
    ] = None,
    level: Annotated[
        float | None, typer.Option(help=f"Of the task, instead of the recipe's: {_LEVEL}.")
    ] = None,
    half_weight: Annotated[
        float | None, typer.Option(help="Weight of the loss at half resolution, instead of the recipe's.")
    ] = None,
    edge_weight: Annotated[
        float | None, typer.Option(help="Weight of the edge loss, instead of the recipe's.")
    ] = None,
    ssim_weight: Annotated[
        float | None, typer.Option(help="Weight of the loss 1 - SSIM, instead of the recipe's.")
    ] = None,
) -> None:
    """Train a network by a recipe.

    A recipe has the keys model (name and options), data (photos: a folder of clean photos, or pairs: a folder
    with input/ and target/), out and steps, and may have weights (a checkpoint of the network to start from),
    validation (photos or pairs, on which every checkpoint is scored), task (derain, demosaic,
    {name: denoise, sigma: 30}, {name: jpeg, quality: 10} or {name: sr, scale: 2}), learning_rate,
    weight_decay, ema_decay (of a moving average of the weights, 0.999 say, which is what is then written),
    batch, crop, stages (several of both: [{until: 92000, batch: 8, crop: 128}, ...]), seed, precision
    (float32, bf16, or fp16 on a GPU), device, workers, checkpoint_every and the weights of losses
    beside Charbonnier's of the restored image: half_weight (0.8; for networks that also return a result at
    half resolution), edge_weight (0) and ssim_weight (0).
    """
    from dataclasses import replace

    from rich.console import Console

    from restore_nets.recipe import load_recipe
    from restore_nets.running import run_recipe
    from restore_nets.tasks import task_at

    console = Console()
    recipe = load_recipe(config)
    if task is not None or level is not None:
        recipe = replace(recipe, task=task_at(task or recipe.task.name, level))
    losses = {"half_weight": half_weight, "edge_weight": edge_weight, "ssim_weight": ssim_weight}
    given = {name: weight for name, weight in losses.items() if weight is not None}
    weights = run_recipe(replace(recipe, **given), resume, console)
    console.print(f"Weights: {weights}", soft_wrap=True)


@app.command()
def restore(
    weights: Annotated[
        Path,
        typer.Argument(
            metavar="WEIGHTS", help="What train or demo wrote, or any checkpoint of the network in --model."
        ),
    ],
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT...", help="PNG and JPEG files, and folders of them.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where results go, under the names of the inputs.")
    ],
    tile: Annotated[
        int, typer.Option(help="Restore larger photos in tiles of at most this many pixels a side; 0: never.")
    ] = 512,
    device: Device = "cpu",
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The network, for weights that do not say it (.pth, .pt, .ckpt)."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of --model, see the command models. Repeatable."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What the network was trained for, where the weights do not say it: "
            f"{', '.join(DEFAULT_MODELS)}.",
        ),
    ] = None,
) -> None:
    """Restore photos with a trained network.

    The inputs are never overwritten; earlier results in --out are replaced. A network for super-resolution
    enlarges. Networks of pyramid attention find their matches in a whole photo with --tile 0. A
    published checkpoint needs its network named: --model drsformer --option mefc=false --option
    "heads=[1, 2, 4, 8]"; and one for demosaicking its task, --task demosaic: photos are then given to it as
    the mosaic of their colours that it fills in.
    """
    from rich.console import Console

    from restore_nets.checkpoints import load_model, load_task
    from restore_nets.progress import progress
    from restore_nets.restoring import check_tile, plan, restore_files
    from restore_nets.tasks import task_at
    from restore_nets.training import available_device

    check_tile(tile)
    named = None if task is None else task_at(task, None)
    options = _network_options(option or [])
    if options and model is None:
        raise ValueError(f"--option {', '.join(options)} needs --model, the network that has it")
    work = plan(inputs, out)
    network = load_model(weights, model, **options).to(available_device(device))
    trained_for = load_task(weights)
    if trained_for is not None and named is not None and trained_for.name != named.name:
        raise ValueError(f"--task must be {trained_for.name}, which {weights} was trained for; got {task}")
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    with progress(console, "restoring", len(work.jobs)) as advance:
        failures = restore_files(
            network, work.jobs, tile, lambda job: advance(job.source.name), trained_for or named
        )
    if trained_for is not None:
        console.print(f"Trained for: {trained_for}")
    console.print(
        f"{len(work.jobs) - len(failures)} of {len(work.jobs)} photos restored to {out}", soft_wrap=True
    )
    if work.ignored:
        console.print(f"{len(work.ignored)} other files ignored: {_listed(work.ignored)}", soft_wrap=True)
    for source, reason in failures.items():
        _complain(reason if str(source) in reason else f"{source}: {reason}")
    if failures:
        raise typer.Exit(FAILED)


@app.command()
def evaluate(
    restored: Annotated[Path, typer.Argument(metavar="RESTORED", help="Folder of PNG and JPEG files.")],
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="Folder of what they should be, by the same names.")
    ],
    metric: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="The convention: derain (Y of YCbCr), derain-did, denoise (RGB), jpeg, sr-x2 to sr-x4.",
        ),
    ] = "derain",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the scores of every photo, as CSV.")
    ] = None,
) -> None:
    """Score restored photos against their targets: PSNR and SSIM, by the conventions of the field."""
    from rich.console import Console
    from rich.table import Table

    from restore_nets import evaluation
    from restore_nets.files import check_folder, write_text
    from restore_nets.metrics import PRESETS

    if out is not None:
        check_folder(out)
    console = Console()
    with console.status("reading") as status:
        scores = {}
        for name, score in evaluation.evaluate(restored, target, metric):
            scores[name] = score
            status.update(f"{len(scores)} photos")
    shown = Table("photo", "PSNR, dB", "SSIM")
    for name, score in [*scores.items(), ("mean", evaluation.mean(scores))]:
        shown.add_row(name, f"{score.psnr:.2f}", f"{score.ssim:.4f}")
    console.print(shown)
    console.print(f"Compared: {PRESETS[metric]}.", soft_wrap=True)
    if out is not None:
        write_text(out, evaluation.table(scores))


@app.command()
def profile(
    model: Annotated[str, typer.Option(metavar="NAME", help="The network, see the command models.")],
    size: Annotated[int, typer.Option(help="Height and width of the image that it sees, in pixels.")] = 128,
    batch: Annotated[int, typer.Option(help="Images per step.")] = 1,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="float32, or bf16 for mixed precision (autocast).")
    ] = "float32",
    device: Device = "cpu",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Time eager PyTorch under torch.compile too.")
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="An option of the network, see the command models. Repeatable."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all figures, as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with plots.")] = None,
) -> None:
    """Say where a training step of a network spends its time on this machine.

    Forward, loss, backward and AdamW, with our operators and in eager PyTorch, which take turns; by phase,
    by kind of operator, by module and by operator, with the peak memory of each. On a GPU all times are the
    device's.
    """
    import json

    from rich.console import Console

    from restore_nets.files import check_folder, write_text
    from restore_nets.profile_report import page, print_report
    from restore_nets.profiling import COMPILED, EAGER, EAGER_LAST, OURS, Step, profile_step

    step = Step(model, size, batch, dtype, _network_options(option or []), device)
    for path in (out, html):
        if path is not None:
            check_folder(path)
    console = Console()
    with console.status("starting") as status:
        names = (EAGER, EAGER_LAST, OURS, *([COMPILED] if compiled else []))
        result = profile_step(step, names, on_stage=status.update)
    print_report(result, console)
    if out is not None:
        write_text(out, json.dumps(result, indent=1) + "\n")
    if html is not None:
        write_text(html, page(result))


@app.command()
def models() -> None:
    """List the networks and their options."""
    import inspect

    import torch
    from rich.console import Console
    from rich.table import Table

    from restore_nets.models import create_model, list_models

    table = Table("name", "parameters", "options with their defaults")
    for name in list_models():
        with torch.device("meta"):
            model = create_model(name)
        count = sum(p.numel() for p in model.parameters())
        options = inspect.signature(type(model)).parameters.values()
        table.add_row(name, f"{count:,}", ", ".join(f"{o.name}={o.default}" for o in options))
    Console().print(table)


def _network_options(assignments: Sequence[str]) -> dict[str, Any]:
    """The keywords in KEY=VALUE arguments; values are YAML: ``false``, ``48``, ``[4, 6, 6, 8]``, text."""
    import yaml

    options: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not key or not equals:
            raise ValueError(f"--option must be KEY=VALUE; got {assignment!r}")
        if key in options:
            raise ValueError(f"--option {key} must be given once; got it again as {assignment!r}")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--option {key} must have a YAML value; got {value!r}") from error
    return options


def _listed(paths: Sequence[Path], most: int = 3) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(map(str, paths[:most])) + more


def _complain(message: object) -> None:
    print(f"restore-nets: {' '.join(str(message).split())}", file=sys.stderr)


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit status: 2 for a mistake in it, told in one line.

    Python's development mode (``python -X dev``) shows the traceback of an error instead.
    """
    try:
        status = app(list(arguments) or ["--help"], prog_name="restore-nets", standalone_mode=False) or 0
    except typer.Abort:
        status = INTERRUPTED
    except _UsageError as error:
        _complain(f"{error.format_message()} (see restore-nets --help)")  # type: ignore[attr-defined]
        return USAGE
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if sys.flags.dev_mode:
            raise
        _complain(error)
        return USAGE
    if status == INTERRUPTED:
        _complain("interrupted")
    return status


def main() -> None:
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()

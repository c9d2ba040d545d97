"""Training in bfloat16 and float16: steps near those in float32, scaled losses, exact resuming."""

from __future__ import annotations

from statistics import geometric_mean

import pytest
import torch
from rich.console import Console
from test_step_profile import tiny
from test_training import RECIPE, TINY, same_weights, trainer

from restore_kernels import use_backend
from restore_nets import list_models
from restore_nets.profiling import EAGER, OURS, Alternative
from restore_nets.recipe import SHIPPED, DataRecipe, Recipe
from restore_nets.running import run_recipe
from restore_nets.training import Trainer, TrainingConfig

# Ours and eager round to bfloat16 at other places, by errors of the same size.
ERROR_MULTIPLE = 2.0


@pytest.mark.parametrize("name", list_models())
def test_a_step_in_bfloat16_errs_as_eagers_does(name):
    """Loss and gradient against those in float32, of the network's own recipe."""
    truth = Alternative(tiny(name), EAGER)
    loss = truth()
    errors = {}
    for which in (EAGER, OURS):
        narrow = Alternative(tiny(name, dtype="bf16"), which)
        value, gradient = narrow(), narrow.gradient()
        assert gradient.isfinite().all() and gradient.dtype == torch.float32
        relative = (gradient - truth.gradient()).norm() / truth.gradient().norm()
        errors[which] = {"loss": abs(value - loss) / loss, "gradient": float(relative)}
    epsilon = torch.finfo(torch.bfloat16).eps
    for what, error in errors[OURS].items():
        assert 0 < error <= max(ERROR_MULTIPLE * errors[EAGER][what], epsilon / 4), (what, errors)


def test_float16_needs_a_gpu():
    with pytest.raises(ValueError, match=r"precision float16 needs a CUDA device.*device='cpu'"):
        TrainingConfig(1, precision="float16")
    assert TrainingConfig(1, precision="float16", device="cuda:1").precision == "float16"


@pytest.fixture
def float16(monkeypatch):
    """Lets float16 train on the CPU, where PyTorch has all that it takes, if slowly."""
    check = TrainingConfig.__post_init__

    def unchecked(self: TrainingConfig) -> None:
        if self.precision != "float16":
            check(self)

    monkeypatch.setattr(TrainingConfig, "__post_init__", unchecked)
    return lambda steps=6, seed=0: trainer(steps, seed, precision="float16")


def test_float16_strays_from_float32_as_eager_does(float16):
    """AdamW makes steps of full length of gradients that rounding decides: later losses are further apart.

    How far is luck of the one run, so it is the geometric mean over several that counts.
    """
    means = {}
    for backend in ("eager", "auto"):
        errors = []
        for seed in range(6):
            with use_backend(backend):
                wide, narrow = trainer(4, seed), float16(4, seed)
                for run in (wide, narrow):
                    run.train()
            assert narrow.skipped_steps == 0 and narrow.losses[0] == pytest.approx(wide.losses[0], rel=2**-9)
            errors += [abs(n - w) / w for n, w in zip(narrow.losses, wide.losses, strict=True)]
        means[backend] = geometric_mean(max(error, torch.finfo(torch.float32).eps) for error in errors)
    assert torch.finfo(torch.float32).eps < means["auto"] <= ERROR_MULTIPLE * means["eager"]


def test_scaling_changes_nothing_but_what_would_vanish(float16):
    """The gradient that the optimizer sees is that of the loss, not of the scaled one."""
    gradients = []
    for scale in (1.0, 2.0**12):
        run = float16(1)
        run.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        run.train()
        gradients.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=0, atol=2**-6 * float(gradients[1].abs().max()))
    assert (gradients[0] == 0).sum() > (gradients[1] == 0).sum()


def test_a_step_that_overflows_is_skipped_and_counted(float16):
    run = float16(4)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-45)
    before = {name: x.clone() for name, x in run.model.state_dict().items()}
    run.train(until=1)
    assert run.skipped_steps == len(run.losses) == 1
    assert all(torch.equal(x, before[name]) for name, x in run.model.state_dict().items())
    run.train()
    assert run.skipped_steps == 1 and len(run.losses) == 4
    assert not torch.equal(run.model.output.weight, before["output.weight"])


@pytest.mark.parametrize("stop", [1, 4])
def test_a_scaled_run_resumes_bitwise(float16, tmp_path, stop):
    """The scale changes during the run: it falls at the first step and doubles every second one."""

    def scaled() -> Trainer:
        run = float16()
        run.scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**60, backoff_factor=2.0**-50, growth_interval=2
        )
        return run

    whole = scaled()
    whole.train()
    assert whole.skipped_steps == 1 and whole.scaler.get_scale() == 2.0**12
    first = scaled()
    first.train(until=stop)
    first.save(tmp_path / "checkpoint.pt", RECIPE)
    second = float16()
    second.resume(tmp_path / "checkpoint.pt", RECIPE)
    second.train()
    assert second.losses == whole.losses and second.skipped_steps == whole.skipped_steps
    assert second.scaler.get_scale() == whole.scaler.get_scale()
    assert same_weights(second.model, whole.model)


def test_checkpoints_from_before_the_scaler_resume(tmp_path):
    path = tmp_path / "checkpoint.pt"
    whole, first, second = trainer(), trainer(), trainer()
    whole.train()
    first.train(until=2)
    first.save(path, RECIPE)
    state = torch.load(path)
    torch.save({key: x for key, x in state.items() if key not in ("scaler", "skipped_steps")}, path)
    second.resume(path, RECIPE)
    second.train()
    assert second.losses == whole.losses and same_weights(second.model, whole.model)


def test_skipped_steps_are_said(tmp_path, monkeypatch, capsys):
    step = Trainer.step

    def skipping(self: Trainer, degraded: torch.Tensor, clean: torch.Tensor) -> float:
        self.skipped_steps += len(self.losses) == 1
        return step(self, degraded, clean)

    recipe = Recipe(TINY, DataRecipe(photos=SHIPPED), tmp_path, steps=3, batch=1, crop=16)
    run_recipe(recipe, False, Console())
    assert "skipped" not in capsys.readouterr().out
    monkeypatch.setattr(Trainer, "step", skipping)
    run_recipe(Recipe(TINY, recipe.data, tmp_path / "again", 3, batch=1, crop=16), False, Console())
    assert "1 of 3 steps skipped" in capsys.readouterr().out

"""Training: exact resuming, atomic checkpoints, the schedule."""

from __future__ import annotations

import gc
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from restore_nets import create_model
from restore_nets.data import DegradedCrops, synthetic_crops
from restore_nets.models.subtasks import half_size
from restore_nets.tasks import create_task
from restore_nets.training import FROZEN_BY_PYTHON, Trainer, TrainingConfig, available_device, schedule

TINY = {
    "name": "ddsa", "dim": 4, "num_blocks": [1, 1, 1, 1], "heads": [1, 1, 1, 1], "ffn_expansion": 1.0,
}  # fmt: skip
RAIN = create_task("derain")
RECIPE = {"what": "a test"}


def photo(height: int = 40, width: int = 50) -> torch.Tensor:
    coarse = torch.rand(1, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    return (smooth * 255).to(torch.uint8)


def trainer(steps: int = 6, seed: int = 0, **config: object) -> Trainer:
    torch.manual_seed(seed)
    crops = DegradedCrops(RAIN, {"a": photo()}, steps, batch=2, crop=16, seed=seed)
    return Trainer(create_model(**TINY), crops, TrainingConfig(steps, **config))


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    state = b.state_dict()
    return all(torch.equal(x, state[name]) for name, x in a.state_dict().items())


def test_training_is_decided_by_the_seed():
    first, again, other = trainer(3), trainer(3), trainer(3, seed=1)
    for run in (first, again, other):
        run.train()
    assert first.losses == again.losses
    assert same_weights(first.model, again.model)
    assert first.losses != other.losses


class OneBatch(DegradedCrops):
    """The same batch at every step."""

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return super().__getitem__(0)


def test_training_learns():
    torch.manual_seed(0)
    crops = OneBatch(RAIN, {"a": photo()}, 60, batch=2, crop=16, seed=0)
    run = Trainer(create_model(**TINY), crops, TrainingConfig(60, learning_rate=5e-3))
    run.train()
    assert run.losses[-1] < 0.6 * run.losses[0]


@pytest.mark.parametrize("stop", [1, 4])
def test_resumed_run_equals_an_uninterrupted_one_bitwise(tmp_path, stop):
    whole = trainer()
    whole.train()
    first = trainer()
    first.train(until=stop)
    first.save(tmp_path / "checkpoint.pt", RECIPE)
    torch.manual_seed(99)  # a new process would have another state
    second = trainer()
    second.resume(tmp_path / "checkpoint.pt", RECIPE)
    second.train()
    assert second.losses == whole.losses
    assert same_weights(second.model, whole.model)


def test_resume_restores_the_random_state(tmp_path):
    run = trainer()
    run.save(tmp_path / "checkpoint.pt", RECIPE)
    expected = torch.rand(3)
    torch.manual_seed(99)
    trainer(seed=5)
    other = trainer()
    other.resume(tmp_path / "checkpoint.pt", RECIPE)
    assert torch.equal(torch.rand(3), expected)


def test_resume_refuses_another_run(tmp_path):
    path = tmp_path / "checkpoint.pt"
    trainer().save(path, RECIPE)
    with pytest.raises(ValueError, match="was trained with steps = 6; got 7"):
        trainer(7).resume(path, RECIPE)
    with pytest.raises(ValueError, match="was trained with what = 'a test'; got 'another'"):
        trainer().resume(path, {"what": "another"})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        trainer().resume(path, RECIPE)
    torch.save({"params": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a checkpoint of a training run"):
        trainer().resume(path, RECIPE)


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch, failure):
    path = tmp_path / "checkpoint.pt"
    run = trainer()
    run.save(path, RECIPE)
    before = path.read_bytes()

    def save_half(state, target):
        Path(target).write_bytes(before[:100])
        raise failure

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(type(failure)):
        run.save(path, RECIPE)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_bfloat16_autocast_stays_near_float32():
    wide, narrow = trainer(2), trainer(2, precision="bfloat16")
    for run in (wide, narrow):
        run.train()
    assert narrow.losses[0] != wide.losses[0]
    # Every layer rounds to 2^-9; the errors of a mean over all pixels mostly cancel.
    assert narrow.losses == pytest.approx(wide.losses, rel=2**-6)


class TwoOutputs(nn.Module):
    """A network that also returns a result at half resolution, as those of association learning do."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 3, 3, padding=1)
        self.coarse = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        small = nn.functional.avg_pool2d(x, 2)
        return x - self.fine(x), small - self.coarse(small)


def two_outputs(steps: int = 6, batches: type[DegradedCrops] = DegradedCrops, **config: object) -> Trainer:
    torch.manual_seed(0)
    crops = batches(RAIN, {"a": photo()}, steps, batch=2, crop=16, seed=0)
    return Trainer(TwoOutputs(), crops, TrainingConfig(steps, learning_rate=1e-2, **config))


def test_both_outputs_learn():
    run = two_outputs(60, OneBatch)
    degraded, clean = run.crops[0]

    @torch.no_grad()
    def errors() -> list[float]:
        restored, half = run.model(degraded)
        return [float((restored - clean).abs().mean()), float((half - half_size(clean)).abs().mean())]

    before = errors()
    run.train()
    assert all(after < 0.6 * first for after, first in zip(errors(), before, strict=True))


@pytest.mark.parametrize("weight", ["half_weight", "edge_weight", "ssim_weight"])
def test_weights_of_losses_change_training(weight):
    default, other = two_outputs(2), two_outputs(2, **{weight: 0.5})
    for run in (default, other):
        run.train()
    assert default.losses[0] != other.losses[0]
    assert not same_weights(default.model, other.model)


def test_half_weight_is_nothing_to_networks_with_one_output():
    default, other = trainer(2), trainer(2, half_weight=0.5)
    for run in (default, other):
        run.train()
    assert default.losses == other.losses


def test_two_outputs_resume_bitwise_with_the_same_losses_only(tmp_path):
    losses = {"half_weight": 0.5, "edge_weight": 0.05, "ssim_weight": 0.1}
    whole = two_outputs(**losses)
    whole.train()
    first = two_outputs(**losses)
    first.train(until=3)
    first.save(tmp_path / "checkpoint.pt", RECIPE)
    second = two_outputs(**losses)
    second.resume(tmp_path / "checkpoint.pt", RECIPE)
    second.train()
    assert second.losses == whole.losses
    assert same_weights(second.model, whole.model)
    for name, weight in losses.items():
        with pytest.raises(ValueError, match=f"was trained with {name} = {weight}; got 0.7"):
            two_outputs(**{**losses, name: 0.7}).resume(tmp_path / "checkpoint.pt", RECIPE)


def test_divergence_at_half_resolution_stops_training():
    run = two_outputs()
    with torch.no_grad():
        run.model.coarse.bias.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="diverged: the loss of step 1 is nan"):
        run.train()


def test_crops_must_hold_the_window_of_ssim():
    crops = DegradedCrops(RAIN, {"a": photo()}, 1, batch=1, crop=10, seed=0)
    Trainer(create_model(**TINY), crops, TrainingConfig(1))
    with pytest.raises(ValueError, match="crop must be at least 11 where ssim_weight is not 0; got 10"):
        Trainer(create_model(**TINY), crops, TrainingConfig(1, ssim_weight=0.1))


def test_network_must_enlarge_as_the_task_does():
    task = create_task("sr", scale=2)
    crops = synthetic_crops(task, {"a": photo()}, 2, batch=2, crop=16, seed=0)
    with pytest.raises(ValueError, match=r"photos 2 times for the task sr \(scale 2\); DDSANet .* 1 times"):
        Trainer(create_model(**TINY), crops, TrainingConfig(1))
    enlarging = create_model("pa_edsr", n_resblocks=2, n_feats=8, scale=2)
    run = Trainer(enlarging, crops, TrainingConfig(2))
    run.train()
    assert len(run.losses) == 2
    rain = DegradedCrops(RAIN, {"a": photo()}, 1, batch=2, crop=16, seed=0)
    with pytest.raises(ValueError, match=r"photos 1 times for the task derain; PAEDSR enlarges 2 times"):
        Trainer(enlarging, rain, TrainingConfig(1))


def test_divergence_stops_training():
    run = trainer()
    with torch.no_grad():
        next(iter(run.model.parameters())).fill_(torch.nan)
    with pytest.raises(RuntimeError, match="diverged: the loss of step 1 is nan"):
        run.train()


def test_collector_is_spared_while_training_and_no_longer():
    run, frozen = trainer(2), []
    run.train(lambda _: frozen.append(gc.get_freeze_count()), until=1)
    assert frozen[0] > FROZEN_BY_PYTHON
    assert gc.get_freeze_count() == 0
    with pytest.raises(ZeroDivisionError):
        run.train(lambda _: 1 / 0)
    assert gc.get_freeze_count() == 0


def test_collector_that_was_spared_before_stays_so():
    gc.freeze()
    try:
        trainer(1).train()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_schedule_rises_then_falls_to_zero():
    rates = [schedule(step, 100) for step in range(101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1
    assert all(a > b for a, b in pairwise(rates[5:]))
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert schedule(0, 1) == 1


def test_bad_config():
    for change, message in {
        "steps": "steps must be at least 1",
        "learning_rate": "learning_rate must be positive",
        "weight_decay": "weight_decay must not be negative",
        "workers": "workers must not be negative",
        "half_weight": "half_weight must not be negative",
        "edge_weight": "edge_weight must not be negative",
        "ssim_weight": "ssim_weight must not be negative",
    }.items():
        with pytest.raises(ValueError, match=message):
            TrainingConfig(**{"steps": 1, change: -1})
    with pytest.raises(ValueError, match="edge_weight must not be negative; got nan"):
        TrainingConfig(1, edge_weight=float("nan"))
    with pytest.raises(
        ValueError,
        match="precision must be one of float32, bfloat16, float16, fp32, bf16, fp16; got 'float8'",
    ):
        TrainingConfig(1, precision="float8")
    for device in ("gpu", "meta"):
        with pytest.raises(ValueError, match=f"device must be cpu, cuda or cuda:N; got '{device}'"):
            available_device(device)
    with pytest.raises(ValueError, match="'cuda:99' does not exist here"):
        available_device("cuda:99")

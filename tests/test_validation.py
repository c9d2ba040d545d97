"""Validation while training, the average of the weights, and what a crash leaves of both."""

from __future__ import annotations

import csv

import pytest
import torch
from test_recipe import Silent
from test_training import TINY, photo, same_weights, trainer

from restore_nets import create_model, load_model
from restore_nets.images import from_bytes, to_bytes, write_image
from restore_nets.metrics import score
from restore_nets.recipe import DataRecipe, load_recipe
from restore_nets.restoring import restore
from restore_nets.running import run_recipe
from restore_nets.training import Trainer, TrainingConfig
from restore_nets.validation import Validation


def rows(folder):
    with (folder / "validation.csv").open(newline="") as file:
        return {int(row["step"]): (float(row["psnr"]), float(row["ssim"])) for row in csv.DictReader(file)}


@pytest.fixture
def validated(recipe_file, tmp_path):
    """A recipe file with a folder of photos to validate on."""
    (tmp_path / "unseen").mkdir()
    for seed in (5, 6):
        write_image(tmp_path / "unseen" / f"{seed}.png", photo(40 + seed).float() / 255)

    def write(**changes):
        return recipe_file(**{"validation": f"{{photos: {tmp_path / 'unseen'}}}", **changes})

    return write


def test_every_checkpoint_is_scored(validated, tmp_path):
    recipe = load_recipe(validated(learning_rate="5e-2"))
    weights = run_recipe(recipe, False, Silent())
    found = rows(tmp_path / "out")
    assert list(found) == [0, 2, 4, 5]
    pairs = recipe.validation_pairs()
    scores = {0: [], 5: []}
    model = load_model(weights)
    for pair in pairs:
        degraded, clean = (from_bytes(x) for x in (pair.degraded, pair.clean))
        restored = from_bytes(to_bytes(restore(model, degraded)))
        for step, picture in ((0, degraded), (5, restored)):
            scores[step].append(score(picture, clean, "derain"))
    for step, each in scores.items():
        assert found[step][0] == pytest.approx(sum(s.psnr for s in each) / 2, rel=1e-12)
        assert found[step][1] == pytest.approx(sum(s.ssim for s in each) / 2, rel=1e-12)


def test_the_best_weights_are_kept(validated, tmp_path, monkeypatch):
    """Of the highest PSNR, not the last."""
    psnr = {2: 20.0, 4: 25.0, 5: 24.0}
    mean, steps = Validation._mean, iter(psnr)

    def scored(self, restored):
        found = mean(self, restored)
        return found if not self.scores else type(found)(psnr[next(steps)], found.ssim)

    monkeypatch.setattr(Validation, "_mean", scored)
    weights = run_recipe(load_recipe(validated()), False, Silent())
    assert {step: row[0] for step, row in rows(tmp_path / "out").items() if step} == psnr
    best = load_model(tmp_path / "out" / "best.safetensors")
    assert not same_weights(best, load_model(weights))
    short = load_recipe(validated(out=str(tmp_path / "again")))
    crops = short.crops()
    torch.manual_seed(short.seed)
    run = Trainer(create_model(**TINY), crops, short.training_config())
    run.train(until=4)
    assert same_weights(best, run.model)


@pytest.mark.parametrize("ema_decay", [None, "0.5"])
def test_a_crash_while_validating_loses_nothing(ema_decay, validated, tmp_path, monkeypatch):
    whole = run_recipe(
        load_recipe(validated(out=str(tmp_path / "whole"), ema_decay=ema_decay)), False, Silent()
    )
    recipe = load_recipe(validated(out=str(tmp_path / "crashed"), ema_decay=ema_decay))
    with monkeypatch.context() as patch:
        add = Validation.add

        def crash(self, step, *rest):
            if step == 4:
                raise MemoryError
            return add(self, step, *rest)

        patch.setattr(Validation, "add", crash)
        with pytest.raises(MemoryError):
            run_recipe(recipe, False, Silent())
    assert list(rows(tmp_path / "crashed")) == [0, 2]
    resumed = run_recipe(recipe, True, Silent())
    assert rows(tmp_path / "crashed") == rows(tmp_path / "whole")
    for name in (resumed.name, "best.safetensors"):
        assert same_weights(load_model(resumed.parent / name), load_model(whole.parent / name))


def test_rows_after_the_checkpoint_are_measured_again(validated, tmp_path):
    """The table of a run that is resumed from an earlier step."""
    recipe = load_recipe(validated())
    run_recipe(recipe, False, Silent())
    table = tmp_path / "out" / "validation.csv"
    right = rows(tmp_path / "out")
    table.write_text(table.read_text() + "9,99.0,1.0\n")
    validation = Validation(recipe.validation_pairs(), recipe.task, table)
    validation.resume(5)
    assert set(validation.scores) == {0, 2, 4, 5} and validation.scores[4].psnr == right[4][0]
    table.write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match=r"validation\.csv is no table of validation"):
        validation.resume(5)


def test_scores_of_other_photos_do_not_mix(validated, tmp_path):
    recipe = load_recipe(validated())
    run_recipe(recipe, False, Silent())
    other = load_recipe(validated(validation=f"{{photos: {tmp_path / 'photos'}}}"))
    with pytest.raises(ValueError, match=r"was trained with validation = {'photos': .*unseen"):
        run_recipe(other, True, Silent())


def test_validation_data(validated, tmp_path):
    recipe = load_recipe(validated())
    assert recipe.validation == DataRecipe(photos=str(tmp_path / "unseen"))
    own = load_recipe(validated(data="{photos: scikit-image}", validation="{photos: scikit-image}"))
    trained_on = {name.split(".")[0] for name in own.data.read(own.task, ("brick.png",))}
    assert trained_on == {"brick"}
    assert {pair.name for pair in own.validation_pairs()} == {"chelsea", "coffee", "rocket"}
    with pytest.raises(ValueError, match="validation: there must be either photos or pairs; got neither"):
        load_recipe(validated(validation="{}"))


def test_photos_too_small_to_score_are_known_at_the_start(validated, tmp_path):
    write_image(tmp_path / "unseen" / "7.png", torch.rand(3, 8, 40))
    recipe = load_recipe(validated())
    with pytest.raises(ValueError, match=r"validation photo 7\.png: .*H, W >= 11"):
        run_recipe(recipe, False, Silent())
    assert not (tmp_path / "out").exists()


def test_the_average_is_of_the_weights_after_every_step():
    """decay a + (1 - decay) w, from the weights after the first step on."""
    run, plain = trainer(4, ema_decay=0.75), trainer(4)
    expected = []

    def follow(_):
        now = [p.detach().clone() for p in plain.model.parameters()]
        expected[:] = (
            [torch.lerp(w, a, 0.75) for a, w in zip(expected, now, strict=True)] if expected else now
        )

    plain.train(follow)
    run.train()
    assert same_weights(run.model, plain.model) and plain.trained is plain.model
    for mine, his in zip(run.trained.parameters(), expected, strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-5, atol=1e-7)
    assert not same_weights(run.trained, run.model)


def test_written_weights_are_the_average(recipe_file):
    recipe = load_recipe(recipe_file(ema_decay="0.9", learning_rate="1e-2"))
    weights = run_recipe(recipe, False, Silent())
    crops = recipe.crops()
    torch.manual_seed(recipe.seed)
    run = Trainer(create_model(**TINY), crops, recipe.training_config())
    run.train()
    assert same_weights(load_model(weights), run.trained)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, float("nan")])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="ema_decay must be between 0 and 1; got"):
        TrainingConfig(1, ema_decay=decay)


def test_checkpoints_from_before_there_was_an_average_resume(tmp_path):
    run = trainer(3)
    run.train(until=1)
    run.save(tmp_path / "c.pt", {})
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    del state["average"], state["config"]["ema_decay"]
    torch.save(state, tmp_path / "c.pt")
    again = trainer(3)
    again.resume(tmp_path / "c.pt", {})
    again.train()
    run.train()
    assert same_weights(again.model, run.model)


def test_validation_leaves_training_alone(validated, recipe_file, tmp_path):
    with_it = run_recipe(load_recipe(validated(out=str(tmp_path / "a"))), False, Silent())
    without = run_recipe(load_recipe(recipe_file(out=str(tmp_path / "b"))), False, Silent())
    assert same_weights(load_model(with_it), load_model(without))

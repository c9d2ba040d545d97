"""Recipes: what they say, runs that follow them, and mistakes told in one line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from test_training import RAIN, TINY, photo, same_weights

from restore_nets import create_model, load_model
from restore_nets.checkpoints import load_task
from restore_nets.data import degraded_pairs, values
from restore_nets.images import write_image
from restore_nets.recipe import DataRecipe, load_recipe
from restore_nets.running import run_recipe
from restore_nets.tasks import create_task
from restore_nets.training import Trainer, TrainingConfig

STAGED = {"batch": None, "crop": None}  # which the stages say


class Silent:
    """A console for tests."""

    def __new__(cls):
        from rich.console import Console

        return Console(quiet=True)


def test_recipe(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file(learning_rate="1e-3", device="cpu", edge_weight="0.05"))
    assert recipe.learning_rate == 1e-3  # YAML 1.1 reads 1e-3 as text
    assert recipe.steps == 5
    assert recipe.task == RAIN
    assert load_recipe(recipe_file(task="demosaic")).task == create_task("demosaic")
    noise = load_recipe(recipe_file(task="{name: denoise, sigma: 50}")).task
    assert noise == create_task("denoise", sigma=50)
    recipe_file()
    assert recipe.out == tmp_path / "out"
    assert recipe.data == DataRecipe(photos=str(tmp_path / "photos"))
    assert recipe.training_config() == TrainingConfig(5, 1e-3, edge_weight=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": "3"}, r"the recipe has no key 'stepz', did you mean steps\?"),
        ({"data": "{photo: x}"}, r"data has no key 'photo', did you mean photos\?"),
        ({"data": "{photos: x, pairs: y}"}, "data: there must be either photos or pairs; got both"),
        ({"data": "{}"}, "data: there must be either photos or pairs; got neither"),
        ({"data": "photos"}, "data must be a mapping of keys to values; got 'photos'"),
        ({"steps": None, "out": None}, "the recipe must have out, steps"),
        ({"steps": "many"}, "steps must be an integer; got 'many'"),
        ({"steps": "true"}, "steps must be an integer; got True"),
        ({"steps": "2.5"}, "steps must be an integer; got 2.5"),
        ({"batch": "0"}, "batch must be at least 1; got 0"),
        ({"learning_rate": "fast"}, "learning_rate must be a number; got 'fast'"),
        ({"half_weight": "much"}, "half_weight must be a number; got 'much'"),
        ({"out": "3"}, "out must be a path; got 3"),
        ({"model": "{dim: 8}"}, "model must have the key name"),
        ({"seed": "-1"}, "seed must not be negative; got -1"),
        ({"task": "denoize"}, r"task must be one of derain, .*; got 'denoize', did you mean denoise"),
        ({"task": "{name: denoise, sigmas: 3}"}, r"task denoise has the option sigma; got 'sigmas', did"),
        ({"task": "{name: denoise, sigma: much}"}, "sigma must be a number; got 'much'"),
        ({"task": "{name: sr, scale: 5}"}, "scale must be one of 2, 3, 4; got 5"),
        ({"task": "{sigma: 3}"}, "task must be a name, or a mapping of name and level; got {'sigma': 3}"),
        ({"stages": "{until: 5, batch: 2, crop: 16}", **STAGED}, "stages must be a list; got {'until': 5"),
        ({"stages": "[]", **STAGED}, "stages must not be empty"),
        ({"stages": "[{until: 5, batch: 1, crop: 8}]"}, "stages say batch and crop; got batch and crop"),
        ({"stages": "[{until: 5, batch: 2}]", **STAGED}, r"stages\[0\] must have crop"),
        ({"stages": "[{until: 5, batch: 0, crop: 16}]", **STAGED}, r"stages\[0\]: batch must be at least 1"),
        ({"stages": "[{until: x, batch: 1, crop: 8}]", **STAGED}, r"stages\[0\]\.until must be an integer"),
        ({"stages": "[{until: 5, batch: 1, crops: 8}]", **STAGED}, r"stages\[0\] has no key 'crops', did"),
        ({"task": "3"}, "task must be a name, or a mapping of name and level; got 3"),
        ({"out": "[unclosed"}, "is not valid YAML"),
    ],
)
def test_wrong_recipe_is_one_line_that_names_the_key(recipe_file, changes, message):
    path = recipe_file(**changes)
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_recipe_starts_from_a_checkpoint(recipe_file, tmp_path):
    torch.manual_seed(7)
    trained = create_model(**TINY)
    torch.save({"params": trained.state_dict()}, tmp_path / "published.pth")
    recipe = load_recipe(
        recipe_file(weights=str(tmp_path / "published.pth"), steps="1", learning_rate="1e-12")
    )
    weights = run_recipe(recipe, False, Silent())
    for name, x in load_model(weights).state_dict().items():
        torch.testing.assert_close(x, trained.state_dict()[name], rtol=0, atol=1e-9)
    run_recipe(recipe, True, Silent())  # which takes the run's own checkpoint
    with pytest.raises(ValueError, match="was trained with weights = "):
        run_recipe(replace(recipe, weights=None), True, Silent())


def test_recipe_says_what_of_a_checkpoint_does_not_fit(recipe_file, tmp_path):
    torch.save(create_model(**{**TINY, "dim": 8}).state_dict(), tmp_path / "other.pth")
    recipe = load_recipe(recipe_file(weights=str(tmp_path / "other.pth")))
    with pytest.raises(ValueError, match=r"other.pth does not fit DDSANet"):
        run_recipe(recipe, False, Silent())
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError):
        run_recipe(replace(recipe, weights=str(tmp_path / "none.pth")), False, Silent())


def test_stages_of_a_recipe(recipe_file, monkeypatch):
    """Batches and crops of each stage; resuming is exact across its end."""
    stages = "[{until: 3, batch: 4, crop: 8}, {until: 5, batch: 1, crop: 24}]"
    recipe = load_recipe(recipe_file(**STAGED, stages=stages, checkpoint_every="1"))
    assert json.loads(json.dumps(recipe.identity())) == recipe.identity()
    shapes = [tuple(recipe.crops()[step][0].shape) for step in range(5)]
    assert shapes == [(4, 3, 8, 8)] * 3 + [(1, 3, 24, 24)] * 2
    first = load_recipe(recipe_file(batch="4", crop="8")).crops()
    assert torch.equal(recipe.crops()[2][1], first[2][1])

    whole = run_recipe(replace(recipe, out=recipe.out / "whole"), False, Silent())
    trained = Trainer.train
    with monkeypatch.context() as patch:

        def stop(self, on_step, until):
            trained(self, on_step, until)
            if until == 4:
                raise KeyboardInterrupt

        patch.setattr(Trainer, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe, False, Silent())
    assert same_weights(load_model(run_recipe(recipe, True, Silent())), load_model(whole))
    with pytest.raises(ValueError, match="was trained with batch = None; got 8"):
        run_recipe(replace(recipe, stages=None, crop=16), True, Silent())


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[{until: 3, batch: 1, crop: 8}]", r"stages must end .*, the last at step 5; got \[3\]"),
        ("[{until: 5, batch: 1, crop: 8}, {until: 3, batch: 1, crop: 8}]", r"got \[5, 3\]"),
        ("[{until: 5, batch: 1, crop: 8}, {until: 5, batch: 1, crop: 8}]", r"got \[5, 5\]"),
        (
            "[{until: 2, batch: 1, crop: 8}, {until: 5, batch: 1, crop: 64}]",
            "must be at least crop=64 pixels",
        ),
    ],
)
def test_stages_that_do_not_fit(recipe_file, stages, message):
    recipe = load_recipe(recipe_file(**STAGED, stages=stages))
    with pytest.raises(ValueError, match=message):
        run_recipe(recipe, False, Silent())
    assert not recipe.out.exists()


def test_recipe_run_can_be_resumed_after_a_crash(recipe_file, tmp_path, monkeypatch):
    whole = run_recipe(load_recipe(recipe_file(out=str(tmp_path / "whole"))), False, Silent())

    recipe = load_recipe(recipe_file(out=str(tmp_path / "crashed")))
    with monkeypatch.context() as patch:
        step = Trainer.step

        def crash_at_step_4(self, degraded, clean):
            if len(self.losses) == 3:
                raise MemoryError
            return step(self, degraded, clean)

        patch.setattr(Trainer, "step", crash_at_step_4)
        with pytest.raises(MemoryError):
            run_recipe(recipe, False, Silent())
    with pytest.raises(FileExistsError, match="resume it with --resume"):
        run_recipe(recipe, False, Silent())
    resumed = run_recipe(recipe, True, Silent())

    assert same_weights(load_model(resumed), load_model(whole))
    assert (resumed.parent / "losses.csv").read_text() == (whole.parent / "losses.csv").read_text()
    assert len((whole.parent / "losses.csv").read_text().splitlines()) == 6
    assert sorted(p.name for p in whole.parent.iterdir()) == [
        "checkpoint.pt",
        "losses.csv",
        "model.safetensors",
    ]


def test_recipe_trains_on_pairs(recipe_file, tmp_path):
    for part in ("input", "target"):
        (tmp_path / "pairs" / part).mkdir(parents=True)
        write_image(tmp_path / "pairs" / part / "1.png", photo().float() / 255)
    recipe = load_recipe(recipe_file(data=f"{{pairs: {tmp_path / 'pairs'}}}", steps="1"))
    assert run_recipe(recipe, False, Silent()).exists()


SMALL_NETWORKS = {
    "denoise": {"name": "panet", "n_resblocks": 2, "n_feats": 4},
    "demosaic": TINY,
    "jpeg": {"name": "panet", "n_resblocks": 2, "n_feats": 4},
    "sr": {"name": "pa_edsr", "n_resblocks": 2, "n_feats": 8, "scale": 2},
}


@pytest.mark.parametrize("name", SMALL_NETWORKS)
@pytest.mark.parametrize("kind", ["photos", "pairs"])
def test_recipe_of_every_task(name, kind, recipe_file, tmp_path):
    task = create_task(name)
    (pair,) = degraded_pairs(task, {"1.png": photo()}, 0)
    for part, picture in (("input", pair.degraded), ("target", pair.clean)):
        (tmp_path / "pairs" / part).mkdir(parents=True)
        write_image(tmp_path / "pairs" / part / "1.png", values(picture))
    changes = {} if kind == "photos" else {"data": f"{{pairs: {tmp_path / 'pairs'}}}"}
    recipe = load_recipe(recipe_file(model=json.dumps(SMALL_NETWORKS[name]), task=name, steps="2", **changes))
    weights = run_recipe(recipe, False, Silent())
    assert load_task(weights) == task
    assert len((weights.parent / "losses.csv").read_text().splitlines()) == 3


def test_run_of_another_task_is_not_resumed(recipe_file):
    noise = "{{name: denoise, sigma: {}}}"
    run_recipe(load_recipe(recipe_file(task=noise.format(30), steps="2")), False, Silent())
    with pytest.raises(ValueError, match=r"was trained with task = .*'sigma': 30.*; got .*'sigma': 50"):
        run_recipe(load_recipe(recipe_file(task=noise.format(50), steps="2")), True, Silent())


def test_recipe_without_checkpoint_cannot_be_resumed(recipe_file):
    with pytest.raises(FileNotFoundError, match=r"checkpoint\.pt"):
        run_recipe(load_recipe(recipe_file()), True, Silent())

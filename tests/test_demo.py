"""The demonstration in small: what it writes, what it keeps unseen, and that its checks can fail."""

from __future__ import annotations

import html
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import restore_kernels
import restore_kernels.nn
from restore_nets import cli, create_model, demo, figures, list_models, load_model
from restore_nets.checkpoints import load_task
from restore_nets.data import values
from restore_nets.demo_recipes import DEFAULT_MODELS, DEFAULT_TASK, RECIPES, DemoRecipe
from restore_nets.images import read_image, write_image
from restore_nets.kernel_checks import Agreement, follow_losses
from restore_nets.metrics import PRESETS, score
from restore_nets.restoring import restore, scale_of
from restore_nets.tasks import create_task, list_tasks, task_at
from restore_nets.training import Trainer


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The whole demonstration in a second or two."""
    u_shape = {"dim": 4, "num_blocks": [1, 1, 1, 1], "heads": [1, 1, 1, 1], "ffn_expansion": 1.0}
    options = {
        "association": {"n_feat": 4, "heads": 1, "num_blocks": 1, "tokens": 2, "token_layers": 1},
        "ddsa": u_shape,
        "drsformer": {**u_shape, "dim": 8, "mefc": False},
        "elf": {"n_feat": 4},
        "pa_edsr": {"n_resblocks": 2, "n_feats": 8, "reduction": 2},
        "panet": {"n_resblocks": 2, "n_feats": 8},
    }
    recipes = {
        name: DemoRecipe(values, steps=4, batch=2, crop=16, enlarges=name == "pa_edsr")
        for name, values in options.items()
    }
    monkeypatch.setattr(demo, "RECIPES", recipes)
    monkeypatch.setattr(demo, "REPEATED_STEPS", 3)
    monkeypatch.setattr(demo, "SECONDS_FOR_TIMES", 0.01)


def photo(seed: int, height: int = 48, width: int = 56) -> torch.Tensor:
    coarse = torch.rand(1, 3, 6, 7, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(6):
        write_image(folder / f"{index}.png", photo(index))
    return folder


@pytest.fixture
def pairs(tmp_path) -> Path:
    for part in ("input", "target"):
        (tmp_path / "pairs" / part).mkdir(parents=True)
        for index in range(3):
            write_image(
                tmp_path / "pairs" / part / f"{index}.png", photo(index) * (1 if part == "input" else 0.8)
            )
    return tmp_path / "pairs"


class References(HTMLParser):
    """What a page would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.images = 0
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.images += tag == "img"
        self.found += [
            value for name, value in attributes if name.split(":")[-1] in ("src", "href", "srcset")
        ]


def test_writes_everything(photos, tmp_path, capsys):
    out = tmp_path / "out" / "demo"
    assert cli.run(["demo", "--photos", str(photos), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "5.png", "loss.png", "model.safetensors", "report.html",
    ]  # fmt: skip
    assert "dB rainy" in capsys.readouterr().out
    # Three pictures of 56 pixels and two gaps, under a caption.
    assert read_image(out / "5.png").shape[2] == 3 * 56 + 2 * 8
    restored = restore(load_model(out / "model.safetensors"), photo(0))
    assert restored.shape == (3, 48, 56)

    page = (out / "report.html").read_text()
    references = References(page)
    assert references.images == 6
    outside = [x for x in references.found if not x.startswith(("data:", "#"))]
    assert outside == []
    assert "@import" not in page
    assert "url(http" not in page
    repeat = "--task derain --model ddsa --steps 4 --seed 0"
    for text in ("Photos the network never saw", "PSNR", "follow eager", "speed-up", repeat):
        assert text in page
    assert "mask" not in page.replace("gate by a mask", "")
    assert "found its matches" not in page


@pytest.mark.parametrize("name", ["drsformer", "elf"])
def test_every_network_is_demonstrated(name, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.run(["demo", "--model", name, "--photos", str(photos), "--out", str(out)]) == 0
    assert type(load_model(out / "model.safetensors")) is type(create_model(name))
    page = (out / "report.html").read_text()
    assert f"<code>{name}</code>" in page
    assert f"--model {name} --steps 4" in page


@pytest.mark.parametrize(
    ("name", "level", "picture"),
    [
        ("denoise", 30, "noisy"),
        ("demosaic", None, "bilinear"),
        ("jpeg", 20, "compressed"),
        ("sr", 2, "bicubic"),
    ],
)
def test_every_task_is_demonstrated(name, level, picture, photos, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--task", name] if level is None else ["--task", name, "--level", str(level)]
    assert cli.run(["demo", *arguments, "--photos", str(photos), "--out", str(out)]) == 0
    task = task_at(name, level)
    assert load_task(out / "model.safetensors") == task
    assert f"dB {picture}" in capsys.readouterr().out
    assert read_image(out / "5.png").shape[2] == 3 * 56 + 2 * 8  # all pictures at the clean one's size
    page = (out / "report.html").read_text()
    assert References(page).images == 6 + 1
    assert "Where a pixel found its matches" in page
    assert read_image(out / "5-matches.png").std() > 0
    words = (
        f"{picture} → restored",
        f"{task.metric}: {PRESETS[task.metric]}",
        task.labels.made,
        task.labels.done,
    )
    for text in (*words, f"{' '.join(arguments)} --model {DEFAULT_MODELS[name]} --steps 4"):
        assert html.escape(text, quote=False) in page.replace("&#39;", "'")
    for text in ("rain", "Rain", "3×3 median"):
        assert text not in page.replace("training", "").replace("trained", "").replace("Training", "")


@pytest.mark.parametrize("name", ["denoise", "demosaic", "jpeg", "sr"])
def test_figures_of_a_result_are_those_of_its_pictures(name, photos, tmp_path):
    task = create_task(name)
    result = demo.run(demo.Options(tmp_path / "out", photos=photos, task=task), Console(quiet=True))
    (unseen,) = result.results
    clean = photo(5)
    torch.testing.assert_close(unseen.clean, clean, rtol=0, atol=0.51 / 255)
    (pair,) = result.material.unseen
    assert torch.equal(unseen.degraded, task.before(values(pair.degraded)))
    network = load_model(tmp_path / "out" / "model.safetensors")
    restored = (255 * restore(network, values(pair.degraded))).round() / 255
    torch.testing.assert_close(unseen.restored, restored)
    for picture, figure in ((unseen.degraded, unseen.before), (unseen.restored, unseen.after)):
        assert figure == score(picture, unseen.clean, task.metric)
    assert (unseen.classical is None) == (name in ("demosaic", "sr"))


@pytest.mark.parametrize("name", ["demosaic", "sr"])
def test_pairs_of_every_task(name, tmp_path):
    task = create_task(name)
    for index in range(3):
        clean = photo(index)
        for part, picture in (("input", task.degrade(clean, np.random.default_rng(0))), ("target", clean)):
            (tmp_path / "pairs" / part).mkdir(parents=True, exist_ok=True)
            write_image(tmp_path / "pairs" / part / f"{index}.png", picture)
    options = demo.Options(tmp_path / "out", pairs=tmp_path / "pairs", task=task)
    result = demo.run(options, Console(quiet=True))
    assert [r.name for r in result.results] == ["2.png"]
    assert "The pairs are yours" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("task", "crop", "steps", "gain"), [("denoise", 24, 60, 4), ("jpeg", 16, 100, 0), ("sr", 16, 100, 0)]
)
def test_small_pyramid_networks_learn(task, crop, steps, gain, tmp_path, monkeypatch):
    """Better than the noisy photo by 4 dB, than the compressed one, than bicubic enlargement."""
    name = DEFAULT_MODELS[task]
    recipe = RECIPES[name]
    options = {**recipe.options, "n_resblocks": 2, "n_feats": 16}
    small = replace(recipe, options=options, steps=steps, crop=crop, learning_rate=2e-3, restored=96)
    monkeypatch.setattr(demo, "RECIPES", {name: small})
    chosen = demo.Options(tmp_path, task=create_task(task))
    material = demo.prepare(chosen)
    trainer = demo.make_trainer(material, chosen, steps)
    trainer.train()
    results = [demo.restore_pair(trainer.model, pair, chosen.task) for pair in material.unseen[:2]]
    assert np.mean([result.after.psnr - result.before.psnr for result in results]) > gain


def test_unseen_photos_are_cut_to_what_the_recipe_restores(photos, tmp_path, monkeypatch):
    recipes = {"panet": replace(demo.RECIPES["panet"], restored=30)}
    monkeypatch.setattr(demo, "RECIPES", recipes)
    for task in (create_task("denoise"), create_task("demosaic")):
        (pair,) = demo.prepare(demo.Options(tmp_path, photos=photos, task=task)).unseen
        assert pair.clean.shape == pair.degraded.shape == (3, 30, 30)


def test_every_network_has_a_recipe_that_fits_it():
    assert sorted(RECIPES) == list_models()
    assert set(DEFAULT_MODELS.values()) <= set(RECIPES)
    assert list(DEFAULT_MODELS) == list_tasks()
    assert DEFAULT_TASK in DEFAULT_MODELS
    for name, recipe in RECIPES.items():
        with torch.device("meta"):
            create_model(name, **recipe.options)


def test_predicted_mask_is_shown_beside_the_true_streaks(photos, tmp_path, capsys):
    out = tmp_path / "out"
    result = demo.run(demo.Options(out, photos=photos, model="association"), Console(quiet=True))
    (unseen,) = result.results
    network = load_model(out / "model.safetensors")
    with torch.no_grad():
        mask = network.degradation_mask(unseen.degraded[None])[0, 0]
    torch.testing.assert_close(unseen.mask.mask, mask)
    (pair,) = demo.prepare(result.options).unseen
    assert torch.equal(unseen.mask.streaks, pair.truth)
    expected = np.corrcoef(mask.numpy().ravel(), pair.truth.numpy().ravel())[0, 1]
    assert result.mask_correlation() == pytest.approx(expected, abs=1e-5)

    assert read_image(out / "5-mask.png").shape[2] == 3 * 56 + 2 * 8
    page = (out / "report.html").read_text()
    assert References(page).images == 10
    assert "true streaks" in page
    assert f"{expected:.3f} in the mean" in page


def test_streaks_of_real_pairs_are_not_known(pairs, tmp_path):
    result = demo.run(demo.Options(tmp_path / "out", pairs=pairs, model="association"), Console(quiet=True))
    assert result.mask_correlation() is None
    page = (tmp_path / "out" / "report.html").read_text()
    assert "predicted mask" in page
    assert "true streaks" not in page
    with pytest.raises(ValueError, match="streaks must be known"):
        result.results[0].mask.correlation()


def test_unknown_network_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model must be one of .*; got 'ddas', did you mean ddsa\?"):
        demo.Options(tmp_path, model="ddas")


@pytest.mark.parametrize("name", RECIPES)
def test_networks_fit_the_tasks_of_their_scale(name, tmp_path):
    for task in map(create_task, list_tasks()):
        if RECIPES[name].enlarges == (task.name == "sr"):
            network = demo.Options(tmp_path, model=name, task=task).network
            with torch.device("meta"):
                assert scale_of(create_model(**network)) == task.scale
        else:
            with pytest.raises(ValueError, match=rf"one of .* for the task {task.name}.*{name}"):
                demo.Options(tmp_path, model=name, task=task)


def test_shipped_photos_need_nothing(tmp_path):
    result = demo.run(demo.Options(tmp_path, steps=1), Console(quiet=True))
    assert {r.name for r in result.results} == {"chelsea", "coffee", "rocket"}
    assert result.mean("before", "psnr") < 25


def test_pairs(pairs, tmp_path):
    result = demo.run(demo.Options(tmp_path / "out", pairs=pairs), Console(quiet=True))
    assert [r.name for r in result.results] == ["2.png"]
    assert result.material.training == ["0.png", "1.png"]


def test_same_seed_same_result(photos, tmp_path):
    first, again, other = (
        demo.run(demo.Options(tmp_path / str(n), photos=photos, seed=seed), Console(quiet=True))
        for n, seed in enumerate((3, 3, 4))
    )
    assert first.losses == again.losses
    assert first.gain == again.gain
    assert first.losses != other.losses


def test_eager_run_has_nothing_to_compare(photos, tmp_path):
    with restore_kernels.use_backend("eager"):
        result = demo.run(demo.Options(tmp_path / "out", photos=photos), Console(quiet=True))
    assert result.agreement is None
    assert "there is nothing to compare" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(("count", "unseen"), [(2, 1), (6, 1), (10, 2), (100, 4)])
def test_some_photos_stay_unseen(count, unseen, tmp_path, monkeypatch):
    monkeypatch.setattr(
        demo, "read_photos", lambda _: {f"{i:03}": torch.zeros(3, 20, 20).byte() for i in range(count)}
    )
    material = demo.prepare(demo.Options(tmp_path, photos=tmp_path))
    assert len(material.unseen) == unseen
    assert len(material.training) == count - unseen
    assert not set(material.training) & {pair.name for pair in material.unseen}


def test_one_photo_is_too_few(tmp_path):
    write_image(tmp_path / "a.png", photo(0))
    with pytest.raises(ValueError, match="must hold at least 2 photos"):
        demo.prepare(demo.Options(tmp_path, photos=tmp_path))


def test_seconds_become_steps(photos, tmp_path):
    options = demo.Options(tmp_path, photos=photos)
    material = demo.prepare(options)
    few, many = (demo.steps_within(s, lambda: demo.make_trainer(material, options, 10)) for s in (1e-6, 100))
    assert few == 1
    assert many > 100


def test_busiest_window_finds_the_difference():
    difference = torch.zeros(3, 100, 120)
    difference[:, 60:70, 30:40] = -1
    rows, columns = figures.busiest_window(difference, 40)
    assert rows.start <= 60
    assert rows.stop >= 70
    assert columns.start <= 30
    assert columns.stop >= 40
    assert figures.busiest_window(torch.zeros(3, 10, 200), 40) == (slice(0, 10), slice(0, 40))


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return 1.01 * gradient


def scaled_gradient_of_v(q, k, v, topk, **options):
    return restore_kernels.topk_attention(q, k, ScaledGradient.apply(v), topk, **options)


def one_entry_too_few(q, k, v, topk, **options):
    kept = [k if k is None else k - 1 for k in topk]
    return restore_kernels.topk_attention(q, k, v, kept, **options)


def constant_weights(q, k, v, topk, *, weights, **options):
    return restore_kernels.topk_attention(q, k, v, topk, weights=weights.detach(), **options)


@pytest.mark.parametrize(
    ("attention", "passes"),
    [
        (restore_kernels.topk_attention, True),
        (scaled_gradient_of_v, False),
        (one_entry_too_few, False),
        (constant_weights, False),
    ],
)
def test_losses_of_a_wrong_kernel_do_not_follow_eager(attention, passes, photos, tmp_path, monkeypatch):
    options = demo.Options(tmp_path, photos=photos)
    material = demo.prepare(options)

    def make_trainer() -> Trainer:
        return demo.make_trainer(material, options, 40)

    steps = 12
    with monkeypatch.context() as patch:
        patch.setattr(restore_kernels.nn.projected_attention, "topk_attention", attention)
        trainer = make_trainer()
        trainer.train(until=steps)
    calls = []
    agreement = follow_losses(trainer.losses, make_trainer, lambda: calls.append(1), first_steps=2)
    assert len(calls) == 3 * steps + 2
    assert len(agreement.first_noise) == 2
    assert agreement.passed == passes


def test_first_losses_may_differ_by_what_rounding_does_to_them():
    losses, noise = [1.0] * 4, [[0.0, 0.0, 1e-3, 1e-3]]
    at_once, late, too_soon = [1e-4, 1e-3, 1e-3, 1e-3], [0.0, 1e-3, 1e-3, 1e-3], [1e-3] * 4
    assert Agreement(late, noise, losses).passed
    assert not Agreement(at_once, noise, losses).passed
    assert not Agreement(at_once, noise, losses, [0.0, 4e-5]).passed
    assert Agreement(at_once, noise, losses, [0.0, 9e-5]).passed
    assert not Agreement(too_soon, noise, losses, [0.0, 9e-5]).passed
    # Of later steps they say nothing.
    assert not Agreement(late, [[0.0] * 4], losses, [1e-2]).passed

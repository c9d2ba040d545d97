"""The command line: what it writes, and mistakes told in one line with exit status 2."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from restore_nets import cli, create_model, load_model, save_checkpoint
from restore_nets.checkpoints import load_task
from restore_nets.images import read_image, write_image
from restore_nets.tasks import create_task

TINY = {
    "name": "ddsa", "dim": 4, "num_blocks": [1, 1, 1, 1], "heads": [1, 1, 1, 1], "ffn_expansion": 1.0,
}  # fmt: skip
TINY_OPTIONS = [
    argument
    for key, value in TINY.items() if key != "name"
    for argument in ("--option", f"{key}={value}")
]  # fmt: skip
RESTORE_BARE = ["restore", "bare.pth", "photos", "--out", "out", "--model", "ddsa"]


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_checkpoint(create_model(**TINY), path, TINY)
    return path


@pytest.fixture
def bare(tmp_path):
    """A published checkpoint: tensors by name, and not a word about the network."""
    torch.manual_seed(0)
    path = tmp_path / "bare.pth"
    torch.save({"params": create_model(**TINY).state_dict()}, path)
    return path


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    write_image(folder / "a.png", torch.rand(3, 33, 21, generator=generator))
    write_image(folder / "b.jpg", torch.rand(3, 24, 40, generator=generator))
    return folder


@pytest.fixture
def recipe(photos, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {json.dumps(TINY)}\ndata: {{photos: {photos}}}\n"
        f"out: {tmp_path / 'run'}\nsteps: 2\nbatch: 1\ncrop: 16\n"
    )
    return path


@pytest.mark.parametrize("command", [[], ["demo"], ["train"], ["restore"], ["models"]])
def test_help(command, capsys):
    assert cli.run([*command, "--help"]) == 0
    assert f"Usage: restore-nets {' '.join(command)}".strip() in capsys.readouterr().out


def test_no_arguments_show_the_help(capsys):
    assert cli.run([]) == 0
    assert "Usage: restore-nets" in capsys.readouterr().out


def test_models(capsys):
    assert cli.run(["models"]) == 0
    output = capsys.readouterr().out
    assert "ddsa" in output
    assert "drsformer" in output
    assert "33,655,424" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demos"], "No such command 'demos'"),
        (["demo", "--stepz", "3"], "No such option: --stepz"),
        (["demo", "--steps", "many"], "Invalid value for '--steps'"),
        (["demo", "--steps", "0"], "steps must be at least 1; got 0"),
        (["demo", "--seconds", "-1"], "seconds must be positive; got -1"),
        (["demo", "--steps", "1", "--seconds", "1"], "either --steps or --seconds"),
        (["demo", "--photos", "a", "--data", "b"], "either --photos or --data"),
        (["demo", "--photos", "absent"], "absent"),
        (["demo", "--model", "ddas"], "got 'ddas', did you mean ddsa?"),
        (["demo", "--device", "tpu"], "device must be cpu, cuda or cuda:N; got 'tpu'"),
        (["demo", "--task", "denoize"], "got 'denoize', did you mean denoise"),
        (["demo", "--task", "sr", "--level", "5"], "scale must be one of 2, 3, 4; got 5"),
        (["demo", "--task", "jpeg", "--level", "0.5"], "quality must be an integer; got 0.5"),
        (["demo", "--task", "denoise", "--level", "-1"], "sigma must be positive and finite; got -1"),
        (["demo", "--level", "3"], "task derain has no level; got 3"),
        (
            ["demo", "--task", "sr", "--model", "ddsa"],
            "task sr (scale 2); ddsa keeps the size of photos",
        ),
        (["demo", "--task", "jpeg", "--model", "pa_edsr"], "(quality 10); pa_edsr enlarges photos"),
        (["train"], "Missing option '--config'"),
        (["train", "--config", "recipe.yaml", "--task", "demosiac"], "did you mean demosaic"),
        (["train", "--config", "recipe.yaml", "--level", "30"], "task derain has no level; got 30"),
        (["train", "--config", "recipe.yaml", "--task", "sr"], "must enlarge photos 2 times"),
        (["train", "--config", "absent.yaml"], "absent.yaml"),
        (["train", "--config", "recipe.yaml", "--edge-weight", "-1"], "edge_weight must not be negative"),
        (["train", "--config", "recipe.yaml", "--half-weight", "much"], "Invalid value for '--half-weight'"),
        (["restore"], "Missing argument"),
        (["restore", "model.safetensors", "a.png"], "Missing option '--out'"),
        (["restore", "absent.safetensors", "photos/a.png", "--out", "out"], "absent.safetensors"),
        (["restore", "model.safetensors", "absent.png", "--out", "out"], "absent.png does not exist"),
        (["restore", "model.safetensors", "photos", "--out", "photos"], "would overwrite photos/a.png"),
        (["restore", "model.safetensors", "photos", "--out", "out", "--tile", "7"], "tile must be 0"),
        (["restore", "photos/a.png", "photos", "--out", "out"], "photos/a.png"),
        (["restore", "bare.pth", "photos", "--out", "out"], "bare.pth does not say which network it is for"),
        (["restore", "bare.pth", "photos", "--out", "out"], "--model NAME"),
        (["restore", "bare.pth", "photos", "--out", "out", "--model", "dsda"], "did you mean ddsa?"),
        (
            ["restore", "bare.pth", "photos", "--out", "out", "--model", "ddsa"],
            "does not fit DDSANet: missing",
        ),
        ([*RESTORE_BARE, "--option", "dim"], "--option must be KEY=VALUE; got 'dim'"),
        ([*RESTORE_BARE, "--option", "=4"], "--option must be KEY=VALUE; got '=4'"),
        ([*RESTORE_BARE, "--option", "dim=four"], "dim must be an integer; got 'four'"),
        ([*RESTORE_BARE, "--option", "dim=[4"], "--option dim must have a YAML value; got '[4'"),
        ([*RESTORE_BARE, "--option", "dim=4", "--option", "dim=8"], "--option dim must be given once"),
        ([*RESTORE_BARE, "--option", "dims=4"], "got 'dims', did you mean dim"),
        (
            ["restore", "bare.pth", "photos", "--out", "out", "--option", "dim=4"],
            "--option dim needs --model",
        ),
    ],
)
def test_mistakes_are_one_line(
    arguments, message, weights, bare, recipe, photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert cli.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("restore-nets: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_restore_writes_results_under_the_same_names(weights, photos, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    (photos / "notes.txt").write_text("no photo")
    assert cli.run(["restore", str(weights), str(photos), "--out", str(out)]) == 0
    assert read_image(out / "a.png").shape == (3, 33, 21)
    assert read_image(out / "b.jpg").shape == (3, 24, 40)
    output = capsys.readouterr().out.replace("\n", "")
    assert "2 of 2 photos restored" in output
    assert "1 other files ignored" in output
    assert "notes.txt" in output


def test_restore_takes_published_checkpoints(weights, bare, photos, tmp_path):
    ours, published = tmp_path / "ours", tmp_path / "published"
    assert cli.run(["restore", str(weights), str(photos), "--out", str(ours)]) == 0
    named = ["--model", "ddsa", *TINY_OPTIONS]
    assert cli.run(["restore", str(bare), str(photos), "--out", str(published), *named]) == 0
    assert (published / "a.png").read_bytes() == (ours / "a.png").read_bytes()


@pytest.mark.parametrize("command", [["--help"], ["restore", "--help"], ["demo", "--help"], ["demos"]])
def test_help_and_mistyped_commands_load_no_torch(command):
    program = (
        "import sys, restore_nets\n"
        "from restore_nets import cli\n"
        f"cli.run({command!r})\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "restore-nets" in result.stdout + result.stderr


def test_names_of_the_package_are_loaded_when_used():
    import restore_nets

    assert set(restore_nets.__all__) <= set(dir(restore_nets))
    for name in restore_nets.__all__:
        assert getattr(restore_nets, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'restore_nets' has no attribute 'create_modle'"):
        restore_nets.create_modle  # noqa: B018


def test_restore_reports_every_failure_and_restores_the_rest(weights, photos, tmp_path, capsys):
    broken = photos / "a.png"
    broken.write_bytes(broken.read_bytes()[:200])
    out = tmp_path / "out"
    assert cli.run(["restore", str(weights), str(photos), "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert "1 of 2 photos restored" in captured.out.replace("\n", "")
    assert captured.err.count("\n") == 1
    assert f"{broken} is not a readable image" in captured.err
    assert [path.name for path in out.iterdir()] == ["b.jpg"]


def test_interrupt(weights, photos, tmp_path, monkeypatch, capsys):
    from restore_nets import restoring

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(restoring, "restore", interrupted)
    assert cli.run(["restore", str(weights), str(photos), "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "restore-nets: interrupted\n"
    assert list((tmp_path / "out").iterdir()) == []


def test_train_then_restore(recipe, photos, tmp_path, capsys):
    assert cli.run(["train", "--config", str(recipe)]) == 0
    weights = tmp_path / "run" / "model.safetensors"
    assert str(weights) in capsys.readouterr().out
    assert cli.run(["train", "--config", str(recipe)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.run(["train", "--config", str(recipe), "--resume"]) == 0
    assert cli.run(["restore", str(weights), str(photos / "a.png"), "--out", str(tmp_path / "out")]) == 0


SMALL_NETWORKS = {
    "association": {"n_feat": 4, "heads": 1, "num_blocks": 1, "tokens": 2, "token_layers": 1},
    "drsformer": {"dim": 8, "num_blocks": [1, 1, 1, 1], "heads": [1, 1, 1, 1], "ffn_expansion": 1.0},
    "elf": {"n_feat": 4},
}


@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_every_network_trains_resumes_and_restores(name, recipe, photos, tmp_path):
    network = json.dumps({"name": name, **SMALL_NETWORKS[name]})
    recipe.write_text(recipe.read_text().replace(json.dumps(TINY), network) + "edge_weight: 0.05\n")
    assert cli.run(["train", "--config", str(recipe)]) == 0
    assert cli.run(["train", "--config", str(recipe), "--resume"]) == 0
    weights, out = tmp_path / "run" / "model.safetensors", tmp_path / "out"
    assert cli.run(["restore", str(weights), str(photos), "--out", str(out)]) == 0
    assert read_image(out / "a.png").shape == (3, 33, 21)


TASK_ARGUMENTS = [
    (["--task", "denoise", "--level", "50"], {"name": "denoise", "sigma": 50}),
    (["--task", "demosaic"], {"name": "demosaic"}),
    (["--task", "jpeg"], {"name": "jpeg", "quality": 10}),
]


@pytest.mark.parametrize(("arguments", "task"), TASK_ARGUMENTS)
def test_train_and_restore_every_task(arguments, task, recipe, photos, tmp_path, capsys):
    assert cli.run(["train", "--config", str(recipe), *arguments]) == 0
    weights, out = tmp_path / "run" / "model.safetensors", tmp_path / "out"
    assert load_task(weights) == create_task(**task)
    assert cli.run(["restore", str(weights), str(photos), "--out", str(out), "--tile", "0"]) == 0
    assert f"Trained for: {create_task(**task)}" in capsys.readouterr().out
    assert read_image(out / "a.png").shape == (3, 33, 21)


def test_a_published_checkpoint_is_told_its_task(recipe, photos, tmp_path, capsys):
    """A network for demosaicking is given a mosaic, whether its own file says so or --task does."""
    assert cli.run(["train", "--config", str(recipe), "--task", "demosaic"]) == 0
    weights, published = tmp_path / "run" / "model.safetensors", tmp_path / "published.pth"
    torch.save({"params": load_model(weights).state_dict()}, published)
    network = [f"--option={key}={json.dumps(value)}" for key, value in TINY.items() if key != "name"]
    command = ["restore", str(published), str(photos), "--model", TINY["name"], *network, "--out"]
    assert cli.run([*command, str(tmp_path / "told"), "--task", "demosaic"]) == 0
    assert cli.run([*command, str(tmp_path / "untold")]) == 0
    assert cli.run(["restore", str(weights), str(photos), "--out", str(tmp_path / "own")]) == 0
    told, untold, own = (read_image(tmp_path / name / "a.png") for name in ("told", "untold", "own"))
    assert torch.equal(told, own) and not torch.equal(untold, own)
    again = ["restore", str(weights), str(photos), "--out", str(tmp_path / "own"), "--task"]
    assert cli.run([*again, "jpeg"]) == 2
    assert f"--task must be demosaic, which {weights} was trained for; got jpeg" in capsys.readouterr().err
    assert cli.run([*again, "mosaic"]) == 2
    assert "got 'mosaic', did you mean demosaic?" in capsys.readouterr().err


def test_super_resolution_writes_larger_photos(recipe, photos, tmp_path):
    network = {"name": "pa_edsr", "n_resblocks": 2, "n_feats": 8, "scale": 3}
    text = recipe.read_text().replace(json.dumps(TINY), json.dumps(network)).replace("crop: 16", "crop: 15")
    recipe.write_text(text + "task: {name: sr, scale: 3}\n")
    assert cli.run(["train", "--config", str(recipe)]) == 0
    weights, out = tmp_path / "run" / "model.safetensors", tmp_path / "out"
    assert cli.run(["restore", str(weights), str(photos), "--out", str(out)]) == 0
    assert read_image(out / "a.png").shape == (3, 99, 63)


def test_level_takes_the_place_of_the_recipes(recipe, tmp_path):
    recipe.write_text(recipe.read_text() + "task: {name: denoise, sigma: 10}\n")
    assert cli.run(["train", "--config", str(recipe), "--level", "70"]) == 0
    assert load_task(tmp_path / "run" / "model.safetensors") == create_task("denoise", sigma=70)


def test_weights_of_losses_take_the_place_of_the_recipes(recipe, tmp_path, capsys):
    command = ["train", "--config", str(recipe), "--edge-weight", "0.05", "--ssim-weight", "0.2"]
    assert cli.run(command) == 0
    assert cli.run(["train", "--config", str(recipe), "--resume"]) == 2
    assert "was trained with edge_weight = 0.05; got 0.0" in capsys.readouterr().err
    recipe.write_text(recipe.read_text() + "edge_weight: 0.05\nssim_weight: 0.2\n")
    assert cli.run(["train", "--config", str(recipe), "--resume"]) == 0


def test_development_mode_shows_the_traceback(tmp_path):
    command = [sys.executable, "-X", "dev", "-W", "ignore", "-m", "restore_nets.cli"]
    result = subprocess.run(
        [*command, "restore", "m.safetensors", "absent.png", "--out", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" in result.stderr

"""Folders of restored photos are scored as single photos are."""

from __future__ import annotations

import math

import pytest
import torch

from restore_nets import cli
from restore_nets.evaluation import evaluate, mean, table
from restore_nets.images import read_image, write_image
from restore_nets.metrics import score


@pytest.fixture
def folders(tmp_path):
    """Two photos, and what is nearly the same, once under another suffix."""
    generator = torch.Generator().manual_seed(0)
    for folder in ("restored", "target"):
        (tmp_path / folder).mkdir()
    for name, own in (("b", "b.png"), ("a", "a.jpg")):
        photo = torch.rand(3, 24, 31, generator=generator)
        write_image(tmp_path / "target" / f"{name}.png", photo)
        write_image(tmp_path / "restored" / own, photo * 0.9)
    (tmp_path / "restored" / "notes.txt").write_text("not a photo")
    return tmp_path / "restored", tmp_path / "target"


@pytest.mark.parametrize("preset", ["derain", "denoise"])
def test_scores_are_those_of_the_pairs(folders, preset):
    restored, target = folders
    scores = dict(evaluate(*folders, preset))
    assert list(scores) == ["a", "b"]
    for name, file in (("a", "a.jpg"), ("b", "b.png")):
        assert scores[name] == score(read_image(restored / file), read_image(target / f"{name}.png"), preset)
    assert mean(scores).psnr == pytest.approx((scores["a"].psnr + scores["b"].psnr) / 2)
    assert table(scores).splitlines()[-1].startswith("mean,")


def test_equal_photos(folders):
    _, target = folders
    assert all(s.psnr == math.inf and s.ssim == 1 for _, s in evaluate(target, target, "derain"))


def test_command(folders, tmp_path, capsys):
    out = tmp_path / "scores.csv"
    assert cli.run(["evaluate", *map(str, folders), "--metric", "denoise", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "mean" in printed and "Compared: RGB, no crop, 11x11 Gaussian SSIM." in printed
    scores = dict(evaluate(*folders, "denoise"))
    assert out.read_text() == table(scores)
    assert f"{mean(scores).psnr:.2f}" in printed and f"{mean(scores).ssim:.4f}" in printed


def test_mistakes_are_one_line(folders, tmp_path, capsys):
    restored, target = folders

    def complaint(*arguments: str) -> str:
        assert cli.run(["evaluate", str(restored), str(target), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "preset must be one of derain, " in complaint("--metric", "derian")
    write_image(target / "a.png", torch.rand(3, 24, 30))
    assert "target must have the shape of image, (3, 24, 31); got (3, 24, 30)" in complaint()
    (target / "a.png").unlink()
    assert f"a is missing in {target} (1 without a partner)" in complaint()
    write_image(target / "b.jpg", torch.rand(3, 24, 30))
    assert "holds two photos named b: b.jpg, b.png" in complaint()
    target = tmp_path / "empty"
    target.mkdir()
    assert "empty holds no PNG or JPEG files" in complaint()

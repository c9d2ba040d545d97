"""Restoring: tiles without seams, odd sizes, bounded pieces, and files that fail alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from restore_nets import create_model
from restore_nets.images import read_colour_profile, read_image, write_image
from restore_nets.restoring import OVERLAP, SMALLEST_TILE, plan, restore, restore_files, spans
from restore_nets.tasks import create_task


class Local(nn.Module):
    """A network that sees 5x5 pixels around each, and remembers the pieces that it was given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 5, padding=2)
        self.sides: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sides += x.shape[2:]
        return 0.5 + 0.2 * torch.tanh(self.conv(x - 0.5))


class Level(nn.Module):
    """A network whose result depends on the whole piece: it moves the piece's mean to 0.5."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=(2, 3), keepdim=True) + 0.5


def photo(height: int, width: int) -> Tensor:
    coarse = torch.rand(1, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 1)


@pytest.mark.parametrize("tile", [SMALLEST_TILE, 256, 512])
@pytest.mark.parametrize("length", [1, 191, 192, 193, 257, 320, 321, 1000, 4000])
def test_spans_cover_a_side_with_weights_that_sum_to_one(length, tile):
    total = torch.zeros(length)
    for span in spans(length, tile):
        assert 0 <= span.start < span.end <= length
        assert span.start % 2 == 0
        assert span.end - span.start <= tile
        assert (span.weights > 0).all()
        total[span.start : span.end] += span.weights
    torch.testing.assert_close(total, torch.ones(length))


@pytest.mark.parametrize("size", [(300, 500), (193, 101), (450, 192)])
def test_tiles_of_a_local_network_equal_the_whole(size):
    image, model = photo(*size), Local()
    whole = restore(model, image, tile=0)
    model.sides.clear()
    tiled = restore(model, image, tile=SMALLEST_TILE)
    assert max(model.sides) <= SMALLEST_TILE
    assert len(model.sides) > 2
    # At a tile's edge the network sees zeros instead of the photo, where its weight is next to nothing:
    # two pixels deep, of weight at most 2.5 / OVERLAP, with outputs that differ by at most 0.4.
    assert (tiled - whole).abs().max() < 0.4 * 2.5 / OVERLAP
    inside = torch.ones(size, dtype=torch.bool)
    for axis, length in enumerate(size):
        for span in list(spans(length, SMALLEST_TILE)):
            for edge in {span.start, span.end} - {0, length}:
                inside.index_fill_(axis, torch.arange(edge - 3, edge + 3), False)
    torch.testing.assert_close(tiled[:, inside], whole[:, inside], rtol=0, atol=1e-6)


class Enlarging(Local):
    """A network that enlarges: it sees 5x5 pixels around each, and writes scale x scale for it."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(3, 3 * scale**2, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(super().forward(x), self.scale)


@pytest.mark.parametrize("scale", [2, 3])
def test_tiles_of_an_enlarging_network_equal_the_whole(scale):
    image, model = photo(200, 310), Enlarging(scale)
    whole = restore(model, image, tile=0)
    assert whole.shape == (3, scale * 200, scale * 310)
    with torch.no_grad():
        torch.testing.assert_close(whole, model(image[None])[0])
    model.sides.clear()
    tiled = restore(model, image, tile=SMALLEST_TILE)
    assert max(model.sides) <= SMALLEST_TILE
    assert len(model.sides) > 2
    assert tiled.shape == whole.shape
    # As above: at a tile's edge zeros are seen, where the weight is next to nothing.
    assert (tiled - whole).abs().max() < 0.4 * 2.5 / OVERLAP
    inside = torch.ones(whole.shape[1:], dtype=torch.bool)
    for axis, length in enumerate(image.shape[1:]):
        for span in spans(length, SMALLEST_TILE, scale):
            for edge in {span.start, span.end} - {0, length}:
                inside.index_fill_(axis, torch.arange(scale * (edge - 3), scale * (edge + 3)), False)
    torch.testing.assert_close(tiled[:, inside], whole[:, inside], rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [2, 4])
def test_spans_fade_at_the_size_of_the_result(scale):
    total = torch.zeros(scale * 1000)
    largest = 0.0
    for span in spans(1000, 256, scale):
        total[span.outside] += span.weights
        largest = max(largest, float(span.weights.diff().abs().max()))
    torch.testing.assert_close(total, torch.ones(scale * 1000))
    assert largest < 1.1 / (scale * (OVERLAP - 4))


class TwoOutputs(Local):
    """The same, with a second result at half resolution."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        restored = super().forward(x)
        return restored, nn.functional.avg_pool2d(x, 2)


@pytest.mark.parametrize("tile", [0, SMALLEST_TILE])
def test_of_two_outputs_the_first_is_the_photo(tile):
    image = photo(250, 301)
    assert torch.equal(restore(TwoOutputs(), image, tile), restore(Local(), image, tile))


def test_no_seams_where_tiles_differ_in_level():
    """Tiles whose results differ by a constant fade into each other: no step is steeper than the fade."""
    ramp = torch.linspace(0.2, 0.8, 700).expand(3, 200, 700).contiguous()
    restored = restore(Level(), ramp, tile=256)
    means = [float(ramp[0, 0, span.inside].mean()) for span in spans(700, 256)]
    largest_jump = max(abs(a - b) for a, b in pairwise(means))
    steps = (restored[:, :, 1:] - restored[:, :, :-1]).abs().max()
    assert largest_jump > 0.1  # cut without overlap, this would be a seam
    assert steps < 2 * largest_jump / OVERLAP


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (37, 61)])
def test_odd_sizes(size):
    torch.manual_seed(0)
    model = create_model("ddsa", dim=8, num_blocks=(1, 1, 1, 1), heads=(1, 2, 4, 8), ffn_expansion=1.0)
    image = photo(*size)
    with torch.no_grad():
        expected = model(image[None])[0].clamp(0, 1)
    torch.testing.assert_close(restore(model, image), expected)


@pytest.mark.parametrize("tile", [0, SMALLEST_TILE])
@pytest.mark.parametrize(
    ("name", "options", "scale"),
    [("panet", {"n_resblocks": 2, "n_feats": 4}, 1), ("pa_edsr", {"n_feats": 8, "scale": 3}, 3)],
)
def test_pyramid_networks(name, options, scale, tile):
    torch.manual_seed(0)
    model = create_model(name, **{"n_resblocks": 2, **options})
    image = photo(11, 18)
    with torch.no_grad():
        expected = model(image[None])[0].clamp(0, 1)
    assert expected.shape == (3, 11 * scale, 18 * scale)
    torch.testing.assert_close(restore(model, image, tile), expected)


def test_result_stays_in_range():
    class Wild(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * x - 1

    restored = restore(Wild(), photo(40, 40))
    assert restored.min() == 0
    assert restored.max() == 1


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"image must have shape \(3, H, W\); got \(1, 3, 8, 8\)"):
        restore(Local(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"tile must be 0 .* or at least 192 pixels; got 100"):
        restore(Local(), torch.zeros(3, 8, 8), tile=100)


@pytest.fixture
def folder(tmp_path):
    """Photos in a folder and in one inside it, and a file that is no photo."""
    root = tmp_path / "photos"
    (root / "deeper").mkdir(parents=True)
    write_image(root / "a.png", photo(20, 30))
    write_image(root / "b.jpg", photo(31, 17))
    write_image(root / "deeper" / "a.png", photo(9, 9))
    (root / "notes.txt").write_text("no photo")
    return root


def test_plan_keeps_names_and_subfolders(folder, tmp_path):
    out = tmp_path / "out"
    work = plan([folder], out)
    assert [job.destination for job in work.jobs] == [out / "a.png", out / "b.jpg", out / "deeper" / "a.png"]
    assert work.ignored == [folder / "notes.txt"]
    assert [job.destination for job in plan([folder / "b.jpg"], out).jobs] == [out / "b.jpg"]


def test_plan_ignores_results_of_an_earlier_run(folder):
    out = folder / "out"
    out.mkdir()
    write_image(out / "a.png", photo(4, 4))
    assert len(plan([folder], out).jobs) == 3


def test_plan_refuses_to_lose_a_photo(folder, tmp_path):
    with pytest.raises(ValueError, match=r"restoring .*a\.png would overwrite .*a\.png"):
        plan([folder], folder)
    with pytest.raises(ValueError, match="would overwrite"):
        plan([folder / "deeper" / "a.png", folder / "a.png"], folder)
    with pytest.raises(ValueError, match="would both be written"):
        plan([folder / "a.png", folder / "deeper" / "a.png"], tmp_path / "out")


def test_plan_names_what_is_wrong(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        plan([folder / "absent"], tmp_path)
    with pytest.raises(ValueError, match=r"notes\.txt is no PNG or JPEG"):
        plan([folder / "notes.txt"], tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no PNG or JPEG files in"):
        plan([tmp_path / "empty"], tmp_path / "out")


def test_a_broken_photo_does_not_stop_the_others(folder, tmp_path):
    broken = folder / "a.png"
    broken.write_bytes(broken.read_bytes()[:100])
    out, seen = tmp_path / "out", []
    failures = restore_files(Local(), plan([folder], out).jobs, 0, seen.append)
    assert list(failures) == [broken]
    assert "a.png is not a readable image" in failures[broken]
    assert len(seen) == 3
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*")) == ["b.jpg", "deeper/a.png"]
    assert read_image(out / "b.jpg").shape == (3, 31, 17)


def test_result_that_is_not_finite_is_a_failure(folder, tmp_path):
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.nan

    failures = restore_files(Broken(), plan([folder / "a.png"], tmp_path / "out").jobs, 0)
    assert "finite" in failures[folder / "a.png"]
    assert not list((tmp_path / "out").iterdir())


def test_network_gets_photos_as_its_task_takes_them(tmp_path):
    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    write_image(tmp_path / "a.png", photo(8, 8))
    jobs, task = plan([tmp_path / "a.png"], tmp_path / "out").jobs, create_task("demosaic")
    assert restore_files(Same(), jobs, 0, task=task) == {}
    expected = task.network_input(read_image(tmp_path / "a.png"))
    assert torch.equal(read_image(tmp_path / "out" / "a.png"), expected)


def test_colour_profile_survives(tmp_path):
    write_image(tmp_path / "a.png", photo(8, 8), b"profile")
    assert restore_files(Local(), plan([tmp_path / "a.png"], tmp_path / "out").jobs, 0) == {}
    assert read_colour_profile(tmp_path / "out" / "a.png") == b"profile"


def test_interrupt_leaves_no_half_written_file(folder, tmp_path):
    class Interrupted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        restore_files(Interrupted(), plan([folder], out).jobs, 0)
    assert not out.exists() or not list(out.rglob("*.*"))

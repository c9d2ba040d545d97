"""Training batches: a function of seed and step; pairs that belong together; clear errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from restore_nets.data import (
    DegradedCrops,
    Pair,
    PairedCrops,
    degraded_pairs,
    middle,
    read_pairs,
    read_photos,
    shrink,
    synthetic_crops,
)  # fmt: skip
from restore_nets.images import write_image
from restore_nets.photos import TRAINING, UNSEEN, shipped_photos
from restore_nets.rain import random_rain
from restore_nets.tasks import create_task

RAIN = create_task("derain")


def photo(height: int = 40, width: int = 50, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def test_batches_depend_on_seed_and_step_alone():
    photos = {"a": photo(), "b": photo(seed=1)}
    crops = DegradedCrops(RAIN, photos, steps=5, batch=3, crop=16, seed=7)
    forwards = [crops[step] for step in range(5)]
    backwards = [crops[step] for step in reversed(range(5))][::-1]
    for (x, y), (x_again, y_again) in zip(forwards, backwards, strict=True):
        assert x.shape == y.shape == (3, 3, 16, 16)
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)
    assert not torch.equal(forwards[0][1], forwards[1][1])
    other = DegradedCrops(RAIN, photos, steps=5, batch=3, crop=16, seed=8)
    assert not torch.equal(forwards[0][1], other[0][1])


def test_loader_processes_give_the_same_batches():
    crops = DegradedCrops(RAIN, {"a": photo()}, steps=4, batch=2, crop=16, seed=0)
    for workers in (0, 2):
        loader = DataLoader(crops, batch_size=None, sampler=range(4), num_workers=workers)
        for step, (x, y) in enumerate(loader):
            assert torch.equal(x, crops[step][0])
            assert torch.equal(y, crops[step][1])


def test_iteration_ends_after_the_last_step():
    assert len(list(DegradedCrops(RAIN, {"a": photo()}, 3, 1, 8, 0))) == 3


def exponents(crop: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """The gamma of each pixel in crop = original ** gamma, where it can be read off."""
    between = (original > 0.1) & (original < 0.9)
    return crop[between].clamp(min=1e-6).log() / original[between].log()


def test_crop_may_be_the_whole_photo_at_another_exposure():
    whole = photo(16, 16).float() / 255
    for crop in DegradedCrops(RAIN, {"a": photo(16, 16)}, steps=1, batch=8, crop=16, seed=0)[0][1]:
        gamma = min((exponents(crop, x) for x in (whole, whole.flip(-1))), key=torch.std)
        assert gamma.std() < 1e-4
        assert 0.6 < gamma.mean() < 2.2


def test_pairs_are_cropped_and_mirrored_together():
    clean = photo()
    pairs = [Pair("a", 255 - clean, clean)]
    seen = {}
    for step in range(8):
        x, y = PairedCrops(RAIN, pairs, steps=8, batch=2, crop=16, seed=0)[step]
        torch.testing.assert_close(x, 1 - y)
        seen[step] = y
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("scale", [2, 3])
def test_pairs_of_different_sizes_are_cropped_at_the_same_place(scale):
    task = create_task("sr", scale=scale)
    small = photo(20, 24)
    pairs = [Pair("a", small, small.repeat_interleave(scale, 1).repeat_interleave(scale, 2))]
    corners = set()
    for x, y in PairedCrops(task, pairs, steps=8, batch=4, crop=4 * scale, seed=0):
        assert x.shape == (4, 3, 4, 4)
        assert torch.equal(y, x.repeat_interleave(scale, 2).repeat_interleave(scale, 3))
        corners |= {tuple(crop[:, 0, 0].tolist()) for crop in x}
    assert len(corners) > 8
    with pytest.raises(ValueError, match=rf"crop must be a multiple of the scale of .*{scale}\); got 7"):
        PairedCrops(task, pairs, 1, 1, 7, 0)


def orientations(picture: torch.Tensor) -> list[np.ndarray]:
    """The eight that a square can have; the first and the fifth are upright."""
    return [
        x.rot90(turns, (1, 2)).contiguous().numpy()
        for x in (picture, picture.flip(-1)) for turns in range(4)
    ]  # fmt: skip


def test_crops_are_turned_where_the_task_allows_it():
    clean = photo(16, 16)
    turned = {orientation.tobytes() for orientation in orientations(clean)}
    for name, count in (("denoise", 8), ("jpeg", 8), ("demosaic", 8), ("derain", 2)):
        task = create_task(name)
        pairs = [Pair("a", clean, clean)]
        crops = synthetic_crops(task, {"a": clean}, 8, 8, 16, 0)
        if name == "derain":  # its exposures change the crops
            crops = PairedCrops(task, pairs, 8, 8, 16, 0)
        seen = {(255 * y).round().byte().contiguous().numpy().tobytes() for _, batch in crops for y in batch}
        assert seen <= turned
        assert len(seen) == count


def test_pairs_of_mosaics_keep_their_pattern():
    task = create_task("demosaic")
    (pair,) = degraded_pairs(task, {"a": 100 + photo() % 100}, 0)
    crops = PairedCrops(task, [pair], steps=20, batch=2, crop=15, seed=0)
    seen = set()
    for x, y in crops:
        for degraded, clean in zip(x, y, strict=True):
            assert torch.equal(degraded, task.network_input(clean))
            seen.add(float(clean[0, 0, 0]))
    assert len(seen) > 10
    synthetic = synthetic_crops(task, {"a": photo()}, 4, 2, 15, 0)
    for x, y in synthetic:
        assert torch.equal(x, torch.stack([task.network_input(clean) for clean in y]))


@pytest.mark.parametrize("name", ["jpeg", "sr"])
def test_crops_are_cut_out_of_degraded_photos(name):
    """A degraded pixel depends on its neighbours: so it also does at the border of a crop."""
    task = create_task(name)
    clean = {"a": photo(40, 48)}
    (pair,) = degraded_pairs(task, clean, 0)
    whole = pair.degraded
    degraded, _ = synthetic_crops(task, clean, 1, 6, 16, 0)[0]
    side = 16 // task.scale
    corners = [
        (y, x) for y in range(whole.shape[1] - side + 1) for x in range(whole.shape[2] - side + 1)
    ]  # fmt: skip
    places = {
        orientation.tobytes()
        for y, x in corners
        for orientation in orientations(whole[:, y : y + side, x : x + side])
    }
    for crop in degraded:
        assert (255 * crop).round().byte().contiguous().numpy().tobytes() in places


def test_noise_is_new_in_every_crop():
    task = create_task("denoise", sigma=30)
    clean = {"a": torch.full((3, 20, 20), 128, dtype=torch.uint8)}
    x, y = synthetic_crops(task, clean, 1, 2, 16, 0)[0]
    assert not torch.equal(x[0], x[1])
    assert torch.equal(y[0], y[1])
    (pair,) = degraded_pairs(task, {"a": torch.zeros(3, 20, 20, dtype=torch.uint8)}, 0)
    assert pair.degraded.min() < 0  # neither clipped nor rounded


def test_middle_of_a_pair():
    rain = Pair("a", photo(21, 33), photo(21, 33), torch.rand(21, 33))
    cut = middle(rain, 11, RAIN)
    assert torch.equal(cut.clean, rain.clean[:, 5:16, 11:22])
    assert torch.equal(cut.degraded, rain.degraded[:, 5:16, 11:22])
    assert torch.equal(cut.truth, rain.truth[5:16, 11:22])
    assert torch.equal(middle(rain, 40, RAIN).clean, rain.clean)

    small = photo(21, 33)
    enlarged = Pair("a", small, small.repeat_interleave(2, 1).repeat_interleave(2, 2))
    cut = middle(enlarged, 25, create_task("sr", scale=2))
    assert cut.clean.shape == (3, 24, 24)
    assert torch.equal(cut.clean, cut.degraded.repeat_interleave(2, 1).repeat_interleave(2, 2))

    (mosaic,) = degraded_pairs(create_task("demosaic"), {"a": 1 + photo(20, 33) // 2}, 0)
    cut = middle(mosaic, 10, create_task("demosaic"))
    assert (cut.degraded[0, 0::2, 0::2] > 0).all()


def test_photo_smaller_than_the_crop_is_named():
    with pytest.raises(ValueError, match=r"photo small \(50x10\) must be at least crop=16"):
        DegradedCrops(RAIN, {"a": photo(), "small": photo(10, 50)}, 1, 1, 16, 0)
    with pytest.raises(ValueError, match="at least one photo"):
        DegradedCrops(RAIN, {}, 1, 1, 16, 0)


def test_rain_for_evaluation_depends_on_the_seed():
    photos = {"a": photo(), "b": photo()}
    first, again, other = (degraded_pairs(RAIN, photos, seed) for seed in (0, 0, 1))
    assert [pair.name for pair in first] == ["a", "b"]
    assert torch.equal(first[0].degraded, again[0].degraded)
    assert not torch.equal(first[0].degraded, other[0].degraded)
    assert not torch.equal(first[0].degraded, first[1].degraded)  # a rain of its own each
    assert torch.equal(first[0].clean, photos["a"])


def test_rain_for_evaluation_tells_where_its_streaks_are():
    (pair,) = degraded_pairs(RAIN, {"black": torch.zeros(3, 40, 50, dtype=torch.uint8)}, 0)
    assert pair.truth is not None
    assert pair.truth.shape == (40, 50)
    rng = np.random.default_rng((1, 0, 0))
    light = random_rain(rng).light
    # On black, rain is its light times its opacity.
    for channel in pair.degraded:
        torch.testing.assert_close(channel / 255, light * pair.truth, rtol=0, atol=0.5 / 255 + 1e-6)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, image.float() / 255)


def test_folder_of_photos(tmp_path):
    for name in ("b.png", "a.png"):
        save(tmp_path / name, photo(seed=ord(name[0])))
    (tmp_path / "notes.txt").write_text("not a photo")
    photos = read_photos(tmp_path)
    assert list(photos) == ["a.png", "b.png"]
    assert torch.equal(photos["a.png"], photo(seed=ord("a")))
    with pytest.raises(FileNotFoundError, match="absent"):
        read_photos(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no PNG or JPEG"):
        read_photos(tmp_path / "empty")


def test_folder_of_pairs(tmp_path):
    save(tmp_path / "input" / "1.png", photo(seed=1))
    save(tmp_path / "target" / "1.png", photo(seed=2))
    (pair,) = read_pairs(tmp_path)
    assert torch.equal(pair.degraded, photo(seed=1))
    assert torch.equal(pair.clean, photo(seed=2))
    save(tmp_path / "input" / "2.png", photo())
    with pytest.raises(ValueError, match=r"2\.png is missing in target/"):
        read_pairs(tmp_path)
    save(tmp_path / "target" / "2.png", photo(40, 51))
    with pytest.raises(ValueError, match=r"2\.png must have one size.*50x40 and 51x40"):
        read_pairs(tmp_path)


def test_folder_of_pairs_of_different_sizes(tmp_path):
    save(tmp_path / "input" / "1.png", photo(20, 30))
    save(tmp_path / "target" / "1.png", photo(40, 60))
    (pair,) = read_pairs(tmp_path, scale=2)
    assert pair.degraded.shape == (3, 20, 30)
    assert pair.clean.shape == (3, 40, 60)
    with pytest.raises(ValueError, match=r"1\.png must be 3 times as wide and high.*30x20 and 60x40"):
        read_pairs(tmp_path, scale=3)
    with pytest.raises(ValueError, match=r"1\.png must have one size.*30x20 and 60x40"):
        read_pairs(tmp_path)


def test_shrinking():
    assert torch.equal(shrink(photo(40, 50), 50), photo(40, 50))
    assert shrink(photo(40, 80), 20).shape == (3, 10, 20)
    flat = torch.full((3, 60, 90), 77, dtype=torch.uint8)
    assert (shrink(flat, 31) == 77).all()


def test_shipped_photos_are_disjoint_and_photos():
    assert not set(TRAINING) & set(UNSEEN)
    training, unseen = shipped_photos(TRAINING), shipped_photos(UNSEEN)
    for name, image in {**training, **unseen}.items():
        assert image.dtype == torch.uint8, name
        assert min(image.shape[1:]) >= 300, name
        assert image.float().std() > 20, name  # something to see

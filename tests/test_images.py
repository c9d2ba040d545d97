"""Image files: what is read is what was written, and nothing is half-written."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from restore_nets import files
from restore_nets.images import read_colour_profile, read_image, to_bytes, write_image


def noise(height: int, width: int) -> torch.Tensor:
    """Random 8-bit levels as an image."""
    levels = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0))
    return levels.float() / 255


@pytest.mark.parametrize("size", [(1, 1), (7, 13), (32, 20)])
def test_png_keeps_every_level(tmp_path, size):
    image = noise(*size)
    write_image(tmp_path / "a.png", image)
    read = read_image(tmp_path / "a.png")
    assert read.dtype == torch.float32
    assert torch.equal(read, image)


def test_jpeg_stays_near(tmp_path):
    y, x = torch.meshgrid(torch.linspace(0, 1, 40), torch.linspace(0, 1, 50), indexing="ij")
    image = torch.stack((x, y, 1 - x))
    write_image(tmp_path / "a.JPG", image)
    with Image.open(tmp_path / "a.JPG") as file:
        assert file.format == "JPEG"
    # Quality 95 quantises smooth content by a few of 255 levels.
    assert (read_image(tmp_path / "a.JPG") - image).abs().max() < 6 / 255


def test_values_are_clipped_and_rounded(tmp_path):
    image = torch.tensor([-0.5, 0.4999 / 255, 0.5001 / 255, 2.0]).view(1, 1, 4).repeat(3, 1, 1)
    write_image(tmp_path / "a.png", image)
    assert (read_image(tmp_path / "a.png")[0, 0] * 255).round().tolist() == [0, 0, 1, 255]


def test_grey_becomes_equal_channels(tmp_path):
    Image.fromarray(np.array([[0, 128, 255]], dtype=np.uint8)).save(tmp_path / "grey.png")
    expected = torch.tensor([0, 128, 255]) / 255
    assert torch.equal(read_image(tmp_path / "grey.png"), expected.view(1, 1, 3).repeat(3, 1, 1))


def test_16_bit_grey_is_read_in_full(tmp_path):
    Image.fromarray(np.array([[0, 1000, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    expected = torch.tensor([0, 1000 / 65535, 1])
    torch.testing.assert_close(read_image(tmp_path / "deep.png")[1, 0], expected)


def test_transparency_shows_white(tmp_path):
    pixels = np.array([[[10, 20, 30, 0], [10, 20, 30, 255]]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "alpha.png")
    assert to_bytes(read_image(tmp_path / "alpha.png"))[:, 0].T.tolist() == [[255, 255, 255], [10, 20, 30]]


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png", transparency=0)
    assert to_bytes(read_image(tmp_path / "palette.png"))[:, 0].T.tolist() == [
        [255, 255, 255],
        [200, 100, 50],
    ]


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 30, 20)


def test_colour_profile_is_kept(tmp_path):
    profile = b"not interpreted here" * 10
    write_image(tmp_path / "a.png", noise(4, 4), profile)
    assert read_colour_profile(tmp_path / "a.png") == profile
    write_image(tmp_path / "b.png", noise(4, 4))
    assert read_colour_profile(tmp_path / "b.png") is None


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    pixels = (noise(64, 64).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.98])
def test_truncated_file_is_one_line_that_names_it(tmp_path, kind, share):
    content = encoded(kind)
    path = tmp_path / "broken.png"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"broken\.png is not a readable image") as error:
        read_image(path)
    assert "\n" not in str(error.value)


def test_other_formats_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", format="BMP")
    with pytest.raises(ValueError, match="neither PNG nor JPEG"):
        read_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"must end in \.png"):
        write_image(tmp_path / "a.bmp", noise(4, 4))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        read_image(tmp_path / "absent.png")


@pytest.mark.parametrize("image", [torch.zeros(1, 4, 4), torch.zeros(2, 3, 4, 4)])
def test_other_shapes_are_refused(tmp_path, image):
    with pytest.raises(ValueError, match=r"must have shape \(3, H, W\)"):
        write_image(tmp_path / "a.png", image)


def test_nan_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="finite"):
        write_image(tmp_path / "a.png", torch.full((3, 2, 2), torch.nan))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, failure):
    path = tmp_path / "a.png"
    write_image(path, noise(4, 4))
    before = path.read_bytes()

    def save_half(self, target, **_):
        target.write_bytes(before[:20])
        raise failure

    monkeypatch.setattr(Image.Image, "save", save_half)
    with pytest.raises(type(failure)):
        write_image(path, noise(8, 8))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_written_whole_replaces_only_at_the_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with files.written_whole(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "permissions"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_written_files_have_the_permissions_of_any_new_file(tmp_path, umask, permissions):
    before = os.umask(umask)
    try:
        for name in ("new.txt", "replaced.txt"):
            if name == "replaced.txt":
                (tmp_path / name).touch(0o600)
            with files.written_whole(tmp_path / name) as temporary:
                temporary.unlink()  # as a library that writes a private file of its own and renames it
                temporary.touch(0o600)
            assert (tmp_path / name).stat().st_mode & 0o777 == permissions
    finally:
        os.umask(before)

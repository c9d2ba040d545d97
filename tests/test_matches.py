"""The matches of one pixel: the row of the full softmax; and their picture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from restore_kernels import use_backend
from restore_kernels.nn import PyramidAttention
from restore_kernels.pyramid_attention import reference
from restore_nets import create_model, figures
from restore_nets.match_figure import match_figure, match_picture
from restore_nets.matches import Matches, find_matches, pyramid_attention_of, textured_pixel

PIXELS = [(0, 0), (4, 6), (8, 10), (8, 0)]


@pytest.fixture(autouse=True)
def eager():
    with use_backend("eager"):
        yield


def photo(height: int = 9, width: int = 11) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def panet() -> nn.Module:
    torch.manual_seed(0)
    return create_model("panet", n_resblocks=2, n_feats=8)


def full_softmax(model: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    """The probabilities of every pixel (H * W, h_i, w_i), from all scores of the reference."""
    attention = pyramid_attention_of(model)
    seen: list[torch.Tensor] = []
    handle = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(image[None])
        handle.remove()
        query, keys, _ = attention.project(seen[0])
        scores = reference.scores(
            query.double(), [key.double() for key in keys], attention.patch_size, attention.softmax_scale,
            attention.eps,
        )  # fmt: skip
    probabilities = scores.softmax(dim=2)[0]
    if attention.hard:
        probabilities = (probabilities == probabilities.amax(dim=1, keepdim=True)).double()
    levels = probabilities.split([key.shape[2] * key.shape[3] for key in keys], dim=1)
    return [level.unflatten(1, key.shape[2:]) for level, key in zip(levels, keys, strict=True)]


@pytest.mark.parametrize("options", [{}, {"patch_size": 5}, {"hard": True}], ids=str)
def test_a_pixels_matches_are_its_row_of_the_softmax(panet, options):
    for name, value in options.items():
        setattr(pyramid_attention_of(panet), name, value)
    image = photo()
    rows = full_softmax(panet, image)
    for row, column in PIXELS:
        matches = find_matches(panet, image, (row, column))
        assert matches.pixel == (row, column)
        assert sum(matches.shares) == pytest.approx(1, abs=1e-6)
        for level, expected in zip(matches.probabilities, rows, strict=True):
            torch.testing.assert_close(level, expected[row * 11 + column].float(), rtol=1e-5, atol=1e-9)


def test_super_resolution_matches_on_the_small_image():
    model = create_model("pa_edsr", n_resblocks=2, n_feats=8, reduction=2)
    shapes = [tuple(level.shape) for level in find_matches(model, photo(), (2, 3)).probabilities]
    assert shapes == [(9, 11), (8, 9), (7, 8), (6, 7), (5, 6)]


def test_nothing_is_left_behind(panet):
    image = photo()
    expected = panet.eval()(image[None])
    find_matches(panet, image, (0, 0))
    assert torch.equal(panet(image[None]), expected)


def test_nothing_after_the_projections_runs(panet, monkeypatch):
    def never(*args, **options):
        raise AssertionError

    monkeypatch.setattr("restore_kernels.nn.pyramid.pyramid_attention", never)
    find_matches(panet, photo(), (0, 0))


@pytest.mark.parametrize("pixel", [(9, 0), (0, 11), (-1, 0)], ids=str)
def test_pixels_outside(panet, pixel):
    with pytest.raises(ValueError, match="pixel must be in an image of 9 rows and 11 columns; got"):
        find_matches(panet, photo(), pixel)


def test_networks_without_pyramid_attention(panet):
    with pytest.raises(ValueError, match="model must contain a PyramidAttention; got Conv2d"):
        find_matches(nn.Conv2d(3, 3, 1), photo(), (0, 0))

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = PyramidAttention(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(ValueError, match="Unused does not use its PyramidAttention"):
        find_matches(Unused(), photo(), (0, 0))


def test_texture_is_found_and_an_edge_is_not():
    image = torch.zeros(3, 64, 96)
    image[:, :, 40:] = 1  # an edge
    image[:, 20:26, 60:66] = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    row, column = textured_pixel(image)
    assert 18 <= row < 28
    assert 58 <= column < 68


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 40)], ids=str)
def test_a_textured_pixel_is_in_the_image(size):
    row, column = textured_pixel(photo(*size))
    assert 0 <= row < size[0]
    assert 0 <= column < size[1]


@pytest.mark.parametrize("size", [(1, 1), (24, 36)], ids=str)
def test_figure(panet, size):
    image = photo(*size)
    figure = match_figure(panet, image)
    titles = [axes.get_title() for axes in figure.axes[:6]]
    assert titles[0] == "the pixel"
    shares = find_matches(panet, image, textured_pixel(image)).shares
    for title, share, i in zip(titles[1:], shares, range(5), strict=True):
        height, width = (max(1, (10 - i) * side // 10) for side in size)
        assert title == f"{width} × {height} pixels: {share:.0%} of the weight"
    picture = figures.png(figure)
    assert picture.shape[0] == 3
    assert picture.std() > 0


def test_the_brightest_spot_is_the_best_match(panet):
    image = photo(24, 36)
    matches = find_matches(panet, image, (10, 20))
    figure = match_figure(panet, image, (10, 20))
    for axes, level in zip(figure.axes[1:6], matches.probabilities, strict=True):
        colour = torch.as_tensor(axes.images[1].get_array().filled())
        brightest = int(level.argmax())
        assert colour.flatten()[brightest] == colour.max()


def test_shares():
    assert Matches((0, 0), [torch.full((2, 2), 0.125), torch.full((1, 2), 0.25)]).shares == [0.5, 0.5]


@pytest.mark.parametrize(("name", "scale"), [("panet", 1), ("pa_edsr", 2)])
def test_picture_for_a_photo(name, scale):
    options = {"panet": {"n_feats": 8}, "pa_edsr": {"n_feats": 8, "reduction": 2, "scale": 2}}[name]
    model = create_model(name, n_resblocks=2, **options)
    clean = photo(24 * scale, 36 * scale)
    seen = photo(24, 36)
    row, column = textured_pixel(clean)
    expected = figures.png(match_figure(model, seen, (row // scale, column // scale)))
    assert torch.equal(match_picture(model, seen, clean), expected)


def test_no_picture_without_pyramid_attention():
    assert match_picture(nn.Conv2d(3, 3, 1), photo(), photo()) is None

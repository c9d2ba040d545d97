"""Networks that predict the photo itself begin near their input, and can still learn everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from restore_nets import create_model
from restore_nets.metrics import score
from restore_nets.starts import bicubic_kernels, pass_input_through
from restore_nets.tasks import create_task
from restore_nets.tasks.super_resolution import downscale, upscale


def photo(height: int = 24, width: int = 36) -> torch.Tensor:
    coarse = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 1)


def without_body(model: nn.Module) -> nn.Module:
    """The network of which only what is carried through remains."""
    with torch.no_grad():
        model.body[-1].weight.zero_()
        model.head[0].weight[3:].zero_()
        model.head[0].bias[3:].zero_()
    return model.eval()


def test_panet_begins_as_its_input():
    torch.manual_seed(0)
    model = create_model("panet", n_resblocks=2, n_feats=8)
    pass_input_through(model)
    with torch.no_grad():
        begun = model(photo()[None])[0]
        carried = without_body(model)(photo()[None])[0]
    torch.testing.assert_close(carried, photo())
    assert score(begun, photo(), "denoise").psnr > 20


def test_demosaicing_begins_with_bilinear_interpolation():
    torch.manual_seed(0)
    task, model = create_task("demosaic"), create_model("panet", n_resblocks=2, n_feats=8)
    pass_input_through(model, task.first_filter())
    mosaic = task.degrade(photo(), np.random.default_rng(0))
    with torch.no_grad():
        carried = without_body(model)(mosaic[None])[0]
    torch.testing.assert_close(carried[:, 1:-1, 1:-1], task.before(mosaic)[:, 1:-1, 1:-1])


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_pa_edsr_begins_as_an_enlargement(scale):
    torch.manual_seed(0)
    clean = photo(24, 48)
    small = downscale(clean, scale)
    model = create_model("pa_edsr", n_resblocks=2, n_feats=8, reduction=2, scale=scale)
    pass_input_through(model)
    with torch.no_grad():
        begun = model(small[None])[0]
        carried = without_body(model)(small[None])[0]
    assert score(begun, clean, f"sr-x{scale}").psnr > 20
    # Of the bicubic kernel all but its thin outer part is there.
    inside = (slice(None), slice(2 * scale, -2 * scale), slice(2 * scale, -2 * scale))
    assert (carried - upscale(small, scale))[inside].abs().max() < 0.1
    assert score(carried, upscale(small, scale).clamp(0, 1), f"sr-x{scale}").psnr > 25


@pytest.mark.parametrize("factor", [2, 3])
def test_kernels_are_those_of_bicubic_enlargement(factor):
    kernels = bicubic_kernels(factor)
    torch.testing.assert_close(kernels.sum(dim=(1, 2)), torch.ones(factor**2))
    # Pixels in opposite corners see opposite sides.
    assert torch.allclose(kernels, kernels.flip(0).flip(1, 2))
    if factor == 3:
        torch.testing.assert_close(kernels[4], nn.functional.pad(torch.ones(1, 1), (1, 1, 1, 1)))


def test_all_weights_go_on_learning():
    torch.manual_seed(0)
    model = create_model("panet", n_resblocks=2, n_feats=8)
    pass_input_through(model)
    (model(photo()[None]) - photo() ** 2).square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and bool(parameter.grad.abs().max() > 0), name

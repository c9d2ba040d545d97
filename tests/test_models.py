"""The networks by name: options, sizes, dtypes, formats, compilation, and that they learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import restore_kernels
from restore_nets import create_model, list_models, load_model, save_checkpoint
from restore_nets.models.blocks import ChannelNorm, reflect
from restore_nets.models.ddsa import SpatialFeedForward
from restore_nets.models.pa_edsr import PAEDSR
from restore_nets.models.panet import PANet

SMALL = {"dim": 8, "num_blocks": (1, 1, 1, 1), "heads": (1, 1, 2, 4)}
NETWORKS = {
    "drsformer": {"name": "drsformer", **SMALL},
    "drsformer without mefc": {"name": "drsformer", **SMALL, "mefc": False, "bias": True, "norm": "BiasFree"},
    "ddsa": {"name": "ddsa", **SMALL},
    "ddsa token": {"name": "ddsa", **SMALL, "layout": "token", "window_size": 4, "bias": True},
    # Reduced by 4, two channels would be left in a gate: often no ReLU of them fires, nor learns.
    "elf": {"name": "elf", "n_feat": 8, "reduction": 1},
    "association": {
        "name": "association", "n_feat": 8, "reduction": 1, "num_blocks": 1, "tokens": 3, "token_layers": 1,
    },
    "panet": {"name": "panet", "n_resblocks": 4, "n_feats": 8},
    "pa_edsr": {"name": "pa_edsr", "n_resblocks": 2, "n_feats": 16, "reduction": 2},
    "pa_edsr x3": {"name": "pa_edsr", "n_resblocks": 2, "n_feats": 16, "reduction": 2, "scale": 3},
}  # fmt: skip


@pytest.fixture(params=NETWORKS)
def network(request) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model(**NETWORKS[request.param]).eval()


@pytest.fixture(autouse=True)
def eager():
    with restore_kernels.use_backend("eager"):
        yield


def image(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def outputs(result: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The restored image, and the one at half resolution of the networks that return it."""
    return result if isinstance(result, tuple) else (result,)


def test_list_models():
    assert list_models() == ["association", "ddsa", "drsformer", "elf", "pa_edsr", "panet"]


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("drsformer", {}, 33_655_424),
        ("drsformer", {"mefc": False}, 32_610_304),
        ("panet", {}, 5_957_279),
        ("pa_edsr", {}, 40_811_870),
        ("pa_edsr", {"scale": 3}, 43_762_270),
        ("pa_edsr", {"scale": 4}, 43_172_190),
    ],
    ids=str,
)
def test_networks_have_the_published_sizes(name, options, parameters):
    with torch.device("meta"):
        model = create_model(name, **options)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"name": "drsfomer"},
            ValueError,
            "name must be one of association, ddsa, drsformer, elf, pa_edsr, panet; got 'drsfomer', did you",
        ),
        (
            {"name": "resnet"},
            ValueError,
            "name must be one of association, ddsa, drsformer, elf, pa_edsr, panet; got 'resnet'$",
        ),
        ({"head": 1}, TypeError, "options dim, .*; got 'head', did you mean heads"),
        ({"topk_ratio": 0.5}, TypeError, "drsformer has the options .*; got 'topk_ratio'"),
        ({"dim": 8.0}, TypeError, r"dim must be an integer; got 8\.0"),
        ({"dim": 0}, ValueError, "dim must be at least 1; got 0"),
        ({"dim": 7}, ValueError, "dim must be even; got 7"),
        ({"num_blocks": 4}, TypeError, "num_blocks must be a sequence of 4 integers; got 4"),
        ({"num_blocks": "4668"}, TypeError, "num_blocks must be a sequence of 4 integers"),
        ({"num_blocks": (4, 6, 6)}, ValueError, "num_blocks must have 4 entries, one per level; got 3"),
        ({"num_blocks": (4, 6, 6, 0)}, ValueError, r"num_blocks\[3\] must be at least 1; got 0"),
        ({"heads": (1, 2, 4, True)}, TypeError, r"heads\[3\] must be an integer; got True"),
        ({"heads": (1, 5, 4, 8)}, ValueError, r"heads\[1\] must divide its level's width, 96; got 5"),
        ({"ffn_expansion": "2"}, TypeError, "ffn_expansion must be a number; got '2'"),
        ({"ffn_expansion": -1}, ValueError, "ffn_expansion must be positive and finite; got -1"),
        ({"ffn_expansion": 0.01}, ValueError, "ffn_expansion must give at least 1 hidden channel"),
        ({"bias": 1}, TypeError, "bias must be True or False; got 1"),
        ({"norm": "withbias"}, ValueError, "norm must be one of WithBias, BiasFree.* did you mean WithBias"),
        ({"mefc": None}, TypeError, "mefc must be True or False; got None"),
        ({"name": "ddsa", "topk_ratio": 1.5}, ValueError, r"topk_ratio must be in \(0, 1\]; got 1.5"),
        ({"name": "ddsa", "topk_ratio": "1"}, TypeError, "topk_ratio must be a number; got '1'"),
        ({"name": "ddsa", "layout": "tokens"}, ValueError, "layout must be one of .*, did you mean token"),
        ({"name": "ddsa", "window_size": 0}, ValueError, "window_size must be at least 1; got 0"),
        ({"name": "elf", "n_feat": 9}, ValueError, "n_feat must be even and a multiple of 2 heads; got 9"),
        ({"name": "elf", "n_feat": 0}, ValueError, "n_feat must be at least 1; got 0"),
        ({"name": "elf", "kernel_size": 4}, ValueError, "kernel_size must be odd; got 4"),
        ({"name": "elf", "reduction": 64}, ValueError, "reduction must be at most n_feat=48; got 64"),
        ({"name": "elf", "bias": 0}, TypeError, "bias must be True or False; got 0"),
        ({"name": "elf", "tokens": 4}, TypeError, "elf has the options n_feat, .*; got 'tokens'"),
        ({"name": "association", "heads": 5}, ValueError, "n_feat must be even and a multiple of 5 heads"),
        ({"name": "association", "tokens": 0}, ValueError, "tokens must be at least 1; got 0"),
        (
            {"name": "association", "token_layers": 1.5},
            TypeError,
            r"token_layers must be an integer; got 1\.5",
        ),
        ({"name": "association", "num_blocks": -1}, ValueError, "num_blocks must be at least 1; got -1"),
        ({"name": "association", "ffn_expansion": 0.01}, ValueError, "ffn_expansion must give at least 1"),
        ({"name": "panet", "n_resblocks": 3}, ValueError, "n_resblocks must be even: half .*; got 3"),
        ({"name": "panet", "n_resblocks": 0}, ValueError, "n_resblocks must be at least 1; got 0"),
        ({"name": "panet", "n_feats": 1}, ValueError, "n_feats must be at least 2, .*; got 1"),
        ({"name": "panet", "colors": "rgb"}, TypeError, "colors must be an integer; got 'rgb'"),
        ({"name": "panet", "res_scale": 0}, ValueError, "res_scale must be positive and finite; got 0"),
        ({"name": "panet", "scale": 2}, TypeError, "panet has the options n_resblocks, .*; got 'scale'"),
        ({"name": "pa_edsr", "scale": 5}, ValueError, "scale must be one of 2, 3, 4; got 5"),
        ({"name": "pa_edsr", "scale": 2.0}, TypeError, r"scale must be an integer; got 2\.0"),
        ({"name": "pa_edsr", "n_feats": 4}, ValueError, "n_feats must be at least 8, .*; got 4"),
        ({"name": "pa_edsr", "reduction": 0}, ValueError, "reduction must be at least 1; got 0"),
        ({"name": "pa_edsr", "n_resblocks": 1.5}, TypeError, r"n_resblocks must be an integer; got 1\.5"),
    ],
    ids=str,
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message) as raised:
        create_model(**{"name": "drsformer", **options})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "shape",
    [(3, 8, 8), (1, 4, 8, 8), (1, 3, 0, 8), (0, 3, 8, 8)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_bad_input(network, shape):
    with pytest.raises(ValueError, match=r"x must have shape \(B, 3, H, W\), not empty; got"):
        network(torch.zeros(shape))


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 9), (3, 2), (13, 17), (24, 7)], ids=lambda size: "x".join(map(str, size))
)
def test_any_size_is_the_reflected_image_cropped(network, size):
    x = image(2, 3, *size, dtype=torch.float64)
    below, right = (-side % network.multiple for side in size)
    padded = torch.from_numpy(np.pad(x, ((0, 0), (0, 0), (0, below), (0, right)), mode="reflect"))
    network.double()
    enlarged = getattr(network, "scale", 1)
    for reduced, out, of_padded in zip((1, 2), outputs(network(x)), outputs(network(padded)), strict=False):
        height, width = (-(-enlarged * side // reduced) for side in size)
        assert out.shape == (2, 3, height, width)
        # Convolutions of other strides may round otherwise.
        torch.testing.assert_close(out, of_padded[:, :, :height, :width], rtol=0, atol=1e-12)


def test_reflect_is_reflection_padding():
    x = image(2, 3, 5, 6)
    assert torch.equal(reflect(reflect(x, 2, 3), 3, 2), F.pad(x, (0, 2, 0, 3), mode="reflect"))


def test_a_batch_is_its_images(network):
    x = image(2, 3, 16, 24, dtype=torch.float64)
    network.double()
    for batch, *images in zip(*(outputs(network(part)) for part in (x, x[:1], x[1:])), strict=True):
        # Products of a batch may add up in another order.
        torch.testing.assert_close(batch, torch.cat(images), rtol=0, atol=1e-12)


def test_channels_last(network):
    x = image(2, 3, 16, 24)
    last = network(x.to(memory_format=torch.channels_last))
    # Another memory format takes other convolution kernels; the output is near 1.
    torch.testing.assert_close(last, network(x), rtol=0, atol=1e-5)


def test_float32_is_near_float64(network):
    x = image(1, 3, 16, 24)
    out = network(x)
    exact = network.double()(x.double())
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-5, check_dtype=False)


def test_autocast(network):
    x = image(1, 3, 16, 24)
    expected = network(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = network(x)
        sum(x.sum() for x in outputs(out)).backward()
    if not isinstance(network, (PANet, PAEDSR)):  # which predict the image, and not what to add to it
        assert outputs(out)[0].dtype == torch.float32  # the image itself is not rounded
    # What is predicted is a few units at most, and bfloat16 holds 8 bits of it.
    torch.testing.assert_close(out, expected, rtol=0, atol=0.05, check_dtype=False)
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)


def test_every_parameter_gets_a_gradient(network):
    sum(x.square().sum() for x in outputs(network(image(1, 3, 16, 24)))).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == [name for name, p in network.named_parameters() if not p.requires_grad]


def test_a_whole_network_compiles_as_one_graph():
    """All of them, shortened, with their backward passes: tests/test_compiling.py."""
    network = create_model(**NETWORKS["ddsa"])
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    x = image(1, 3, 13, 16)
    torch.testing.assert_close(compiled(x), network(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["drsformer", "ddsa", "elf", "association", "panet", "pa_edsr"])
def test_gradients_are_right(name):
    torch.manual_seed(0)
    narrow = {"dim": 4, "heads": (1, 1, 1, 1), "ffn_expansion": 1.0}
    network = create_model(**NETWORKS[name] | (narrow if "dim" in NETWORKS[name] else {})).double()
    x = image(1, 3, 8, 8, dtype=torch.float64).requires_grad_()
    direction = image(1, 3, 8, 8, dtype=torch.float64) - 0.5

    def loss(x: torch.Tensor) -> torch.Tensor:
        return sum(((image(*y.shape, dtype=y.dtype) - 0.3) * y).sum() for y in outputs(network(x)))

    (grad,) = torch.autograd.grad(loss(x), x)
    with torch.no_grad():
        step = 1e-6
        difference = loss(x + step * direction) - loss(x - step * direction)
    # Central differences: the error is of the order step**2 plus 1e-16 / step.
    torch.testing.assert_close((grad * direction).sum(), difference / (2 * step), rtol=1e-7, atol=1e-7)


def test_bias_free_norm_divides_by_the_standard_deviation():
    norm = ChannelNorm(6, "BiasFree")
    assert list(norm.state_dict()) == ["weight"]
    norm.weight.data = torch.arange(1.0, 7.0)
    x = image(2, 6, 3, 4) + 2
    deviation = (x.var(dim=1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), x / deviation * norm.weight[:, None, None])
    half = norm.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    # Two roundings to 8 bits: of the quotient and of its product with the weight.
    torch.testing.assert_close(half.float(), norm.float()(x.bfloat16().float()), rtol=2**-7, atol=0)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 6)], ids=lambda size: "x".join(map(str, size)))
def test_spatial_feed_forward_takes_odd_sizes(size):
    x = image(1, 8, *size)
    assert SpatialFeedForward(8, 2.0, bias=False, norm="WithBias")(x).shape == x.shape


def test_ddsa_starts_near_its_input():
    torch.manual_seed(0)
    x = image(1, 3, 32, 32)
    assert (create_model("ddsa", dim=24, num_blocks=(1, 1, 1, 1))(x) - x).square().mean().sqrt() < 0.1


@pytest.mark.parametrize("layout", ["channel", "token"])
def test_ddsa_learns(layout):
    torch.manual_seed(0)
    network = create_model("ddsa", **SMALL, layout=layout)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    clean = image(2, 3, 32, 32) * 0.5
    streaked = clean.clone()
    streaked[:, :, :, ::8] += 0.4
    losses = []
    for _ in range(40):
        loss = F.l1_loss(network(streaked), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * F.l1_loss(streaked, clean).item(), losses


@pytest.mark.parametrize("name", ["panet", "pa_edsr x3"])
def test_checkpoints_of_the_pyramid_networks(name, tmp_path):
    """Published ones, and our own: shared activations, frozen shifts and buffers come back."""
    config = NETWORKS[name]
    torch.manual_seed(0)
    network = create_model(**config)
    state = {f"module.{key}": x for key, x in network.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "published.pth")
    save_checkpoint(network, tmp_path / "own.safetensors", config)
    x = image(1, 3, 9, 8)
    for loaded in (
        load_model(tmp_path / "published.pth", **config),
        load_model(tmp_path / "own.safetensors"),
    ):
        assert torch.equal(loaded(x), network(x))
        assert getattr(loaded, "scale", 1) == (3 if "x3" in name else 1)


def test_the_networks_take_the_backend_of_the_block():
    network = create_model("ddsa", **SMALL).double()
    with (
        restore_kernels.use_backend("triton"),
        pytest.raises(RuntimeError, match="backend 'triton' cannot run"),
    ):
        network(image(1, 3, 8, 8, dtype=torch.float64))

"""Association learning: its blocks, its half-sized images, the degradation mask and the tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conformance import check_runs
from torch import nn

import restore_kernels
from restore_kernels.nn import MultiDconvAttention
from restore_nets import create_model, load_model, save_checkpoint
from restore_nets.models.association import AssociationNetwork, DegradationMask
from restore_nets.models.multi_scale import Quadruple, Quarter
from restore_nets.models.subtasks import TwoTaskNetwork, half_size
from restore_nets.models.tokens import TokenAttention, TokenBranch

SMALL = {"name": "association", "n_feat": 8, "num_blocks": 1, "tokens": 3, "token_layers": 1}
NETWORKS = {"elf": {"name": "elf", "n_feat": 8}, "association": SMALL}


def image(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(autouse=True)
def eager():
    with restore_kernels.use_backend("eager"):
        yield


@pytest.fixture(params=NETWORKS)
def network(request) -> nn.Module:
    torch.manual_seed(0)
    return create_model(**NETWORKS[request.param]).eval()


@pytest.fixture
def association() -> AssociationNetwork:
    torch.manual_seed(0)
    model = create_model(**SMALL).eval()
    assert isinstance(model, AssociationNetwork)
    return model


@pytest.mark.parametrize(("name", "parameters"), [("elf", 1_223_972), ("association", 1_415_638)])
def test_the_networks_have_the_size_that_is_said(name, parameters):
    """ELF's is the published one."""
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("size", [(1, 1), (4, 6), (5, 7)], ids=str)
def test_half_size_averages_pixels(size):
    x = image(2, 3, *size, dtype=torch.float64)
    height, width = size
    rows, columns = height + height % 2, width + width % 2
    # Reflection about the last pixel; a single one is repeated.
    row = [min(i, max(2 * height - 2 - i, 0)) for i in range(rows)]
    column = [min(i, max(2 * width - 2 - i, 0)) for i in range(columns)]
    expected = x[:, :, row][:, :, :, column].unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(3, 5))
    torch.testing.assert_close(half_size(x), expected)


@pytest.mark.parametrize("size", [(1, 1), (13, 17), (16, 32)], ids=str)
def test_without_rain_both_outputs_are_the_image(network, size):
    """So the loss at half resolution compares like with like, whatever the size."""
    assert isinstance(network, TwoTaskNetwork)
    for tail in (network.dsnet.tail, network.ssnet.tail):
        nn.init.zeros_(tail.weight)
    x = image(2, 3, *size)
    background, half_background = network(x)
    assert torch.equal(background, x)
    assert torch.equal(half_background, half_size(x))


def test_checkpoints_keep_shared_activations(network, tmp_path):
    config = next(c for c in NETWORKS.values() if type(network) is type(create_model(**c)))
    path = tmp_path / "model.safetensors"
    save_checkpoint(network, path, config)
    loaded = load_model(path)
    for key, x in network.state_dict().items():
        assert torch.equal(x, loaded.state_dict()[key]), key
    assert loaded.dsnet.shallow_feat1[1].body[1] is loaded.dsnet.shallow_feat2[1].body[1]


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("bias", [False, True])
def test_multi_dconv_attention_is_attention_between_channels(backend, bias):
    torch.manual_seed(0)
    module = MultiDconvAttention(12, 2, bias).double()
    module.temperature.data = torch.tensor([0.5, 3.0], dtype=torch.float64).view(2, 1, 1)
    x = image(2, 12, 5, 7, dtype=torch.float64).requires_grad_()
    qkv = module.qkv_dwconv(module.qkv(x)).view(2, 3, 2, 6, 35)
    q, k, v = F.normalize(qkv[:, 0], dim=-1), F.normalize(qkv[:, 1], dim=-1), qkv[:, 2]
    attended = (module.temperature * q @ k.mT).softmax(dim=-1) @ v
    expected = module.project_out(attended.reshape(2, 12, 5, 7))
    check_runs(restore_kernels.explain(restore_kernels.topk_attention, q, k, v, [None]), backend)
    with restore_kernels.use_backend(backend):
        out = module(x)
    torch.testing.assert_close(out, expected)
    leaves = [x, *module.parameters()]
    for got, want in zip(
        torch.autograd.grad(out.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, want)


def test_token_attention_is_multi_head_attention():
    torch.manual_seed(0)
    ours = TokenAttention(12, 3).double()
    theirs = nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    theirs.in_proj_weight.data = torch.cat((ours.q.weight, ours.kv.weight))
    theirs.in_proj_bias.data = torch.cat((ours.q.bias, ours.kv.bias))
    theirs.out_proj.load_state_dict(ours.project_out.state_dict())
    queries, context = image(2, 5, 12, dtype=torch.float64), image(2, 7, 12, dtype=torch.float64, seed=2)
    torch.testing.assert_close(ours(queries, context), theirs(queries, context, context)[0])


def test_tokens_carry_what_is_far_away(association):
    """Without ORB, a pixel's result depends on every other pixel, through the tokens alone."""
    branch = association.dsnet.orsnet
    assert isinstance(branch, TokenBranch)
    branch.orb = nn.Identity()
    x = image(1, 8, 6, 40).requires_grad_()
    (grad,) = torch.autograd.grad(branch(x)[0, :, 0, 0].square().sum(), x)
    assert (grad.abs().sum(dim=1) > 0).all()


def test_mask_starts_undecided_and_rises_with_the_residual():
    mask = DegradationMask(8)
    strengths = torch.tensor([0.0, 0.06, 0.12, -0.12, 0.3])
    out = mask(strengths.expand(1, 3, 1, 5), image(1, 8, 1, 5)).flatten()
    expected = torch.sigmoid(torch.tensor([-2.4, 0.0, 2.4, 2.4, 9.6]))
    torch.testing.assert_close(out, expected)


def test_mask_cannot_fall_with_the_residual():
    mask = DegradationMask(8)
    mask.log_gain.data.fill_(-20.0)
    residual = image(1, 3, 1, 1).requires_grad_()
    (grad,) = torch.autograd.grad(mask(residual, torch.zeros(1, 8, 1, 1)).sum(), residual)
    assert (grad > 0).all()


def test_mask_learns_through_attention(association):
    background, _ = association(image(1, 3, 32, 32))
    background.square().sum().backward()
    for name, parameter in association.ssnet.stem.mask.named_parameters():
        assert parameter.grad.any(), name


def test_attention_looks_where_the_mask_is(association):
    """Features of the image have no part in what attention adds where the mask is 0."""
    stem = association.ssnet.stem
    q, k, v = (image(1, 8, 6, 6, seed=seed) for seed in (1, 2, 3))
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., :3] = 1
    changed = [x.clone() for x in (k, v)]
    for x in changed:
        x[..., 4:] = 0.0  # what the 3x3 convolutions reach from there lies under the mask
    before, after = stem.former.attn(q, k, v, mask), stem.former.attn(q, *changed, mask)
    torch.testing.assert_close(before, after)
    assert not torch.equal(stem.former.attn(q, k, v), stem.former.attn(q, *changed))


@pytest.mark.parametrize("size", [(1, 1), (13, 17), (16, 32)], ids=str)
def test_degradation_mask_of_any_size(association, size):
    mask = association.degradation_mask(image(2, 3, *size))
    assert mask.shape == (2, 1, *size)
    assert ((mask > 0) & (mask < 1)).all()


def test_degradation_mask_is_the_one_of_the_forward_pass(association):
    x = image(1, 3, 16, 16)
    seen = []
    association.ssnet.stem.mask.register_forward_hook(lambda module, args, out: seen.append(out))
    association(x)
    mask = association.degradation_mask(x)
    assert torch.equal(seen[0], seen[1])
    torch.testing.assert_close(mask, F.interpolate(seen[0], size=(16, 16), mode="bilinear"))


def test_association_starts_near_its_input():
    torch.manual_seed(0)
    x = image(1, 3, 32, 32)
    background, half_background = create_model("association", n_feat=24, num_blocks=1)(x)
    assert (background - x).square().mean().sqrt() < 0.1
    assert (half_background - half_size(x)).square().mean().sqrt() < 0.1


def test_association_learns_to_remove_streaks_and_where_they_are():
    torch.manual_seed(0)
    network = create_model(**SMALL)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    clean = image(2, 3, 32, 32) * 0.5
    streaked = clean.clone()
    streaked[:, :, :, ::8] += 0.4
    for _ in range(60):
        background, half_background = network(streaked)
        loss = F.l1_loss(background, clean) + 0.8 * F.l1_loss(half_background, half_size(clean))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert F.l1_loss(network(streaked)[0], clean) < 0.7 * F.l1_loss(streaked, clean)
        mask = network.degradation_mask(streaked)
    # Streaks lie on every eighth column; the fourth one from each is far from all.
    assert mask[..., ::8].mean() > mask[..., 4::8].mean() + 0.2


@pytest.mark.parametrize(("module", "factor"), [(Quadruple(), 4.0), (Quarter(), 0.25)], ids=["4", "1/4"])
@pytest.mark.parametrize("size", [(4, 4), (4, 8), (12, 20)], ids=str)
def test_resizing_by_four_is_bilinear(module, factor, size):
    """Compiled, too, where it is made of other operations."""
    torch.compiler.reset()
    x = image(2, 3, *size, dtype=torch.float64)
    expected = F.interpolate(x, scale_factor=factor, mode="bilinear")
    for resize in (module, torch.compile(module, backend="eager", fullgraph=True)):
        torch.testing.assert_close(resize(x), expected)

"""Other people's networks with their modules swapped: the same results, in all that is done to networks."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from patching_models import Attention, LayerNorm2d, Restorer
from torch import Tensor, nn

import restore_kernels
from restore_kernels import patch, use_backend
from restore_kernels.nn import (
    ChannelNorm,
    DenseConv2d,
    DepthwiseConv2d,
    MultiDconvAttention,
    PointwiseConv2d,
    TopKSparseAttention,
)

REPLACED = {
    "embed": DenseConv2d,
    "blocks.0.norm1": nn.Sequential,
    "blocks.0.norm1.body": ChannelNorm,
    "blocks.0.attn": MultiDconvAttention,
    "blocks.0.attn.qkv_dwconv": DepthwiseConv2d,
    "blocks.0.attn.qkv": PointwiseConv2d,
    "blocks.0.attn.project_out": PointwiseConv2d,
    "blocks.0.norm2": ChannelNorm,
    "blocks.0.ffn.project_in": PointwiseConv2d,
    "blocks.0.ffn.dwconv": DepthwiseConv2d,
    "blocks.0.ffn.project_out": PointwiseConv2d,
    "blocks.1.norm1": nn.Sequential,
    "blocks.1.norm1.body": ChannelNorm,
    "blocks.1.attn": TopKSparseAttention,
    "blocks.1.attn.qkv_dwconv": DepthwiseConv2d,
    "blocks.1.attn.qkv": PointwiseConv2d,
    "blocks.1.attn.project_out": PointwiseConv2d,
    "blocks.1.norm2": ChannelNorm,
    "blocks.1.ffn.project_in": PointwiseConv2d,
    "blocks.1.ffn.dwconv5x5": DepthwiseConv2d,
    "blocks.1.ffn.dwconv": DepthwiseConv2d,
    "blocks.1.ffn.project_out": PointwiseConv2d,
    "tail": DenseConv2d,
}


@pytest.fixture
def model() -> Restorer:
    torch.manual_seed(0)
    return Restorer()


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand((2, 3, 10, 12), generator=torch.Generator().manual_seed(1)).to(dtype)


def results(model: Callable[[Tensor], Tensor], x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *parameters])]


def as_near(got: list[Tensor], own: list[Tensor], exact: list[Tensor]) -> None:
    """The worst tensor is no further from the truth, for its size, than four times what eager's worst is."""
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in own]

    def worst(tensors: list[Tensor]) -> Tensor:
        pairs = zip(tensors, exact, strict=True)
        return torch.stack([(x - truth).abs().max() / truth.abs().max() for x, truth in pairs]).max()

    assert worst(got) <= 4 * worst(own)


def test_what_is_replaced(model):
    patched = patch(model)
    assert {x.name: x.new for x in patched.replaced} == REPLACED
    order = [name for name, _ in model.named_modules() if name in REPLACED]
    assert [x.name for x in patched.replaced] == order
    for name, module_class in REPLACED.items():
        assert type(model.get_submodule(name)) is module_class
    (skipped,) = patched.skipped
    assert (skipped.name, skipped.module_class) == ("down", nn.Conv2d)
    assert skipped.reason == "stride must be (1, 1); got (2, 2)"


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_the_same(model, dtype, backend):
    """Before, while and after; after, to the bit."""
    model, x = model.to(dtype), images(dtype)
    exact_model = copy.deepcopy(model).double()
    exact = results(exact_model, x.double(), list(exact_model.parameters()))
    parameters = list(model.parameters())
    before = results(model, x, parameters)
    with patch(model) as patched, use_backend(backend):
        assert patched.replaced
        as_near(results(model, x, parameters), before, exact)
    assert all(map(torch.equal, results(model, x, parameters), before))


def test_autocast(model):
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        own = model(x)
        with patch(model):
            got = model(x)
    as_near([got], [own], [copy.deepcopy(model).double()(x.double())])


def test_undo_leaves_nothing_behind(model):
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    patched = patch(model)
    patched.undo()
    patched.undo()
    for module, (module_class, settings) in zip(model.modules(), before, strict=True):
        assert type(module) is module_class
        assert vars(module) == settings


def test_nothing_but_the_class_changes(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("other devices' numbers"))
    model.blocks[0].requires_grad_(False)
    model.blocks[1].eval()
    objects = {name: id(x) for name, x in model.state_dict(keep_vars=True).items()}
    modules = [(id(x), x.training) for x in model.modules()]
    generator = torch.random.get_rng_state()
    with patch(model):
        assert {name: id(x) for name, x in model.state_dict(keep_vars=True).items()} == objects
        assert list(model.state_dict()) == list(objects)
        assert [(id(x), x.training) for x in model.modules()] == modules
        assert not any(x.requires_grad for x in model.blocks[0].parameters())
        assert torch.equal(torch.random.get_rng_state(), generator)
        assert torch.get_default_dtype() == torch.float32


def test_hooks_run_as_before_and_not_while_patching(model):
    ran: list[str] = []
    for name in REPLACED:
        if name.endswith("attn.project_out"):
            continue  # then its attention would not be swapped
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(f"pre {name}"))
        module.register_forward_hook(lambda *_, name=name: ran.append(f"post {name}"))
        module.register_full_backward_hook(lambda *_, name=name: ran.append(f"backward {name}"))
    model(images().requires_grad_()).sum().backward()
    before = sorted(ran)
    ran.clear()
    patched = patch(model)
    assert not ran and len(patched.replaced) == len(REPLACED)
    model(images().requires_grad_()).sum().backward()
    assert sorted(ran) == before
    ran.clear()
    patched.undo()
    model(images().requires_grad_()).sum().backward()
    assert sorted(ran) == before


def test_an_optimizer_goes_on(model):
    """Nine steps of AdamW, the middle three patched, are nine steps."""

    def train(model: nn.Module, patched_steps: range) -> list[float]:
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
        for step in range(9):
            patched = patch(model) if step in patched_steps else None
            optimizer.zero_grad()
            loss = (model(images()) - 0.5).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if patched:
                patched.undo()
        return losses

    twin = copy.deepcopy(model)
    expected, got = train(model, range(0)), train(twin, range(3, 6))
    assert expected[-1] < 0.9 * expected[0]
    assert got == pytest.approx(expected, rel=1e-4)


def test_copies_and_files(model):
    """deepcopy, a state dict into an unpatched model and back, the model as a file."""
    patch(model)
    expected = model(images())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), expected)
    assert not {id(x) for x in twin.parameters()} & {id(x) for x in model.parameters()}
    plain = Restorer()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(images()), expected, rtol=1e-4, atol=1e-5)
    model.load_state_dict(plain.state_dict())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(images()), expected)
    assert type(loaded.blocks[1].attn) is TopKSparseAttention


def test_a_patched_model_compiles_in_one_graph(model):
    torch.compiler.reset()
    patch(model)
    parameters = list(model.parameters())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, expected = results(compiled, images(), parameters), results(model, images(), parameters)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_a_compiled_model_is_patched_inside(model):
    torch.compiler.reset()
    compiled_with: list[str] = []

    def compiler(graph, inputs):
        compiled_with.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    expected = compiled(images())
    patched = patch(compiled)
    assert {x.name.removeprefix("_orig_mod.") for x in patched.replaced} == set(REPLACED)
    torch.testing.assert_close(compiled(images()), expected, rtol=1e-4, atol=1e-5)
    patched.undo()
    assert torch.equal(compiled(images()), expected)
    convolutions = [graph.count("conv2d") for graph in compiled_with[:2]]
    assert convolutions[1] < convolutions[0]  # compiled anew


def test_modules_compiled_in_place(model):
    torch.compiler.reset()
    for block in model.blocks:
        block.attn.compile(backend="aot_eager", fullgraph=True)
    expected = model(images())
    assert {x.name for x in patch(model).replaced} == set(REPLACED)
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "mode",
    [
        torch.inference_mode, torch.no_grad, lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16), lambda: use_backend("triton", "cuda"),
    ],
)  # fmt: skip
def test_the_caller_s_modes_do_not_matter(model, mode):
    with mode():
        assert {x.name for x in patch(model).replaced} == set(REPLACED)
    assert all(x.device.type == "cpu" for x in model.parameters())


def test_a_model_within_data_parallelism(model, tmp_path):
    """Patched after it was wrapped: its gradients still reach the reducer's hooks."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        reduced: list[int] = []

        def count(_, bucket):
            reduced.append(bucket.buffer().numel())
            future: torch.futures.Future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        wrapped.register_comm_hook(None, count)
        patched = patch(wrapped)
        assert {x.name.removeprefix("module.") for x in patched.replaced} == set(REPLACED)
        wrapped(images()).sum().backward()
        assert sum(reduced) == sum(x.numel() for x in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_twice_replaces_nothing_more(model):
    patch(model)
    again = patch(model)
    assert not again.replaced
    again.undo()
    assert type(model.blocks[1].attn) is TopKSparseAttention


def test_a_module_of_two_names_and_a_weight_of_two_modules():
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    other = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
    other.weight = conv.weight
    model = nn.Sequential(conv, other, conv)
    expected = model(torch.ones(1, 8, 5, 5))
    patched = patch(model)
    assert [x.name for x in patched.replaced] == ["0", "1"]
    assert model[0] is model[2] and model[1].weight is model[0].weight
    torch.testing.assert_close(model(torch.ones(1, 8, 5, 5)), expected)


def test_the_model_itself_may_be_one(model):
    norm = LayerNorm2d(6)
    with patch(norm) as patched:
        assert type(norm) is ChannelNorm and norm.eps == 1e-6
        assert "(the model)" in str(patched)
    assert type(norm) is LayerNorm2d


@pytest.mark.parametrize("size", [1, 3])
def test_a_convolution_takes_an_image_without_a_batch(size):
    conv, x = nn.Conv2d(8, 8, size, padding=size // 2, groups=8 if size > 1 else 1), torch.randn(8, 5, 6)
    expected = conv(x)
    assert patch(conv).replaced
    torch.testing.assert_close(conv(x), expected)


def test_a_block_ends_after_an_error(model):
    with pytest.raises(ZeroDivisionError), patch(model):
        raise ZeroDivisionError
    assert type(model.blocks[0].attn) is Attention


def test_undo_does_not_guess(model):
    """A module that has become something else in the meantime is not undone, nor is anything else."""
    patched = patch(model)
    nn.utils.parametrizations.weight_norm(model.blocks[0].ffn.dwconv)
    with pytest.raises(RuntimeError, match="DepthwiseConv2d that was swapped in is now a Parametrized"):
        patched.undo()
    assert type(model.blocks[1].attn) is TopKSparseAttention


def test_print(model):
    """Also in the README."""
    text = str(patch(model))
    assert text in (Path(__file__).parents[1] / "README.md").read_text()
    lines = text.splitlines()
    assert lines[0] == "replaced: 23"
    assert "     1  Attention -> TopKSparseAttention  (blocks.1.attn)" in lines
    first = "blocks.0.attn.qkv_dwconv, blocks.0.ffn.dwconv, blocks.1.attn.qkv_dwconv, ..."
    assert f"     5  Conv2d -> DepthwiseConv2d  ({first})" in lines
    assert lines[-2:] == ["skipped: 1", "     1  Conv2d: stride must be (1, 1); got (2, 2)  (down)"]


@pytest.mark.parametrize("rules", [{"Conv2d": None}, {nn.Conv2d: 3}])
def test_only_rules(rules):
    with pytest.raises(TypeError, match="rules must map classes to functions or None; got"):
        patch(nn.Conv2d(4, 4, 1), rules)


def test_only_modules():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module; got dict"):
        restore_kernels.patch({})  # type: ignore[arg-type]

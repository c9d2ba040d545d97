"""Top-k attention inside the rest of PyTorch: autocast, torch.compile, torch.func, memory formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import conformance
import pytest
import torch
from attention_problems import INTERPRETED, LAYOUTS
from topk_attention_problems import BACKENDS, FUSED
from torch import Tensor

from restore_kernels import topk_attention, use_backend
from restore_kernels.nn import DynamicDualAttention, TopKSparseAttention

SHAPES = {
    "channel": ((1, 2, 6, 20),) * 3,
    "token": ((1, 2, 9, 6), (1, 2, 7, 6), (1, 2, 7, 5)),
}
COMPILED = [backend for backend in BACKENDS if backend not in INTERPRETED]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(conformance.DEVICE, dtype)


def qkv(layout: str, *batch: int) -> list[Tensor]:
    return [randn(*batch, *shape, seed=i) for i, shape in enumerate(SHAPES[layout])]


def close(a: Tensor, b: Tensor) -> None:
    """Equal but for the order of sums: another program may split the same sum differently."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield


class Graphs:
    """A compiler backend that runs graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        self.graphs.append(graph)
        return graph.forward

    def run_fused(self) -> list[bool]:
        """Of each graph, whether it calls an operator of ours."""
        return ["topk_attention" in str([node.target for node in x.graph.nodes]) for x in self.graphs]


COMPILERS = [(backend, "aot_eager") for backend in COMPILED]
COMPILERS += [(backend, "inductor") for backend in COMPILED if backend != "eager"]


@pytest.mark.parametrize(("layout", "projected"), [("channel", False), ("channel", True), ("token", False)])
@pytest.mark.parametrize(("backend", "compiler"), COMPILERS)
def test_compiles_in_one_graph_with_its_backward(backend, compiler, layout, projected):
    def call(q, k, v, temperature, weights, *out_proj):
        options = {"out_proj": out_proj[0]} if out_proj else {}
        out = topk_attention(
            2 * q, k, v, [2, 3, None], temperature=temperature, weights=weights, layout=layout,
            backend=backend, **options,
        )  # fmt: skip
        return out.sigmoid()

    inputs = [*qkv(layout), randn(2, 1, 1, seed=3), randn(3, seed=4)]
    inputs += [randn(8, 12, seed=5)] if projected else []
    inputs = [x.requires_grad_() for x in inputs]
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    out, expected = compiled(*inputs), call(*inputs)
    close(out, expected)
    grads = (torch.autograd.grad(x.square().sum(), inputs) for x in (out, expected))
    for grad, expected_grad in zip(*grads, strict=True):
        close(grad, expected_grad)


@pytest.mark.parametrize("backend", COMPILED)
def test_a_compiled_module_trains(backend):
    torch.manual_seed(0)
    module = TopKSparseAttention(16, 2, bias=True).to(conformance.DEVICE)
    x = randn(2, 16, 8, 6)
    with use_backend(backend):
        expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        grads = torch.autograd.grad(compiled(x).square().sum(), list(module.parameters()))
    for grad, expected_grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", FUSED)
def test_the_choice_of_a_backend_is_never_stale(backend):
    """Leaving or entering a block after compilation compiles again."""
    graphs = Graphs()
    compiled = torch.compile(lambda *x: topk_attention(*x, [2, None]), fullgraph=True, backend=graphs)
    inputs = qkv("channel")
    ran = []
    for name in (backend, "eager", backend):
        with use_backend(name):
            count = len(graphs.graphs)
            compiled(*inputs)
            ran.append(len(graphs.graphs) - count)
    assert ran == [1, 1, 0]
    fused, eager = (
        any("topk_attention" in str(node.target) for node in g.graph.nodes) for g in graphs.graphs
    )
    assert (fused, eager) == (True, False)


def test_a_block_inside_of_the_compiled_region():
    def call(*inputs: Tensor) -> Tensor:
        with use_backend("eager"):
            return topk_attention(*inputs, [2, None])

    graphs = Graphs()
    compiled = torch.compile(call, fullgraph=True, backend=graphs)
    close(compiled(*qkv("channel")), call(*qkv("channel")))
    assert graphs.run_fused() == [False]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", COMPILED)
def test_one_graph_serves_every_size(backend, layout, normalize):
    """Also where None stands for the length of a row, which is dynamic in the token layout."""
    graphs = Graphs()

    def call(*inputs: Tensor) -> Tensor:
        return topk_attention(*inputs, [2, None], layout=layout, normalize=normalize, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend=graphs, dynamic=True)
    for size in (9, 12, 20):
        shape = (2, 2, 6, size) if layout == "channel" else (2, 2, size, 6)
        inputs = [randn(*shape, seed=i) for i in range(3)]
        close(compiled(*inputs), call(*inputs))
    assert len(graphs.graphs) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_is_that_of_a_matrix_product(backend, layout, dtype):
    inputs = [x.requires_grad_() for x in qkv(layout)]
    inputs[1] = inputs[1].detach().to(dtype).requires_grad_()  # autocast mixes them
    temperature, projection = randn(2, 1, 1).requires_grad_(), randn(8, 12).requires_grad_()
    options = {"out_proj": projection} if layout == "channel" else {}
    with torch.autocast(conformance.DEVICE, dtype):
        out = topk_attention(
            *inputs, [2, None], temperature=temperature, layout=layout, backend=backend, **options
        )
        product = inputs[0] @ inputs[0].mT
    assert out.dtype == product.dtype == dtype
    leaves = [*inputs, temperature, *options.values()]
    for leaf, grad in zip(leaves, torch.autograd.grad(out.float().sum(), leaves), strict=True):
        assert grad.dtype == leaf.dtype
    cast = [x.to(dtype) for x in inputs]
    options = {name: x.to(dtype) for name, x in options.items()}
    expected = topk_attention(
        *cast, [2, None], temperature=temperature, layout=layout, backend=backend, **options
    )
    assert torch.equal(out, expected)


def test_autocast_leaves_float64_alone():
    inputs = [x.double() for x in qkv("channel")]
    with torch.autocast(conformance.DEVICE, torch.bfloat16):
        assert topk_attention(*inputs, [2], backend="eager").dtype == torch.float64


@pytest.mark.parametrize("wanted", range(5))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", FUSED)
def test_gradient_of_one_input_alone(backend, layout, wanted):
    inputs = [*qkv(layout), randn(2, 1, 1), randn(2)]
    inputs[wanted].requires_grad_()

    def gradient(name: str) -> Tensor:
        q, k, v, temperature, weights = inputs
        out = topk_attention(
            q, k, v, [2, None], temperature=temperature, weights=weights, layout=layout, backend=name
        )
        return torch.autograd.grad(out.square().sum(), inputs[wanted])[0]

    close(gradient(backend), gradient("eager"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", FUSED)
def test_inference_mode_keeps_no_graph(backend, layout):
    inputs = [x.requires_grad_() for x in qkv(layout)]
    expected = topk_attention(*inputs, [2, None], layout=layout, backend=backend)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = topk_attention(*inputs, [2, None], layout=layout, backend=backend)
        assert not out.requires_grad and torch.equal(out, expected)


def _loss(layout: str, backend: str) -> Callable[..., Tensor]:
    def loss(q: Tensor, k: Tensor, v: Tensor, *out_proj: Tensor) -> Tensor:
        more = {"out_proj": out_proj[0]} if out_proj else {}
        return topk_attention(q, k, v, [2, None], layout=layout, backend=backend, **more).square().sum()

    return loss


def _transformed(transform: Callable, inputs: list[Tensor], layout: str, backend: str) -> None:
    results = [transform(_loss(layout, name))(*inputs) for name in (backend, "eager")]
    for result, expected in zip(*results, strict=True):
        close(result, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", FUSED)
def test_func_grad(backend, layout):
    _transformed(lambda f: torch.func.grad(f, argnums=(0, 1, 2)), qkv(layout), layout, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", FUSED)
def test_func_vmap(backend, layout):
    """Mapped over the last dimension of one input and the first of another; the third is shared."""
    q, k, v = qkv(layout, 2)
    inputs = [q.movedim(0, -1), k[0], v]
    vmap = lambda f: lambda *x: [torch.func.vmap(f, in_dims=(-1, None, 0))(*x)]  # noqa: E731
    _transformed(vmap, inputs, layout, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", FUSED)
def test_func_per_sample_gradients(backend, layout):
    _transformed(lambda f: torch.func.vmap(torch.func.grad(f, (0, 1, 2))), qkv(layout, 2), layout, backend)


@pytest.mark.parametrize("mapped", [None, 0])
@pytest.mark.parametrize("backend", FUSED)
def test_func_per_sample_gradients_of_a_projection(backend, mapped):
    """A shared projection has a gradient per sample too; a mapped one has no batch to join."""
    projection = randn(2, 8, 12) if mapped == 0 else randn(8, 12)

    def per_sample(f: Callable) -> Callable:
        return torch.func.vmap(torch.func.grad(f, (0, 1, 2, 3)), in_dims=(0, 0, 0, mapped))

    _transformed(per_sample, [*qkv("channel", 2), projection], "channel", backend)


@pytest.mark.parametrize("backend", FUSED)
def test_func_gradient_through_vmap(backend):
    def total(f: Callable) -> Callable:
        mapped = torch.func.vmap(f, in_dims=(0, None, 0))
        return torch.func.grad(lambda *x: mapped(*x).sum(), argnums=(0, 1, 2))

    q, k, v = qkv("channel", 2)
    _transformed(total, [q, k[0], v], "channel", backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", FUSED)
def test_a_second_derivative_is_an_error_that_names_the_way_out(backend, layout):
    q, k, v = (x.requires_grad_() for x in qkv(layout))
    (grad,) = torch.autograd.grad(_loss(layout, backend)(q, k, v), q, create_graph=True)
    with pytest.raises(
        RuntimeError, match=f"no second derivative on backend '{backend}'; backend='eager' has"
    ):
        grad.sum().backward()
    second = torch.func.grad(lambda q: torch.func.grad(_loss(layout, backend))(q, k, v).sum())
    with pytest.raises(RuntimeError, match="no second derivative"):
        second(q.detach())


@pytest.mark.parametrize("backend", FUSED)
def test_forward_mode_is_an_error(backend):
    q, k, v = qkv("channel")
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda q: _loss("channel", backend)(q, k, v), (q,), (q,))


MODULES = [
    lambda: TopKSparseAttention(12, 2, bias=True),
    lambda: DynamicDualAttention(12, 2),
    lambda: DynamicDualAttention(12, 2, layout="token", window_size=4),
]


@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize("backend", FUSED)
def test_modules_keep_channels_last(backend, make):
    torch.manual_seed(0)
    module, x = make().to(conformance.DEVICE), randn(1, 12, 7, 5)
    with use_backend(backend):
        expected = module(x)
        module = module.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        out = module(x)
        out.square().sum().backward()
    close(out, expected)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize("backend", FUSED)
def test_modules_agree_with_eager(backend, make):
    torch.manual_seed(0)
    module, x = make().to(conformance.DEVICE), randn(1, 12, 7, 5).requires_grad_()
    leaves = [x, *module.parameters()]
    results = []
    for name in (backend, "eager"):
        with use_backend(name):
            out = module(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", FUSED)
def test_runs_under_deterministic_algorithms(backend):
    q, k, v = (x.requires_grad_() for x in qkv("channel"))
    torch.use_deterministic_algorithms(True)
    try:
        _loss("channel", backend)(q, k, v).backward()
        with use_backend(backend):
            module = TopKSparseAttention(12, 2).to(conformance.DEVICE)
            module(randn(1, 12, 8, 8)).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert q.grad is not None and q.grad.isfinite().all()

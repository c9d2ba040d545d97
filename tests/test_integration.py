"""The operators inside the rest of PyTorch: autocast, torch.compile, memory formats, modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import conformance
import pytest
import torch
from attention_problems import INTERPRETED, LAYOUTS
from operators import OPERATORS, close, compiled, each_backend, fused, qkv, randn
from torch import Tensor

from restore_kernels import record, use_backend
from restore_kernels.nn import DynamicDualAttention, MultiInputAttention, TopKSparseAttention


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
        return ["_attention" in str([node.target for node in x.graph.nodes]) for x in self.graphs]


COMPILERS = [
    (operator, backend, compiler)
    for operator in OPERATORS
    for backend in operator.backends
    for compiler in ("aot_eager", "inductor")
    if compiled(backend) and (compiler, backend) != ("inductor", "eager")
]
GIVEN = [
    ("channel", "own"),
    ("channel", "own and out_proj"),
    ("token", "own"),
    ("channel", ""),
    ("token", ""),
]


@pytest.mark.parametrize(
    ("operator", "backend", "compiler", "layout", "given"),
    [(*row, *given) for row in COMPILERS for given in (GIVEN if row[-1] == "aot_eager" else GIVEN[:3])],
    ids=str,
)
def test_compiles_in_one_graph_with_its_backward(operator, backend, compiler, layout, given):
    options = {"temperature": randn(2, 1, 1, seed=4)}
    if "own" in given:
        options[operator.own] = operator.own_tensor(layout)
    if "out_proj" in given:
        options["out_proj"] = randn(8, 12, seed=5)
    inputs = [x.requires_grad_() for x in (*qkv(layout), *options.values())]

    def call(q, k, v, *more):
        named = dict(zip(options, more, strict=True))
        return operator(2 * q, k, v, **named, layout=layout, backend=backend).sigmoid()

    out, expected = torch.compile(call, fullgraph=True, backend=compiler)(*inputs), call(*inputs)
    close(out, expected)
    grads = (torch.autograd.grad(x.square().sum(), inputs) for x in (out, expected))
    for grad, expected_grad in zip(*grads, strict=True):
        close(grad, expected_grad)


@each_backend(fused)
def test_the_choice_of_a_backend_is_never_stale(operator, backend):
    """Leaving or entering a block after compilation compiles again."""
    graphs = Graphs()
    by_graph = torch.compile(lambda *x: operator(*x), fullgraph=True, backend=graphs)
    inputs = qkv("channel")
    ran = []
    for name in (backend, "eager", backend):
        with use_backend(name):
            count = len(graphs.graphs)
            by_graph(*inputs)
            ran.append(len(graphs.graphs) - count)
    assert ran == [1, 1, 0]
    assert graphs.run_fused() == [True, False]


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_a_block_inside_of_the_compiled_region(operator):
    def call(*inputs: Tensor) -> Tensor:
        with use_backend("eager"):
            return operator(*inputs)

    graphs = Graphs()
    by_graph = torch.compile(call, fullgraph=True, backend=graphs)
    close(by_graph(*qkv("channel")), call(*qkv("channel")))
    assert graphs.run_fused() == [False]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@each_backend(compiled)
def test_one_graph_serves_every_size(operator, backend, layout, normalize):
    """Also where None stands for the length of a row, which is dynamic in the token layout."""
    graphs = Graphs()
    options = {"layout": layout, "normalize": normalize, "backend": backend}

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return operator(q, k, v, **options, **({"mask": mask} if operator.own == "mask" else {}))

    by_graph = torch.compile(call, fullgraph=True, backend=graphs, dynamic=True)
    for size in (9, 12, 20):
        shape = (2, 2, 6, size) if layout == "channel" else (2, 2, size, 6)
        inputs = [*(randn(*shape, seed=i) for i in range(3)), randn(size).sigmoid()]
        close(by_graph(*inputs), call(*inputs))
    assert len(graphs.graphs) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@each_backend()
def test_autocast_is_that_of_a_matrix_product(operator, backend, layout, dtype):
    """Of q, k, v and out_proj; what is small and computed with in float32 stays as it is."""
    inputs = [x.requires_grad_() for x in qkv(layout)]
    inputs[1] = inputs[1].detach().to(dtype).requires_grad_()  # autocast mixes them
    small = {"temperature": randn(2, 1, 1), operator.own: operator.own_tensor(layout)}
    wide = {"out_proj": randn(8, 12)} if layout == "channel" else {}
    for x in (*small.values(), *wide.values()):
        x.requires_grad_()
    with torch.autocast(conformance.DEVICE, dtype):
        out = operator(*inputs, layout=layout, backend=backend, **small, **wide)
        product = inputs[0] @ inputs[0].mT
    assert out.dtype == product.dtype == dtype
    leaves = [*inputs, *small.values(), *wide.values()]
    for leaf, grad in zip(leaves, torch.autograd.grad(out.float().sum(), leaves), strict=True):
        assert grad.dtype == leaf.dtype
    cast = [x.to(dtype) for x in inputs]
    wide = {name: x.to(dtype) for name, x in wide.items()}
    assert torch.equal(out, operator(*cast, layout=layout, backend=backend, **small, **wide))


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_autocast_leaves_float64_alone(operator):
    inputs = [x.double() for x in qkv("channel")]
    with torch.autocast(conformance.DEVICE, torch.bfloat16):
        assert operator(*inputs, backend="eager").dtype == torch.float64


@pytest.mark.parametrize("wanted", range(5))
@pytest.mark.parametrize("layout", LAYOUTS)
@each_backend(fused)
def test_gradient_of_one_input_alone(operator, backend, layout, wanted):
    if operator.own == "mask" and backend in INTERPRETED and wanted < 3:
        pytest.skip("the interpreter shows no more than with top-k attention")
    inputs = [*qkv(layout), randn(2, 1, 1), operator.own_tensor(layout)]
    inputs[wanted].requires_grad_()

    def gradient(name: str) -> Tensor:
        q, k, v, temperature, own = inputs
        options = {"temperature": temperature, operator.own: own, "layout": layout}
        out = operator(q, k, v, **options, backend=name)
        return torch.autograd.grad(out.square().sum(), inputs[wanted])[0]

    close(gradient(backend), gradient("eager"))


@pytest.mark.parametrize("layout", LAYOUTS)
@each_backend(fused)
def test_inference_mode_keeps_no_graph(operator, backend, layout):
    inputs = [x.requires_grad_() for x in qkv(layout)]
    options = {operator.own: operator.own_tensor(layout), "layout": layout, "backend": backend}
    expected = operator(*inputs, **options)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = operator(*inputs, **options)
        assert not out.requires_grad and torch.equal(out, expected)


class MaskedAttentionOfOneImage(MultiInputAttention):
    """With its four inputs made of one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x.tanh(), 2 * x, x.mean(dim=1, keepdim=True).sigmoid())


TOPK, MASKED = OPERATORS
DIM = 6  # Triton's interpreter takes time for every channel of a depthwise convolution, hardly for its pixels
MODULES = [
    (TOPK, lambda: TopKSparseAttention(DIM, 2, bias=True)),
    (MASKED, lambda: MaskedAttentionOfOneImage(DIM, 2, bias=True)),
    (TOPK, lambda: DynamicDualAttention(DIM, 2)),
    (TOPK, lambda: DynamicDualAttention(DIM, 2, layout="token", window_size=4)),
]


def each_module(modules, wanted: Callable[[str], bool]) -> pytest.MarkDecorator:
    """Runs the test for every module and each wanted backend.

    All modules have convolutions, for which there are no CUDA C++ kernels: Triton's run.
    """
    pairs = [
        (("cuda", "triton") if name == "cuda" else (name,), make)
        for operator, make in modules
        for name in operator.backends
        if wanted(name)
    ]
    return pytest.mark.parametrize(("backends", "make"), pairs)


@each_module(MODULES, fused)
def test_modules_keep_channels_last(backends, make):
    torch.manual_seed(0)
    module, x = make().to(conformance.DEVICE), randn(1, DIM, 7, 5)
    with use_backend("eager"):
        expected = module(x)
    with use_backend(*backends):
        module = module.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        out = module(x)
        out.square().sum().backward()
    close(out, expected)
    assert out.is_contiguous(memory_format=torch.channels_last)


@each_module(MODULES, fused)
def test_modules_agree_with_eager(backends, make):
    torch.manual_seed(0)
    module, x = make().to(conformance.DEVICE), randn(1, DIM, 7, 5).requires_grad_()
    leaves = [x, *module.parameters()]
    results = []
    for names in (backends, ("eager",)):
        with use_backend(*names):
            out = module(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif("cuda" not in TOPK.backends, reason="needs the CUDA kernels, or their build for the host")
def test_of_several_backends_each_operator_gets_the_first_that_has_it():
    """Also in backward, and in a graph of torch.compile."""
    module, x = TopKSparseAttention(DIM, 2).to(conformance.DEVICE), randn(1, DIM, 5, 4)
    with use_backend("cuda", "triton"), record() as records:
        expected = module(x)
        expected.sum().backward()
    ran = {(each.operator, each.direction): each.backend for each in records}
    assert ran == {
        ("pointwise_conv", "forward"): "triton", ("pointwise_conv", "backward"): "triton",
        ("depthwise_conv", "forward"): "triton", ("depthwise_conv", "backward"): "triton",
        ("topk_attention_channel", "forward"): "cuda", ("topk_attention_channel", "backward"): "cuda",
    }  # fmt: skip
    with use_backend("cuda", "triton"):
        close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)


@each_module(MODULES[:2], fused)
def test_modules_run_under_deterministic_algorithms(backends, make):
    module, x = make().to(conformance.DEVICE), randn(1, DIM, 8, 8).requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        with use_backend(*backends):
            module(x).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert x.grad is not None and x.grad.isfinite().all()


@each_module(MODULES[:2], compiled)
def test_a_compiled_module_trains(backends, make):
    torch.manual_seed(0)
    module, x = make().to(conformance.DEVICE), randn(2, DIM, 8, 6)
    with use_backend(*backends):
        expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
        by_graph = torch.compile(module, fullgraph=True, backend="aot_eager")
        grads = torch.autograd.grad(by_graph(x).square().sum(), list(module.parameters()))
    for grad, expected_grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)

"""The attention module, the block and the networks reproduce the golden cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance import check_runs
from decisions import recorded, replayed
from golden_cases import GoldenCase, Results, load, relative_error, results
from torch import nn

import restore_kernels
from restore_kernels.nn import PyramidAttention, TopKSparseAttention
from restore_nets import create_model
from restore_nets.models.blocks import TransformerBlock
from restore_nets.models.drsformer import MixedScaleFeedForward
from restore_nets.models.gated import GatedBlockOptions, MultiInputBlock

EXACT = {torch.float64: 1e-9, torch.float32: 1e-6}  # by the dtype in which a case is stored
IN_FLOAT32 = 1e-4
# The float32 network's scores and ReLU inputs carry its rounding: some 1e-7 after one layer, more in depth.
NEAR_TIE = 1e-5


def attention_module(config: dict[str, Any]) -> nn.Module:
    return TopKSparseAttention(**config)


def sparse_block(config: dict[str, Any]) -> nn.Module:
    dim, bias = config["dim"], config["bias"]
    attention = TopKSparseAttention(dim, config["heads"], bias)
    feed_forward = MixedScaleFeedForward(dim, config["ffn_expansion"], bias)
    return TransformerBlock(dim, config["norm"], attention, feed_forward)


def multi_input_block(config: dict[str, Any]) -> nn.Module:
    options = GatedBlockOptions(config["dim"], config["ffn_expansion"], config["bias"], config["norm"])
    return MultiInputBlock(options, config["heads"])


def pyramid_module(config: dict[str, Any]) -> nn.Module:
    return PyramidAttention(**config)


def network(name: str) -> Callable[[dict[str, Any]], nn.Module]:
    return lambda config: create_model(name, **config)


TOPK, MASKED = restore_kernels.topk_attention, restore_kernels.masked_attention
PYRAMID = restore_kernels.pyramid_attention
BUILDERS = {
    "tksa_dim48_heads1": attention_module,
    "tksa_dim96_heads2_bias": attention_module,
    "tksa_block_dim48": sparse_block,
    "drsformer_small": network("drsformer"),
    "drsformer_small_no_mefc": network("drsformer"),
    "multi_input_block_dim48": multi_input_block,
    "elf_48": network("elf"),
}
PYRAMID_BUILDERS = {
    "pyramid_attention_17x23": pyramid_module,
    "pyramid_attention_20x20": pyramid_module,
    "pyramid_attention_hard_16x16": pyramid_module,
    "panet_4blocks": network("panet"),
    "pa_edsr_x2_2blocks": network("pa_edsr"),
}
OPERATORS = (
    dict.fromkeys(BUILDERS, (TOPK,))
    | {"multi_input_block_dim48": (MASKED,), "elf_48": (TOPK, MASKED)}
    | dict.fromkeys(PYRAMID_BUILDERS, (PYRAMID,))
)
BUILDERS |= PYRAMID_BUILDERS
CASES = tuple(BUILDERS)


def build(case: GoldenCase) -> nn.Module:
    """The case's module with the case's parameters."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # frozen parameters, which the network defines, are not rounded
    try:
        module = BUILDERS[case.name](case.config)
    finally:
        torch.set_default_dtype(before)
    module.load_state_dict(module.state_dict() | case.trained)
    return module


def require(backend: str, name: str, dtype: torch.dtype) -> None:
    q = torch.zeros(1, 1, 2, 2, dtype=dtype)
    arguments = {TOPK: (q, q, q, [1]), MASKED: (q, q, q), PYRAMID: (q, [q], [q])}
    for operator in OPERATORS[name]:
        check_runs(restore_kernels.explain(operator, *arguments[operator]), backend)


def errors(got: Results, want: Results) -> dict[str, float]:
    """The relative error of each output, input gradient and norm of a parameter's gradient.

    The gradient of a single number, a branch weight or a temperature, is a sum over the whole image
    that may cancel; its error is seen relative to the largest norm among the parameters beside it.
    """
    assert got.parameter_gradient_norms.keys() == want.parameter_gradient_norms.keys()
    norms = want.parameter_gradient_norms
    largest_beside: dict[str, float] = {}
    for name, norm in norms.items():
        owner = name.rpartition(".")[0]
        largest_beside[owner] = max(norm, largest_beside.get(owner, 0.0))
    found = {
        name: abs(got.parameter_gradient_norms[name] - norm) / largest_beside[name.rpartition(".")[0]]
        for name, norm in norms.items()
    }
    for kind in ("outputs", "input_gradients"):
        for i, (x, y) in enumerate(zip(getattr(got, kind), getattr(want, kind), strict=True)):
            found[f"{kind}[{i}]"] = relative_error(x, y)
    return found


def largest(errors: dict[str, float]) -> tuple[float, str]:
    return max((error, name) for name, error in errors.items())


@pytest.mark.parametrize("name", CASES)
def test_state_dict_keys_are_the_published_ones(name):
    case = load(name)
    module = build(case)
    assert {key: list(x.shape) for key, x in module.named_buffers()} == case.buffers
    buffers = dict(module.named_buffers(remove_duplicate=False))
    keys = [key for key in module.state_dict() if key not in buffers]
    assert [key for key in keys if key not in case.shared] == list(case.parameters)
    assert set(keys) == case.parameters.keys() | case.shared.keys()
    for key, name in case.shared.items():
        assert module.get_parameter(key) is module.get_parameter(name)
    for key, x in case.parameters.items():
        assert module.get_parameter(key).requires_grad == (x is not None)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_float64(name, backend):
    require(backend, name, torch.float64)
    case = load(name)
    with restore_kernels.use_backend(backend):
        got = results(case, build(case), torch.float64)
    stored = {f"{kind}[{i}]": x.dtype for kind in ("outputs", "input_gradients")
              for i, x in enumerate(getattr(case.expected, kind))}  # fmt: skip
    for value, error in errors(got, case.expected).items():
        assert error <= EXACT[stored.get(value, torch.float64)], value


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_float32(name, backend):
    require(backend, name, torch.float32)
    case = load(name)
    assert_float32_is_right(case, build(case), case.expected, backend)


def assert_float32_is_right(case: GoldenCase, module: nn.Module, expected: Results, backend: str) -> None:
    """The float32 results are near the expected ones, or an excess comes from flipped near ties alone."""
    with restore_kernels.use_backend(backend), recorded() as decisions:
        got = results(case, module, torch.float32)
    excess, value = largest(errors(got, expected))
    if excess <= IN_FLOAT32:
        return
    with restore_kernels.use_backend("eager"), replayed(decisions) as replay:
        expected = results(case, module, torch.float64)
    assert replay.flips, f"{value} is off by {excess:.1e} with the very decisions of float64"
    assert replay.widest_gap <= NEAR_TIE, f"{value} is off by {excess:.1e}; not every flip is a near tie"
    excess, value = largest(errors(got, expected))
    assert excess <= IN_FLOAT32, f"{value} is off by {excess:.1e} with float32's decisions"


@pytest.fixture
def near_tie() -> tuple[GoldenCase, nn.Module]:
    """A case, and a module to which every third key differs from two others by less than float32 holds."""
    case = load("tksa_dim48_heads1")
    module = build(case)
    first, *others = (slice(48 + start, 48 + start + 16) for start in (0, 16, 32))  # the keys' channels
    with torch.no_grad():
        for weight in (module.qkv.weight, module.qkv_dwconv.weight):
            for other in others:
                weight[other] = weight[first]
        for key, change in zip(others, (1, 2), strict=True):
            module.qkv.weight[key, 0] += change * 1e-9
    return case, module


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_flipped_near_ties_are_traced(near_tie, backend):
    require(backend, near_tie[0].name, torch.float32)
    case, module = near_tie
    with restore_kernels.use_backend("eager"):
        truth = results(case, module, torch.float64)
    with restore_kernels.use_backend(backend):
        excess, _ = largest(errors(results(case, module, torch.float32), truth))
    assert excess > IN_FLOAT32
    assert_float32_is_right(case, module, truth, backend)


def test_a_fault_beside_near_ties_is_seen(near_tie):
    case, module = near_tie
    with restore_kernels.use_backend("eager"):
        truth = results(case, module, torch.float64)

    def fault(_, inputs, out):
        return out * (1 + 1e-3) if out.dtype == torch.float32 else out

    module.register_forward_hook(fault)
    with pytest.raises(AssertionError, match="with float32's decisions"):
        assert_float32_is_right(case, module, truth, "eager")


def test_a_fault_without_near_ties_is_seen():
    case = load("tksa_dim48_heads1")
    module = build(case)
    with torch.no_grad():
        module.attn2 *= 1 + 1e-3
    with pytest.raises(AssertionError, match="very decisions of float64"):
        assert_float32_is_right(case, module, case.expected, "eager")

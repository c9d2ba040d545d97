"""The drop-in module of pyramid attention: its pyramid at any size, formats, dtypes, errors."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from restore_kernels import use_backend
from restore_kernels.nn import PyramidAttention
from restore_kernels.nn.resizing import resize_bicubic
from restore_kernels.pyramid_attention import reference

SIZES = [(1, 1), (2, 3), (1, 9), (3, 1), (7, 12)]


@pytest.fixture(autouse=True)
def eager():
    with use_backend("eager"):
        yield


def module(**options) -> PyramidAttention:
    torch.manual_seed(0)
    return PyramidAttention(**{"channels": 6, **options})


def features(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("levels", [1, 5, 10])
def test_every_level_has_its_size(size, levels):
    attention, x = module(levels=levels), features(2, 6, *size)
    query, keys, values = attention.project(x)
    assert query.shape == (2, 3, *size)
    # floor((10 - i) / 10 * side), in whole numbers.
    expected = [[max(1, (10 - i) * side // 10) for side in size] for i in range(levels)]
    assert [list(key.shape) for key in keys] == [[2, 3, *sides] for sides in expected]
    assert [list(value.shape) for value in values] == [[2, 6, *sides] for sides in expected]
    assert torch.equal(keys[0], attention.conv_match(x))


@pytest.mark.parametrize("dim", [2, 3])
def test_a_side_of_one_pixel_is_that_pixel(dim):
    """Beyond its borders an image goes on as it ends, so one row is as good as ten like it."""
    attention = module().double()
    x = features(1, 6, 8, 8, dtype=torch.float64).narrow(dim, 0, 1)
    for one, ten in zip(
        attention.project(x)[1], attention.project(x.repeat_interleave(10, dim))[1], strict=True
    ):
        torch.testing.assert_close(one, ten.narrow(dim, 0, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hard": True},
        {"levels": 2, "patch_size": 5, "softmax_scale": 3.0, "res_scale": 0.1, "reduction": 3},
    ],
    ids=["default", "hard", "other"],
)
def test_result_is_attention_to_the_pyramid_plus_the_input(size, options):
    attention, x = module(**options).double(), features(2, 6, *size, dtype=torch.float64)
    settings = (options.get("patch_size", 3), options.get("softmax_scale", 10.0), 1e-4, 0.25)
    attended = reference.pyramid_attention(*attention.project(x), *settings, options.get("hard", False))
    torch.testing.assert_close(attention(x), attended + options.get("res_scale", 1.0) * x)


def test_the_identical_patch_is_the_best_match():
    """Where queries and keys are equal, no normalised patch matches better than the patch itself."""
    attention = module(hard=True, levels=1, res_scale=0.0).double()
    attention.conv_match.load_state_dict(attention.conv_match_L_base.state_dict())
    x = features(1, 6, 9, 8, dtype=torch.float64)
    # A pixel is a quarter of the sum of its copies in the patches around it: 9 inside, 4 in the corners.
    ones = torch.ones(9, 8, dtype=torch.float64)
    copies = torch.nn.functional.conv2d(ones[None, None], ones.new_ones(1, 1, 3, 3), padding=1)
    torch.testing.assert_close(attention(x), attention.conv_assembly(x) * copies / 4)


@pytest.mark.parametrize("hard", [False, True])
def test_what_gets_a_gradient(hard):
    attention = module(hard=hard)
    x = features(1, 6, 9, 8).requires_grad_()
    attention(x).square().sum().backward()
    got = {
        name.split(".")[0] for name, p in attention.named_parameters() if p.grad is not None and p.grad.any()
    }
    matching = set() if hard else {"conv_match_L_base", "conv_match"}
    assert got == {"conv_assembly", *matching}
    assert x.grad is not None


def test_channels_last_and_slices():
    attention, x = module().double(), features(2, 8, 9, 11, dtype=torch.float64)
    expected = attention(x[:, 1:7].contiguous())
    last = attention(x[:, 1:7].contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attention(x[:, 1:7]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    attention, x = module(softmax_scale=1.0), features(1, 6, 9, 11)
    expected = attention(x)
    out = attention.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    # Scores of a few units carry the rounding of their dtype, and so do the probabilities.
    bound = 16 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=bound)


def test_empty_batch():
    assert module()(torch.zeros(0, 6, 5, 4)).shape == (0, 6, 5, 4)


def test_compiles_once_for_all_sizes():
    attention = module(levels=2).double()
    torch.compiler.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(attention, fullgraph=True, backend=keep)
    for size in ((9, 12), (12, 11), (23, 14)):
        x = features(1, 6, *size, dtype=torch.float64)
        torch._dynamo.mark_dynamic(x, (2, 3))
        torch.testing.assert_close(compiled(x), attention(x), rtol=1e-12, atol=1e-12)
    assert len(graphs) == 1


def gradients(call, x: torch.Tensor, autocast: bool) -> tuple[torch.Tensor, ...]:
    """The result, and the gradient of x."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = call(x)
    return out.detach(), torch.autograd.grad(out, x, features(*out.shape, dtype=out.dtype))[0]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_resized_as_without_compiling(memory_format, autocast):
    x = features(2, 6, 13, 17).to(memory_format=memory_format)
    torch.compiler.reset()
    call = partial(resize_bicubic, factors=(0.7, 0.6))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for image in (x, x.bfloat16()):
        for ours, expected in zip(
            gradients(compiled, image, autocast), gradients(call, image, autocast), strict=True
        ):
            assert ours.dtype == expected.dtype and torch.equal(ours, expected)


def test_gradient_of_a_pyramid_under_inductor():
    """Of four resized images and their source Inductor's own interpolation adds the gradients up wrongly."""

    def pyramid(x):
        levels = [x, *(resize_bicubic(x, (factor, factor)) for factor in (0.9, 0.8, 0.7, 0.6))]
        return torch.cat([level.flatten(2) for level in levels], dim=2)

    x = features(1, 2, 24, 24)
    torch.compiler.reset()
    compiled = torch.compile(pyramid, fullgraph=True, dynamic=False)
    for ours, expected in zip(gradients(compiled, x, False), gradients(pyramid, x, False), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_eps_is_what_checkpoints_hold():
    buffers = dict(module().named_buffers())
    assert list(buffers) == ["escape_NaN"]
    assert math.isclose(buffers["escape_NaN"].item(), PyramidAttention.eps, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 0}, "reduction must be between 1 and channels=6; got 0"),
        ({"reduction": 7}, "reduction must be between 1 and channels=6; got 7"),
        ({"levels": 0}, "levels must be between 1 and 10; got 0"),
        ({"levels": 11}, "levels must be between 1 and 10; got 11"),
        ({"patch_size": 4}, "patch_size must be one of 1, 3, 5, 7; got 4"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


@pytest.mark.parametrize("shape", [(6, 4, 4), (1, 5, 4, 4), (1, 6, 0, 4), (1, 6, 4, 0)], ids=str)
def test_bad_input(shape):
    with pytest.raises(ValueError, match=r"x must have .*; got \("):
        module()(torch.zeros(shape))

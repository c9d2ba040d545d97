"""Bad input to the operators and modules: one line that names the argument, the expectation, the fact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from restore_kernels import explain, masked_attention, pyramid_attention, topk_attention
from restore_kernels.nn import (
    ChannelGate,
    ChannelNorm,
    DepthwiseConv2d,
    DynamicDualAttention,
    MultiDconvAttention,
    MultiInputAttention,
    PyramidAttention,
    TopKSparseAttention,
)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


CHANNEL: dict[str, Any] = {
    "q": ones(2, 3, 4, 5), "k": ones(2, 3, 4, 5), "v": ones(2, 3, 4, 5), "topk": [2],
}  # fmt: skip
TOKEN: dict[str, Any] = {
    "q": ones(2, 3, 6, 4), "k": ones(2, 3, 5, 4), "v": ones(2, 3, 5, 7), "topk": [2], "layout": "token",
}  # fmt: skip

VALUE_ERRORS = [
    (CHANNEL, {"q": ones(3, 4, 5)}, r"q must have shape \(B, H, C, N\); got \(3, 4, 5\)"),
    (CHANNEL, {"k": ones(2, 3, 4, 6)}, r"k must have shape \(2, 3, 4, 5\).*got \(2, 3, 4, 6\)"),
    (CHANNEL, {"v": ones(2, 3, 5, 5)}, r"v must have shape \(2, 3, 4, 5\).*got \(2, 3, 5, 5\)"),
    (CHANNEL, {x: ones(2, 0, 4, 5) for x in "qkv"}, r"q must have no empty dimension.*\(2, 0, 4, 5\)"),
    (CHANNEL, {x: ones(2, 3, 4, 0) for x in "qkv"}, r"q must have no empty dimension.*\(2, 3, 4, 0\)"),
    (CHANNEL, {"topk": []}, "topk must name at least one branch"),
    (CHANNEL, {"topk": [0]}, r"topk\[0\] must be between 1 and 4.*got 0"),
    (CHANNEL, {"topk": [2, 5]}, r"topk\[1\] must be between 1 and 4.*got 5"),
    (CHANNEL, {"topk": [-1]}, r"topk\[0\] must be between 1 and 4.*got -1"),
    (CHANNEL, {"weights": ones(2)}, r"weights must broadcast to \(2, 3, 1\); got \(2,\)"),
    (CHANNEL, {"weights": ones(1, 2, 3, 1)}, r"weights must broadcast to \(2, 3, 1\); got \(1, 2, 3, 1\)"),
    (CHANNEL, {"temperature": ones(3)}, r"temperature must broadcast to \(2, 3, 1, 1\); got \(3,\)"),
    (CHANNEL, {"layout": "pixel"}, "layout must be 'channel' or 'token'; got 'pixel'"),
    (CHANNEL, {"out_proj": ones(7, 11)}, r"out_proj must have shape \(7, 12\).*got \(7, 11\)"),
    (CHANNEL, {"out_proj": ones(12)}, r"out_proj must have shape \(C_out, H \* C\); got \(12,\)"),
    (CHANNEL, {"out_proj": ones(0, 12)}, r"out_proj must have no empty dimension.*\(0, 12\)"),
    (CHANNEL, {"k": ones(2, 3, 4, 5).to("meta")}, "k must be on q's device cpu; got meta"),
    (CHANNEL, {"weights": ones(1).to("meta")}, "weights must be on q's device cpu; got meta"),
    (TOKEN, {"k": ones(2, 3, 5, 3)}, r"k must have shape \(2, 3, 5, 4\).*got \(2, 3, 5, 3\)"),
    (TOKEN, {"v": ones(2, 3, 6, 7)}, r"v must have shape \(2, 3, 5, 7\).*got \(2, 3, 6, 7\)"),
    (TOKEN, {"v": ones(5, 7)}, r"v must have shape \(B, H, M, E\); got \(5, 7\)"),
    (TOKEN, {"topk": [6]}, r"topk\[0\] must be between 1 and 5, the length of a row; got 6"),
    (TOKEN, {"out_proj": ones(7, 12)}, "out_proj is for layout='channel'; got layout='token'"),
]
TYPE_ERRORS = [
    (CHANNEL, {"q": np.ones((2, 3, 4, 5))}, "q must be a tensor; got ndarray"),
    (CHANNEL, {"k": None}, "k must be a tensor; got NoneType"),
    (CHANNEL, {"q": ones(2, 3, 4, 5, dtype=torch.int64)}, "q must be float32, .*; got int64"),
    (CHANNEL, {"q": ones(2, 3, 4, 5, dtype=torch.complex64)}, "q must be float32, .*; got complex64"),
    (CHANNEL, {"k": ones(2, 3, 4, 5, dtype=torch.float16)}, "k must have q's dtype float32; got float16"),
    (CHANNEL, {"v": ones(2, 3, 4, 5, dtype=torch.float64)}, "v must have q's dtype float32; got float64"),
    (CHANNEL, {"topk": 2}, "topk must be a sequence with one entry per branch; got int"),
    (CHANNEL, {"topk": "22"}, "topk must be a sequence with one entry per branch; got str"),
    (CHANNEL, {"topk": [2.0]}, r"topk\[0\] must be an int or None; got 2.0"),
    (CHANNEL, {"topk": [True]}, r"topk\[0\] must be an int or None; got True"),
    (CHANNEL, {"weights": [0.5]}, "weights must be a tensor; got list"),
    (CHANNEL, {"weights": ones(1, dtype=torch.int32)}, "weights must be float32, .*; got int32"),
    (CHANNEL, {"temperature": "1"}, "temperature must be a number or a tensor; got str"),
    (CHANNEL, {"out_proj": [[1.0]]}, "out_proj must be a tensor; got list"),
    (CHANNEL, {"out_proj": ones(7, 12, dtype=torch.float64)}, "out_proj must have q's dtype float32; got"),
    (TOKEN, {"k": ones(2, 3, 5, 4, dtype=torch.bool)}, "k must be float32, .*; got bool"),
]
# What they say of q, k, v, temperature and out_proj is the same; masked attention has other arguments too.
SHARED_ERRORS = [
    (error, good, bad, message)
    for error, rows in ((ValueError, VALUE_ERRORS), (TypeError, TYPE_ERRORS))
    for good, bad, message in rows
    if not bad.keys() & {"topk", "weights"}
]
MASKED_CHANNEL: dict[str, Any] = {x: CHANNEL[x] for x in "qkv"} | {"mask": ones(4, 5)}
MASKED_TOKEN: dict[str, Any] = {x: TOKEN[x] for x in "qkv"} | {"mask": ones(5), "layout": "token"}
MASK_DTYPES = "float32, bfloat16, float16, float64 or bool"
MASK_ERRORS = [
    (ValueError, MASKED_CHANNEL, ones(3, 1), r"mask must broadcast to \(2, 3, 4, 5\); got \(3, 1\)"),
    (ValueError, MASKED_CHANNEL, ones(6), r"mask must broadcast to \(2, 3, 4, 5\); got \(6,\)"),
    (
        ValueError,
        MASKED_CHANNEL,
        ones(1, 2, 3, 4, 5),
        r"mask must broadcast to \(2, 3, 4, 5\); got \(1, 2, 3,",
    ),
    (ValueError, MASKED_CHANNEL, ones(0), r"mask must broadcast to \(2, 3, 4, 5\); got \(0,\)"),
    (ValueError, MASKED_CHANNEL, ones(5).to("meta"), "mask must be on q's device cpu; got meta"),
    (ValueError, MASKED_TOKEN, ones(6), r"mask must broadcast to \(2, 3, 5\); got \(6,\)"),
    (ValueError, MASKED_TOKEN, ones(2, 3, 1, 5), r"mask must broadcast to \(2, 3, 5\); got \(2, 3, 1, 5\)"),
    (ValueError, MASKED_TOKEN, ones(2, 3, 6, 5), r"mask must broadcast to \(2, 3, 5\); got \(2, 3, 6, 5\)"),
    (TypeError, MASKED_CHANNEL, [1.0] * 5, "mask must be a tensor; got list"),
    (TypeError, MASKED_CHANNEL, 1.0, "mask must be a tensor; got float"),
    (TypeError, MASKED_CHANNEL, np.ones(5), "mask must be a tensor; got ndarray"),
    (TypeError, MASKED_CHANNEL, ones(5, dtype=torch.uint8), f"mask must be {MASK_DTYPES}; got uint8"),
    (TypeError, MASKED_TOKEN, ones(5, dtype=torch.complex64), f"mask must be {MASK_DTYPES}; got complex64"),
]


PYRAMID: dict[str, Any] = {
    "query": ones(2, 3, 4, 5), "keys": [ones(2, 3, 4, 5), ones(2, 3, 2, 6)],
    "values": [ones(2, 7, 4, 5), ones(2, 7, 2, 6)],
}  # fmt: skip
KEY, VALUE = PYRAMID["keys"][0], PYRAMID["values"][0]
NAN, INFINITY = float("nan"), float("inf")
PYRAMID_VALUE_ERRORS = [
    ({"query": ones(3, 4, 5)}, r"query must have shape \(B, Cq, H, W\); got \(3, 4, 5\)"),
    ({"query": ones(2, 3, 0, 5)}, r"query must have no empty dimension.*\(2, 3, 0, 5\)"),
    ({"query": ones(2, 4, 4, 5)}, r"keys\[0\] must have shape \(2, 4, 4, 5\) to fit query \(2, 4,"),
    ({"keys": [], "values": []}, "keys must have at least one level; got none"),
    ({"values": [VALUE]}, "values must have one level per level of keys, 2; got 1"),
    ({"keys": [KEY, ones(1, 3, 2, 6)]}, r"keys\[1\] must have shape \(2, 3, 2, 6\).*got \(1, 3, 2,"),
    ({"keys": [KEY, ones(2, 3, 2, 0)]}, r"keys\[1\] must have no empty dimension.*\(2, 3, 2, 0\)"),
    ({"keys": [KEY, ones(3, 12)]}, r"keys\[1\] must have shape \(B, Cq, h, w\); got \(3, 12\)"),
    ({"keys": [KEY, KEY]}, r"values\[1\] must have shape \(2, 7, 4, 5\) to fit keys\[1\] \(2, 3, 4,"),
    ({"values": [VALUE, ones(2, 8, 2, 6)]}, r"values\[1\] must have shape \(2, 7, 2, 6\).*got \(2, 8"),
    ({"values": [ones(2, 7, 5, 4), VALUE]}, r"values\[0\] must have shape \(2, 7, 4, 5\).*got \(2, 7,"),
    ({"values": [ones(7, 20), VALUE]}, r"values\[0\] must have shape \(B, Cv, h, w\); got \(7, 20\)"),
    ({"keys": [KEY, KEY.to("meta")]}, r"keys\[1\] must be on query's device cpu; got meta"),
    ({"patch_size": 2}, "patch_size must be one of 1, 3, 5, 7; got 2"),
    ({"patch_size": 9}, "patch_size must be one of 1, 3, 5, 7; got 9"),
    ({"patch_size": "3"}, "patch_size must be one of 1, 3, 5, 7; got '3'"),
    ({"patch_size": 3.0}, "patch_size must be one of 1, 3, 5, 7; got 3.0"),
    ({"softmax_scale": NAN}, "softmax_scale must be a finite number; got nan"),
    ({"softmax_scale": ones(1)}, "softmax_scale must be a finite number; got tensor"),
    ({"out_scale": INFINITY}, "out_scale must be a finite number; got inf"),
    ({"out_scale": None}, "out_scale must be a finite number; got None"),
    ({"eps": -INFINITY}, "eps must be a finite number; got -inf"),
    ({"eps": 0}, "eps must be positive; got 0"),
    ({"eps": -1e-4}, "eps must be positive; got -0.0001"),
    ({"backend": "gpu"}, "backend must be one of auto, eager, cpu, triton, cuda; got 'gpu'"),
]
PYRAMID_TYPE_ERRORS = [
    ({"query": np.ones((2, 3, 4, 5))}, "query must be a tensor; got ndarray"),
    ({"query": ones(2, 3, 4, 5, dtype=torch.int64)}, "query must be float32, .*; got int64"),
    ({"keys": KEY}, "keys must be a list of tensors, one per level; got Tensor"),
    ({"values": None}, "values must be a list of tensors, one per level; got NoneType"),
    ({"keys": [KEY, None]}, r"keys\[1\] must be a tensor; got NoneType"),
    ({"keys": [KEY, ones(2, 3, 2, 6).double()]}, r"keys\[1\] must have query's dtype float32; got"),
    ({"values": [VALUE, ones(2, 7, 2, 6).half()]}, r"values\[1\] must have keys\[1\]'s dtype float32; got"),
    ({"values": [VALUE.bool(), VALUE]}, r"values\[0\] must be float32, .*; got bool"),
    ({"values": [VALUE, 2.0]}, r"values\[1\] must be a tensor; got float"),
]


def ids(rows: list[tuple]) -> list[str]:
    return [message[:40] for *_, message in rows]


def assert_refused(operator, good: dict[str, Any], bad: dict[str, Any], error, message: str) -> None:
    operator(**good)
    with pytest.raises(error, match=message) as raised:
        operator(**{**good, **bad})
    assert "\n" not in str(raised.value)


PYRAMID_ERRORS = [
    (error, *row)
    for error, rows in ((ValueError, PYRAMID_VALUE_ERRORS), (TypeError, PYRAMID_TYPE_ERRORS))
    for row in rows
]
TOPK_ERRORS = [(ValueError, *row) for row in VALUE_ERRORS] + [(TypeError, *row) for row in TYPE_ERRORS]


@pytest.mark.parametrize(("error", "good", "bad", "message"), TOPK_ERRORS, ids=ids(TOPK_ERRORS))
def test_topk_attention(error, good, bad, message):
    assert_refused(topk_attention, good, bad, error, message)


@pytest.mark.parametrize(("error", "good", "bad", "message"), SHARED_ERRORS, ids=ids(SHARED_ERRORS))
def test_masked_attention(error, good, bad, message):
    masked = MASKED_CHANNEL if good is CHANNEL else MASKED_TOKEN
    assert_refused(masked_attention, masked, bad, error, message)


@pytest.mark.parametrize(("error", "good", "mask", "message"), MASK_ERRORS, ids=ids(MASK_ERRORS))
def test_mask(error, good, mask, message):
    assert_refused(masked_attention, good, {"mask": mask}, error, message)
    with pytest.raises(error, match=message):
        explain(masked_attention, **{**good, "mask": mask})


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize(("error", "bad", "message"), PYRAMID_ERRORS, ids=ids(PYRAMID_ERRORS))
def test_pyramid_attention(error, bad, message, hard):
    assert_refused(pyramid_attention, {**PYRAMID, "hard": hard}, bad, error, message)
    with pytest.raises(error, match=message):
        explain(pyramid_attention, **{**PYRAMID, **bad})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="mixing devices takes a GPU")
def test_a_mix_of_devices():
    with pytest.raises(ValueError, match="v must be on q's device cpu; got cuda:0"):
        topk_attention(**{**CHANNEL, "v": CHANNEL["v"].cuda()})


MODULES = [
    (TopKSparseAttention, (10, 3), {}, "dim must be a positive multiple of heads; got dim=10, heads=3"),
    (TopKSparseAttention, (0, 1), {}, "dim must be a positive multiple of heads; got dim=0, heads=1"),
    (TopKSparseAttention, (4, 0), {}, "dim must be a positive multiple of heads; got dim=4, heads=0"),
    (TopKSparseAttention, (4, 4), {}, "dim / heads must be at least 2; got dim=4, heads=4"),
    (DynamicDualAttention, (4, 2), {"topk_ratio": 0}, r"topk_ratio must be in \(0, 1\]; got 0"),
    (DynamicDualAttention, (4, 2), {"topk_ratio": 1.5}, r"topk_ratio must be in \(0, 1\]; got 1.5"),
    (DynamicDualAttention, (4, 2), {"layout": "x"}, "layout must be 'channel' or 'token'; got 'x'"),
    (DynamicDualAttention, (4, 2), {"window_size": 0}, "window_size must be at least 1; got 0"),
    (MultiInputAttention, (10, 3), {}, "dim must be a positive multiple of heads; got dim=10, heads=3"),
    (MultiInputAttention, (4, 0), {}, "dim must be a positive multiple of heads; got dim=4, heads=0"),
]


@pytest.mark.parametrize(("module", "sizes", "options", "message"), MODULES)
def test_module_options(module, sizes, options, message):
    with pytest.raises(ValueError, match=message):
        module(*sizes, **options)


@pytest.mark.parametrize("module", [TopKSparseAttention, DynamicDualAttention])
@pytest.mark.parametrize("shape", [(2, 5, 8, 8), (4, 8, 8), (2, 4, 64)])
def test_module_input(module, shape):
    with pytest.raises(ValueError, match=r"x must have shape \(B, 4, H, W\); got"):
        module(4, 2)(torch.ones(shape))


IMAGE = torch.ones(2, 4, 8, 6)
MULTI_INPUT = [
    ({"q": torch.ones(2, 5, 8, 6)}, r"q must have shape \(B, 4, H, W\); got \(2, 5, 8, 6\)"),
    ({"k": torch.ones(4, 8, 6)}, r"k must have shape \(B, 4, H, W\); got \(4, 8, 6\)"),
    ({"v": torch.ones(2, 4, 6, 8)}, r"v must have q's shape \(2, 4, 8, 6\); got \(2, 4, 6, 8\)"),
    ({"mask": torch.ones(8, 5)}, r"mask must broadcast to \(2, 4, 8, 6\); got \(8, 5\)"),
    ({"mask": torch.ones(1, 2, 4, 8, 6)}, r"mask must broadcast to \(2, 4, 8, 6\); got \(1, 2, 4, 8, 6\)"),
]


@pytest.mark.parametrize(("bad", "message"), MULTI_INPUT)
def test_multi_input_attention(bad, message):
    module, good = MultiInputAttention(4, 2), {"q": IMAGE, "k": IMAGE, "v": IMAGE, "mask": IMAGE[:, :1]}
    module(**good)
    with pytest.raises(ValueError, match=message):
        module(**{**good, **bad})


MODULES_OF_IMAGES = [
    ChannelNorm(4), MultiDconvAttention(4, 2), TopKSparseAttention(4, 2), DynamicDualAttention(4, 2),
    PyramidAttention(4), DepthwiseConv2d(4, 4, 3), ChannelGate(4, 2),
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES_OF_IMAGES, ids=lambda module: type(module).__name__)
def test_modules_take_tensors(module):
    with pytest.raises(TypeError, match=r"^x must be a tensor; got float$"):
        module(1.0)

"""The attention calls of the networks: found at their sizes, timed against the same result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import restore_kernels
from restore_kernels.nn import multi_input_attention, projected_attention, pyramid
from restore_kernels.profiling.baselines import published_masked_attention, published_pyramid_attention
from restore_nets import attention_calls, create_model
from restore_nets.attention_calls import AttentionCall, PyramidCall, time_attention

TOPK = AttentionCall("topk_attention", "channel", *3 * ((2, 2, 8, 64),), topk=(None, 4), projected=16)
MASKED = AttentionCall("masked_attention", "channel", *3 * ((2, 2, 8, 64),), mask=(2, 1, 1, 64), projected=16)
TOKENS = AttentionCall(
    "masked_attention", "token", (2, 2, 5, 8), (2, 2, 49, 8), (2, 2, 49, 6), normalize=False
)  # fmt: skip
PYRAMID = PyramidCall((2, 4, 7, 6), ((2, 4, 7, 6), (2, 4, 5, 4)), ((2, 3, 7, 6), (2, 3, 5, 4)))
CALLS = [TOPK, MASKED, TOKENS, PYRAMID]


def calls_of(name: str, side: int = 32, **options: object) -> list[attention_calls.Call]:
    with restore_kernels.use_backend("eager"):
        return attention_calls.attention_calls(create_model(name, **options), torch.rand(2, 3, side, side))


def test_calls_of_the_top_k_networks():
    u_shape = {"dim": 8, "num_blocks": (1, 1, 1, 1), "heads": (1, 1, 2, 4), "ffn_expansion": 1.0}
    calls = calls_of("ddsa", **u_shape)
    assert {call.operator for call in calls} == {"topk_attention"}
    # Level 1 twice (the decoder is twice as wide), levels 2 and 3 once for both ways, the latent one.
    assert [str(call) for call in calls] == [
        "B2 H1 C8 N32x32", "B2 H1 C16 N16x16", "B2 H2 C16 N8x8", "B2 H4 C16 N16", "B2 H1 C16 N32x32",
    ]  # fmt: skip
    assert calls[0].selection == "all, 4"
    assert calls[0].projected == 8
    assert calls_of("drsformer", mefc=False, **u_shape)[0].topk == (4, 5, 6, 6)
    windows = calls_of("ddsa", layout="token", **u_shape)[0]
    assert windows.layout == "token"
    assert windows.q == (2 * 16, 1, 64, 8)


def test_calls_of_the_association_network():
    calls = calls_of("association", n_feat=8, heads=2, num_blocks=1, tokens=5, token_layers=1)
    tokens = [call for call in calls if call.layout == "token"]
    assert {call.operator for call in tokens} == {"masked_attention"}
    assert {(call.q[2], call.k[2]) for call in tokens} == {(5, 256), (5, 5), (256, 5)}
    masked = [call for call in calls if call.mask is not None]
    assert masked
    assert all(call.selection == "masked" for call in masked)
    assert any(call.operator == "topk_attention" for call in calls)


def test_calls_of_the_pyramid_networks():
    (call,) = calls_of("panet", side=20, n_resblocks=2, n_feats=8)
    assert isinstance(call, PyramidCall)
    sides = (20, 18, 16, 14, 12)
    assert call.query == (2, 4, 20, 20)
    assert call.keys == tuple((2, 4, side, side) for side in sides)
    assert call.values == tuple((2, 8, side, side) for side in sides)
    described = f"{call.operator}, {call.layout}: {call}, {call.selection}"
    pairs = sum(side**2 for side in sides)
    assert described == f"pyramid_attention, 3x3 patches: B2 C4 N20x20 M{pairs}, all of 5 levels"
    (call,) = calls_of("pa_edsr", side=10, n_resblocks=2, n_feats=8, reduction=4)
    assert str(call) == "B2 C2 N10x10 M330"


def test_recording_leaves_nothing_behind():
    model = create_model("elf", n_feat=4)
    with pytest.raises(ValueError, match="x must have shape"):
        attention_calls.attention_calls(model, torch.rand(2, 4, 8, 8))
    assert projected_attention.topk_attention is restore_kernels.topk_attention
    assert multi_input_attention.masked_attention is restore_kernels.masked_attention
    assert pyramid.pyramid_attention is restore_kernels.pyramid_attention


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_timing_compares_the_same_result(call):
    times = time_attention(call, torch.device("cpu"), seconds=0.01)
    assert times.same
    assert times.fused.median > 0
    assert times.backend in ("cpu", "eager")


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_timing_notices_another_result(call, monkeypatch):
    true = attention_calls.OPERATORS[call.operator]

    def wrong(*args, **options):
        return 1.01 * true(*args, **options)

    wrong.plan = true.plan
    monkeypatch.setitem(attention_calls.OPERATORS, call.operator, wrong)
    assert not time_attention(call, torch.device("cpu"), 0.01).same


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_timing_says_what_runs(call):
    with restore_kernels.use_backend("eager"):
        assert time_attention(call, torch.device("cpu"), 0.01).backend == "eager"


def test_masked_keys_count_as_their_mask_says():
    q, k, v = (torch.randn(1, 1, 6, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(1, 1, 6, dtype=torch.float64)
    temperature = torch.ones(1, 1, 1, dtype=torch.float64)
    expected = restore_kernels.masked_attention(q, k, v, mask, layout="token", backend="eager")
    result = published_masked_attention(q, k, v, mask, temperature, True, "token", None)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("hard", [False, True])
def test_published_pyramid_attention_is_pyramid_attention(hard):
    query = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    keys, values = (
        [torch.randn(2, c, *size, dtype=torch.float64) for size in ((7, 6), (3, 8))] for c in (4, 3)
    )
    options = {"patch_size": 5, "softmax_scale": 2.0, "hard": hard}
    expected = restore_kernels.pyramid_attention(query, keys, values, **options, backend="eager")
    torch.testing.assert_close(published_pyramid_attention(query, keys, values, **options), expected)


def test_hard_matching_is_timed_too():
    times = time_attention(replace(PYRAMID, hard=True), torch.device("cpu"), seconds=0.01)
    assert times.same
    assert times.call.selection == "best match of 2 levels"
    assert str(times.call) == "B1 C4 N7x6 M62"

"""The conformance suite sees faults: each one here is planted in masked attention's otherwise right model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import faults
import masked_attention_contract as contract
import pytest
import test_masked_attention_masks as masks
import torch
from conformance import assert_conforms
from faults import Plant, as_if_contiguous, changed_input, changed_output, with_last, with_one_more
from masked_attention_problems import Case, build
from torch import Tensor

CHANNEL = Case("channel", (1, 2, 12, 30), (1, 2, 12, 30), temperature=(2, 1, 1))
SHARED_ROW = replace(CHANNEL, mask=(30,))
TOKEN = Case("token", (1, 2, 20, 12, 8, 9), (1, 2, 12), temperature=(2, 1, 1))
LAYOUTS = pytest.mark.parametrize("case", [CHANNEL, TOKEN], ids=["channel", "token"])


@pytest.fixture
def model(monkeypatch) -> Plant:
    return faults.model(monkeypatch, contract)


def assert_caught(case: Case, match: str) -> None:
    faults.assert_caught(build(case), match)


def replaced_by(function: Callable) -> Callable[[Callable], Callable]:
    return lambda _: function


@pytest.mark.parametrize("mask", ["full", "shared", "none", "zeros", "beyond"])
@LAYOUTS
def test_the_model_itself_conforms(model, case, mask):
    if mask in ("zeros", "beyond"):
        case = replace(case, kind=mask)
    elif mask != "full":
        case = replace(case, mask=case.mask[-1:] if mask == "shared" else None)
    assert_conforms(build(case), "cpu")


GATES = {
    "k": lambda k, v, mask: (k, v * mask),
    "v": lambda k, v, mask: (k * mask, v),
    "none": lambda k, v, mask: (k, v),
    "twice": lambda k, v, mask: (k * mask**2, v * mask**2),
    "clamped": lambda k, v, mask: (k * mask.clamp(0, 1), v * mask.clamp(0, 1)),
    "hard": lambda k, v, mask: (k * (mask > 0), v * (mask > 0)),
}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("case", [CHANNEL, SHARED_ROW], ids=["full", "shared"])
def test_gate_ignored_or_changed(model, gate, case):
    model("gated", replaced_by(GATES[gate]))
    kind = "beyond" if gate == "clamped" else "mixed"
    assert_caught(replace(case, kind=kind), "out: largest error")


@pytest.mark.parametrize("index", [1, 2])
def test_gradient_not_gated(model, index):
    """Which leaves the output right."""

    def wrap(backward: Callable) -> Callable:
        def faulty(*args):
            grads, without_mask = list(backward(*args)), [*args]
            without_mask[1 + index] = args[1 + index] * args[4]
            without_mask[4] = torch.ones_like(args[4])
            grads[index] = backward(*without_mask)[index]
            return tuple(grads)

        return faulty

    model("channel_backward", wrap)
    assert_caught(CHANNEL, f"grad_{'qkv'[index]}: largest error")


def test_keys_normalized_before_the_gate(model):
    def wrap(channel: Callable) -> Callable:
        def faulty(q, k, v, mask, temperature, out_proj, normalize):
            unit_q, unit_k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
            return channel(unit_q, unit_k, v, mask, temperature, out_proj, False)

        return faulty

    model("channel", wrap)
    assert_caught(CHANNEL, "out: largest error")


@pytest.mark.parametrize("term", [0, 1])
@pytest.mark.parametrize("case", [CHANNEL, SHARED_ROW], ids=["full", "shared"])
def test_mask_gradient_without_one_of_its_terms(model, case, term):
    model("mask_gradient", changed_input(term, torch.zeros_like))
    assert_caught(case, "grad_mask: largest error")


def test_mask_gradient_of_one_channel_for_all(model):
    def first_row(grad_k: Tensor, grad_v: Tensor, k: Tensor, v: Tensor, rows: int) -> Tensor:
        return (grad_k * k + grad_v * v)[:, :, :rows]

    model("mask_gradient", replaced_by(first_row))
    assert_conforms(build(CHANNEL), "cpu")
    assert_caught(SHARED_ROW, "grad_mask: largest error")


LOGITS = {  # masks come as (B, H, 1, M)
    "the mask itself": lambda scores, mask: torch.where(mask > 0, scores + mask, -torch.inf),
    "no mask": lambda scores, mask: scores,
    "a hard mask": lambda scores, mask: torch.where(mask > 0, scores, -torch.inf),
    "the mask twice": lambda scores, mask: scores + 2 * mask.clamp_min(0).log(),
    "a little weight where masked": lambda scores, mask: scores + mask.clamp_min(1e-4).log(),
    "the mask's size": lambda scores, mask: scores + mask.abs().log(),
    "a mask of at most 1": lambda scores, mask: scores + mask.clamp(0, 1).log(),
}


def with_logits(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Callable], Callable]:
    return replaced_by(lambda scores, mask: function(scores, mask.unsqueeze(-2)))


@pytest.mark.parametrize("fault", LOGITS)
def test_keys_weighed_otherwise(model, fault):
    model("logits", with_logits(LOGITS[fault]))
    kind = "beyond" if fault in ("the mask's size", "a mask of at most 1") else "mixed"
    assert_caught(replace(TOKEN, kind=kind), "out: largest error")


def test_the_logarithm_of_a_negative_mask(model):
    model("logits", with_logits(lambda scores, mask: scores + mask.log()))
    assert_conforms(build(TOKEN), "cpu")
    assert_caught(replace(TOKEN, kind="beyond"), "out has NaN")


def test_a_large_negative_score_instead_of_none(model):
    """Which is right unless all of a row's keys are masked."""

    def filled(scores: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask > 0, scores + mask.clamp_min(0).log(), -1e9)

    model("logits", with_logits(filled))
    assert_conforms(build(TOKEN), "cpu")
    assert_caught(replace(TOKEN, kind="zeros"), "out: largest error")


def test_a_vanishing_weight_instead_of_none(model):
    """Which is right unless the scores of masked keys are large."""
    model("logits", with_logits(lambda scores, mask: scores + mask.clamp_min(1e-38).log()))
    assert_conforms(build(TOKEN), "cpu")
    with pytest.raises(AssertionError, match="out"):
        masks.test_a_key_left_out_has_no_influence("cpu", replace(TOKEN, normalize=False))


def test_nan_where_all_keys_are_masked(model):
    model("row_probabilities", replaced_by(lambda scores, total: (scores - total[..., None]).exp()))
    assert_conforms(build(TOKEN), "cpu")
    assert_caught(replace(TOKEN, kind="zeros"), "out has NaN")


KEY_WEIGHT_GRADIENTS = {
    "not divided": (lambda grad, mask: grad.sum(-2), "largest error"),
    "divided by 0": (lambda grad, mask: grad.sum(-2) / mask, "has NaN"),
    "where masked": (lambda grad, mask: (grad.sum(-2) / mask).nan_to_num(1), "largest error"),
    "one query's": (lambda grad, mask: torch.where(mask > 0, grad[..., 0, :] / mask, 0), "largest error"),
}


@pytest.mark.parametrize("fault", KEY_WEIGHT_GRADIENTS)
def test_gradient_of_key_weights(model, fault):
    function, match = KEY_WEIGHT_GRADIENTS[fault]
    model("key_weight_gradient", replaced_by(function))
    assert_caught(TOKEN, f"grad_mask:? {match}")


@LAYOUTS
def test_softmax_gradient_without_its_row_sums(model, case):
    model("softmax_backward", changed_input(2, torch.zeros_like))
    assert_caught(case, "grad_q: largest error")


GRADIENTS = {"q": 0, "k": 1, "v": 2, "mask": 3, "temperature": 4}


@pytest.mark.parametrize("name", GRADIENTS)
@LAYOUTS
def test_missing_gradient(model, case, name):
    model(f"{case.layout}_backward", changed_output(GRADIENTS[name], torch.zeros_like))
    assert_caught(case, f"grad_{name}: largest error")


@pytest.mark.parametrize("value", [0.0, float("nan")])
@LAYOUTS
def test_unwritten_element(model, case, value):
    model(f"{case.layout}_backward", changed_output(3, lambda x: with_last(x, value)))
    assert_caught(case, "grad_mask")


@LAYOUTS
def test_strides_of_a_broadcast_mask_ignored(model, case):
    model(case.layout, changed_input(3, as_if_contiguous))
    assert_conforms(build(case), "cpu")
    assert_caught(replace(case, mask=case.mask[-1:]), "out")


@LAYOUTS
def test_strides_of_a_placed_mask_ignored(model, case):
    model(case.layout, changed_input(3, as_if_contiguous))
    assert_caught(replace(case, mask_arrangement="every_other_element"), "out")


@LAYOUTS
def test_the_first_head_s_mask_for_all(model, case):
    model(case.layout, changed_input(3, lambda mask: mask[:, :1].expand_as(mask)))
    assert_conforms(build(replace(case, mask=case.mask[-1:])), "cpu")
    assert_caught(case, "out: largest error")


def test_the_first_channel_s_mask_for_all(model):
    model("channel", changed_input(3, lambda mask: mask[:, :, :1].expand_as(mask)))
    assert_conforms(build(SHARED_ROW), "cpu")
    assert_caught(CHANNEL, "out: largest error")


@LAYOUTS
def test_mask_in_a_narrower_dtype(model, case):
    model(case.layout, changed_input(3, lambda mask: mask.bfloat16().float()))
    assert_caught(case, "out: largest error")


@LAYOUTS
def test_memory_beyond_the_mask_read(model, case):
    model(case.layout, changed_input(3, with_one_more))
    assert_caught(case, "out has NaN")


@LAYOUTS
def test_mask_overwritten(model, case):
    model(f"{case.layout}_backward", changed_input(4, lambda mask: mask.mul_(2)))
    assert_caught(case, "wrote to one of its inputs")

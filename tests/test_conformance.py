"""The conformance suite sees faults: each one here is planted in top-k attention's otherwise right model."""

from __future__ import annotations

import faults
import pytest
import topk_attention_contract as contract
import torch
from conformance import assert_conforms
from faults import (
    Plant,
    as_if_contiguous,
    changed_input,
    changed_output,
    rounded_to_tf32,
    with_last,
    with_one_more,
)  # fmt: skip
from test_topk_attention import exact_scores
from topk_attention_problems import Case, build
from torch import Tensor

CHANNEL = Case("channel", (2, 2, 12, 30), (3, 7, None), temperature=(2, 1, 1), weights=(3,))
TOKEN = Case("token", (2, 2, 20, 12, 8, 9), (3, 7, None), temperature=(2, 1, 1), weights=(3,))
TIES = Case("channel", (1, 2, 23, 64), (5, 11), temperature=(2, 1, 1))


@pytest.fixture
def model(monkeypatch) -> Plant:
    return faults.model(monkeypatch, contract)


def assert_caught(case: Case, match: str) -> None:
    faults.assert_caught(exact_scores(case) if case is TIES else build(case), match)


@pytest.mark.parametrize("case", [CHANNEL, TOKEN, TIES], ids=["channel", "token", "ties"])
def test_the_model_itself_conforms(model, case):
    assert_conforms(exact_scores(case) if case is TIES else build(case), "cpu")


def test_higher_index_first_among_ties(model):
    def last_first(scores: Tensor, count: int) -> Tensor:
        order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :count]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.shape[-1] - 1 - order, True)

    model("kept_entries", lambda _: last_first)
    assert_conforms(build(CHANNEL), "cpu")  # without ties there is no difference
    assert_caught(TIES, "out: largest error")


@pytest.mark.parametrize("count", [-1, 1])
def test_selection_off_by_one(model, count):
    model("kept_entries", changed_input(1, lambda kept: min(12, max(1, kept + count))))
    assert_caught(CHANNEL, "out: largest error")


GRADIENTS = {"q": 0, "k": 1, "v": 2, "temperature": 3, "weights": 4}


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("case", [CHANNEL, TOKEN], ids=["channel", "token"])
def test_missing_gradient(model, case, name):
    model(f"{case.layout}_backward", changed_output(GRADIENTS[name], torch.zeros_like))
    assert_caught(case, f"grad_{name}: largest error")


@pytest.mark.parametrize("value", [0.0, float("nan")])
@pytest.mark.parametrize("case", [CHANNEL, TOKEN], ids=["channel", "token"])
def test_unwritten_element(model, case, value):
    model(case.layout, changed_output(0, lambda x: with_last(x, value)))
    assert_caught(case, "out")


def test_gradient_without_its_last_pixel(model):
    model("channel_backward", changed_output(2, lambda x: with_last(x, 0)))
    assert_caught(CHANNEL, "grad_v")


def test_products_in_reduced_precision(model):
    model("channel", changed_input(0, rounded_to_tf32))
    assert_caught(CHANNEL, "out: largest error")


def test_sums_in_bfloat16(model):
    model("mixture_backward", changed_output(0, lambda x: x.bfloat16().to(x.dtype)))
    assert_caught(CHANNEL, "grad_q: largest error")


def test_two_lost_bits_of_bfloat16(model):
    """As in float32 accumulators cut to two bits less than bfloat16 has."""
    case = Case("channel", (2, 2, 12, 300), (3, None), dtype=torch.bfloat16)
    model("channel", changed_output(0, lambda x: (x.view(torch.int16) & ~3).view(torch.bfloat16)))
    assert_caught(case, "out: ")


def test_projection_missing_from_the_norm_gradient(model):
    model("similarity_backward", changed_input(6, lambda normalize: False))
    assert_caught(CHANNEL, "grad_q: largest error")


def test_strides_ignored(model):
    model("channel", changed_input(0, as_if_contiguous))
    assert_conforms(build(CHANNEL), "cpu")
    places = ("pixel_major", "contiguous", "contiguous")
    assert_caught(Case("channel", (2, 2, 12, 30), (3,), arrangements=places), "out")


def test_memory_beyond_an_input_read(model):
    model("token", changed_input(2, with_one_more))
    assert_caught(TOKEN, "out has NaN")


def test_input_overwritten(model):
    model("token_backward", changed_input(1, lambda q: q.mul_(2)))
    assert_caught(TOKEN, "wrote to one of its inputs")

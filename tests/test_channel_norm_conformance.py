"""The conformance suite sees faults: each one here is planted in channel normalisation's right model."""

from __future__ import annotations

import channel_norm_contract as contract
import faults
import pytest
import torch
from channel_norm_problems import Case, build
from conformance import assert_conforms
from faults import (
    Plant,
    as_if_contiguous,
    assert_caught,
    changed_input,
    changed_output,
    with_last,
    with_one_more,
)

CASE = Case((2, 12, 5, 6))
FREE = Case((2, 12, 5, 6), biased=False)


@pytest.fixture
def model(monkeypatch) -> Plant:
    return faults.model(monkeypatch, contract)


@pytest.mark.parametrize("case", [CASE, FREE], ids=["biased", "unbiased"])
def test_the_model_itself_conforms(model, case):
    assert_conforms(build(case), "cpu")


def test_variance_without_bias_correction_is_not_the_other_one(model):
    model("statistics", lambda f: lambda x, eps: (f(x, eps)[0], (x.var(1) + eps).rsqrt()))
    assert_caught(build(CASE), "out: largest error")


def test_variance_from_the_mean_of_the_squares(model):
    def cancelling(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        mean = x.mean(1)
        return mean, ((x.square().mean(1) - mean.square()).clamp_min(0) + eps).rsqrt()

    model("statistics", lambda f: cancelling)
    assert_caught(build(Case(CASE.image, mean=1e4)), "out: largest error")


def test_eps_beside_the_deviation(model):
    model("statistics", lambda f: lambda x, eps: (f(x, eps)[0], 1 / (f(x, 0)[1].reciprocal() + eps)))
    assert_caught(build(Case(CASE.image, eps=0.5)), "out: largest error")


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_missing_gradient(model, name):
    model("backward", changed_output(("x", "weight", "bias").index(name), torch.zeros_like))
    assert_caught(build(CASE), f"grad_{name}: largest error")


def test_gradient_of_the_other_form(model):
    model("backward", changed_input(5, lambda biased: True))
    assert_caught(build(FREE), "grad_x: largest error")


def test_gradients_of_one_image(model):
    model("backward", changed_output(1, lambda x: x / 2))
    assert_caught(build(CASE), "grad_weight: largest error")


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_unwritten_element(model, value):
    model("channel_norm", changed_output(0, lambda x: with_last(x, value)))
    assert_caught(build(CASE), "out")


def test_statistics_in_bfloat16(model):
    model("statistics", lambda f: lambda x, eps: tuple(y.bfloat16().to(x.dtype) for y in f(x, eps)))
    assert_caught(build(CASE), "out: largest error")


def test_strides_ignored(model):
    model("channel_norm", changed_input(0, as_if_contiguous))
    assert_conforms(build(CASE), "cpu")
    assert_caught(build(Case(CASE.image, arrangement="channels_last")), "out")


def test_memory_beyond_an_input_read(model):
    model("channel_norm", changed_input(0, with_one_more))
    assert_caught(build(CASE), "out has NaN")


def test_input_overwritten(model):
    model("backward", changed_input(1, lambda x: x.mul_(2)))
    assert_caught(build(CASE), "wrote to one of its inputs")

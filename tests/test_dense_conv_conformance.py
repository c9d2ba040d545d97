"""The conformance suite sees faults: each one here is planted in dense convolution's right model."""

from __future__ import annotations

import dense_conv_contract as contract
import faults
import pytest
import torch
from conformance import assert_conforms
from dense_conv_problems import Case, build
from faults import (
    Plant,
    as_if_contiguous,
    assert_caught,
    changed_input,
    changed_output,
    rounded_to_tf32,
    with_last,
    with_one_more,
)
from torch import Tensor

CASE = Case((2, 12, 5, 7), 33, bias=True)


@pytest.fixture
def model(monkeypatch) -> Plant:
    return faults.model(monkeypatch, contract)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_model_itself_conforms(model, dtype):
    assert_conforms(build(Case(CASE.image, CASE.channels, bias=True, dtype=dtype)), "cpu")


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_missing_gradient(model, name):
    model("backward", changed_output(("x", "weight", "bias").index(name), torch.zeros_like))
    assert_caught(build(CASE), f"grad_{name}: largest error")


def test_weight_not_turned_in_backward(model):
    model("backward", changed_input(2, lambda weight: weight.flip(2, 3)))
    assert_caught(build(CASE), "grad_x: largest error")


def test_border_reflected(model):
    def reflecting(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
        return torch.nn.functional.unfold(padded, 3)

    model("patches", lambda _: reflecting)
    assert_caught(build(CASE), "out: largest error")


def test_last_column_left_out(model):
    def without_last(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., -1] = 0
        return x

    model("patches", changed_input(0, without_last))
    assert_caught(build(CASE), "out: largest error")


def test_bias_left_out(model):
    model("dense_conv", changed_input(2, lambda bias: None))
    assert_caught(build(CASE), "out: largest error")


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_unwritten_element(model, value):
    model("dense_conv", lambda f: lambda *args: with_last(f(*args), value))
    assert_caught(build(CASE), "out")


def test_products_in_tf32(model):
    model("patches", lambda f: lambda x: rounded_to_tf32(f(x)))
    assert_caught(build(CASE), "out: largest error")


def test_digits_lost_in_transforms(model):
    """As in those of larger tiles, whose coefficients are not 1: terms that cancel leave their rounding."""
    model("patches", changed_input(0, lambda x: (x + 64 * x.abs().amax()) - 64 * x.abs().amax()))
    assert_caught(build(CASE), "out: ")


def test_strides_ignored(model):
    model("dense_conv", changed_input(0, as_if_contiguous))
    assert_conforms(build(CASE), "cpu")
    assert_caught(build(Case(CASE.image, CASE.channels, arrangements=("channels_last", "contiguous"))), "out")


def test_memory_beyond_an_input_read(model):
    model("dense_conv", changed_input(0, with_one_more))
    assert_caught(build(CASE), "out has NaN")


def test_input_overwritten(model):
    model("backward", changed_input(1, lambda x: x.mul_(2)))
    assert_caught(build(CASE), "wrote to one of its inputs")

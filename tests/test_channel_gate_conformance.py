"""The conformance suite sees faults: each one here is planted in the channel gate's right model."""

from __future__ import annotations

import channel_gate_contract as contract
import faults
import pytest
import torch
from channel_gate_problems import Case, build
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

CASE = Case((2, 12, 5, 6), 4)


@pytest.fixture
def model(monkeypatch) -> Plant:
    return faults.model(monkeypatch, contract)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_the_model_itself_conforms(model, biased, residual):
    assert_conforms(build(Case((2, 12, 5, 6), 4, biased=biased, residual=residual)), "cpu")


@pytest.mark.parametrize("position", [3, 4, 5], ids=["down_bias", "up_bias", "residual"])
def test_argument_forgotten(model, position):
    model("channel_gate", changed_input(position, lambda x: None))
    assert_caught(build(CASE), "out: largest error")


@pytest.mark.parametrize("name", ["x", "down", "up", "down_bias", "up_bias"])
def test_missing_gradient(model, name):
    model(
        "backward", changed_output(("x", "down", "up", "down_bias", "up_bias").index(name), torch.zeros_like)
    )
    assert_caught(build(CASE), f"grad_{name}: largest error")


def test_averages_without_gradient(model):
    def gated(grad_out, x, *others):
        return contract.as_image(grad_out * others[-1][:, :, None, None], x)

    model("backward", lambda f: lambda *args: (gated(*args), *f(*args)[1:]))
    assert_caught(build(CASE), "grad_x: largest error")


def test_rectifier_without_gradient(model):
    model("backward", changed_input(5, lambda hidden: hidden + 1e-30))
    assert_caught(build(CASE), "grad_")


def test_averages_in_bfloat16(model):
    model("layer", changed_input(0, lambda x: x.bfloat16().to(x.dtype)))
    assert_caught(build(CASE), "out: largest error")


def test_gradients_of_one_image(model):
    def of_one(f):
        def backward(grad_out, x, down, up, *saved):
            one = f(grad_out[:1], x[:1], down, up, *(tensor[:1] for tensor in saved))
            return f(grad_out, x, down, up, *saved)[0], *one[1:]

        return backward

    model("backward", of_one)
    assert_caught(build(CASE), "grad_down: largest error")


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_unwritten_element(model, value):
    model("channel_gate", changed_output(0, lambda x: with_last(x, value)))
    assert_caught(build(CASE), "out")


def test_strides_ignored(model):
    model("channel_gate", changed_input(0, as_if_contiguous))
    assert_conforms(build(CASE), "cpu")
    assert_caught(build(Case(CASE.image, arrangement="channels_last")), "out")


def test_memory_beyond_an_input_read(model):
    model("channel_gate", changed_input(0, with_one_more))
    assert_caught(build(CASE), "out has NaN")


def test_input_overwritten(model):
    model("backward", changed_input(1, lambda x: x.mul_(2)))
    assert_caught(build(CASE), "wrote to one of its inputs")

"""The conformance suite sees faults: each one here is planted in pointwise convolution's right model."""

from __future__ import annotations

from collections.abc import Callable

import faults
import pointwise_conv_contract as contract
import pytest
import torch
from conformance import assert_conforms
from faults import (
    Plant,
    as_if_contiguous,
    assert_caught,
    changed_input,
    rounded_to_tf32,
    with_last,
    with_one_more,
)
from pointwise_conv_problems import Case, build
from torch import Tensor

CASE = Case((2, 12, 5, 6), (20, 13), bias=True)
PER_IMAGE = Case((2, 12, 5, 6), (20,), per_image=True)
NARROW = Case((2, 12, 5, 6), (20, 13), bias=True, dtype=torch.bfloat16)


@pytest.fixture
def model(monkeypatch) -> Plant:
    return faults.model(monkeypatch, contract)


def changed_gradient(change: Callable[[list[Tensor]], list[Tensor]]) -> Callable[[Callable], Callable]:
    """Wraps backward to change its gradients, flattened."""

    def wrap(operator: Callable) -> Callable:
        def faulty(*args):
            of_images, *others = operator(*args)
            *of_images, weight, bias = change([*of_images, *others])
            return of_images, weight, bias

        return faulty

    return wrap


def of_images(change: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """Changes every image of a list."""
    return lambda images: [change(image) for image in images]


@pytest.mark.parametrize("case", [CASE, PER_IMAGE, NARROW], ids=str)
def test_the_model_itself_conforms(model, case):
    assert_conforms(build(case), "cpu")


@pytest.mark.parametrize("name", ["x0", "x1", "weight", "bias"])
def test_missing_gradient(model, name):
    index = ("x0", "x1", "weight", "bias").index(name)
    model(
        "backward",
        changed_gradient(
            lambda grads: [torch.zeros_like(x) if i == index else x for i, x in enumerate(grads)]
        ),
    )
    assert_caught(build(CASE), f"grad_{name}: largest error")


def test_images_in_another_order(model):
    model("together", changed_input(0, lambda images: list(images)[::-1]))
    assert_caught(build(CASE), "out: largest error")


def test_last_channel_left_out(model):
    def without_last(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, -1] = 0
        return x

    model("together", lambda f: lambda images: without_last(f(images)))
    assert_caught(build(CASE), "out: largest error")


def test_weight_of_the_first_image_for_all(model):
    model("pointwise_conv", changed_input(1, lambda weight: weight[:1].expand_as(weight)))
    assert_caught(build(PER_IMAGE), "out: largest error")


def test_gradient_of_one_image_of_the_batch(model):
    model("backward", changed_gradient(lambda grads: [*grads[:-2], grads[-2] / 2, grads[-1]]))
    assert_caught(build(CASE), "grad_weight: largest error")


def test_bias_left_out(model):
    model("pointwise_conv", changed_input(2, lambda bias: None))
    assert_caught(build(CASE), "out: largest error")


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_unwritten_element(model, value):
    model("pointwise_conv", lambda f: lambda *args: with_last(f(*args), value))
    assert_caught(build(CASE), "out")


def test_products_in_tf32(model):
    model("together", lambda f: lambda images: rounded_to_tf32(f(images)))
    assert_caught(build(CASE), "out: largest error")


def test_sums_rounded_at_every_channel(model):
    def rounding(x: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
        out, pixels = torch.zeros(()), torch.cat(x, dim=1)
        for c in range(pixels.shape[1]):
            out = (out + weight[:, c].float() * pixels[:, c : c + 1]).to(pixels.dtype)
        return out if bias is None else out + bias[:, None, None]

    model("pointwise_conv", lambda f: rounding)
    assert_caught(build(Case((2, 12, 20, 20), (70,), dtype=torch.bfloat16)), "out: ")


def test_strides_ignored(model):
    model("pointwise_conv", changed_input(0, of_images(as_if_contiguous)))
    assert_conforms(build(CASE), "cpu")
    assert_caught(build(Case(CASE.image, CASE.channels, arrangements=("channels_last", "contiguous"))), "out")


def test_memory_beyond_an_input_read(model):
    model("pointwise_conv", changed_input(0, of_images(with_one_more)))
    assert_caught(build(CASE), "out has NaN")


def test_input_overwritten(model):
    model("backward", changed_input(1, of_images(lambda x: x.mul_(2))))
    assert_caught(build(CASE), "wrote to one of its inputs")

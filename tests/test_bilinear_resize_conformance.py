"""The conformance suite sees faults: each one here is planted in bilinear resizing's right model."""

from __future__ import annotations

import bilinear_resize_contract as contract
import faults
import pytest
import torch
from bilinear_resize_problems import Case, build
from conformance import assert_conforms
from faults import Plant, as_if_contiguous, assert_caught, changed_input, with_last, with_one_more

DOUBLED, HALVED = Case((2, 3, 5, 6), 2, cut=(1, 0)), Case((2, 3, 5, 6), 0.5)


@pytest.fixture
def model(monkeypatch) -> Plant:
    return faults.model(monkeypatch, contract)


@pytest.mark.parametrize("case", [DOUBLED, HALVED], ids=str)
def test_the_model_itself_conforms(model, case):
    assert_conforms(build(case), "cpu")


@pytest.mark.parametrize("case", [DOUBLED, HALVED], ids=str)
def test_residual_forgotten(model, case):
    model("bilinear_resize", changed_input(1, lambda x: None))
    assert_caught(build(case), "out: largest error")


@pytest.mark.parametrize("case", [DOUBLED, HALVED], ids=str)
def test_missing_gradient(model, case):
    model("backward", lambda f: lambda *args: torch.zeros_like(f(*args)))
    assert_caught(build(case), "grad_x: largest error")


def test_border_left_out(model):
    """As if there were zeros beyond it."""

    def without(f):
        def doubling(size, small):
            matrix = f(size, small).clone()
            matrix[0] *= 0.75
            return matrix

        return doubling

    model("doubling", without)
    assert_caught(build(DOUBLED), "out: largest error")


def test_what_was_cut_off_has_a_gradient(model):
    """The last row of a doubled image counts twice."""

    def with_last_row_again(f):
        def backward(grad_out, doubles, height, width):
            again = torch.cat((grad_out, grad_out[:, :, -1:]), dim=2)
            return f(again, doubles, height, width)

        return backward

    model("backward", with_last_row_again)
    assert_caught(build(DOUBLED), "grad_x: largest error")


def test_odd_side_averaged_with_nothing(model):
    model("halving", lambda f: lambda small, size: f(small, size).clamp(max=0.5))
    assert_caught(build(HALVED), "out: largest error")


def test_corners_aligned(model):
    def aligned(f):
        def doubling(size, small):
            matrix = torch.zeros(size, small, dtype=torch.float64)
            for i in range(size):
                place = i * (small - 1) / (2 * small - 1)
                low = min(int(place), small - 2)
                matrix[i, low], matrix[i, low + 1] = 1 + low - place, place - low
            return matrix

        return doubling

    model("doubling", aligned)
    assert_caught(build(DOUBLED), "out: largest error")


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_unwritten_element(model, value):
    model("bilinear_resize", lambda f: lambda *args: with_last(f(*args), value))
    assert_caught(build(DOUBLED), "out")


def test_strides_ignored(model):
    model("bilinear_resize", changed_input(0, as_if_contiguous))
    assert_conforms(build(DOUBLED), "cpu")
    assert_caught(build(Case(DOUBLED.image, 2, arrangement="transposed")), "out")


def test_memory_beyond_an_input_read(model):
    model("bilinear_resize", changed_input(0, with_one_more))
    assert_caught(build(HALVED), "out has NaN")


def test_input_overwritten(model):
    model("backward", changed_input(0, lambda x: x.mul_(2)))
    assert_caught(build(DOUBLED), "wrote to one of its inputs")

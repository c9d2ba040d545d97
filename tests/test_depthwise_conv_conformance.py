"""The conformance suite sees faults: each one here is planted in depthwise convolution's compiled backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import faults
import pytest
import torch
from conformance import assert_conforms
from depthwise_conv_problems import BACKENDS, Case, build

from restore_kernels import native
from restore_kernels.depthwise_conv import autograd
from restore_kernels.depthwise_conv.ops import overload

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled backend does not run here")

# A group straddles the images; the gradient passes an activation, a gate and the edges of the image.
CASE = Case((2, 3, 6, 7), inputs=2, images=(3, 3), bias=True, activation="prelu", gate=True)
Operator = Callable[..., Any]
FORWARD, BACKWARD = "depthwise_conv", "depthwise_conv_backward"


def images_exchanged(op: Operator, x, *rest):
    """The two inputs of the group that straddles the images."""
    first, second = (image.clone() for image in x)
    first[:, 2], second[:, 0] = x[1][:, 0], x[0][:, 2]
    return op([first, second], *rest)


def last_row_not_gated(op: Operator, x, weight, bias, slope, gate, *rest):
    gate = gate.clone()
    gate[:, :, -1] = 1
    return op(x, weight, bias, slope, gate, *rest)


def bias_not_computed_again(op: Operator, grad_out, x, weight, bias, *rest):
    return op(grad_out, x, weight, None, *rest)


def gate_left_out_backward(op: Operator, grad_out, x, weight, bias, slope, gate, *rest):
    of_gate = op(grad_out, x, weight, bias, slope, gate, *rest)[-1]
    return *op(grad_out, x, weight, bias, slope, torch.ones_like(gate), *rest)[:-1], of_gate


def gate_gradient_before_activation(op: Operator, *args):
    *tensors, out, dilation, _, wanted = args
    tensors[4] = None  # slope
    return *op(*args)[:-1], op(*tensors, out, dilation, None, wanted)[-1]


def slope_gradient_of_rows_twice(op: Operator, *args):
    """As if a row on which two bands of rows depend counted for both."""
    grad_x, of_weight, of_bias, of_slope, of_gate = op(*args)
    row = op(args[0][:, :, -1:], [x[:, :, -1:] for x in args[1]], *args[2:5], args[5][:, :, -1:], *args[6:])
    return grad_x, of_weight, of_bias, of_slope + row[3], of_gate


def second_image_gets_the_first_gradient(op: Operator, *args):
    (of_first, _), *others = op(*args)
    return [of_first, of_first.clone()], *others


FAULTS = [
    (FORWARD, images_exchanged, "out"),
    (FORWARD, last_row_not_gated, "out"),
    (BACKWARD, bias_not_computed_again, "grad_"),
    (BACKWARD, gate_left_out_backward, "grad_"),
    (BACKWARD, gate_gradient_before_activation, "grad_gate"),
    (BACKWARD, slope_gradient_of_rows_twice, "grad_slope"),
    (BACKWARD, second_image_gets_the_first_gradient, r"grad_x\[1\]"),
]


@pytest.fixture
def plant(monkeypatch):
    def plant(name: str, fault: Operator) -> None:
        def faulty(asked: str, backend: str) -> Operator:
            op = overload(asked, backend)
            return (lambda *args: fault(op, *args)) if asked == name else op

        monkeypatch.setattr(native, "loaded_cpu_module", None)
        monkeypatch.setattr(autograd, "overload", faulty)

    return plant


@pytest.mark.parametrize("name", [FORWARD, BACKWARD])
def test_no_fault(name, plant):
    plant(name, lambda op, *args: op(*args))
    assert_conforms(build(CASE), "cpu")


@pytest.mark.parametrize(("name", "fault", "match"), FAULTS)
def test_fault_is_caught(name, fault, match, plant):
    plant(name, fault)
    faults.assert_caught(build(CASE), match)

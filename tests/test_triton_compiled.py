"""The Triton kernels compiled for GPUs that are not here: no spills, within limits, on the matrix units.

Each case and dtype for one architecture, in turn, since compiling takes most of the time of all tests.
``pytest --all-architectures`` compiles each for all; ``python tests/aot.py`` prints the table of every case.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import aot
import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@dataclass(frozen=True)
class Operator:
    cases: tuple[str, ...]  # the extremes of those in aot.CASES
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    on_matrix_units: tuple[str, ...] = ()  # the dtypes whose products run there


OPERATORS = {
    "topk_attention": Operator(
        ("channel heads=8 out_proj", "token D=32 M=64", "token D=48 M=64"),
        dtypes=("float32", "bfloat16", "float16"),
        on_matrix_units=("bfloat16", "float16"),
    ),
    "masked_attention": Operator(
        ("masked channel heads=1 gated", "masked token 16x65536 D=48"),
        on_matrix_units=("float32", "bfloat16"),
    ),
    "pyramid_attention": Operator(("pyramid 3x3 Cq=32 Cv=64",), ("bfloat16",), ("bfloat16",)),
    "channel_gate": Operator(("channel gate C=48", "channel gate C=64 channels_last")),
    "bilinear_resize": Operator(("resize to twice the size", "resize to half the size channels_last")),
    "channel_norm": Operator(("channel norm C=1", "channel norm C=48", "channel norm C=384 without bias")),
    "depthwise_conv2d": Operator(("depthwise 7x7 dilated", "depthwise 5x5 paired gelu gated")),
    "pointwise_conv2d": Operator(
        ("pointwise 96 to 510", "pointwise 8 images to 96, crops"), on_matrix_units=("float32", "bfloat16")
    ),
}

Compiled = tuple[str, set[aot.Job], list[aot.Row]]


@pytest.fixture(scope="module")
def jobs(pytestconfig: pytest.Config) -> dict[str, list[aot.Job]]:
    """What is to be compiled of every operator."""
    in_turn = not pytestconfig.getoption("--all-architectures")
    return {
        name: aot.jobs(operator.cases, operator.dtypes, aot.ARCHITECTURES, in_turn)
        for name, operator in OPERATORS.items()
    }


@pytest.fixture(scope="module")
def table(jobs: dict[str, list[aot.Job]]) -> list[aot.Row]:
    """Of all operators at once: processes take as long to start as a kernel to compile."""
    return aot.compile_apart([job for own in jobs.values() for job in own])


@pytest.fixture(params=OPERATORS)
def compiled(
    request: pytest.FixtureRequest, jobs: dict[str, list[aot.Job]], table: list[aot.Row]
) -> Compiled:
    """Of an operator: its name, what was to be compiled, and the table."""
    own = set(jobs[request.param])
    return request.param, own, [row for row in table if row.case in OPERATORS[request.param].cases]


def test_no_spills_and_within_limits(compiled):
    _, jobs, rows = compiled
    assert {(row.case, row.dtype, row.architecture) for row in rows} == jobs
    aot.assert_fits(rows)


def test_scores_that_are_compared_take_their_norms_from_memory(table):
    """Summed up in several kernels, in orders that the compiler chooses, norms would differ by a bit here and
    there, and with them the scores by which backward repeats a selection."""
    rows = [row for row in table if row.case.startswith("token ")]
    assert {row.kernel for row in rows if row.square_roots} == {"token_norms_kernel"}
    assert {"token_window_kernel", "token_grad_q_kernel"} <= {row.kernel for row in rows}


def test_products_run_on_the_matrix_units_in_the_kernels_that_there_should_be(compiled):
    name, jobs, rows = compiled
    wanted = {job for job in jobs if job[1] in OPERATORS[name].on_matrix_units}
    assert {(x.case, x.dtype, x.architecture) for x in rows if x.on_matrix_units} >= wanted
    if name == "pyramid_attention":  # every kernel but those that only add up
        others = {row.kernel for row in rows if not row.on_matrix_units}
        assert others == {"key_norms_kernel", "fold_patches_kernel"}
    if (
        name == "masked_attention"
    ):  # programs for 16 queries alone would leave most of a GPU idle: keys are split
        kernels = {row.kernel for row in rows if row.case == "masked token 16x65536 D=48"}
        assert {"masked_combine_kernel", "sum_gradient_kernel"} <= kernels

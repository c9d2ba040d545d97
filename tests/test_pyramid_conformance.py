"""The conformance suite sees faults: each one is planted in pyramid attention's otherwise right model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import faults
import pyramid_attention_contract as contract
import pytest
import test_pyramid_attention_hard as matches
import torch
import torch.nn.functional as F
from conformance import assert_conforms
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
from pyramid_attention_problems import Case, build, with_tensors
from torch import Tensor

CASE = Case((2, 5, 6, 7, 8), ((7, 8), (4, 9), (2, 3)))
SAME_SIZES = replace(CASE, levels=((4, 5), (4, 5)))
CLAMPED = replace(CASE, eps=6.0)  # which a third of the norms are under


@pytest.fixture
def model(monkeypatch) -> Plant:
    return faults.model(monkeypatch, contract)


def replaced_by(function: Callable) -> Callable[[Callable], Callable]:
    return lambda _: function


@pytest.mark.parametrize("patch_size", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [CASE, SAME_SIZES, CLAMPED], ids=["levels", "same sizes", "clamped"])
def test_the_model_itself_conforms(model, case, dtype, patch_size):
    assert_conforms(build(replace(case, dtype=dtype, patch_size=patch_size)), "cpu")


def test_the_clamped_case_has_both():
    parts = [part for name, part in build(CLAMPED).parts.items() if name == "grad_keys[0]"]
    assert all(mask.any() for part in parts for mask in part)


def _around(mode: str) -> Callable[[Tensor, int], Tensor]:
    """What lies around both images: their borders again, or what is at the opposite border."""

    def padded(pairs: Tensor, reach: int) -> Tensor:
        for dim in range(1, 5):
            size = pairs.shape[dim]
            place = torch.arange(-reach, size + reach)
            place = place % size if mode == "wrapped" else place.clamp(0, size - 1)
            pairs = pairs.index_select(dim, place)
        return pairs

    return padded


@pytest.mark.parametrize("mode", ["wrapped", "replicated"])
def test_borders_that_are_not_zero(model, mode):
    model("padded", replaced_by(_around(mode)))
    assert_caught(build(CASE), "out: largest error")


def _without(*missing: tuple[int, int]) -> Callable[[Callable], Callable]:
    return lambda shifts: lambda size: [shift for shift in shifts(size) if shift not in missing]


@pytest.mark.parametrize("row", [-1, 1])
def test_a_missing_halo_row(model, row):
    model("shifts", _without((row, -1), (row, 0), (row, 1)))
    assert_caught(build(CASE), "out: largest error")


def test_a_missing_corner(model):
    model("shifts", _without((1, 1)))
    assert_caught(build(CASE), "out: largest error")


@pytest.mark.parametrize(("pairs", "rows"), [((8, 16), 8), ((16, 16), 16)])
def test_a_missing_halo_row_at_the_edge_of_a_tile_alone(model, pairs, rows):
    """Which images within one tile do not show."""

    def tiled(box: Callable) -> Callable:
        def faulty(x: Tensor, size: int) -> Tensor:
            if x.shape[1] <= rows:
                return box(x, size)
            top, bottom = x[:, :rows], x[:, rows:]
            return torch.cat([box(top, size), box(bottom, size)], dim=1)

        return faulty

    model("box", tiled)
    case = replace(CASE, image=(1, 5, 6, *pairs))
    assert_conforms(build(case), "cpu")
    assert_caught(build(replace(case, image=(1, 5, 6, rows + 1, 16))), "out: largest error")


def test_a_patch_that_is_read_the_other_way_around(model):
    """Correlation along one image, convolution along the other."""

    def box(pairs: Tensor, size: int) -> Tensor:
        return original(pairs.flip(3, 4), size).flip(3, 4)

    original = contract.box
    model("box", replaced_by(box))
    assert_caught(build(CASE), "out: largest error")


def test_levels_in_reverse_for_the_values(model):
    """Which shows where levels have the same size."""

    def parted(pairs: Tensor, levels: list[Tensor]) -> list[Tensor]:
        return original(pairs, levels)[::-1]

    original = contract.parted
    model("parted", replaced_by(parted))
    assert_caught(build(SAME_SIZES), "out: largest error")


def test_the_last_level_left_out(model):
    def all_scores(*args) -> Tensor:
        scores = original(*args)
        scores[..., -6:] = -torch.inf
        return scores

    original = contract.all_scores
    model("all_scores", replaced_by(all_scores))
    assert_caught(build(CASE), "out: largest error")


def test_a_softmax_per_level(model):
    def all_scores(query, keys, *options) -> Tensor:
        levels = [original(query, [key], *options) for key in keys]
        return torch.cat([x - x.logsumexp(-1, keepdim=True) for x in levels], dim=-1)

    original = contract.all_scores
    model("all_scores", replaced_by(all_scores))
    assert_caught(build(CASE), "out: largest error")


EPS = {
    "forgotten": lambda norms, eps: norms,
    "added": lambda norms, eps: norms + eps,
    "of squares": lambda norms, eps: (norms.square() + eps**2).sqrt(),
    "fixed": lambda norms, eps: norms.clamp_min(1e-4),
}


@pytest.mark.parametrize("fault", EPS)
def test_eps(model, fault):
    model("clamped", replaced_by(EPS[fault]))
    assert_caught(build(CLAMPED), "out: largest error")


def test_eps_that_is_only_forgotten_for_zero_keys(model):
    model("clamped", replaced_by(EPS["forgotten"]))
    problem = build(CASE)
    assert_conforms(problem, "cpu")
    assert_caught(with_tensors(problem, **{"keys[1]": torch.zeros(2, 5, 4, 9)}), "out has NaN")


def test_norms_of_pixels(model):
    model("norms", changed_input(1, lambda size: 1))
    assert_caught(build(CASE), "out: largest error")


def test_norms_without_the_border(model):
    def interior(key: Tensor, size: int) -> Tensor:
        norm = original(key, size)
        return F.pad(norm[:, 1:-1, 1:-1], (1, 1, 1, 1), "replicate") if min(key.shape[2:]) > 2 else norm

    original = contract.norms
    model("norms", replaced_by(interior))
    assert_caught(build(CASE), "out: largest error")


NORM_GRADIENTS = {
    "missing": lambda grad, scores, norms, eps: torch.zeros_like(norms),
    "of the wrong sign": lambda *args: -contract_norm_gradient(*args),
    "once divided": lambda grad, scores, norms, eps: contract_norm_gradient(grad, scores, norms, eps) * norms,
    "where clamped too": lambda grad, scores, norms, eps: contract_norm_gradient(grad, scores, norms, 0.0),
}
contract_norm_gradient = contract.norm_gradient


@pytest.mark.parametrize("fault", NORM_GRADIENTS)
def test_norm_gradient(model, fault):
    model("norm_gradient", replaced_by(NORM_GRADIENTS[fault]))
    case = CLAMPED if fault == "where clamped too" else CASE
    assert_caught(build(case), r"grad_keys\[.\]: largest error")


def test_norm_gradient_of_the_center_alone(model):
    """Which leaves out that a pixel is in the norms of all patches around it."""
    model("box_of_image", lambda box: lambda image, size: box(image, 3 if (image >= 0).all() else 1))
    assert_caught(build(CASE), r"grad_keys\[0\]: largest error")


def test_softmax_gradient_without_its_row_sums(model):
    model("softmax_backward", changed_input(2, torch.zeros_like))
    assert_caught(build(CASE), "grad_query: largest error")


GRADIENTS = {"query": None, "keys[1]": (1, 1), "values[2]": (2, 2)}


@pytest.mark.parametrize("value", [0.0, float("nan")])
@pytest.mark.parametrize("name", GRADIENTS)
def test_unwritten_gradient(model, name, value):
    def wrap(backward: Callable) -> Callable:
        def faulty(*args):
            grad_query, *grads = backward(*args)
            if (place := GRADIENTS[name]) is None:
                return with_last(grad_query, value), *grads
            kind, level = place
            grads[kind - 1][level] = with_last(grads[kind - 1][level], value)
            return grad_query, *grads

        return faulty

    model("backward", wrap)
    assert_caught(build(CASE), rf"grad_{name}".replace("[", r"\[").replace("]", r"\]"))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_unwritten_output(model, value):
    model("pyramid_attention", changed_output(0, lambda x: with_last(x, value)))
    assert_caught(build(CASE), "out")


def test_scale_of_the_output_forgotten_in_backward(model):
    model("backward", changed_input(8, lambda out_scale: 1.0))
    assert_caught(build(CASE), "grad_query: largest error")


def test_scale_of_the_scores_forgotten_in_backward(model):
    def wrap(backward: Callable) -> Callable:
        def faulty(*args):
            grad_query, *grads = backward(*args)
            return grad_query / args[6], *grads

        return faulty

    model("backward", wrap)
    assert_caught(build(CASE), "grad_query: largest error")


def test_no_largest_score_subtracted(model):
    """Which shows where exponentials are beyond the dtype."""

    def all_scores(*args) -> Tensor:
        return original(*args).exp().log()

    original = contract.all_scores
    model("all_scores", replaced_by(all_scores))
    assert_conforms(build(replace(CASE, softmax_scale=0.5)), "cpu")
    assert_caught(build(replace(CASE, softmax_scale=2000.0)), "out has NaN")


def test_a_skipped_tile_that_matters(model):
    """Whose probabilities are under 2^-10 of the largest: no rounding."""

    def mixed(probabilities: Tensor, *args) -> Tensor:
        largest = probabilities.amax(-1, keepdim=True)
        return original(torch.where(probabilities < 2**-10 * largest, 0, probabilities), *args)

    original = contract.mixed
    model("mixed", replaced_by(mixed))
    assert_caught(build(CASE), "out: largest error")


def test_products_in_reduced_precision(model):
    model("pyramid_attention", changed_input(0, rounded_to_tf32))
    assert_caught(build(CASE), "out: largest error")


def test_sums_in_bfloat16(model):
    model("softmax_backward", lambda function: lambda *x: function(*x).bfloat16().to(x[0].dtype))
    assert_caught(build(CASE), "grad_query: largest error")


def test_strides_ignored(model):
    model("pyramid_attention", changed_input(0, as_if_contiguous))
    assert_conforms(build(CASE), "cpu")
    places = ("channels_last", "contiguous", "contiguous")
    assert_caught(build(replace(CASE, arrangements=places)), "out")


def test_memory_beyond_a_level_read(model):
    model("pyramid_attention", changed_input(2, lambda values: [*values[:-1], with_one_more(values[-1])]))
    assert_caught(build(CASE), "out has NaN")


def test_input_overwritten(model):
    model("backward", changed_input(1, lambda query: query.mul_(2)))
    assert_caught(build(CASE), "wrote to one of its inputs")


def assert_ties_are_caught() -> None:
    case = replace(SAME_SIZES, image=(1, 4, 3, 6, 7))
    with pytest.raises(AssertionError, match="not the first of equal scores"):
        matches.test_of_equal_scores_the_first_is_taken("cpu", case)


def test_the_last_of_equal_scores(model):
    def last(scores: Tensor) -> Tensor:
        return scores.shape[-1] - 1 - first(scores.flip(-1))

    first = contract.best
    model("best", replaced_by(last))
    matches.assert_matches(build(CASE), "cpu")  # without ties there is no difference
    assert_ties_are_caught()


def test_the_first_of_equal_scores_of_the_last_level(model):
    """Right within each level, wrong across them."""

    def best(scores: Tensor) -> Tensor:
        half = scores.shape[-1] // 2
        levels = scores.split(half, -1)
        first, second = (first_of(level) for level in levels)
        later = levels[1].amax(-1) >= levels[0].amax(-1)
        return torch.where(later, half + second, first)

    first_of = contract.best
    model("best", replaced_by(best))
    matches.assert_matches(build(SAME_SIZES), "cpu")
    assert_ties_are_caught()


def test_the_second_best_match(model):
    model("best", replaced_by(lambda scores: scores.topk(2).indices[..., 1]))
    with pytest.raises(AssertionError, match="below the best"):
        matches.assert_matches(build(CASE), "cpu")


def test_the_mixture_instead_of_the_match(model):
    model("one_hot", replaced_by(lambda index, length, dtype: F.one_hot(index, length).to(dtype) * 0.9))
    with pytest.raises(AssertionError, match="out: largest error"):
        matches.assert_matches(build(CASE), "cpu")


def test_a_hard_gradient_at_another_match(model):
    model("hard_backward", changed_input(2, lambda index: (index + 1) % 20))
    with pytest.raises(AssertionError, match=r"grad_values\[.\]"):
        matches.assert_matches(build(CASE), "cpu")

"""Problems for masked attention: masks of every broadcast shape, of every kind, and their analysis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import conformance
import pytest
import torch
from arrangements import arrange
from attention_contract import CLAMP
from attention_problems import (
    AttentionCase,
    draw_grad,
    draw_inputs,
    drawing,
    each_of,
    products,
    sizes_of_terms,
)  # fmt: skip
from conformance import Problem, runnable
from torch import Tensor

from restore_kernels import explain, masked_attention

PROBE = torch.ones(1, 1, 2, 2, device=conformance.DEVICE)
EXPLANATION = explain(masked_attention, PROBE, PROBE, PROBE)
BACKENDS = runnable(EXPLANATION)
FUSED = [backend for backend in BACKENDS if backend != "eager"]


def _mixed(soft: Tensor) -> Tensor:
    """A third 0, a third 1, but for the last column: not all of a row is masked."""
    mask = torch.where(soft < 0.3, 0, torch.where(soft > 0.7, 1, soft))
    if mask.dim():
        mask[..., -1] = soft[..., -1]
    return mask


# Masks as functions of values spread evenly over [0.02, 1].
MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "soft": lambda soft: soft,
    "mixed": _mixed,
    "hard": lambda soft: (_mixed(soft) > 0).to(soft),
    "ones": torch.ones_like,
    "zeros": torch.zeros_like,
    "beyond": lambda soft: 4 * soft - 1,  # below 0 and above 1
    "tiny": lambda soft: 1e-30 * soft,
    "huge": lambda soft: 1e30 * soft,
}
# Of gated keys, the last two make squares beyond float32, where eager is no yardstick.
KINDS = {"channel": tuple(MASKS)[:-2], "token": tuple(MASKS)}


@dataclass(frozen=True)
class Case(AttentionCase):
    """One call of masked attention.

    Attributes:
        mask: its shape, or None for no mask.
        kind: one of ``MASKS``.
        mask_arrangement: of the mask, as of q, k and v.
    """

    mask: tuple[int, ...] | None
    kind: str = "mixed"
    mask_arrangement: str = "contiguous"

    def own_parts(self) -> list[str]:
        if self.mask is None:
            return ["no_mask"]
        placed = [] if self.mask_arrangement == "contiguous" else [f"mask_{self.mask_arrangement}"]
        return [f"{self.kind}{self.mask}", *placed]


def each(
    cases: Iterable[Case], backends: Sequence[str] = BACKENDS, interpreted: int = 4
) -> pytest.MarkDecorator:
    """``each_of`` the backends that run masked attention here."""
    return each_of(cases, backends, interpreted)


def full_mask(layout: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a mask with all of its dimensions, of a case of this layout and shape."""
    return tuple(shape) if layout == "channel" else (*shape[:2], shape[3])


def build(case: Case) -> Problem:
    """The case with random numbers in it."""
    randn = drawing(seed=0)
    tensors, options = draw_inputs(case, randn)
    if case.mask is not None:
        soft = 0.02 + 0.98 * torch.special.ndtr(randn(*case.mask))
        mask = MASKS[case.kind](soft).to(conformance.DEVICE, case.small_dtype())
        tensors["mask"] = _arranged(mask, case.mask_arrangement)
    problem = Problem(masked_attention, tensors, options, draw_grad(case, randn), {})
    return with_magnitudes(problem)


def _arranged(mask: Tensor, name: str) -> Tensor:
    """The mask, of up to four dimensions, in memory as named."""
    placed = arrange(mask[(None,) * (4 - mask.dim())], name)
    return placed[(0,) * (4 - mask.dim())]


def with_tensors(problem: Problem, **tensors: Tensor) -> Problem:
    """The problem with some tensors replaced."""
    changed = {name: x.to(problem.tensors[name]) for name, x in tensors.items()}
    return with_magnitudes(replace(problem, tensors={**problem.tensors, **changed}))


def with_magnitudes(problem: Problem) -> Problem:
    """The problem with the size of the terms of each result: its sums over absolute values.

    Probabilities count by the size of their logits besides, as in ``topk_attention_problems``; a
    key's logit has the logarithm of its mask in it.
    """
    if problem.options["layout"] == "channel":
        return _with_channel_magnitudes(problem)
    given = problem.tensors
    x, v = products(problem), given["v"].double().abs()
    batch, heads, _, keys = x.scores.shape
    mask = given.get("mask", torch.ones((), device=v.device)).double().expand(batch, heads, keys)
    kept = (mask > 0).unsqueeze(-2)  # (B, H, 1, M)
    log_mask = torch.where(mask > 0, mask, 1).log().unsqueeze(-2)
    logits = (x.scores + log_mask).masked_fill(~kept, -torch.inf)
    probabilities = logits.softmax(-1).nan_to_num(0)  # of NaN, where no key is kept
    largest = (x.size_of_scores() + log_mask.abs()).masked_fill(~kept, 0).amax(-1, keepdim=True)
    sizes, grad_scores, _ = _sizes(problem, x, v, probabilities * (largest + 1))
    if "mask" in given:
        grad_mask = torch.where(mask > 0, grad_scores.sum(-2) / mask, 0)
        sizes["grad_mask"] = grad_mask.sum_to_size(given["mask"].shape)
    return replace(problem, magnitudes=sizes)


def _with_channel_magnitudes(problem: Problem) -> Problem:
    """Where gated rows of k are 0, their norm is the clamp, 1e-12, and gradients huge: judged apart."""
    given = problem.tensors
    k, v = given["k"].double(), given["v"].double().abs()
    mask = given["mask"].double().expand_as(k) if "mask" in given else torch.ones_like(k)
    x = products(problem, k * mask)
    largest_score = x.size_of_scores().amax(-1, keepdim=True)
    sizes, _, _ = _sizes(problem, x, v * mask.abs(), x.scores.softmax(-1) * (largest_score + 1))
    grad_gated = {name: sizes[f"grad_{name}"] for name in "kv"}
    sizes |= {f"grad_{name}": mask.abs() * size for name, size in grad_gated.items()}
    parts = {}
    if "mask" in given:
        grad_mask = grad_gated["k"] * k.abs() + grad_gated["v"] * v
        sizes["grad_mask"] = grad_mask.sum_to_size(given["mask"].shape)
        clamped = (x.norms_k <= CLAMP).unsqueeze(-1).expand_as(k).double()
        clamped = clamped.sum_to_size(given["mask"].shape) > 0
        parts = {"grad_mask": [clamped, ~clamped]}
    return replace(problem, magnitudes=sizes, parts=parts)


def _sizes(problem, x, v, probabilities):
    """``sizes_of_terms`` of one branch of weight 1."""
    return sizes_of_terms(problem, x, v, probabilities[None], torch.ones_like(x.temperature)[..., None])

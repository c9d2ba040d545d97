"""Problems for pyramid attention: images and levels of all sizes, and their analysis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import conformance
import pytest
import torch
import torch.nn.functional as F
from arrangements import arrange
from attention_problems import drawing, each_of
from conformance import Problem, Tensors, runnable
from torch import Tensor

from restore_kernels import explain, pyramid_attention
from restore_kernels.pyramid_attention import reference
from restore_kernels.pyramid_attention.api import CUDA_CHANNELS

PROBE = torch.ones(1, 1, 2, 2, device=conformance.DEVICE)
EXPLANATION = explain(pyramid_attention, PROBE, [PROBE], [PROBE])
BACKENDS = runnable(EXPLANATION)
FUSED = [backend for backend in BACKENDS if backend != "eager"]
HARD_BACKENDS = runnable(explain(pyramid_attention, PROBE, [PROBE], [PROBE], hard=True))
HARD_FUSED = [backend for backend in HARD_BACKENDS if backend != "eager"]

ROUNDINGS_OF_A_SUM = 4

Levels = tuple[tuple[int, int], ...]


def pyramid(height: int, width: int) -> Levels:
    """The sizes of five levels, as the published networks scale them."""
    return tuple((max(1, height * tenths // 10), max(1, width * tenths // 10)) for tenths in range(10, 5, -1))


@dataclass(frozen=True)
class Case:
    """What distinguishes one call from another.

    Attributes:
        image: (B, Cq, Cv, H, W).
        levels: (h, w) of each.
        arrangements: of the query, the keys and the values, names of ``arrangements.IMAGE_ARRANGEMENTS``.
        grad: arrangement of the output gradient; "one_value" has stride 0 everywhere, as from sum().
    """

    image: tuple[int, int, int, int, int]
    levels: Levels
    _: KW_ONLY
    dtype: torch.dtype = torch.float32
    patch_size: int = 3
    softmax_scale: float = 10.0
    eps: float = 1e-4
    arrangements: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")
    grad: str = "contiguous"

    def __str__(self) -> str:
        levels = [f"{height}x{width}" for height, width in self.levels]
        parts = ["x".join(map(str, self.image)), "+".join(levels), str(self.dtype)[6:]]
        parts += [f"patch{self.patch_size}", f"scale{self.softmax_scale:g}", f"eps{self.eps:g}"]
        names = list(dict.fromkeys(self.arrangements))
        parts += ["+".join(names)] if names != ["contiguous"] else []
        parts += [] if self.grad == "contiguous" else [f"grad_{self.grad}"]
        return "-".join(parts)

    def work(self) -> int:
        """Multiplies of the product of query and keys, pixel by pixel."""
        batch, channels, _, height, width = self.image
        return batch * channels * height * width * sum(h * w for h, w in self.levels)


def each(
    cases: Iterable[Case], backends: Sequence[str] = BACKENDS, interpreted: int = 1
) -> pytest.MarkDecorator:
    """``each_of`` the backends that run pyramid attention here."""
    return each_of(cases, backends, interpreted, covers)


def covers(backend: str, case: Case) -> bool:
    """Whether the backend takes such calls, wherever it runs."""
    _, *channels, _, _ = case.image
    fits = all(count <= most for count, most in zip(channels, CUDA_CHANNELS, strict=True))
    return backend != "cuda" or (case.patch_size == 3 and fits)


def levels_of(tensors: dict[str, Any]) -> tuple[Any, list[Any], list[Any]]:
    """Query, keys and values from what the names of a problem stand for."""
    count = len(tensors) // 2
    keys, values = ([tensors[f"{name}[{i}]"] for i in range(count)] for name in ("keys", "values"))
    return tensors["query"], keys, values


def by_name(backend: str, patch_size: int, softmax_scale: float, eps: float, out_scale: float,
            hard: bool = False, **tensors: Tensor) -> Tensor:  # fmt: skip
    """The operator with one argument per level: ``query``, ``keys[0]``, ..., ``values[0]``, ..."""
    return pyramid_attention(
        *levels_of(tensors), patch_size=patch_size, softmax_scale=softmax_scale, eps=eps,
        out_scale=out_scale, hard=hard, backend=backend,
    )  # fmt: skip


def build(case: Case) -> Problem:
    """The case with random numbers in it."""
    randn = drawing(seed=0)
    batch, channels, of_values, height, width = case.image
    shapes = {"query": (batch, channels, height, width)}
    shapes |= {f"keys[{i}]": (batch, channels, *size) for i, size in enumerate(case.levels)}
    shapes |= {f"values[{i}]": (batch, of_values, *size) for i, size in enumerate(case.levels)}
    places = dict(zip(("query", "keys", "values"), case.arrangements, strict=True))
    tensors = {
        name: arrange(randn(*shape).to(conformance.DEVICE, case.dtype), places[name.partition("[")[0]])
        for name, shape in shapes.items()
    }
    options = {"patch_size": case.patch_size, "softmax_scale": case.softmax_scale, "eps": case.eps}
    grad_shape = (batch, of_values, height, width)
    if case.grad == "one_value":
        grad_out = randn(1).to(conformance.DEVICE, case.dtype).expand(grad_shape)
    else:
        grad_out = arrange(randn(*grad_shape).to(conformance.DEVICE, case.dtype), case.grad)
    return with_magnitudes(Problem(by_name, tensors, {**options, "out_scale": 0.25}, grad_out, {}))


def with_tensors(problem: Problem, **tensors: Tensor) -> Problem:
    """The problem with some tensors replaced."""
    changed = {name: x.to(problem.tensors[name]) for name, x in tensors.items()}
    return with_magnitudes(replace(problem, tensors={**problem.tensors, **changed}))


def split(pairs: Tensor, levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(..., L) of all levels -> (..., h_i * w_i) of each of these images."""
    return pairs.split([level.shape[2:].numel() for level in levels], dim=-1)


def with_magnitudes(problem: Problem) -> Problem:
    """The problem with the size of the roundings of each result, in units of one.

    A score has roundings of the size of its terms, by which its probability is off, and a probability a few
    more in every sum that it takes part in, of partial sums too. The terms of these sums are many and their
    roundings independent, so that they add up as squares. Next to key patches whose norm is clamped,
    gradients to keys may be huge: judged apart.
    """
    wide = {name: x.double() for name, x in problem.tensors.items()}
    query, keys, values = levels_of(wide)
    size, eps, out_scale = (problem.options[name] for name in ("patch_size", "eps", "out_scale"))
    scale = problem.options["softmax_scale"]
    score_sizes = reference.scores(query.abs(), [key.abs() for key in keys], size, abs(scale), eps)
    probabilities = exact_scores(problem).softmax(-1)
    # From here on everything is squared.
    errors = (probabilities * (score_sizes.amax(-1, keepdim=True) + ROUNDINGS_OF_A_SUM)).square()
    grad = out_scale * reference.patches(problem.grad_out.double(), size)  # (B, Cv * size², N)
    value_patches = torch.cat([reference.patches(value, size) for value in values], dim=2)
    products, terms = grad.mT @ value_patches, grad.abs().mT @ value_patches.abs()
    row_sums, sums_of_terms = ((probabilities * x).sum(-1, keepdim=True) for x in (products, terms))
    row_sum_errors = (errors * products.square()).sum(-1, keepdim=True) + sums_of_terms.square()
    grad_scores = errors * (products - row_sums).square()
    grad_scores += probabilities.square() * (terms.square() + row_sum_errors)
    squares = [value.square() for value in values]
    sizes = {"out": out_scale**2 * reference.overlap_add(errors, squares, size, query.shape[2:])}
    parts, query_patches = {}, scale * reference.patches(query, size)  # (B, Cq * size², N)

    def folded(patches: Tensor, image: Tensor) -> Tensor:
        return F.fold(patches, image.shape[2:], size, padding=size // 2)

    of_query = torch.zeros_like(query_patches)
    of_levels = (split(x, keys) for x in (grad_scores, score_sizes, errors))
    for i, (of_scores, score, error) in enumerate(zip(*of_levels, strict=True)):
        key_patches = reference.patches(keys[i], size)
        norm = key_patches.norm(dim=1, keepdim=True)
        divisor = norm.clamp(min=eps).square()
        unit = key_patches.square() / divisor
        of_query += scale**2 * (unit @ of_scores.mT)
        radial = unit * (of_scores * score.square()).sum(1, keepdim=True) * (norm >= eps)
        of_key = (query_patches.square() @ of_scores + radial) / divisor
        sizes[f"grad_keys[{i}]"] = folded(of_key, keys[i])
        sizes[f"grad_values[{i}]"] = folded(grad.square() @ error, values[i])
        is_clamped = (norm < eps).double().unflatten(2, keys[i].shape[2:])  # (B, 1, h, w)
        near_clamped = F.max_pool2d(is_clamped, size, 1, size // 2) > 0
        parts[f"grad_keys[{i}]"] = [near_clamped, ~near_clamped]
    sizes["grad_query"] = folded(of_query, query)
    magnitudes = {name: x.sqrt() for name, x in sizes.items()}
    return replace(problem, magnitudes=magnitudes, parts=parts)


def exact_scores(problem: Problem) -> Tensor:
    """(B, H * W, L) in float64."""
    return scores_in(torch.float64, problem)


def scores_in(dtype: torch.dtype, problem: Problem) -> Tensor:
    """(B, H * W, L) as the reference computes them in this dtype."""
    query, keys, _ = levels_of({name: x.to(dtype) for name, x in problem.tensors.items()})
    options = problem.options
    return reference.scores(query, keys, options["patch_size"], options["softmax_scale"], options["eps"])


def arguments(problem: Problem) -> tuple[Any, ...]:
    """The problem's call as the operators take it."""
    options = (problem.options[name] for name in ("patch_size", "softmax_scale", "eps", "out_scale"))
    return (*levels_of(problem.tensors), *options)


def by_result(out: Tensor, grads: Sequence[Any]) -> Tensors:
    """The output and (grad_query, grad_keys, grad_values) by the names of a problem's results."""
    grad_query, grad_keys, grad_values = grads
    named = {"out": out, "grad_query": grad_query}
    named |= {f"grad_keys[{i}]": x for i, x in enumerate(grad_keys)}
    return named | {f"grad_values[{i}]": x for i, x in enumerate(grad_values)}

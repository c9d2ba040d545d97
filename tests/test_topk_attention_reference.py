"""The eager definition itself, against loops over single numbers and against PyTorch's own operators."""

from __future__ import annotations

import math

import conformance
import pytest
import torch
import torch.nn.functional as F
from conformance import evaluate, judge
from test_topk_attention import branches, exact_scores, sizes, ties
from topk_attention_problems import Case, build, each
from torch import Tensor

from restore_kernels import topk_attention

EAGER = ["eager"]


def by_loops(q: list, k: list, v: list, topk: list[int], weights: list[float], temperature: float) -> list:
    """One head; rows of q and k already normalised; nothing but Python's numbers."""
    result = []
    for query in q:
        scores = [temperature * sum(a * b for a, b in zip(query, key, strict=True)) for key in k]
        ranking = sorted(range(len(k)), key=lambda j: (-scores[j], j))
        row = [0.0] * len(v[0])
        for count, weight in zip(topk, weights, strict=True):
            exponentials = {j: math.exp(scores[j]) for j in ranking[:count]}
            total = sum(exponentials.values())
            for j, exponential in exponentials.items():
                row = [x + weight * exponential / total * y for x, y in zip(row, v[j], strict=True)]
        result.append(row)
    return result


def normalized(rows: list) -> list:
    norms = [max(math.sqrt(sum(x * x for x in row)), 1e-12) for row in rows]
    return [[x / norm for x in row] for row, norm in zip(rows, norms, strict=True)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("layout", ["channel", "token"])
def test_is_what_the_documentation_says(layout, normalize):
    shape = (2, 2, 6, 5) if layout == "channel" else (2, 2, 4, 6, 3, 5)
    problem = build(Case(layout, shape, (2, 4, None), dtype=torch.float64, normalize=normalize))
    q, k, v = (problem.tensors[name] for name in "qkv")
    weights, temperature = q.new_tensor([0.5, 1.5, -0.25]), q.new_tensor([1.5, -0.75])
    out = topk_attention(
        q, k, v, [2, 4, None], weights=weights, temperature=temperature[:, None, None],
        normalize=normalize, layout=layout, backend="eager",
    )  # fmt: skip
    for b in range(2):
        for h in range(2):
            rows = [x[b, h].tolist() for x in (q, k, v)]
            if normalize:
                rows[:2] = [normalized(x) for x in rows[:2]]
            expected = by_loops(*rows, [2, 4, 6], weights.tolist(), temperature[h].item())
            torch.testing.assert_close(
                out[b, h], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
            )


def test_defaults():
    problem = build(Case("token", (1, 2, 5, 6, 3, 4), (2, None), dtype=torch.float64))
    q, k, v = (problem.tensors[name] for name in "qkv")

    def call(**options: object) -> Tensor:
        return topk_attention(q, k, v, [2, None], layout="token", backend="eager", **options)

    half = q.new_tensor([0.5, 0.5])
    assert torch.equal(call(), call(weights=half, temperature=1.0))
    assert torch.equal(call(normalize=False), call(normalize=False, weights=half, temperature=3**-0.5))


def test_one_dense_branch_is_scaled_dot_product_attention():
    problem = build(Case("token", (2, 3, 20, 17, 8, 5), (None,), dtype=torch.float64, normalize=False))
    q, k, v = (problem.tensors[name] for name in "qkv")
    out = topk_attention(q, k, v, [None], normalize=False, layout="token", backend="eager")
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-12, atol=1e-12)


def test_projection_is_a_1x1_convolution():
    problem = build(Case("channel", (2, 3, 6, 35), (3, None), dtype=torch.float64, out_proj=7))
    q, k, v, weight = (problem.tensors[name] for name in ("q", "k", "v", "out_proj"))
    out = topk_attention(q, k, v, [3, None], out_proj=weight, backend="eager")
    image = topk_attention(q, k, v, [3, None], backend="eager").reshape(2, 18, 5, 7)
    expected = F.conv2d(image, weight[:, :, None, None])
    torch.testing.assert_close(out.view(2, 7, 5, 7), expected, rtol=1e-12, atol=1e-12)


def test_the_first_of_equal_scores_are_kept():
    """All scores are equal: each row is the mean of the first two values."""
    q, v = torch.ones(1, 1, 5, 4), torch.arange(20.0).view(1, 1, 5, 4)
    out = topk_attention(q, q, v, [2], backend="eager")
    assert torch.equal(out, v[:, :, :2].mean(2, keepdim=True).expand_as(v))


@each([case for case in (*sizes(), *branches()) if case.dtype == torch.float32], EAGER)
def test_rounding_explains_the_error_of_the_yardstick(backend, case):
    """So that a broken yardstick does not let every backend pass."""
    problem = build(case)
    exact = conformance.eager_in(torch.float64, problem)
    judge(evaluate(problem, backend), exact, exact, problem.magnitudes, problem.parts)


@each([case for case in ties() if case.dtype == torch.float32], EAGER)
def test_exact_scores_have_ties(backend, case):
    """Else the suite's test of ties tests nothing."""
    problem = exact_scores(case)
    q, k = (problem.tensors[name] for name in "qk")
    descending = (q @ k.mT).sort(dim=-1, descending=True).values
    cut = [kept for kept in case.topk if kept is not None]
    tied = torch.stack([descending[..., kept - 1] == descending[..., kept] for kept in cut])
    assert tied.float().mean() > 0.3, "of the selections, a good part must end among equal scores"

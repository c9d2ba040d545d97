"""The eager definition itself, against loops over single numbers and against PyTorch's own operators."""

from __future__ import annotations

import math
from itertools import product

import conformance
import pytest
import torch
import torch.nn.functional as F
from conformance import evaluate, judge
from masked_attention_problems import Case, build, each
from test_masked_attention import sizes
from torch import Tensor

from restore_kernels import masked_attention

EAGER = ["eager"]


def by_loops(q: list, k: list, v: list, key_weights: list[float], temperature: float) -> list:
    """One head; rows of q and k already normalised; nothing but Python's numbers."""
    result = []
    for query in q:
        scores = [temperature * sum(a * b for a, b in zip(query, key, strict=True)) for key in k]
        weights = [w * math.exp(s) if w > 0 else 0.0 for w, s in zip(key_weights, scores, strict=True)]
        row, total = [0.0] * len(v[0]), sum(weights)
        for weight, value in zip(weights, v, strict=True):
            row = [x + weight / total * y if total else x for x, y in zip(row, value, strict=True)]
        result.append(row)
    return result


def times(rows: list, factors: list) -> list:
    return [[x * y for x, y in zip(*pair, strict=True)] for pair in zip(rows, factors, strict=True)]


def normalized(rows: list) -> list:
    norms = [max(math.sqrt(sum(x * x for x in row)), 1e-12) for row in rows]
    return [[x / norm for x in row] for row, norm in zip(rows, norms, strict=True)]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["mixed", "beyond", "zeros"])
@pytest.mark.parametrize("layout", ["channel", "token"])
def test_is_what_the_documentation_says(layout, kind, normalize):
    shape, mask = ((2, 2, 6, 5), (2, 2, 6, 5)) if layout == "channel" else ((2, 2, 4, 6, 3, 5), (2, 2, 6))
    problem = build(Case(layout, shape, mask, kind, dtype=torch.float64, normalize=normalize))
    q, k, v, mask = (problem.tensors[name] for name in ("q", "k", "v", "mask"))
    temperature = q.new_tensor([1.5, -0.75])
    out = masked_attention(
        q, k, v, mask, temperature=temperature[:, None, None], normalize=normalize, layout=layout,
        backend="eager",
    )  # fmt: skip
    for b, h in product(range(2), range(2)):
        rows_q, rows_k, rows_v, rows_mask = (x[b, h].tolist() for x in (q, k, v, mask))
        if layout == "channel":
            rows_k, rows_v, rows_mask = times(rows_k, rows_mask), times(rows_v, rows_mask), [1.0] * 6
        if normalize:
            rows_q, rows_k = normalized(rows_q), normalized(rows_k)
        expected = by_loops(rows_q, rows_k, rows_v, rows_mask, temperature[h].item())
        close(out[b, h], torch.tensor(expected, dtype=torch.float64))


def test_defaults():
    problem = build(Case("token", (1, 2, 5, 6, 3, 4), None, dtype=torch.float64))
    q, k, v = (problem.tensors[name] for name in "qkv")

    def call(*mask: Tensor | None, **options: object) -> Tensor:
        return masked_attention(q, k, v, *mask, layout="token", backend="eager", **options)

    assert torch.equal(call(), call(None, temperature=1.0, normalize=True))
    assert torch.equal(call(normalize=False), call(normalize=False, temperature=3**-0.5))
    image = q.mT  # (1, 2, 3, 5)
    by_default, in_full = (
        masked_attention(image, image, image, normalize=False, backend="eager", **options)
        for options in ({}, {"mask": None, "temperature": 5**-0.5, "layout": "channel"})
    )
    assert torch.equal(by_default, in_full)


@pytest.mark.parametrize("kind", ["soft", "mixed"])
def test_weighs_keys_as_an_additive_mask_of_logarithms(kind):
    case = Case("token", (2, 3, 20, 17, 8, 5), (2, 1, 17), kind, dtype=torch.float64, normalize=False)
    problem = build(case)
    q, k, v, mask = (problem.tensors[name] for name in ("q", "k", "v", "mask"))
    out = masked_attention(q, k, v, mask, normalize=False, layout="token", backend="eager")
    close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask.log().unsqueeze(-2)))


def test_a_whole_mask_counts_keys():
    """A key of weight n is as n keys of weight 1; one of weight 0 is as none."""
    problem = build(Case("token", (2, 1, 20, 5, 8, 5), None, dtype=torch.float64))
    q, k, v = (problem.tensors[name] for name in "qkv")
    counts = torch.tensor([2, 0, 1, 3, 0])
    out = masked_attention(q, k, v, counts.double(), layout="token", backend="eager")
    repeated = (x.repeat_interleave(counts, dim=2) for x in (k, v))
    close(out, masked_attention(q, *repeated, layout="token", backend="eager"))


def test_gates_keys_and_values():
    problem = build(Case("channel", (2, 3, 6, 35), (2, 3, 6, 35), "beyond", dtype=torch.float64))
    q, k, v, mask = (problem.tensors[name] for name in ("q", "k", "v", "mask"))
    out = masked_attention(q, k, v, mask, backend="eager")
    close(out, masked_attention(q, mask * k, mask * v, backend="eager"))


def test_projection_is_a_1x1_convolution():
    problem = build(Case("channel", (2, 3, 6, 35), (2, 1, 1, 35), dtype=torch.float64, out_proj=7))
    q, k, v, mask, weight = (problem.tensors[name] for name in ("q", "k", "v", "mask", "out_proj"))
    out = masked_attention(q, k, v, mask, out_proj=weight, backend="eager")
    image = masked_attention(q, k, v, mask, backend="eager").reshape(2, 18, 5, 7)
    close(out.view(2, 7, 5, 7), F.conv2d(image, weight[:, :, None, None]))


@each([case for case in sizes() if case.dtype == torch.float32], EAGER)
def test_rounding_explains_the_error_of_the_yardstick(backend, case):
    """So that a broken yardstick does not let every backend pass."""
    problem = build(case)
    exact = conformance.eager_in(torch.float64, problem)
    judge(evaluate(problem, backend), exact, exact, problem.magnitudes, problem.parts)

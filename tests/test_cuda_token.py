"""The CUDA kernels of token attention: what the operators' own suites, with few small cases, do not reach."""

from __future__ import annotations

from dataclasses import replace

import conformance
import masked_attention_problems as masked
import pytest
import topk_attention_problems as topk
import torch
from conformance import Problem, assert_conforms, assert_reproducible, check_runs
from test_topk_attention import exact_scores

from restore_kernels import explain, topk_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def build(case: masked.Case | topk.Case) -> Problem:
    """The case's problem; skips without the kernels."""
    problem = masked.build(case) if isinstance(case, masked.Case) else topk.build(case)
    check_runs(explain(problem.operator, **problem.tensors, **problem.options), "cuda")
    return problem


# More than a tile and than a split of keys, of queries, of both; a tile not full; the last row alone.
# Queries, keys, length of q and k, length of v.
TOKENS = [(3, 700, 24, 20), (400, 5, 17, 16), (70, 130, 48, 33), (65, 33, 8, 12)]
LONG = (5, 40, 70, 100)
MASKED = [
    masked.Case("token", (1, 1, *tokens), mask, dtype=dtype, normalize=i % 2 == 0, temperature=(1, 1, 1))
    for i, tokens in enumerate([*TOKENS, LONG])
    for dtype in DTYPES
    for mask in ((1, 1, tokens[1]), None)
]

TOPK = [
    topk.Case(
        "token", (1, 1, *tokens), branches, dtype=dtype, normalize=i % 2 == 0, temperature=(1, 1, 1),
        weights=(len(branches),),
    )
    for i, (tokens, branches) in enumerate(
        (
            ((3, 300, 24, 20), (1, 150, 299, 300, 7)), ((100, 5, 17, 16), (2,)),
            ((70, 130, 48, 33), (None, 20, 100)), ((65, 33, 8, 12), (32,)), (LONG, (4, None)),
        )
    )
    for dtype in DTYPES
]  # fmt: skip


@pytest.mark.parametrize("case", [*MASKED, *TOPK], ids=str)
def test_splits_and_tiles(case):
    assert_conforms(build(case), "cuda")


@pytest.mark.parametrize("case", [MASKED[0], MASKED[2], MASKED[6], MASKED[8], TOPK[3], TOPK[4]], ids=str)
def test_order_of_blocks_and_threads(case):
    assert_reproducible(build(case), "cuda")


@pytest.mark.parametrize("case", MASKED[:4:2], ids=str)
def test_keys_masked_by_the_tile(case):
    """A tile without a key is skipped: in the middle, at the end, everywhere."""
    problem = build(case)
    for hidden in (slice(64, 256), slice(650, None), slice(None)):
        mask = problem.tensors["mask"].clone()
        mask[..., hidden] = 0
        assert_conforms(masked.with_tensors(problem, mask=mask), "cuda")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_scores_in_several_tiles(dtype, normalize):
    """The limit falls among equal scores of an earlier, a middle and the last tile."""
    case = topk.Case("token", (1, 2, 9, 200, 16, 5), (10, 150, 64, 199), dtype=dtype, normalize=normalize)
    build(case)
    assert_conforms(exact_scores(replace(case, temperature=(2, 1, 1))), "cuda")


def test_scores_that_share_most_bits():
    """Of which a search needs every digit: 1 or -1 times 1 and a little, which differs from key to key."""
    case = topk.Case("token", (1, 1, 20, 100, 16, 8), (1, 37, 99), normalize=False, temperature=1.0)
    problem = build(case)
    q, k = (torch.zeros_like(problem.tensors[name]) for name in "qk")
    q[..., 0] = torch.arange(20) % 2 * 2 - 1
    k[..., 0] = 1 + 2**-16 * torch.randperm(100, generator=torch.Generator().manual_seed(0))
    problem = replace(problem, tensors={**problem.tensors, "q": q, "k": k}, parts={})
    assert topk.decided_rows(problem).all()
    assert_conforms(topk.with_magnitudes(problem), "cuda")


@pytest.mark.parametrize(
    ("columns", "branches", "reason"),
    [
        ((129, 5), 1, "its token kernels take rows of at most 128, those of q and k have 129"),
        ((5, 129), 1, "its token kernels take rows of at most 128, those of v have 129"),
        ((5, 5), 9, "its token kernels take at most 8 branches, got 9"),
    ],
)
def test_what_is_not_covered_is_explained(columns, branches, reason):
    q, v = (torch.ones(1, 1, 2, length, device=conformance.DEVICE) for length in columns)
    check_runs(explain(topk_attention, q[..., :5], q[..., :5], v[..., :5], [1], layout="token"), "cuda")
    explanation = explain(topk_attention, q, q, v, [1] * branches, layout="token")
    assert explanation.why_not["cuda"] == reason

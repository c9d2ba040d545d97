"""The four operators of top-k attention as ``ops.py`` describes them, in plain PyTorch.

Where the reference leaves the derivatives to autograd, this states them, and what each pass saves,
as formulas. It serves twice: a backend's saved tensors are held against it, and with a fault
planted in it, it proves that the conformance suite sees such a fault.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attention_contract import normalized_product, similarity_backward, write_rows
from torch import Tensor

from restore_kernels.tensors import accumulate_dtype


def kept_entries(scores: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest entries of every row; of equal entries the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def branch_probabilities(scores: Tensor, topk: Sequence[int]) -> Tensor:
    """(B, H, R, L) -> (J, B, H, R, L): the softmax of each branch over the entries it keeps."""
    branches = [scores.masked_fill(~kept_entries(scores, k), float("-inf")).softmax(-1) for k in topk]
    return torch.stack(branches)


def mixture_backward(
    grad_mixture: Tensor, branches: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients to the scores (B, H, R, L) and to the weights (B, H, J)."""
    kept_grad = branches * grad_mixture  # (J, B, H, R, L)
    row_sums = kept_grad.sum(-1, keepdim=True)
    grad_scores = (weights.movedim(-1, 0)[..., None, None] * (kept_grad - branches * row_sums)).sum(0)
    return grad_scores, row_sums.sum((-1, -2)).movedim(0, -1)


def channel(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, weights: Tensor, out_proj: Tensor | None,
    topk: Sequence[int], normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = accumulate_dtype(q.dtype)
    wide_q, wide_k, wide_v = q.to(dtype), k.to(dtype), v.to(dtype)
    similarity, *norms = normalized_product(wide_q, wide_k, normalize)
    branches = branch_probabilities(temperature[..., None, None] * similarity, topk)
    out = torch.einsum("bhj,jbhrl->bhrl", weights, branches) @ wide_v
    if out_proj is not None:
        out = out_proj.to(dtype) @ out.flatten(1, 2)
    return write_rows(out, v), similarity, torch.stack(norms, dim=2)


def channel_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, weights: Tensor,
    out_proj: Tensor | None, similarity: Tensor, norms: Tensor, topk: Sequence[int], normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = accumulate_dtype(q.dtype)
    wide_q, wide_k, wide_v, grad = q.to(dtype), k.to(dtype), v.to(dtype), grad_out.to(dtype)
    branches = branch_probabilities(temperature[..., None, None] * similarity, topk)
    mixture = torch.einsum("bhj,jbhrl->bhrl", weights, branches)
    grad_out_proj = similarity.new_empty(0)
    if out_proj is not None:
        attended = (mixture @ wide_v).flatten(1, 2)  # (B, H * C, N)
        grad_out_proj = torch.einsum("bon,bcn->oc", grad, attended)
        grad = (out_proj.to(dtype).mT @ grad).unflatten(1, q.shape[1:3])
    grad_scores, grad_weights = mixture_backward(grad @ wide_v.mT, branches, weights)
    grad_temperature = (grad_scores * similarity).sum((-1, -2))
    grad_q, grad_k = similarity_backward(
        temperature[..., None, None] * grad_scores, similarity, wide_q, wide_k,
        norms[:, :, 0], norms[:, :, 1], normalize,
    )  # fmt: skip
    grad_v = mixture.mT @ grad
    grads = write_rows(grad_q, q), write_rows(grad_k, k), write_rows(grad_v, v)
    return (*grads, grad_temperature, grad_weights, grad_out_proj)


def token(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, weights: Tensor,
    topk: Sequence[int], normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = accumulate_dtype(q.dtype)
    similarity, _, _ = normalized_product(q.to(dtype), k.to(dtype), normalize)
    scores = temperature[..., None, None] * similarity
    out = torch.einsum("bhj,jbhrl->bhrl", weights, branch_probabilities(scores, topk)) @ v.to(dtype)
    threshold, last_tie, log_sum_exp = [], [], []
    index = torch.arange(scores.shape[-1], device=scores.device)
    for count in topk:
        kept = kept_entries(scores, count)
        smallest = scores.masked_fill(~kept, float("inf")).amin(-1)
        threshold.append(smallest)
        ties = kept & (scores == smallest[..., None])
        last_tie.append(torch.where(ties, index, -1).amax(-1).int())
        log_sum_exp.append(scores.masked_fill(~kept, float("-inf")).logsumexp(-1))
    return (
        out.to(v.dtype),
        torch.stack(threshold, -1),
        torch.stack(last_tie, -1),
        torch.stack(log_sum_exp, -1),
    )


def token_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, weights: Tensor,
    threshold: Tensor, last_tie: Tensor, log_sum_exp: Tensor, topk: Sequence[int], normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = accumulate_dtype(q.dtype)
    wide_q, wide_k, wide_v, grad = q.to(dtype), k.to(dtype), v.to(dtype), grad_out.to(dtype)
    similarity, norms_q, norms_k = normalized_product(wide_q, wide_k, normalize)
    scores = (temperature[..., None, None] * similarity).unsqueeze(0)  # (1, B, H, N, M)
    least, last, total = (x.movedim(-1, 0).unsqueeze(-1) for x in (threshold, last_tie, log_sum_exp))
    index = torch.arange(scores.shape[-1], device=scores.device)
    kept = (scores > least) | ((scores == least) & (index <= last))
    branches = torch.where(kept, (scores - total).exp(), 0)  # (J, B, H, N, M)
    mixture = torch.einsum("bhj,jbhrl->bhrl", weights, branches)
    grad_scores, grad_weights = mixture_backward(grad @ wide_v.mT, branches, weights)
    grad_temperature = (grad_scores * similarity).sum((-1, -2))
    grad_q, grad_k = similarity_backward(
        temperature[..., None, None] * grad_scores, similarity, wide_q, wide_k, norms_q, norms_k, normalize
    )
    grad_v = mixture.mT @ grad
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_temperature, grad_weights

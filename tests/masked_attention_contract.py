"""The four operators of masked attention as ``ops.py`` describes them, in plain PyTorch.

Where the reference leaves the derivatives to autograd, this states them, and what each pass saves,
as formulas. It serves twice: a backend's saved tensors are held against it, and with a fault
planted in it, it proves that the conformance suite sees such a fault.
"""

from __future__ import annotations

import torch
from attention_contract import normalized_product, similarity_backward, write_rows
from torch import Tensor

from restore_kernels.tensors import accumulate_dtype


def gated(k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """k and v (B, H, C, N) times the mask (B, H, 1 or C, N)."""
    return (k, v) if mask is None else (k * mask, v * mask)


def mask_gradient(grad_gated_k: Tensor, grad_gated_v: Tensor, k: Tensor, v: Tensor, rows: int) -> Tensor:
    """(B, H, rows, N) of a mask that multiplies k and v; one row gates all channels."""
    grad = grad_gated_k * k + grad_gated_v * v
    return grad.sum(2, keepdim=True) if rows == 1 else grad


def logits(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores (B, H, N, M) plus the logarithm of the mask (B, H, M); -inf for keys left out."""
    return scores if mask is None else scores + mask.clamp_min(0).log().unsqueeze(-2)


def key_weight_gradient(grad_scores: Tensor, mask: Tensor) -> Tensor:
    """(B, H, M): P is proportional to the mask as to the exponentials of the scores."""
    total = grad_scores.sum(-2)
    return torch.where(mask > 0, total / mask, 0)


def row_probabilities(scores: Tensor, log_sum_exp: Tensor) -> Tensor:
    """exp(scores - log_sum_exp); 0 where all of a row's keys are left out."""
    return torch.where(scores.isneginf(), 0, (scores - log_sum_exp[..., None]).exp())


def softmax_backward(probabilities: Tensor, grad: Tensor, row_sums: Tensor) -> Tensor:
    """Gradient to the scores; row_sums (..., R) of probabilities times grad."""
    return probabilities * (grad - row_sums[..., None])


def channel(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, temperature: Tensor, out_proj: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = accumulate_dtype(q.dtype)
    gated_k, gated_v = gated(k.to(dtype), v.to(dtype), mask)
    similarity, *norms = normalized_product(q.to(dtype), gated_k, normalize)
    out = (temperature[..., None, None] * similarity).softmax(-1) @ gated_v
    if out_proj is not None:
        out = out_proj.to(dtype) @ out.flatten(1, 2)
    return write_rows(out, v), similarity, torch.stack(norms, dim=2)


def channel_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, temperature: Tensor,
    out_proj: Tensor | None, similarity: Tensor, norms: Tensor, normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = accumulate_dtype(q.dtype)
    wide_q, wide_k, wide_v, grad = q.to(dtype), k.to(dtype), v.to(dtype), grad_out.to(dtype)
    gated_k, gated_v = gated(wide_k, wide_v, mask)
    probabilities = (temperature[..., None, None] * similarity).softmax(-1)
    grad_out_proj = similarity.new_empty(0)
    if out_proj is not None:
        attended = (probabilities @ gated_v).flatten(1, 2)  # (B, H * C, N)
        grad_out_proj = torch.einsum("bon,bcn->oc", grad, attended)
        grad = (out_proj.to(dtype).mT @ grad).unflatten(1, q.shape[1:3])
    grad_probabilities = grad @ gated_v.mT
    row_sums = (probabilities * grad_probabilities).sum(-1)
    grad_scores = softmax_backward(probabilities, grad_probabilities, row_sums)
    grad_temperature = (grad_scores * similarity).sum((-1, -2))
    grad_q, grad_gated_k = similarity_backward(
        temperature[..., None, None] * grad_scores, similarity, wide_q, gated_k,
        norms[:, :, 0], norms[:, :, 1], normalize,
    )  # fmt: skip
    grad_gated_v = probabilities.mT @ grad
    grad_k, grad_v = gated(grad_gated_k, grad_gated_v, mask)
    grad_mask = similarity.new_empty(0)
    if mask is not None:
        grad_mask = mask_gradient(grad_gated_k, grad_gated_v, wide_k, wide_v, mask.shape[2])
    grads = write_rows(grad_q, q), write_rows(grad_k, k), write_rows(grad_v, v)
    return (*grads, grad_mask, grad_temperature, grad_out_proj)


def token(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, temperature: Tensor, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(q.dtype)
    similarity, _, _ = normalized_product(q.to(dtype), k.to(dtype), normalize)
    scores = logits(temperature[..., None, None] * similarity, mask)
    log_sum_exp = scores.logsumexp(-1)
    out = row_probabilities(scores, log_sum_exp) @ v.to(dtype)
    return out.to(v.dtype), log_sum_exp, out.new_empty(0) if dtype == q.dtype else out


def token_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, temperature: Tensor, out: Tensor,
    log_sum_exp: Tensor, normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = accumulate_dtype(q.dtype)
    wide_q, wide_k, wide_v, grad = q.to(dtype), k.to(dtype), v.to(dtype), grad_out.to(dtype)
    similarity, norms_q, norms_k = normalized_product(wide_q, wide_k, normalize)
    scores = logits(temperature[..., None, None] * similarity, mask)
    probabilities = row_probabilities(scores, log_sum_exp)
    grad_scores = softmax_backward(probabilities, grad @ wide_v.mT, (grad * out).sum(-1))
    grad_temperature = (grad_scores * similarity).sum((-1, -2))
    grad_q, grad_k = similarity_backward(
        temperature[..., None, None] * grad_scores, similarity, wide_q, wide_k, norms_q, norms_k, normalize
    )
    grad_v = probabilities.mT @ grad
    grad_mask = similarity.new_empty(0) if mask is None else key_weight_gradient(grad_scores, mask)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_mask, grad_temperature

"""What the operators of every attention family have in common, in plain PyTorch.

Formulas, where the references leave the derivatives to autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from restore_kernels.tensors import empty_like_rows

CLAMP = 1e-12


def row_norms(x: Tensor, normalize: bool) -> Tensor:
    """(..., R, L) -> (..., R): L2 norms clamped from below, or ones."""
    return x.norm(dim=-1).clamp_min(CLAMP) if normalize else torch.ones_like(x[..., 0])


def normalized_product(q: Tensor, k: Tensor, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Similarity (B, H, R, L), and the norms of q's and k's rows."""
    norms_q, norms_k = row_norms(q, normalize), row_norms(k, normalize)
    return (q / norms_q[..., None]) @ (k / norms_k[..., None]).mT, norms_q, norms_k


def similarity_backward(
    grad: Tensor, similarity: Tensor, q: Tensor, k: Tensor, norms_q: Tensor, norms_k: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Gradients to q and k of similarity = (q / norms_q) (k / norms_k)ᵀ; a clamped norm is a constant."""
    unit_q, unit_k = q / norms_q[..., None], k / norms_k[..., None]
    grad_q, grad_k = grad @ unit_k, grad.mT @ unit_q
    if normalize:
        product = grad * similarity
        radial_q = product.sum(-1).masked_fill(norms_q <= CLAMP, 0)
        radial_k = product.sum(-2).masked_fill(norms_k <= CLAMP, 0)
        grad_q = grad_q - radial_q[..., None] * unit_q
        grad_k = grad_k - radial_k[..., None] * unit_k
    return grad_q / norms_q[..., None], grad_k / norms_k[..., None]


def write_rows(x: Tensor, like: Tensor) -> Tensor:
    """x in the dtype and memory format that the operator promises for an output like ``like``."""
    return empty_like_rows(like, tuple(x.shape[1:-1])).copy_(x)

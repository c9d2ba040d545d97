"""The four operators of pyramid attention as ``ops.py`` describes them, in plain PyTorch.

Where the reference works on patches and leaves the derivatives to autograd, this works on pixels
between box filters, as the fused backends do, and states the derivatives. It serves twice: a backend's
saved tensors are held against it, and with a fault planted in it, it proves that the conformance suite
sees such a fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from restore_kernels.tensors import accumulate_dtype, empty_image


def shifts(size: int) -> list[tuple[int, int]]:
    """Of the pixels of a patch against its centre."""
    reach = size // 2
    return list(product(range(-reach, reach + 1), repeat=2))


def padded(pairs: Tensor, reach: int) -> Tensor:
    """(B, H, W, h, w) with zeros outside of either image."""
    return F.pad(pairs, (reach,) * 8)


def box(pairs: Tensor, size: int) -> Tensor:
    """The diagonal box filter: the sum of x[n + d, l + d] over all shifts d within a patch."""
    reach, total = size // 2, torch.zeros_like(pairs)
    around = padded(pairs, reach)
    height, width, level_height, level_width = pairs.shape[1:]
    for dy, dx in shifts(size):
        y, x = reach + dy, reach + dx
        total += around[:, y : y + height, x : x + width, y : y + level_height, x : x + level_width]
    return total


def box_of_image(image: Tensor, size: int) -> Tensor:
    """(B, h, w): the sum over the patch around every pixel."""
    return F.avg_pool2d(image[:, None], size, 1, size // 2, divisor_override=1)[:, 0]


def clamped(norms: Tensor, eps: float) -> Tensor:
    return norms.clamp_min(eps)


def norms(key: Tensor, size: int) -> Tensor:
    """(B, h, w): of the patch around every pixel."""
    return box_of_image(key.square().sum(1), size).sqrt()


def level_scores(query: Tensor, key: Tensor, size: int, scale: float, eps: float) -> Tensor:
    """(B, H, W, h, w)."""
    pairs = box(torch.einsum("bcyx,bcvu->byxvu", query, key), size)
    divisor = clamped(norms(key, size), eps)[:, None, None]
    return torch.where(divisor.isinf(), 0, scale * pairs / divisor)  # a norm that overflows: no inf / inf


def joined(levels: Sequence[Tensor]) -> Tensor:
    """(B, H, W, h_i, w_i) of all levels -> (B, H, W, L): levels in order, each row by row."""
    return torch.cat([level.flatten(3) for level in levels], dim=-1)


def parted(pairs: Tensor, levels: Sequence[Tensor]) -> list[Tensor]:
    """The reverse of ``joined``, for levels of the sizes of these images."""
    sizes = [level.shape[-2:] for level in levels]
    parts = pairs.split([size.numel() for size in sizes], dim=-1)
    return [part.unflatten(-1, size) for part, size in zip(parts, sizes, strict=True)]


def mixed(probabilities: Tensor, values: Sequence[Tensor], size: int, out_scale: float) -> Tensor:
    """(B, Cv, H, W): the patches of the values, mixed and overlap-added."""
    parts = zip(parted(probabilities, values), values, strict=True)
    return out_scale * sum(torch.einsum("byxvu,bcvu->bcyx", box(p, size), v) for p, v in parts)  # type: ignore


def best(scores: Tensor) -> Tensor:
    """(B, H, W): the position of the largest score, the first of equal ones."""
    position = torch.arange(scores.shape[-1], device=scores.device)
    is_best = scores == scores.amax(-1, keepdim=True)
    return torch.where(is_best, position, scores.shape[-1]).amin(-1)


def one_hot(index: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    return F.one_hot(index, length).to(dtype)


def write_image(x: Tensor, like: Tensor) -> Tensor:
    """x in the dtype and memory format that the operator promises for an output like ``like``."""
    return empty_image(like, x.shape[1], x.shape[2:]).copy_(x)


def all_scores(query, keys, size, scale, eps):
    return joined([level_scores(query, key, size, scale, eps) for key in keys])


def widened(*images):
    """Of images and lists of them: in the dtype that sums are made in."""
    dtype = accumulate_dtype(images[0].dtype)
    return tuple([y.to(dtype) for y in x] if isinstance(x, list) else x.to(dtype) for x in images)


def softmax_backward(probabilities: Tensor, grad: Tensor, row_sums: Tensor) -> Tensor:
    """Gradient to the scores; row_sums (..., 1) of probabilities times grad."""
    return probabilities * (grad - row_sums)


def norm_gradient(grad_scores: Tensor, scores: Tensor, norms: Tensor, eps: float) -> Tensor:
    """(B, h, w): of the norms of the patches of a level, divided by them; a clamped one is a constant."""
    grad = -(grad_scores * scores).sum((1, 2)) / norms.square()
    return torch.where(norms >= eps, grad, 0)


def pyramid_attention(query, keys, values, patch_size, softmax_scale, eps, out_scale):
    wide_query, wide_keys, wide_values = widened(query, keys, values)
    scores = all_scores(wide_query, wide_keys, patch_size, softmax_scale, eps)
    log_sum_exp = scores.logsumexp(-1)
    out = mixed((scores - log_sum_exp[..., None]).exp(), wide_values, patch_size, out_scale)
    return write_image(out, query), log_sum_exp


def value_gradients(probabilities, grad, values, size):
    """grad (B, Cv, H, W), times out_scale."""
    parts = parted(probabilities, values)
    return [torch.einsum("byxvu,bcyx->bcvu", box(part, size), grad) for part in parts]


def backward(grad_out, query, keys, values, log_sum_exp, patch_size, softmax_scale, eps, out_scale):
    grad, wide_query, wide_keys, wide_values = widened(grad_out, query, keys, values)
    grad = out_scale * grad
    scores = all_scores(wide_query, wide_keys, patch_size, softmax_scale, eps)
    probabilities = (scores - log_sum_exp[..., None]).exp()
    grad_probabilities = joined(
        [box(torch.einsum("bcyx,bcvu->byxvu", grad, value), patch_size) for value in wide_values]
    )
    row_sums = (probabilities * grad_probabilities).sum(-1, keepdim=True)
    grad_scores = softmax_backward(probabilities, grad_probabilities, row_sums)
    grad_query, grad_keys = torch.zeros_like(wide_query), []
    for key, of_scores, score in zip(wide_keys, parted(grad_scores, keys), parted(scores, keys), strict=True):
        norm = norms(key, patch_size)
        of_pairs = box(softmax_scale * of_scores / clamped(norm, eps)[:, None, None], patch_size)
        grad_query += torch.einsum("byxvu,bcvu->bcyx", of_pairs, key)
        radial = box_of_image(norm_gradient(of_scores, score, norm, eps), patch_size)
        grad_keys.append(torch.einsum("byxvu,bcyx->bcvu", of_pairs, wide_query) + key * radial[:, None])
    grad_values = value_gradients(probabilities, grad, wide_values, patch_size)
    return (
        write_image(grad_query, query),
        [write_image(x, key) for x, key in zip(grad_keys, keys, strict=True)],
        [write_image(x, value) for x, value in zip(grad_values, values, strict=True)],
    )


def hard(query, keys, values, patch_size, softmax_scale, eps, out_scale):
    wide_query, wide_keys, wide_values = widened(query, keys, values)
    scores = all_scores(wide_query, wide_keys, patch_size, softmax_scale, eps)
    index = best(scores)
    chosen = one_hot(index, scores.shape[-1], scores.dtype)
    return write_image(mixed(chosen, wide_values, patch_size, out_scale), query), index


def hard_backward(grad_out, values, index, patch_size, out_scale):
    grad, wide_values = widened(grad_out, values)
    chosen = one_hot(index, sum(value.shape[2:].numel() for value in values), grad.dtype)
    grads = value_gradients(chosen, out_scale * grad, wide_values, patch_size)
    return [write_image(x, value) for x, value in zip(grads, values, strict=True)]

"""The public function: semantic checks, backend choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from restore_kernels import checks, coverage
from restore_kernels.backends import Backend, Call, choose
from restore_kernels.functions import eager
from restore_kernels.pyramid_attention import autograd, reference

PATCH_SIZES = (1, 3, 5, 7)
CUDA_CHANNELS = (32, 64)  # the most that the CUDA C++ kernels take, of query and keys, of values


def pyramid_attention(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], *, patch_size: int = 3,
    softmax_scale: float = 10.0, eps: float = 1e-4, out_scale: float = 0.25, hard: bool = False,
    backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Attention of every patch of an image to the patches of all levels of a pyramid.

    With zero-padded patches around all pixels, n of the image and l of all levels::

        S_nl = softmax_scale * <query patch n, key patch l> / max(|key patch l|, eps)
        P = softmax(S) over all l                                            (never stored)
        out = out_scale * (at every n, the patch Σ_l P_nl value patch l, overlaps added)

    Source: scale-agnostic attention of pyramid attention networks (PANet, arXiv 2004.13824, equations 4
    and 5). The fused backends work on pixels between box filters (``csrc/cpu/pyramid_attention.h``).

    Args:
        query: (B, Cq, H, W). float32, bfloat16, float16 or float64; any strides. Under autocast all
            tensors are cast as for a matrix product.
        keys: one (B, Cq, h_i, w_i) per level, of any sizes; same dtype and device as query.
        values: one (B, Cv, h_i, w_i) per level.
        patch_size: side of the patches in pixels: 1, 3, 5 or 7.
        softmax_scale: multiplies the scores.
        eps: smallest norm that a key patch is divided by.
        out_scale: multiplies the result.
        hard: take the one patch with the largest score (the first of equal ones: levels in order, each
            row by row) instead of the mixture. Then only values get a gradient.
        backend: ``auto``, ``eager``, ``cpu``, ``triton`` or ``cuda``; or several of them, best first.

    Returns:
        (B, Cv, H, W), channels_last where query is.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: no backend asked for by name can run this call; the message says why.
    """
    query, keys, values = _autocast(query, keys, values)
    settings = (patch_size, softmax_scale, eps, out_scale)
    _check(query, keys, values, *settings)
    chosen = choose(_call(query, keys, values, patch_size, hard), backend)
    if chosen != "eager":
        differentiable = autograd.hard if hard else autograd.soft
        return differentiable(query, keys, values, *settings, chosen)
    name = "pyramid_attention_hard" if hard else "pyramid_attention"
    return eager(name, reference.pyramid_attention, query, keys, values, *settings, hard)


def _autocast(query: Any, keys: Any, values: Any) -> tuple[Any, list[Any], list[Any]]:
    """The tensors as autocast casts those of a matrix product."""
    for name, levels in (("keys", keys), ("values", values)):
        if not isinstance(levels, (list, tuple)):
            raise TypeError(f"{name} must be a list of tensors, one per level; got {type(levels).__name__}")
    query, *levels = checks.autocast(query, *keys, *values)
    return query, levels[: len(keys)], levels[len(keys) :]


def _check(query, keys, values, patch_size, softmax_scale, eps, out_scale) -> None:
    """Every semantic check of a call."""
    checks.floating_tensor("query", query, ("B", "Cq", "H", "W"))
    if not keys:
        raise ValueError("keys must have at least one level; got none")
    if len(values) != len(keys):
        raise ValueError(f"values must have one level per level of keys, {len(keys)}; got {len(values)}")
    batch, channels = query.shape[:2]
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        checks.floating_tensor(f"keys[{i}]", key, ("B", "Cq", "h", "w"))
        checks.like(f"keys[{i}]", key, query, (batch, channels, *key.shape[2:]), "query")
        checks.floating_tensor(f"values[{i}]", value, ("B", "Cv", "h", "w"))
        of_values = values[0].shape[1]
        checks.like(f"values[{i}]", value, key, (batch, of_values, *key.shape[2:]), f"keys[{i}]")
    if not isinstance(patch_size, int) or patch_size not in PATCH_SIZES:
        raise ValueError(f"patch_size must be one of {', '.join(map(str, PATCH_SIZES))}; got {patch_size!r}")
    for name, x in (("softmax_scale", softmax_scale), ("eps", eps), ("out_scale", out_scale)):
        if not isinstance(x, (int, float)) or not -math.inf < x < math.inf:  # isfinite breaks graphs
            raise ValueError(f"{name} must be a finite number; got {x!r}")
    if eps <= 0:
        raise ValueError(f"eps must be positive; got {eps}")


def _call(
    query: Tensor, keys: list[Tensor], values: list[Tensor], patch_size: int, hard: bool
) -> Call:  # fmt: skip
    kind, uncovered = "hard" if hard else "soft", _uncovered(query, values[0], patch_size, hard)
    return Call("pyramid_attention", kind, (query, *keys, *values), coverage.of_cuda(uncovered))


def _uncovered(query: Tensor, value: Tensor, patch_size: int, hard: bool) -> str | None:
    """Why the CUDA C++ kernels do not take a call."""
    if hard:
        return "it has no kernels for hard=True"
    if patch_size != 3:
        return f"its kernels are for patch_size 3, got {patch_size}"
    most = zip(("query", "values"), (query, value), CUDA_CHANNELS, strict=True)
    for name, x, channels in most:
        if x.shape[1] > channels:
            return f"its kernels take at most {channels} channels of {name}, got {x.shape[1]}"
    return coverage.little_shared_memory(query)


def _plan(query, keys, values, *, patch_size=3, softmax_scale=10.0, eps=1e-4, out_scale=0.25, hard=False,
          backend="auto"):  # fmt: skip
    query, keys, values = _autocast(query, keys, values)
    _check(query, keys, values, patch_size, softmax_scale, eps, out_scale)
    return _call(query, keys, values, patch_size, hard)


pyramid_attention.plan = _plan  # type: ignore[attr-defined]

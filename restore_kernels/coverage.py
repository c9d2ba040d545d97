"""Which calls the kernels of a backend do not cover, whatever the device: ``Call.refusals``."""

from __future__ import annotations

import torch
from torch import Tensor

from restore_kernels import native

NO_KERNELS = "it has no kernels for this operator"
NO_CUDA = {"cuda": NO_KERNELS}
MOST_WIDE_COLUMNS = 256  # of the Triton kernels' rows in float32: more do not fit shared memory

MOST_CHANNELS, MOST_BRANCHES = 256, 32  # csrc/cuda/channel_rows.cuh
MOST_TOKEN_COLUMNS, MOST_TOKEN_BRANCHES = 128, 8  # csrc/cuda/token_launch.h, csrc/cuda/token_weights.cuh
# Longer rows need more shared memory than every GPU has: csrc/cuda/channel_apply.cuh, token_launch.h.
SHORT_CHANNELS, SHORT_TOKEN_COLUMNS = 48, 64
SHARED_BYTES_OF_MANY = 163 * 1024  # csrc/cuda/launch.h


def of_cuda(reason: str | None) -> dict[str, str]:
    """The refusals of a call that the CUDA C++ kernels do not cover for this reason, if there is one."""
    return {} if reason is None else {"cuda": reason}


def channels(q: Tensor, branches: int = 1) -> dict[str, str]:
    """The refusals of attention between the channels of q in so many branches."""
    return of_cuda(_cuda_channels(q, branches))


def tokens(q: Tensor, v: Tensor, branches: int = 1) -> dict[str, str]:
    """The refusals of attention between the tokens of q and v in so many branches."""
    refusals = of_cuda(_cuda_tokens(q, v, branches))
    columns = max(q.shape[3], v.shape[3])
    if q.dtype == torch.float32 and columns > MOST_WIDE_COLUMNS:
        most = f"its token kernels take rows of at most {MOST_WIDE_COLUMNS} in float32"
        refusals["triton"] = f"{most}, got {columns}"
    return refusals


def _cuda_channels(q: Tensor, branches: int = 1) -> str | None:
    """Why they do not cover attention between the channels of q in so many branches, or None."""
    if q.shape[2] > MOST_CHANNELS:
        return f"its channel kernels take heads of at most {MOST_CHANNELS} channels, got {q.shape[2]}"
    if branches > MOST_BRANCHES:
        return f"its channel kernels take at most {MOST_BRANCHES} branches, got {branches}"
    return little_shared_memory(q) if q.shape[2] > SHORT_CHANNELS else None


def _cuda_tokens(q: Tensor, v: Tensor, branches: int = 1) -> str | None:
    """Why they do not cover attention between the tokens of q and v in so many branches, or None."""
    for name, x in (("q and k", q), ("v", v)):
        if x.shape[3] > MOST_TOKEN_COLUMNS:
            most = f"its token kernels take rows of at most {MOST_TOKEN_COLUMNS}"
            return f"{most}, those of {name} have {x.shape[3]}"
    if branches > MOST_TOKEN_BRANCHES:
        return f"its token kernels take at most {MOST_TOKEN_BRANCHES} branches, got {branches}"
    return little_shared_memory(q) if max(q.shape[3], v.shape[3]) > SHORT_TOKEN_COLUMNS else None


def little_shared_memory(x: Tensor) -> str | None:
    """Why kernels whose blocks need much shared memory do not run where x is, or None."""
    return native.why_little_shared_memory(x.device.type, x.device.index, SHARED_BYTES_OF_MANY)

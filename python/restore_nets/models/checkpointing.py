"""What a network computes again in backward instead of keeping it: ``checkpointing`` of ``create_model``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from restore_kernels.nn import (
    DynamicDualAttention,
    MultiDconvAttention,
    MultiInputAttention,
    PyramidAttention,
    TopKSparseAttention,
)
from restore_nets.models.blocks import TransformerBlock
from restore_nets.models.gated import MultiInputBlock
from restore_nets.models.options import check_choice
from restore_nets.models.residual import ResidualBlock
from restore_nets.models.tokens import TokenAttention, TokenLayer

# The modules of which only the input is kept.
_RECOMPUTED: dict[str, tuple[type[nn.Module], ...]] = {
    "none": (),
    "attention": (
        DynamicDualAttention, MultiDconvAttention, MultiInputAttention, PyramidAttention, TokenAttention,
        TopKSparseAttention,
    ),
    "block": (MultiInputBlock, PyramidAttention, ResidualBlock, TokenLayer, TransformerBlock),
}  # fmt: skip

CHECKPOINTING = tuple(_RECOMPUTED)


def apply_checkpointing(model: nn.Module, checkpointing: str) -> None:
    """Make the blocks of a network, or their attention, recompute in backward what they would keep.

    Results and state dict stay as they are. ``"attention"`` saves most where features are large and
    attention is cheap to repeat; ``"block"`` keeps one tensor per block for about a third more time.
    """
    check_choice("checkpointing", checkpointing, CHECKPOINTING)
    for module in model.modules():
        if isinstance(module, _RECOMPUTED[checkpointing]):
            module.forward = partial(_recomputed, type(module).forward, module)


def _recomputed(forward: Callable[..., Any], module: nn.Module, *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(module, *args)
    # No block draws random numbers.
    return checkpoint(forward, module, *args, use_reentrant=False, preserve_rng_state=False)

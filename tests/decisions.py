"""Traces a deviation of a float32 run to the decisions in it that hung by a thread.

Top-k selection and ReLU decide: where two similarities, or a ReLU's input and zero, differ by less
than rounding, a float32 run may decide otherwise than float64, and results jump. Such a run is right
if the float64 network that is made to decide as the float32 run did agrees with it, and every
decision that it would not have made itself was a near tie.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from restore_kernels import native
from restore_kernels.topk_attention import reference

topk_attention = import_module("restore_kernels.topk_attention.autograd")
depthwise_conv = import_module("restore_kernels.depthwise_conv.autograd")


@dataclass
class Decisions:
    """What a run has decided, call by call.

    Attributes:
        ranks: of every channel attention, the rank of every score among its row.
        positive: of every ReLU, which inputs pass.
    """

    ranks: list[Tensor] = field(default_factory=list)
    positive: list[Tensor] = field(default_factory=list)


@dataclass
class Replay:
    """How the decisions look to the run that repeats them.

    Attributes:
        flips: how many it would have made otherwise.
        widest_gap: how far the clearest of those was from a tie, as a share of the largest score of
            its attention or input of its ReLU.
    """

    flips: int = 0
    widest_gap: float = 0.0

    def judge(self, gap: Tensor, size: Tensor) -> None:
        """gap: by how much each decision is wrong, negative for right ones; size: of what was compared."""
        self.flips += int((gap > 0).sum())
        self.widest_gap = max(self.widest_gap, (gap.max() / size).item())


@contextmanager
def recorded() -> Iterator[Decisions]:
    """The decisions of what runs in the block, on any backend."""
    decisions = Decisions()
    mixture, relu = reference.branch_mixture, torch.relu
    attention, convolution = topk_attention.overload, depthwise_conv.overload

    def recording_mixture(scores, weights, topk):
        decisions.ranks.append(_rank(scores))
        return mixture(scores, weights, topk)

    def recording_attention(name, backend):
        operator = attention(name, backend)

        def call(*args):
            out, similarity, norms = operator(*args)
            temperature = args[3]
            decisions.ranks.append(_rank(temperature[..., None, None] * similarity))
            return out, similarity, norms

        return call if name == "topk_attention_channel" else operator

    def recording_convolution(name, backend):
        operator = convolution(name, backend)

        def call(*args):
            out = operator(*args)
            if args[-1] == "relu":
                decisions.positive.append(out.detach() > 0)
            return out

        return call if name == "depthwise_conv" else operator

    def recording_relu(x):
        decisions.positive.append(x.detach() > 0)
        return relu(x)

    with _patched(
        (reference, "branch_mixture", recording_mixture),
        (topk_attention, "overload", recording_attention),
        (depthwise_conv, "overload", recording_convolution),
        # The library's nodes call no overload.
        (native, "loaded_cpu_module", None),
        (torch, "relu", recording_relu),
    ):
        yield decisions


@contextmanager
def replayed(decisions: Decisions) -> Iterator[Replay]:
    """Makes the eager backend and ReLU decide as recorded."""
    replay = Replay()
    ranks, positive = iter(decisions.ranks), iter(decisions.positive)

    def replaying_mixture(scores, weights, topk):
        rank, known = next(ranks), scores.detach()
        branches = []
        for kept in topk:
            dropped = rank >= kept
            branches.append(scores.masked_fill(dropped, float("-inf")).softmax(dim=-1))
            if kept < scores.shape[-1]:
                largest_dropped = known.masked_fill(~dropped, float("-inf")).amax(dim=-1)
                smallest_kept = known.masked_fill(dropped, float("inf")).amin(dim=-1)
                replay.judge(largest_dropped - smallest_kept, known.abs().max())
        return torch.einsum("bhj,jbhrl->bhrl", weights, torch.stack(branches))

    def replaying_relu(x):
        passes, known = next(positive), x.detach()
        replay.judge(torch.where(passes, -known, known), known.abs().max())
        return x * passes

    with _patched((reference, "branch_mixture", replaying_mixture), (torch, "relu", replaying_relu)):
        yield replay


def _rank(scores: Tensor) -> Tensor:
    return scores.detach().argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


@contextmanager
def _patched(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for target, name, replacement in changes:
            stack.enter_context(mock.patch.object(target, name, replacement))
        yield

"""Whether the fused attention pays in a given network, and whether it computes the same.

Both questions are asked at the sizes at which that network calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import restore_kernels
from restore_kernels import topk_attention
from restore_kernels.nn import DynamicDualAttention
from restore_kernels.profiling.baselines import published_topk_attention
from restore_kernels.profiling.measure import Timing, interleave
from restore_nets.training import Trainer

# Losses that differ by less than this, relatively, agree: they are means of many float32 numbers.
AGREE = 8 * torch.finfo(torch.float32).eps
# Runs that differ by rounding part at a step that is a matter of luck, and from there on exponentially.
# So a backend may part from eager in half the time, and by a multiple of the difference, of such runs.
EAGER_RUNS = 3  # one as it is, the others with rounding errors added
PARTING_SHARE = 0.5
NOISE_MULTIPLE = 10.0
# Of the two ways to compute attention in float32, relative to the largest entry of the result.
SAME_RESULT = 1e-4


@dataclass(frozen=True)
class AttentionSize:
    """One call of channel attention: B batch, H heads, C channels per head, N pixels."""

    batch: int
    heads: int
    channels: int
    pixels: int
    topk: tuple[int | None, ...]

    def __str__(self) -> str:
        side = round(self.pixels**0.5)
        pixels = f"{side}x{side}" if side * side == self.pixels else str(self.pixels)
        return f"B{self.batch} H{self.heads} C{self.channels} N{pixels}"


@dataclass(frozen=True)
class AttentionTimes:
    """Forward and backward of one call: the fused kernel against the published computation."""

    size: AttentionSize
    fused: Timing
    published: Timing
    difference: float  # of the results, relative to the largest entry

    @property
    def same(self) -> bool:
        return self.difference <= SAME_RESULT

    @property
    def speedup(self) -> float:
        return self.published.median / self.fused.median


def attention_backend(device: torch.device) -> str:
    """The backend that attention runs on there by default."""
    q = torch.zeros(1, 1, 2, 4, device=device)
    return str(restore_kernels.explain(topk_attention, q, q, q, [None, 1]).chosen)


def attention_sizes(model: nn.Module, batch: Tensor) -> list[AttentionSize]:
    """The different sizes at which a network calls channel attention for a batch (B, 3, H, W)."""
    sizes: list[AttentionSize] = []

    def record(module: DynamicDualAttention, inputs: tuple[Tensor, ...]) -> None:
        count, dim, height, width = inputs[0].shape
        size = AttentionSize(count, module.heads, dim // module.heads, height * width, tuple(module.topk))
        if size not in sizes:
            sizes.append(size)

    with _forward_pre_hooks(model, DynamicDualAttention, record), torch.no_grad():
        model(batch)
    return sizes


@contextmanager
def _forward_pre_hooks(model: nn.Module, kind: type[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    handles = [m.register_forward_pre_hook(hook) for m in model.modules() if isinstance(m, kind)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def time_attention(size: AttentionSize, device: torch.device, seconds: float) -> AttentionTimes:
    """Time forward and backward, interleaved in this process: float32, with the output projection."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    dim = size.heads * size.channels
    qkv = normal(size.batch, 3 * dim, size.pixels)  # one tensor, as the network's convolution gives it
    q, k, v = (part.unflatten(1, (size.heads, -1)).requires_grad_() for part in qkv.chunk(3, dim=1))
    weights = torch.full((len(size.topk),), 1 / len(size.topk), device=device)
    temperature = torch.ones(size.heads, 1, 1, device=device)
    out_proj, gradient = normal(dim, dim), normal(size.batch, dim, size.pixels)

    def fused() -> Tensor:
        return topk_attention(q, k, v, size.topk, weights=weights, temperature=temperature, out_proj=out_proj)

    def published() -> Tensor:
        return published_topk_attention(q, k, v, size.topk, weights, temperature, out_proj)

    def both_passes(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), (q, k, v), gradient)

    with torch.no_grad():
        expected = published()
        difference = float((fused() - expected).abs().max() / expected.abs().max())
    calls = {"fused": both_passes(fused), "published": both_passes(published)}
    times = interleave(calls, seconds=seconds, device=str(device))
    return AttentionTimes(size, times["fused"], times["published"], difference)


@dataclass(frozen=True)
class Agreement:
    """Whether training on a backend follows training on eager PyTorch, from the same seed.

    Args:
        backend: the one that is compared with eager.
        differences: of the two losses of each step, relative to eager's.
        noise: such differences of eager runs to which rounding errors were added, one list per run.
    """

    backend: str
    differences: list[float]
    noise: list[list[float]]

    @property
    def agreeing_steps(self) -> int:
        """Steps from the first on in which the losses agree."""
        return _agreeing_steps(self.differences)

    @property
    def noise_agreeing_steps(self) -> int:
        """The same for rounding errors alone, at the least."""
        return min(map(_agreeing_steps, self.noise))

    @property
    def largest_noise(self) -> float:
        return max(AGREE, *map(max, self.noise))

    @property
    def passed(self) -> bool:
        in_time = self.agreeing_steps >= PARTING_SHARE * self.noise_agreeing_steps
        return in_time and max(self.differences) <= NOISE_MULTIPLE * self.largest_noise


def _agreeing_steps(differences: list[float]) -> int:
    return next((step for step, difference in enumerate(differences) if difference > AGREE), len(differences))


def follow_losses(
    losses: list[float], make_trainer: Callable[[], Trainer], backend: str, on_step: Callable[[], None]
) -> Agreement:
    """Repeat the first steps of a training run with eager attention and compare the losses.

    Two correct ways to compute one thing round differently, and training amplifies what begins as
    rounding, sooner or later. When and how much is measured: in further eager runs every weight is
    moved by one unit in the last place, up or down at random, before every step. Something wrong
    (a gradient off by a thousandth, say) parts from eager at once and not only after some steps.

    Args:
        losses: of the first steps of the run.
        make_trainer: the same run, not yet begun.
        backend: on which the run went.
        on_step: called after each of the ``EAGER_RUNS * len(losses)`` steps.
    """
    generator = torch.Generator().manual_seed(0)

    def run(nudge: Callable[[nn.Module], None]) -> list[float]:
        trainer = make_trainer()

        def between_steps(_: float) -> None:
            nudge(trainer.model)
            on_step()

        nudge(trainer.model)
        trainer.train(between_steps, until=len(losses))
        return trainer.losses

    with restore_kernels.use_backend("eager"):
        eager = run(lambda model: None)
        noisy = [run(lambda model: _nudge(model, generator)) for _ in range(EAGER_RUNS - 1)]
    return Agreement(backend, _differences(losses, eager), [_differences(x, eager) for x in noisy])


def _nudge(model: nn.Module, generator: torch.Generator) -> None:
    """Move every weight by one unit in the last place, up or down at random."""
    with torch.no_grad():
        for parameter in model.parameters():
            up = torch.rand(parameter.shape, generator=generator).to(parameter.device) < 0.5
            parameter.copy_(torch.nextafter(parameter, torch.where(up, torch.inf, -torch.inf)))


def _differences(losses: list[float], reference: list[float]) -> list[float]:
    return [abs(a - b) / b for a, b in zip(losses, reference, strict=True)]

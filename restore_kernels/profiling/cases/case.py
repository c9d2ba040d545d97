"""What every benchmark case has: inputs, a step, what it must move and compute, and what is right of it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from restore_kernels.backends import explain


@dataclass(frozen=True)
class Inputs:
    """The tensor arguments of a call, by name, all with gradients, and the gradient of its output."""

    tensors: dict[str, Any]  # of Tensors; they are passed on as keywords
    grad_out: Tensor

    def double(self) -> Inputs:
        """The same values in float64."""
        tensors = {name: x.detach().double().requires_grad_() for name, x in self.tensors.items()}
        return Inputs(tensors, self.grad_out.double())

    def perturbed(self, seed: int) -> Inputs:
        """Every value moved by about one rounding of float32."""
        device = self.grad_out.device
        generator = torch.Generator(device).manual_seed(seed)
        eps = torch.finfo(torch.float32).eps

        def moved(x: Tensor) -> Tensor:
            noise = torch.randn(x.shape, generator=generator, device=device).to(x.dtype)
            return x.detach() * (1 + eps * noise)

        tensors = {name: moved(x).requires_grad_() for name, x in self.tensors.items()}
        return Inputs(tensors, moved(self.grad_out))

    def training_step(self, forward: Callable[[Inputs], Tensor]) -> None:
        """Forward and backward into fresh gradients, which are freed again: by whom they were made, not by
        the alternative that is timed next."""
        forward(self).backward(self.grad_out)
        for x in self.tensors.values():
            x.grad = None

    @torch.no_grad()
    def inference_step(self, forward: Callable[[Inputs], Tensor]) -> None:
        """Forward alone."""
        forward(self)

    def results(self, forward: Callable[[Inputs], Tensor], backward: bool = True) -> dict[str, Tensor]:
        """The output and, with ``backward``, the gradients of one step."""
        with torch.set_grad_enabled(backward):
            out = forward(self)
        if not backward:
            return {"out": out}
        grads = torch.autograd.grad(out, list(self.tensors.values()), self.grad_out)
        return {"out": out, **{f"grad {name}": x for name, x in zip(self.tensors, grads, strict=True)}}


@dataclass(frozen=True)
class Excerpt:
    """A part of a call that can be computed exactly where the whole is too large for that.

    Attributes:
        whole: the call.
        part: the call that computes part of its results.
        cut: takes that part from the results of the whole; and what the part is right about from its own.
    """

    whole: Inputs
    part: Inputs
    cut: Callable[[dict[str, Tensor]], dict[str, Tensor]]


def option(flag: str, parse: Callable[[str], Any], help: str, *, default: Any = dataclasses.MISSING) -> Any:
    """A field of a case that the command line can set: ``--flag`` with what parse makes of its text."""
    return dataclasses.field(default=default, metadata={"flag": flag, "parse": parse, "help": help})


def nearest(text: str, choices: Iterable[str]) -> str:
    return difflib.get_close_matches(text, list(choices), n=1, cutoff=0)[0]


def one_of(*choices: str) -> Callable[[str], str]:
    """What parses one of the choices."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(
                f"{text!r} is none of {', '.join(choices)}; nearest is {nearest(text, choices)!r}"
            )
        return text

    return parse


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"must have whole numbers; got {text!r}") from None


def sizes(text: str) -> tuple[int, ...]:
    """``8,1,48,16384`` or ``8x1x48x16384``."""
    return tuple(whole(size) for size in text.replace("x", ",").split(","))


class BenchmarkCase:
    """What holds of a case unless it says otherwise. A case is a frozen dataclass of options."""

    operator: ClassVar[Callable[..., Tensor]]
    published_function: ClassVar[Callable[..., Tensor]]
    dims: tuple[str, ...]  # what the sizes of the shape are called
    growing: int  # the position in the shape of what growth is measured in
    size_name: str  # what that is called

    shape: tuple[int, ...]
    backward: bool = True  # is timed too
    pairs: int | None = None  # of positions, to report the time of each

    @property
    def name(self) -> str:
        raise NotImplementedError

    @property
    def series(self) -> str:
        """The name without what grows: cases of one series differ in size alone."""
        replaced = list(map(str, self.shape))
        replaced[self.growing] = self.dims[self.growing]
        return self.name.replace("x".join(map(str, self.shape)), "x".join(replaced))

    @property
    def size(self) -> int:
        """What grows."""
        return self.shape[self.growing]

    def grown(self, factor: float) -> BenchmarkCase:
        """The same call at about ``factor`` times the size."""
        shape = list(self.shape)
        shape[self.growing] = max(1, round(self.size * factor))
        return dataclasses.replace(cast(Any, self), shape=tuple(shape))

    @property
    def flops(self) -> int:
        """Operations of the products of the method, in all that is timed."""
        raise NotImplementedError

    @property
    def elements(self) -> int:
        """Elements moved at the least, in all that is timed."""
        raise NotImplementedError

    @property
    def small(self) -> BenchmarkCase:
        """The same call at a size that takes next to no memory."""
        raise NotImplementedError

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
        raise NotImplementedError

    def arguments(self, x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Those of the operator, by position and by name."""
        raise NotImplementedError

    def published(self, x: Inputs, function: Callable[..., Tensor] | None = None) -> Tensor:
        """The published computation, or a compiled form of it."""
        raise NotImplementedError

    def __str__(self) -> str:
        return f"{self.name}, {self.timed}"

    @property
    def timed(self) -> str:
        return "forward and backward" if self.backward else "forward"

    @property
    def published_flops(self) -> int:
        """Operations of the published computation."""
        return self.flops

    @property
    def published_elements(self) -> int:
        """Elements that the published computation holds at its peak, about."""
        return self.elements

    def ours(self, x: Inputs, backend: str) -> Tensor:
        args, kwargs = self.arguments(x)
        return type(self).operator(*args, **kwargs, backend=backend)

    def why_not(self, x: Inputs) -> Mapping[str, str | None]:
        """Why each backend cannot run the call, or None."""
        args, kwargs = self.arguments(x)
        return explain(type(self).operator, *args, **kwargs).why_not

    def step(self, x: Inputs, forward: Callable[[Inputs], Tensor]) -> None:
        """What is timed."""
        (x.training_step if self.backward else x.inference_step)(forward)

    def excerpt(self, x: Inputs) -> Excerpt:
        """What the correctness of the call is judged by."""
        return Excerpt(x, x, lambda results: results)

    def check(self) -> None:
        """Raise ValueError if there is no such call; the message says the nearest there is."""
        if len(self.shape) != len(self.dims) or min(self.shape) < 1:
            example = "x".join(self.dims)
            raise ValueError(
                f"the shape must be {example}, {len(self.dims)} positive sizes; "
                f"got {'x'.join(map(str, self.shape))}, nearest is {'x'.join(map(str, self._nearest()))}"
            )

    def _nearest(self) -> tuple[int, ...]:
        """The given shape with its wrong sizes mended: without leading sizes those are 1."""
        given = tuple(max(1, size) for size in self.shape)[-len(self.dims) :]
        return (1,) * (len(self.dims) - len(given)) + given

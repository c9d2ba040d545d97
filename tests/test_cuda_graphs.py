"""What a CUDA graph forbids: a step of a network that asks the device for a value.

Without a GPU, steps run under a mode that raises at every operator that would wait for one. With
``--device cuda`` they are captured, replayed with other data and compared.
"""

from __future__ import annotations

import conformance
import pytest
import torch
from test_models import image, outputs
from test_step_profile import TINY
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import restore_kernels
from restore_nets import create_model, list_models

WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero",
    "aten::repeat_interleave.Tensor", "aten::_unique2", "aten::bincount",
}  # fmt: skip


class Waits(Exception):
    """An operator whose result, or the shape of it, the host would have to wait for."""


class NothingWaits(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        by_mask = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if by_mask or name in WAITING or f"{name}.{func._overloadname}" in WAITING:
            raise Waits(str(func))
        return func(*args, **(kwargs or {}))


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, **TINY[name])


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs and the gradients of all weights."""
    out = outputs(model(x))
    weights = [p for p in model.parameters() if p.requires_grad]
    return [*out, *torch.autograd.grad(sum(y.square().sum() for y in out), weights)]


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("name", list_models())
def test_nothing_waits_for_the_device(name, backend):
    """No value of a tensor is read, nor a shape that depends on one: forward, backward, odd sizes."""
    model = network(name)
    with restore_kernels.use_backend(backend), NothingWaits():
        step(model, image(1, 3, 13, 9))


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x * x.max().item(),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x[x > 0.5],
        lambda x: torch.where(x > 0.5)[0],
        lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.long), dim=1),
    ],
)
def test_what_would_wait_is_seen(waits):
    with NothingWaits(), pytest.raises(Waits):
        waits(image(1, 3, 4, 4))


@pytest.mark.parametrize("name", list_models())
def test_a_captured_step_replays_with_other_data(name):
    if conformance.DEVICE != "cuda":
        pytest.skip("captures graphs on a GPU: --device cuda")
    model = network(name).cuda()
    static = image(1, 3, 24, 16).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, tunes and allocates
        for _ in range(3):
            step(model, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(model, static)
    other = torch.rand(static.shape, generator=torch.Generator().manual_seed(7)).cuda()
    static.copy_(other)
    graph.replay()
    for got, expected in zip(captured, step(model, other), strict=True):
        # Convolutions may choose other algorithms outside of the graph.
        assert (got - expected).norm() <= 1e-4 * expected.norm()

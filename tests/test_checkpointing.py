"""Networks that compute again in backward what they would keep: the same results in less memory."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import restore_nets

SMALL = {
    "drsformer": {"dim": 8, "num_blocks": (1, 1, 1, 1), "heads": (1, 2, 2, 2)},
    "ddsa": {"dim": 8, "num_blocks": (1, 1, 1, 1), "heads": (1, 2, 2, 2)},
    "elf": {"n_feat": 16},
    "association": {"n_feat": 16},
    "panet": {"n_resblocks": 4, "n_feats": 8},
    "pa_edsr": {"n_resblocks": 4, "n_feats": 8},
}


def network(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return restore_nets.create_model(name, **SMALL[name], **options)


def step(model: nn.Module) -> list[Tensor]:
    """The outputs and the gradients of every parameter that gets one."""
    image = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(1))
    out = model(image)
    outputs = list(out) if isinstance(out, (tuple, list)) else [out]
    model.zero_grad()
    torch.autograd.backward([x.square().sum() for x in outputs])
    return [*outputs, *(p.grad for p in model.parameters() if p.grad is not None)]


def kept(model: nn.Module) -> int:
    """Bytes that autograd keeps for backward, weights apart."""
    weights = {p.data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in weights:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model(torch.rand(1, 3, 24, 40))
    del out
    return sum(storages.values())


@pytest.mark.parametrize("checkpointing", ["attention", "block"])
@pytest.mark.parametrize("name", SMALL)
def test_same_results(name, checkpointing):
    plain, recomputing = network(name), network(name, checkpointing=checkpointing)
    assert recomputing.state_dict().keys() == plain.state_dict().keys()
    for x, y in zip(step(recomputing), step(plain), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", SMALL)
def test_less_is_kept(name):
    sizes = [kept(network(name, checkpointing=what)) for what in ("none", "attention", "block")]
    assert sizes[2] < sizes[1] < sizes[0]
    assert sizes[2] < 0.7 * sizes[0]


def test_copies_compute_on_their_own():
    model = network("drsformer", checkpointing="block")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = step(copied)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        for x, y in zip(step(copied), before, strict=True):
            assert torch.equal(x, y)


def test_nothing_is_recomputed_without_gradients():
    model = network("panet", checkpointing="block")
    plain = network("panet")
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(image), plain(image))


def test_attention_alone_compiles_as_one_graph():
    model = network("panet", checkpointing="attention")
    expected = step(model)
    for x, y in zip(step(torch.compile(model, fullgraph=True, backend="aot_eager")), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_unknown_names_what_there_is():
    with pytest.raises(ValueError, match=r"checkpointing.*none, attention, block.*got 'blocks'"):
        network("panet", checkpointing="blocks")

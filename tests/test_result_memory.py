"""Results on the CPU come from memory of earlier results of that size, and of nothing that lives."""

from __future__ import annotations

import pytest
import torch

import restore_kernels
from restore_kernels import native

pytestmark = pytest.mark.skipif(native.why_no_cpu_library() is not None, reason="no compiled library")


@pytest.mark.parametrize("side", [1, 8, 200, 800])
def test_memory_of_a_result_is_used_again_once_it_is_free(side):
    x, weight = torch.randn(1, 3, side, side), torch.ones(3)
    first = restore_kernels.channel_norm(x, weight, backend="cpu")
    expected, place = first.clone(), first.data_ptr()
    other = restore_kernels.channel_norm(-x, weight, backend="cpu")
    assert other.data_ptr() != place and torch.equal(first, expected)
    assert first.data_ptr() % 64 == 0 and other.data_ptr() % 64 == 0
    del first
    assert restore_kernels.channel_norm(x, weight, backend="cpu").data_ptr() == place
    assert torch.equal(other, -expected)

"""The autograd Function of the channel gate; weights and biases come in any dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from restore_kernels.channel_gate.ops import overload
from restore_kernels.functions import BackwardFunction, OperatorFunction, compiled_functions, map_over_batch
from restore_kernels.tensors import accumulate_dtype

PARAMETERS = (1, 2, 3, 4)  # positions of weights and biases among the arguments


def channel_gate(
    x: Tensor, down: Tensor, up: Tensor, down_bias: Tensor | None, up_bias: Tensor | None,
    residual: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    """The differentiable operator."""
    if compiled := compiled_functions(backend):
        return compiled.channel_gate(x, down, up, down_bias, up_bias, residual)
    return ChannelGate.call(x, down, up, down_bias, up_bias, residual, backend)[0]


class ChannelGate(OperatorFunction):
    """(x, down, up, down_bias, up_bias, residual, backend) -> out, mean, hidden, gate."""

    @staticmethod
    def forward(x, down, up, down_bias, up_bias, residual, backend):
        dtype = accumulate_dtype(x.dtype)
        biases = (None if bias is None else bias.to(dtype) for bias in (down_bias, up_bias))
        return overload("channel_gate", backend)(x, down.to(dtype), up.to(dtype), *biases, residual)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, down, up, down_bias, up_bias, residual, ctx.backend = inputs
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in (down_bias, up_bias)]
        ctx.has_residual = residual is not None
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, down, up, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 7
        x, down, up, *saved = ctx.saved_tensors
        dtype = saved[0].dtype
        grad_x, grad_down, grad_up, *grad_biases = ChannelGateBackward.run(
            grad_out, x, down.to(dtype), up.to(dtype), *saved, ctx.backend
        )
        biases = (
            None if of is None else grad.to(of) for grad, of in zip(grad_biases, ctx.bias_dtypes, strict=True)
        )
        grad_residual = grad_out if ctx.has_residual else None
        return grad_x, grad_down.to(down.dtype), grad_up.to(up.dtype), *biases, grad_residual, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        fold = all(in_dims[position] is None for position in PARAMETERS)
        return map_over_batch(ChannelGate, info, in_dims, args, fold=fold, unbatched=PARAMETERS)


class ChannelGateBackward(BackwardFunction):
    """grad_out, x, down, up, mean, hidden, gate, backend -> gradients of x, the weights and the biases."""

    operator = "channel_gate"

    @staticmethod
    def forward(grad_out, x, down, up, mean, hidden, gate, backend):
        return overload("channel_gate_backward", backend)(grad_out, x, down, up, mean, hidden, gate)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any):
        # The gradients of the parameters are summed over the batch.
        return map_over_batch(ChannelGateBackward, info, in_dims, args, fold=False)

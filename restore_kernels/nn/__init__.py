"""Drop-in modules over the fused operators, with the state-dict keys of the published networks."""

from restore_kernels.nn.bilinear_resize import BilinearResize
from restore_kernels.nn.convolutions import DenseConv2d, DepthwiseConv2d, PointwiseConv2d
from restore_kernels.nn.gate import ChannelGate
from restore_kernels.nn.multi_input_attention import MultiInputAttention
from restore_kernels.nn.norm import ChannelNorm
from restore_kernels.nn.projected_attention import (
    DynamicDualAttention,
    MultiDconvAttention,
    TopKSparseAttention,
)
from restore_kernels.nn.pyramid import PyramidAttention

__all__ = [
    "BilinearResize",
    "ChannelGate",
    "ChannelNorm",
    "DenseConv2d",
    "DepthwiseConv2d",
    "DynamicDualAttention",
    "MultiDconvAttention",
    "MultiInputAttention",
    "PointwiseConv2d",
    "PyramidAttention",
    "TopKSparseAttention",
]

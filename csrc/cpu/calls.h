// The public functions, for calls that need nothing of their Python: see api.py, whose arguments these are.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <optional>

namespace restore_kernels {

using at::Tensor;
using Result = std::optional<Tensor>;  // nullopt: the call is left to api.py
using pybind11::handle;

Result channel_gate_call(handle x, handle down, handle up, handle down_bias, handle up_bias, handle residual);
Result channel_norm_call(handle x, handle weight, handle bias, handle eps);
Result depthwise_conv2d_call(handle x, handle weight, handle bias, handle dilation, handle activation, handle slope,
                             handle gate);
Result pointwise_conv2d_call(handle x, handle weight, handle bias);
Result topk_attention_call(handle q, handle k, handle v, handle topk, handle weights, handle temperature, handle normalize,
                           handle layout, handle out_proj);
Result masked_attention_call(handle q, handle k, handle v, handle mask, handle temperature, handle normalize, handle layout,
                             handle out_proj);

}  // namespace restore_kernels

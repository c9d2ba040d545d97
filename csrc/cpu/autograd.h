// The operators as differentiable functions; see autograd.py, whose Functions take the same arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

namespace restore_kernels {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor channel_topk(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature, const Tensor& weights,
                    const OptionalTensor& out_proj, const std::vector<int64_t>& topk, bool normalize);
Tensor token_topk(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature, const Tensor& weights,
                  const std::vector<int64_t>& topk, bool normalize);
Tensor channel_masked(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                      const Tensor& temperature, const OptionalTensor& out_proj, bool normalize);
Tensor token_masked(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                    const Tensor& temperature, bool normalize);
Tensor bilinear_resize(const Tensor& x, const OptionalTensor& residual, bool doubles, int64_t height, int64_t width);
Tensor channel_gate(const Tensor& x, const Tensor& down, const Tensor& up, const OptionalTensor& down_bias,
                    const OptionalTensor& up_bias, const OptionalTensor& residual);
Tensor channel_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double eps);
Tensor dense_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);
Tensor depthwise_conv(const std::vector<Tensor>& x, const Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& slope, const OptionalTensor& gate, int64_t dilation,
                      const std::optional<std::string>& activation);
Tensor pointwise_conv(const std::vector<Tensor>& x, const Tensor& weight, const OptionalTensor& bias);

}  // namespace restore_kernels

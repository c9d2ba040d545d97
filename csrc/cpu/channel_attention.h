// Attention between channels: top-k branches over keys and values that a mask may gate.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace channel {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// out, similarity, norms; shapes as in the two ops.py.
std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, const Tensor& temperature,
    const Tensor& weights, const OptionalTensor& out_proj, at::IntArrayRef topk, bool normalize);

// Of q, k, v, mask, temperature, weights, out_proj.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                   const Tensor& temperature, const Tensor& weights, const OptionalTensor& out_proj,
                   const Tensor& similarity, const Tensor& norms, at::IntArrayRef topk, bool normalize);

}  // namespace channel
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

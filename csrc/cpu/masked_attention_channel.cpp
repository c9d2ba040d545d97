// Masked multi-input attention between channels on the CPU: one dense branch over gated keys and values.
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include "channel_attention.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace {

using namespace channel;

// The weight of the only branch, as the weights (B, H, 1) of top-k attention.
Tensor one_branch(const Tensor& temperature) {
  return at::ones({1}, temperature.options()).expand({temperature.size(0), temperature.size(1), 1});
}

std::tuple<Tensor, Tensor, Tensor> masked_attention_channel(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, const Tensor& temperature,
    const OptionalTensor& out_proj, bool normalize) {
  return forward(q, k, v, mask, temperature, one_branch(temperature), out_proj, q.size(2), normalize);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> masked_attention_channel_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
    const Tensor& temperature, const OptionalTensor& out_proj, const Tensor& similarity, const Tensor& norms,
    bool normalize) {
  auto [grad_q, grad_k, grad_v, grad_mask, grad_temperature, grad_weights, grad_out_proj] =
      backward(grad_out, q, k, v, mask, temperature, one_branch(temperature), out_proj, similarity, norms, q.size(2),
               normalize);
  return {grad_q, grad_k, grad_v, grad_mask, grad_temperature, grad_out_proj};
}

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(restore_kernels, CPU, m) {
  m.impl("masked_attention_channel.cpu", masked_attention_channel);
  m.impl("masked_attention_channel_backward.cpu", masked_attention_channel_backward);
}

}  // namespace restore_kernels

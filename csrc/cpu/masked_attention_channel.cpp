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
  const Tensor weights = one_branch(temperature);
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "masked_attention_channel", [&] {
    using T = Accumulate<scalar_t>;
    return forward<scalar_t, T>(Problem<T>(q, mask, temperature, weights, out_proj, q.size(2), normalize), q, k, v);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> masked_attention_channel_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
    const Tensor& temperature, const OptionalTensor& out_proj, const Tensor& similarity, const Tensor& norms,
    bool normalize) {
  const Tensor weights = one_branch(temperature);
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "masked_attention_channel_backward", [&] {
    using T = Accumulate<scalar_t>;
    auto [grad_q, grad_k, grad_v, grad_mask, grad_temperature, grad_weights, grad_out_proj] = backward<scalar_t, T>(
        Problem<T>(q, mask, temperature, weights, out_proj, q.size(2), normalize), grad_out, q, k, v,
        similarity.contiguous(), norms.contiguous());
    return std::make_tuple(grad_q, grad_k, grad_v, grad_mask, grad_temperature, grad_out_proj);
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(restore_kernels, CPU, m) {
  m.impl("masked_attention_channel.cpu", masked_attention_channel);
  m.impl("masked_attention_channel_backward.cpu", masked_attention_channel_backward);
}

}  // namespace restore_kernels

// Attention between channels on the CPU, for every dtype: top-k attention, and masked attention, which is one dense
// branch whose keys and values pass a gate.
#include <torch/library.h>

#include "channel_passes.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace {

using namespace channel;

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, const Tensor& temperature,
    const OptionalTensor& weights, const OptionalTensor& out_proj, at::IntArrayRef topk, bool normalize) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "channel_attention", [&] {
    using T = Accumulate<scalar_t>;
    return forward<scalar_t, T>(Problem<T>(q, mask, temperature, weights, out_proj, topk, normalize), q, k, v);
  });
}

Gradients backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                   const Tensor& temperature, const OptionalTensor& weights, const OptionalTensor& out_proj,
                   const Tensor& similarity, const Tensor& norms, at::IntArrayRef topk, bool normalize) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "channel_attention_backward", [&] {
    using T = Accumulate<scalar_t>;
    return backward<scalar_t, T>(Problem<T>(q, mask, temperature, weights, out_proj, topk, normalize), grad_out, q, k, v,
                                 similarity.contiguous(), norms.contiguous());
  });
}

std::tuple<Tensor, Tensor, Tensor> topk_attention_channel(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature, const Tensor& weights,
    const OptionalTensor& out_proj, at::IntArrayRef topk, bool normalize) {
  return forward(q, k, v, {}, temperature, weights, out_proj, topk, normalize);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> topk_attention_channel_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature,
    const Tensor& weights, const OptionalTensor& out_proj, const Tensor& similarity, const Tensor& norms,
    at::IntArrayRef topk, bool normalize) {
  auto [grad_q, grad_k, grad_v, grad_mask, grad_temperature, grad_weights, grad_out_proj] =
      backward(grad_out, q, k, v, {}, temperature, weights, out_proj, similarity, norms, topk, normalize);
  return {grad_q, grad_k, grad_v, grad_temperature, grad_weights, grad_out_proj};
}

std::tuple<Tensor, Tensor, Tensor> masked_attention_channel(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, const Tensor& temperature,
    const OptionalTensor& out_proj, bool normalize) {
  return forward(q, k, v, mask, temperature, {}, out_proj, q.size(2), normalize);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> masked_attention_channel_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
    const Tensor& temperature, const OptionalTensor& out_proj, const Tensor& similarity, const Tensor& norms,
    bool normalize) {
  auto [grad_q, grad_k, grad_v, grad_mask, grad_temperature, grad_weights, grad_out_proj] =
      backward(grad_out, q, k, v, mask, temperature, {}, out_proj, similarity, norms, q.size(2),
               normalize);
  return {grad_q, grad_k, grad_v, grad_mask, grad_temperature, grad_out_proj};
}

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(restore_kernels, CPU, m) {
  m.impl("topk_attention_channel.cpu", topk_attention_channel);
  m.impl("topk_attention_channel_backward.cpu", topk_attention_channel_backward);
  m.impl("masked_attention_channel.cpu", masked_attention_channel);
  m.impl("masked_attention_channel_backward.cpu", masked_attention_channel_backward);
}

}  // namespace restore_kernels

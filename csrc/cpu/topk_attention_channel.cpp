// Top-k attention between channels on the CPU: the operators of ops.py.
#include <torch/library.h>

#include "channel_attention.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace {

using namespace channel;

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

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(restore_kernels, CPU, m) {
  m.impl("topk_attention_channel.cpu", topk_attention_channel);
  m.impl("topk_attention_channel_backward.cpu", topk_attention_channel_backward);
}

}  // namespace restore_kernels

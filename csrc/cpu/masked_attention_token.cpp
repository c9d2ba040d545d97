// Masked multi-input attention between tokens on the CPU, forward and backward, without an N x M matrix.
//
// Schedule. The longer side, queries or keys, is cut into chunks, which are tasks (masked_token_tiles.h).
// A task meets every block of queries with every tile of keys that is not masked out altogether:
//   forward   online softmax: maxima, sums and the output of the block (transposed, E x R) in float32;
//             where keys are the longer side, the tasks' shares are then combined per query
//   backward  P again from the saved log-sum-exp; dP = do vᵀ, dS = P (dP - do·out); dv += Pᵀ do,
//             dk̂ += dSᵀ q̂, dq̂ += dS k̂. What belongs to the longer side is finished by its task, what
//             belongs to the shorter side is a share per task, added up in order afterwards
// 2·N·M·(D + E) operations forward and 2·N·M·(3 D + 2 E) backward, all on tiles in cache; moves q, k, v,
// do and the results once each: arithmetic is the bound, or, with few queries or few keys, the memory.
// Extra memory: the shorter side, packed, per thread, and its gradients per task, at most 8 tasks of a
// head. Tasks depend on shapes alone, so sums do not depend on the number of threads.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "masked_token_backward.h"
#include "masked_token_forward.h"
#include "result_memory.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace {

using namespace masked;

std::tuple<Tensor, Tensor, Tensor> masked_attention_token(const Tensor& q, const Tensor& k, const Tensor& v,
                                                          const OptionalTensor& mask, const Tensor& temperature,
                                                          bool normalize) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "masked_attention_token", [&] {
    using T = Accumulate<scalar_t>;
    const Problem<T> p(q, k, v, mask, temperature, normalize);
    const auto wide = q.options().dtype(c10::CppTypeToScalarType<T>::value);
    const std::vector<int64_t> shape{p.batch, p.heads, p.queries, p.width}, rows(shape.begin(), shape.end() - 1);
    Forward<scalar_t, T> pass{p, q, k, v, empty_result(shape, v.options()), empty_result(rows, wide),
                              std::is_same_v<scalar_t, T> ? at::empty({0}, wide) : empty_result(shape, wide)};
    if (p.by_keys) pass.keys_in_chunks();
    else pass.queries_in_chunks();
    return std::make_tuple(pass.out, pass.log_sum_exp, pass.wide_out);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> masked_attention_token_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
    const Tensor& temperature, const Tensor& out, const Tensor& log_sum_exp, bool normalize) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "masked_attention_token_backward", [&] {
    using T = Accumulate<scalar_t>;
    const Problem<T> p(q, k, v, mask, temperature, normalize);
    const Tensor packed_out = out.contiguous(), statistics = log_sum_exp.contiguous();
    const auto empty_like = [](const Tensor& x) { return empty_result(x.sizes(), x.options()); };
    Backward<scalar_t, T> pass{
        p, grad_out, q, k, v, packed_out, statistics, empty_like(q), empty_like(k), empty_like(v),
        empty_result(mask ? mask->sizes() : at::IntArrayRef{0}, statistics.options()),
        empty_result({p.batch, p.heads}, statistics.options())};
    if (p.by_keys) pass.keys_in_chunks();
    else pass.queries_in_chunks();
    return std::make_tuple(pass.grad_q, pass.grad_k, pass.grad_v, pass.grad_mask, pass.grad_temperature);
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(restore_kernels, CPU, m) {
  m.impl("masked_attention_token.cpu", masked_attention_token);
  m.impl("masked_attention_token_backward.cpu", masked_attention_token_backward);
}

}  // namespace restore_kernels

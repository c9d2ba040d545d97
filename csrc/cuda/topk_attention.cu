// Launches of top-k token attention.
#include "token_backward.cuh"
#include "token_launch.h"
#include "token_sums.h"
#include "topk_token.cuh"

namespace restore_kernels {

namespace {

using namespace token;

int branches_of(const std::vector<int64_t>& topk) {
  if (topk.size() > kMostBranches)
    throw std::runtime_error("the CUDA kernels take at most " + std::to_string(kMostBranches) + " branches of tokens");
  return static_cast<int>(topk.size());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> topk_attention_token(const Tensor& q, const Tensor& k, const Tensor& v,
                                                                const Tensor& temperature, const Tensor& weights,
                                                                const std::vector<int64_t>& topk, bool normalize) {
  const OnDevice guard(q.get_device_index());
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2);
  const std::vector<int64_t> rows{batch, heads, queries, branches_of(topk)};
  const Tensor out = empty(v, {batch, heads, queries, v.size(3)});
  const Tensor threshold = empty_float32(q, rows), log_sum_exp = empty_float32(q, rows);
  const Tensor last_tie = torch::stable::new_empty(q, rows, ScalarType::Int);
  TopKForward problem{};
  problem.in = inputs(q, k, v, std::nullopt, temperature, normalize);
  problem.weights = per_head(weights);
  problem.branches = branches_of(topk);
  std::copy(topk.begin(), topk.end(), problem.kept);
  problem.out = out.data_ptr();
  problem.threshold = floats(threshold);
  problem.last_tie = static_cast<int*>(last_tie.data_ptr());
  problem.log_sum_exp = floats(log_sum_exp);
  with_kind(q, v, [&]<typename K, int DIM>() {
    launch_with<TopKTiles<K, DIM>, DIM>(topk_token_kernel<K, DIM>, batch * heads * ceil_div(queries, kRows), problem);
  });
  return {out, threshold, last_tie, log_sum_exp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> topk_attention_token_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature,
    const Tensor& weights, const Tensor& threshold, const Tensor& last_tie, const Tensor& log_sum_exp,
    const std::vector<int64_t>& topk, bool normalize) {
  const OnDevice guard(q.get_device_index());
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2), all_heads = batch * heads;
  const int branches = branches_of(topk);
  const Tensor grad_q = empty(q, {batch, heads, queries, q.size(3)});
  const Tensor grad_k = empty(k, {batch, heads, keys, q.size(3)}), grad_v = empty(v, {batch, heads, keys, v.size(3)});
  const Tensor grad_temperature = empty_float32(q, {batch, heads});
  const Tensor grad_weights = empty_float32(q, {batch, heads, branches});
  const Tensor row_sums = empty_float32(q, {batch, heads, queries, branches});
  const Tensor temperature_terms = empty_float32(q, {batch, heads, queries});
  Backward problem{};
  problem.in = inputs(q, k, v, std::nullopt, temperature, normalize);
  problem.grad_out = matrices(grad_out, is_narrow(q, v));
  problem.log_sum_exp = floats(log_sum_exp);
  problem.row_sums = floats(row_sums);
  problem.threshold = floats(threshold);
  problem.last_tie = static_cast<const int*>(last_tie.data_ptr());
  problem.weights = per_head(weights);
  problem.branches = branches;
  problem.grad_q = grad_q.data_ptr();
  problem.grad_k = grad_k.data_ptr();
  problem.grad_v = grad_v.data_ptr();
  problem.temperature_terms = floats(temperature_terms);
  problem.key_splits = problem.query_splits = 1;
  problem.keys_per_split = keys;
  problem.queries_per_split = queries;
  with_kind(q, v, [&]<typename K, int DIM>() {
    launch_with<GradQTiles<K, DIM, Selection>, DIM>(token_grad_q_kernel<K, DIM, Selection>,
                                                    all_heads * ceil_div(queries, kRows), problem);
    launch_with<GradKvTiles<K, DIM, Selection>, DIM>(token_grad_kv_kernel<K, DIM, Selection>,
                                                     all_heads * ceil_div(keys, kRows), problem);
  });
  sum_rows(floats(temperature_terms), floats(grad_temperature), all_heads, queries, 1);
  sum_rows(floats(row_sums), floats(grad_weights), all_heads, queries, branches);
  return {grad_q, grad_k, grad_v, grad_temperature, grad_weights};
}

}  // namespace

}  // namespace restore_kernels

REGISTER(library) {
  library.impl("topk_attention_token.cuda", TORCH_BOX(restore_kernels::topk_attention_token));
  library.impl("topk_attention_token_backward.cuda", TORCH_BOX(restore_kernels::topk_attention_token_backward));
}

// Launches of masked token attention.
#include "masked_token.cuh"
#include "token_backward.cuh"
#include "token_launch.h"
#include "token_sums.h"

namespace restore_kernels {

namespace {

using namespace token;

std::tuple<Tensor, Tensor, Tensor> masked_attention_token(const Tensor& q, const Tensor& k, const Tensor& v,
                                                          const std::optional<Tensor>& mask,
                                                          const Tensor& temperature, bool normalize) {
  const OnDevice guard(q.get_device_index());
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2), width = v.size(3);
  const Tensor out = empty(v, {batch, heads, queries, width});
  const Tensor log_sum_exp = empty_float32(q, {batch, heads, queries});
  const bool rounded = q.scalar_type() != ScalarType::Float;
  const Tensor wide_out =
      empty_float32(q, rounded ? std::vector{batch, heads, queries, width} : std::vector<int64_t>{0});
  with_kind(q, v, [&]<typename K, int DIM>() {
    using Shared = MaskedTiles<K, DIM>;
    const int64_t blocks = batch * heads * ceil_div(queries, kRows);
    const Split splits = split(keys, Shared::kCount, blocks);
    const int64_t parts = splits.count > 1 ? batch * heads * splits.count * queries : 0;
    const Tensor partials = empty_float32(q, {parts, width}), statistics = empty_float32(q, {parts, 2});
    const MaskedForward problem{inputs(q, k, v, mask, temperature, normalize), splits.count, splits.rows,
                                out.data_ptr(), rounded ? floats(wide_out) : nullptr, floats(log_sum_exp),
                                floats(partials), floats(statistics)};
    launch_with<Shared, DIM>(masked_token_kernel<K, DIM>, blocks * splits.count, problem);
    if (splits.count > 1)
      launch(masked_token_combine_kernel, batch * heads * queries, kCombineThreads, 0, problem);
  });
  return {out, log_sum_exp, wide_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> masked_attention_token_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
    const Tensor& temperature, const Tensor& out, const Tensor& log_sum_exp, bool normalize) {
  const OnDevice guard(q.get_device_index());
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2);
  const int64_t length = q.size(3), width = v.size(3), all_heads = batch * heads;
  const Tensor grad_q = empty(q, {batch, heads, queries, length}), grad_k = empty(k, {batch, heads, keys, length});
  const Tensor grad_v = empty(v, {batch, heads, keys, width});
  const Tensor grad_mask = empty_float32(q, mask ? std::vector{batch, heads, keys} : std::vector<int64_t>{0});
  const Tensor grad_temperature = empty_float32(q, {batch, heads});
  const Tensor row_sums = empty_float32(q, {batch, heads, queries});

  const int64_t query_tiles = all_heads * ceil_div(queries, kRows), key_tiles = all_heads * ceil_div(keys, kRows);
  const Split of_keys = split(keys, kStreamed, query_tiles), of_queries = split(queries, kStreamed, key_tiles);
  const auto parts = [&](const Split& split, int64_t rows, int64_t columns) {
    return empty_float32(q, {split.count > 1 ? all_heads * split.count * rows * columns : 0});
  };
  const Tensor partial_q = parts(of_keys, queries, length), partial_k = parts(of_queries, keys, length);
  const Tensor partial_v = parts(of_queries, keys, width), partial_mask = parts(of_queries, mask ? keys : 0, 1);
  const Tensor temperature_terms = empty_float32(q, {all_heads * of_keys.count * queries});

  Backward problem{};
  problem.in = inputs(q, k, v, mask, temperature, normalize);
  problem.grad_out = matrices(grad_out, is_narrow(q, v));
  problem.out = matrices(out, is_narrow(q, v));
  problem.log_sum_exp = floats(log_sum_exp);
  problem.row_sums = floats(row_sums);
  problem.grad_q = grad_q.data_ptr();
  problem.grad_k = grad_k.data_ptr();
  problem.grad_v = grad_v.data_ptr();
  problem.grad_mask = mask ? floats(of_queries.count > 1 ? partial_mask : grad_mask) : nullptr;
  problem.temperature_terms = floats(temperature_terms);
  problem.key_splits = of_keys.count;
  problem.keys_per_split = of_keys.rows;
  problem.query_splits = of_queries.count;
  problem.queries_per_split = of_queries.rows;
  problem.partial_q = floats(partial_q);
  problem.partial_k = floats(partial_k);
  problem.partial_v = floats(partial_v);
  with_kind(q, v, [&]<typename K, int DIM>() {
    launch_with<GradQTiles<K, DIM, Softmax>, DIM>(token_grad_q_kernel<K, DIM, Softmax>, query_tiles * of_keys.count, problem);
    launch_with<GradKvTiles<K, DIM, Softmax>, DIM>(token_grad_kv_kernel<K, DIM, Softmax>, key_tiles * of_queries.count, problem);
  });
  const auto finish = [&](const Tensor& partial, const Matrices& x, void* grad, int64_t splits, bool through_norm) {
    finish_gradient(floats(partial), x, grad, all_heads, heads, splits, through_norm);
  };
  if (of_keys.count > 1) finish(partial_q, problem.in.q, problem.grad_q, of_keys.count, normalize);
  if (of_queries.count > 1) {
    finish(partial_k, problem.in.k, problem.grad_k, of_queries.count, normalize);
    finish(partial_v, problem.in.v, problem.grad_v, of_queries.count, false);
    if (mask) sum_splits(floats(partial_mask), floats(grad_mask), all_heads, of_queries.count, keys);
  }
  sum_rows(floats(temperature_terms), floats(grad_temperature), all_heads, of_keys.count * queries, 1);
  return {grad_q, grad_k, grad_v, grad_mask, grad_temperature};
}

}  // namespace

}  // namespace restore_kernels

REGISTER(library) {
  library.impl("masked_attention_token.cuda", TORCH_BOX(restore_kernels::masked_attention_token));
  library.impl("masked_attention_token_backward.cuda", TORCH_BOX(restore_kernels::masked_attention_token_backward));
}

// Top-k attention between tokens on the CPU, forward and backward, without an N x M matrix.
//
// Schedule. A task owns a range of query rows of one (batch, head) and keeps that head's keys and
// values packed, keys normalised. It walks its rows in blocks of R; for a block
//   forward   scores (R x M, cache-resident) = t q̂ k̂ᵀ; per row: select (topk_select.h), softmax of all
//             branches over nested selections, mixture P; out = P v
//   backward  scores again, bit for bit; the selection by comparing with the saved threshold and last
//             tie; dP = do vᵀ, dS; dq = dS k̂; dk and dv are summed per task
// then, backward, the tasks' dk and dv are added in order and dk goes back through the norm.
// Where the kept entries are few, P and dP exist only as short lists: 2 M D operations per query for the
// scores and O(topk (D + E)) for the rest. Otherwise the block's P is dense and the products are too.
// Extra memory: packed keys and values per thread, R x M per thread, and in backward dk and dv for each
// of at most 8 tasks of a head. Tasks depend on shapes alone, so sums do not depend on threads.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "result_memory.h"
#include "tile_gemm.h"
#include "tile_io.h"
#include "topk_token_rows.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace {

// One head's keys, as the matrix the scores are made with.
template <typename S, typename T>
struct PackedKeys {
  const TokenProblem<T>& p;
  Scratch<T> rows, columns, norms, query_norms, query_block;

  explicit PackedKeys(const TokenProblem<T>& p)
      : p(p), rows(p.keys * p.depth), columns(p.keys * p.depth), norms(p.keys), query_norms(p.block),
        query_block(p.block * p.depth) {}

  Matrix<T> units() const { return {rows.get(), p.depth}; }             // k̂, M x D
  Matrix<T> query_units() const { return {query_block.get(), p.depth}; }  // q̂, R x D

  void load(const Tensor& k, int64_t b, int64_t h) {
    copy_tile<S, T>(head<const S>(k, b, h), units(), p.keys, p.depth);
    normalize_rows<T>(units(), norms.get(), p.keys, p.depth, p.normalize);
    copy_tile<T, T>(Matrix<const T>{rows.get(), p.depth}.transposed(), {columns.get(), p.keys}, p.depth, p.keys);
  }

  // scores (count x M) of `count` queries from row n on. Forward and backward call it for the same
  // blocks, so backward sees the very scores that the selection was made from.
  void scores(const Tensor& q, int64_t b, int64_t h, int64_t n, int64_t count, T* target) {
    copy_tile<S, T>(head<const S>(q, b, h).from(n, 0), query_units(), count, p.depth);
    normalize_rows<T>(query_units(), query_norms.get(), count, p.depth, p.normalize);
    multiply<T>(query_units(), {columns.get(), p.keys}, {target, p.keys}, count, p.keys, p.depth);
    at::vec::map([t = p.scale(b, h)](Vec<T> x) { return Vec<T>(t) * x; }, target, target, count * p.keys);
  }
};

template <typename S, typename T>
void forward_task(const TokenProblem<T>& p, PackedKeys<S, T>& keys, const T* values, const Tensor& q, const Tensor& out,
                  const Tensor& threshold, const Tensor& last_tie, const Tensor& log_sum_exp, int64_t b, int64_t h,
                  int64_t first, int64_t end) {
  Scratch<T> scores(p.block * p.keys), out_block(p.block * p.width);
  ForwardRow<T> row(p);
  for (int64_t n = first; n < end; n += p.block) {
    const int64_t count = std::min(p.block, end - n);
    keys.scores(q, b, h, n, count, scores.get());
    std::fill_n(out_block.get(), count * p.width, T(0));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t saved = ((b * p.heads + h) * p.queries + n + i) * p.branches;
      T *scores_row = scores.get() + i * p.keys, *out_row = out_block.get() + i * p.width;
      T *thresholds = threshold.mutable_data_ptr<T>() + saved, *normalisers = log_sum_exp.mutable_data_ptr<T>() + saved;
      int32_t* last_ties = last_tie.mutable_data_ptr<int32_t>() + saved;
      if (p.dense_product && row.dense(scores_row, b, h, thresholds, last_ties, normalisers)) continue;
      row.select(scores_row, b, h, thresholds, last_ties, normalisers);
      if (p.dense_product) row.mixture(scores_row);
      else row.each([&](int64_t index, T share) { add_scaled(share, values + index * p.width, out_row, p.width); });
    }
    if (p.dense_product)
      multiply<T>({scores.get(), p.keys}, {values, p.width}, {out_block.get(), p.width}, count, p.width, p.keys);
    copy_tile<T, S>({out_block.get(), p.width}, head<S>(out, b, h).from(n, 0), count, p.width);
  }
}

template <typename S, typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const TokenProblem<T>& p, const Tensor& q, const Tensor& k, const Tensor& v) {
  const auto options = q.options().dtype(c10::CppTypeToScalarType<T>::value);
  const std::vector<int64_t> statistics{p.batch, p.heads, p.queries, p.branches};
  const Tensor out = empty_result({p.batch, p.heads, p.queries, p.width}, v.options());
  const Tensor threshold = empty_result(statistics, options), log_sum_exp = empty_result(statistics, options);
  const Tensor last_tie = empty_result(statistics, options.dtype(at::kInt));
  at::parallel_for(0, p.batch * p.heads * p.chunks, 1, [&](int64_t begin, int64_t end) {
    PackedKeys<S, T> keys(p);
    Scratch<T> values(p.keys * p.width);
    p.tasks_of_thread(begin, end, [&](int64_t b, int64_t h, int64_t, int64_t first, int64_t stop, bool new_head) {
      if (new_head) {
        keys.load(k, b, h);
        copy_tile<S, T>(head<const S>(v, b, h), {values.get(), p.width}, p.keys, p.width);
      }
      forward_task<S, T>(p, keys, values.get(), q, out, threshold, last_tie, log_sum_exp, b, h, first, stop);
    });
  });
  return {out, threshold, last_tie, log_sum_exp};
}

// Where a task of backward puts its shares.
template <typename T>
struct Gradients {
  T *keys, *values;  // M x D (of k̂) and M x E
  // 1 and J; sums over every query, of terms that cancel, so in float64.
  double *temperature, *weights;
};

template <typename S, typename T>
class BackwardTask {
 public:
  explicit BackwardTask(const TokenProblem<T>& p)
      : p(p), keys(p), values(p.keys * p.width), value_columns(p.dense_product ? p.keys * p.width : 0),
        scores(p.block * p.keys), grad_scores(p.dense_product ? p.block * p.keys : 0),
        mixture(p.dense_product ? p.keys : 0), grad_out_block(p.block * p.width), grad_q_block(p.block * p.depth), row(p) {}

  void load(const Tensor& k, const Tensor& v, int64_t b, int64_t h) {
    keys.load(k, b, h);
    copy_tile<S, T>(head<const S>(v, b, h), {values.get(), p.width}, p.keys, p.width);
    if (p.dense_product)
      copy_tile<T, T>(Matrix<const T>{values.get(), p.width}.transposed(), {value_columns.get(), p.keys}, p.width, p.keys);
  }

  void run(const Tensor& grad_out, const Tensor& q, const Tensor& grad_q, const Tensor& threshold, const Tensor& last_tie,
           const Tensor& log_sum_exp, int64_t b, int64_t h, int64_t first, int64_t end, const Gradients<T>& grads) {
    for (int64_t n = first; n < end; n += p.block) {
      const int64_t count = std::min(p.block, end - n);
      const int64_t saved = ((b * p.heads + h) * p.queries + n) * p.branches;
      keys.scores(q, b, h, n, count, scores.get());
      copy_tile<S, T>(head<const S>(grad_out, b, h).from(n, 0), {grad_out_block.get(), p.width}, count, p.width);
      const auto statistics = [&](int64_t i) {
        row.set(threshold.const_data_ptr<T>() + saved + i * p.branches,
                last_tie.const_data_ptr<int32_t>() + saved + i * p.branches,
                log_sum_exp.const_data_ptr<T>() + saved + i * p.branches);
      };
      if (p.dense_product) dense_block(b, h, count, statistics, grads);
      else sparse_block(b, h, count, statistics, grads);
      finish_queries(b, h, count, grads);
      copy_tile<T, S>({grad_q_block.get(), p.depth}, head<S>(grad_q, b, h).from(n, 0), count, p.depth);
    }
  }

 private:
  // Both leave dS k̂, without the temperature, in grad_q_block.
  template <typename Statistics>
  void dense_block(int64_t b, int64_t h, int64_t count, Statistics statistics, const Gradients<T>& grads) {
    const Matrix<T> grad_out{grad_out_block.get(), p.width}, ds{grad_scores.get(), p.keys}, mixed{scores.get(), p.keys};
    multiply<T>(grad_out, {value_columns.get(), p.keys}, ds, count, p.keys, p.width);
    for (int64_t i = 0; i < count; ++i) {
      statistics(i);
      row.dense(scores.get() + i * p.keys, grad_scores.get() + i * p.keys, mixture.get(), b, h, grads.weights);
    }
    scale_queries(b, h, count);
    multiply<T>(ds, keys.units(), {grad_q_block.get(), p.depth}, count, p.depth, p.keys);
    multiply_add<T>(ds.transposed(), {scaled_queries.data(), p.depth}, {grads.keys, p.depth}, p.keys, p.depth, count);
    multiply_add<T>(mixed.transposed(), grad_out, {grads.values, p.width}, p.keys, p.width, count);
  }

  template <typename Statistics>
  void sparse_block(int64_t b, int64_t h, int64_t count, Statistics statistics, const Gradients<T>& grads) {
    scale_queries(b, h, count);
    std::fill_n(grad_q_block.get(), count * p.depth, T(0));
    for (int64_t i = 0; i < count; ++i) {
      statistics(i);
      const T *grad_out = grad_out_block.get() + i * p.width, *query = scaled_queries.data() + i * p.depth;
      T* grad_q = grad_q_block.get() + i * p.depth;
      row.sparse(
          scores.get() + i * p.keys, b, h, grads.weights,
          [&](int64_t index) { return dot<T>(grad_out, values.get() + index * p.width, p.width); },
          [&](int64_t index, T probability, T grad_score) {
            add_scaled(grad_score, keys.rows.get() + index * p.depth, grad_q, p.depth);
            add_scaled(grad_score, query, grads.keys + index * p.depth, p.depth);
            add_scaled(probability, grad_out, grads.values + index * p.width, p.width);
          });
    }
  }

  void scale_queries(int64_t b, int64_t h, int64_t count) {
    scaled_queries.resize(count * p.depth);
    at::vec::map([t = p.scale(b, h)](Vec<T> x) { return Vec<T>(t) * x; }, scaled_queries.data(), keys.query_block.get(),
                 count * p.depth);
  }

  // grad_q_block from dS k̂ to the gradient of q; S = t A, so dt = sum dS A = sum q̂ · (dS k̂).
  void finish_queries(int64_t b, int64_t h, int64_t count, const Gradients<T>& grads) {
    const T t = p.scale(b, h);
    for (int64_t i = 0; i < count; ++i) {
      T* grad = grad_q_block.get() + i * p.depth;
      const T* unit = keys.query_block.get() + i * p.depth;
      *grads.temperature += dot<T>(unit, grad, p.depth);
      at::vec::map([t](Vec<T> x) { return Vec<T>(t) * x; }, grad, grad, p.depth);
      backward_norm<T>(grad, unit, keys.query_norms.get()[i], p.depth, p.normalize);
    }
  }

  const TokenProblem<T>& p;

 public:
  PackedKeys<S, T> keys;

 private:
  Scratch<T> values, value_columns, scores, grad_scores, mixture, grad_out_block, grad_q_block;
  std::vector<T> scaled_queries;
  BackwardRow<T> row;
};

// Adds up the tasks of every head, in order, and takes the gradient of the keys back through the norm.
template <typename S, typename T>
void finish_keys(const TokenProblem<T>& p, T* shares, int64_t share_size, const Tensor& k, const Tensor& grad_k,
                 const Tensor& grad_v, const Tensor& grad_temperature, const Tensor& grad_weights) {
  at::parallel_for(0, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
    PackedKeys<S, T> keys(p);
    for (int64_t bh = begin; bh < end; ++bh) {
      const int64_t b = bh / p.heads, h = bh % p.heads;
      T* total = shares + bh * p.chunks * share_size;
      for (int64_t c = 1; c < p.chunks; ++c) add_scaled(T(1), total + c * share_size, total, share_size);
      T *dk = total, *dv = dk + p.keys * p.depth, *rest = dv + p.keys * p.width;
      keys.load(k, b, h);
      for (int64_t l = 0; l < p.keys; ++l)
        backward_norm<T>(dk + l * p.depth, keys.rows.get() + l * p.depth, keys.norms.get()[l], p.depth, p.normalize);
      copy_tile<T, S>({dk, p.depth}, head<S>(grad_k, b, h), p.keys, p.depth);
      copy_tile<T, S>({dv, p.width}, head<S>(grad_v, b, h), p.keys, p.width);
      grad_temperature.mutable_data_ptr<T>()[bh] = rest[0];
      std::copy_n(rest + 1, p.branches, grad_weights.mutable_data_ptr<T>() + bh * p.branches);
    }
  });
}

template <typename S, typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const TokenProblem<T>& p, const Tensor& grad_out, const Tensor& q,
                                                            const Tensor& k, const Tensor& v, const Tensor& threshold,
                                                            const Tensor& last_tie, const Tensor& log_sum_exp) {
  const Tensor grad_q = empty_result(q.sizes(), q.options()), grad_k = empty_result(k.sizes(), k.options()),
               grad_v = empty_result(v.sizes(), v.options());
  const Tensor grad_temperature = empty_result({p.batch, p.heads}, threshold.options());
  const Tensor grad_weights = empty_result({p.batch, p.heads, p.branches}, threshold.options());
  const int64_t tasks = p.batch * p.heads * p.chunks;
  const int64_t share_size = p.keys * (p.depth + p.width) + 1 + p.branches;
  Scratch<T> shares(tasks * share_size);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    BackwardTask<S, T> state(p);
    p.tasks_of_thread(begin, end, [&](int64_t b, int64_t h, int64_t task, int64_t first, int64_t stop, bool new_head) {
      if (new_head) state.load(k, v, b, h);
      T *dk = shares.get() + task * share_size, *dv = dk + p.keys * p.depth, *rest = dv + p.keys * p.width;
      std::fill_n(dk, share_size, T(0));
      std::vector<double> scalars(1 + p.branches);
      state.run(grad_out, q, grad_q, threshold, last_tie, log_sum_exp, b, h, first, stop,
                {dk, dv, scalars.data(), scalars.data() + 1});
      std::copy(scalars.begin(), scalars.end(), rest);
    });
  });
  finish_keys<S, T>(p, shares.get(), share_size, k, grad_k, grad_v, grad_temperature, grad_weights);
  return {grad_q, grad_k, grad_v, grad_temperature, grad_weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> topk_attention_token(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature, const Tensor& weights,
    at::IntArrayRef topk, bool normalize) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "topk_attention_token", [&] {
    using T = Accumulate<scalar_t>;
    return forward<scalar_t, T>(TokenProblem<T>(q, k, v, temperature, weights, topk, normalize), q, k, v);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> topk_attention_token_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature,
    const Tensor& weights, const Tensor& threshold, const Tensor& last_tie, const Tensor& log_sum_exp,
    at::IntArrayRef topk, bool normalize) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "topk_attention_token_backward", [&] {
    using T = Accumulate<scalar_t>;
    return backward<scalar_t, T>(TokenProblem<T>(q, k, v, temperature, weights, topk, normalize), grad_out, q, k, v,
                                 threshold.contiguous(), last_tie.contiguous(), log_sum_exp.contiguous());
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(restore_kernels, CPU, m) {
  m.impl("topk_attention_token.cpu", topk_attention_token);
  m.impl("topk_attention_token_backward.cpu", topk_attention_token_backward);
}

}  // namespace restore_kernels

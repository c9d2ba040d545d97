// The backward pass of masked attention between tokens.
#pragma once

#include <ATen/Parallel.h>

#include <limits>
#include <numeric>
#include <vector>

#include "masked_token_few_keys.h"
#include "masked_token_tiles.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace masked {

// A block of queries with all that backward needs of it, and the gradient of q̂ (transposed, D x R).
template <typename T>
struct BackwardBlock : QueryBlock<T> {
  Scratch<T> rows, grad_rows, grad_columns;  // q̂ (R x D); do (R x E) and transposed
  Scratch<T> delta, log_sum_exp, grad_query;  // do·out

  explicit BackwardBlock(const Problem<T>& p)
      : QueryBlock<T>(p), rows(kQueries * p.depth), grad_rows(kQueries * p.width), grad_columns(kQueries * p.width),
        delta(kQueries), log_sum_exp(kQueries), grad_query(kQueries * p.depth) {}

  template <typename S>
  void load(const Problem<T>& p, const Tensor& q, const Tensor& grad_out, const Tensor& out, const Tensor& statistics,
            int64_t bh, int64_t n) {
    QueryBlock<T>::template load<S>(p, q, bh, n);
    const int64_t b = bh / p.heads, h = bh % p.heads, count = this->count;
    copy_tile<S, T>(head<const S>(q, b, h).from(n, 0), {rows.get(), p.depth}, count, p.depth);
    for (int64_t i = 0; i < count && p.normalize; ++i)
      multiply_by(this->inverses.get()[i], rows.get() + i * p.depth, p.depth);
    const auto grad = head<const S>(grad_out, b, h).from(n, 0);
    copy_tile<S, T>(grad, {grad_rows.get(), p.width}, count, p.width);
    if (count < this->lanes) std::fill_n(grad_columns.get(), kQueries * p.width, T(0));
    copy_tile<S, T>(grad.transposed(), {grad_columns.get(), kQueries}, p.width, count);
    const Matrix<const T> out_rows{out.const_data_ptr<T>() + (bh * p.queries + n) * p.width, p.width};
    std::fill_n(delta.get(), kQueries, T(0));
    dot_rows<T>({grad_rows.get(), p.width}, out_rows, count, p.width, delta.get());
    prefetch_rows<S>(grad_out, b, h, n + kQueries, kQueries);
    prefetch_rows<T>(out, b, h, n + kQueries, kQueries);
    std::fill_n(log_sum_exp.get(), kQueries, std::numeric_limits<T>::infinity());  // lanes beyond: weight 0
    std::copy_n(statistics.const_data_ptr<T>() + bh * p.queries + n, count, log_sum_exp.get());
    std::fill_n(grad_query.get(), kQueries * p.depth, T(0));
  }
};

// Gradients of `count` keys: of k̂ (D each), v (E each) and the logits' biases (1 each).
template <typename T>
struct KeyGradients {
  T *keys, *values, *biases;

  KeyGradients(const Problem<T>& p, T* memory, int64_t count)
      : keys(memory), values(memory + count * p.depth), biases(values + count * p.width) {}
  KeyGradients from(const Problem<T>& p, int64_t m) const {
    KeyGradients result = *this;
    result.keys += m * p.depth, result.values += m * p.width, result.biases += m;
    return result;
  }
  static int64_t size(const Problem<T>& p, int64_t count) { return count * (p.depth + p.width + 1); }
};

template <typename T>
void backward_step(const Problem<T>& p, T scale, const BackwardBlock<T>& block, const KeyTile<T>& tile,
                   const KeyGradients<T>& grads, T* probabilities, T* grad_logits) {
  const Matrix<T> probability{probabilities, kQueries}, grad{grad_logits, kQueries};  // T x R
  make_logits(p, scale, block, tile, probabilities);
  multiply<T>(tile.value_rows(p), {block.grad_columns.get(), kQueries}, grad, tile.count, block.lanes, p.width);
  constexpr int kTogether = row_products::kColumns;
  Vec<T> totals[kTogether];
  for (int64_t m = 0; m < tile.count; ++m) {
    Vec<T> total(T(0));
    for (int64_t n = 0; n < block.lanes; n += Vec<T>::size()) {
      T *row = probabilities + m * kQueries + n, *grad_row = grad_logits + m * kQueries + n;
      const Vec<T> weight = (Vec<T>::loadu(row) - Vec<T>::loadu(block.log_sum_exp.get() + n)).exp();
      const Vec<T> change = weight * (Vec<T>::loadu(grad_row) - Vec<T>::loadu(block.delta.get() + n));
      weight.store(row), change.store(grad_row);
      total = total + change;
    }
    totals[m % kTogether] = total;
    if (m % kTogether + 1 == kTogether) row_products::add_lanes<T, kTogether>(totals, grads.biases + m + 1 - kTogether);
  }
  for (int64_t m = tile.count / kTogether * kTogether; m < tile.count; ++m)
    row_products::add_lanes<T, 1>(totals + m % kTogether, grads.biases + m);
  multiply_add<T>(probability, {block.grad_rows.get(), p.width}, {grads.values, p.width}, tile.count, p.width, block.count);
  multiply_add<T>(grad, {block.rows.get(), p.depth}, {grads.keys, p.depth}, tile.count, p.depth, block.count);
  multiply_add<T>(Matrix<const T>(tile.key_rows(p)).transposed(), grad, {block.grad_query.get(), kQueries}, p.depth,
                  block.lanes, tile.count);
}

template <typename S, typename T>
struct Backward {
  const Problem<T>& p;
  const Tensor &grad_out, &q, &k, &v, &out, &log_sum_exp;
  Tensor grad_q, grad_k, grad_v, grad_mask, grad_temperature;

  // From dS k̂ (D x R) to the gradient of q. Returns sum q̂ · (dS k̂), which over all queries is the
  // temperature's gradient: S = t A, so dt = sum dS A. In float64, and from the longer side, whose sums
  // are short: terms cancel.
  double finish_queries(int64_t bh, const QueryBlock<T>& block, T* grad_query) {
    const T* unit = block.columns.get();
    const Vec<T> t(p.scale(bh));
    T along[kQueries];
    for (int64_t n = 0; n < block.lanes; n += Vec<T>::size()) {
      Vec<T> sum(T(0));
      for (int64_t i = n; i < kQueries * p.depth; i += kQueries)
        sum = at::vec::fmadd(Vec<T>::loadu(grad_query + i), Vec<T>::loadu(unit + i), sum);
      sum.store(along + n);
      const Vec<T> norm = Vec<T>::loadu(block.norms.get() + n);
      // A clamped norm is a constant, and so is the norm where nothing is normalised.
      const Vec<T> factor = t / norm;
      const Vec<T> radial = p.normalize ? sum & (norm > Vec<T>(T(kNormFloor))) : Vec<T>(T(0));
      for (int64_t i = n; i < kQueries * p.depth; i += kQueries)
        (factor * (Vec<T>::loadu(grad_query + i) - radial * Vec<T>::loadu(unit + i))).store(grad_query + i);
    }
    copy_tile<T, S>(Matrix<const T>{grad_query, kQueries}.transposed(),
                    head<S>(grad_q, bh / p.heads, bh % p.heads).from(block.first, 0), block.count, p.depth);
    return std::accumulate(along, along + block.count, 0.0);
  }

  // The same for keys, from dSᵀ q̂.
  double finish_keys(int64_t bh, const KeyTile<T>& tile, const KeyGradients<T>& grads) {
    const int64_t b = bh / p.heads, h = bh % p.heads;
    const T t = p.scale(bh);
    double temperature = 0;
    T along[kKeys];
    if (!tile.masked_out) dot_rows<T>({grads.keys, p.depth}, tile.key_rows(p), tile.count, p.depth, along);
    for (int64_t m = 0; m < tile.count && !tile.masked_out; ++m) {
      T* grad = grads.keys + m * p.depth;
      const T *unit = tile.units.get() + m * p.depth, norm = tile.norms.get()[m];
      const T radial = p.normalize && norm > T(kNormFloor) ? along[m] : T(0);
      temperature += along[m];
      at::vec::map2([factor = t / norm, radial](Vec<T> g, Vec<T> u) { return Vec<T>(factor) * (g - Vec<T>(radial) * u); },
                    grad, grad, unit, p.depth);
    }
    copy_tile<T, S>({grads.keys, p.depth}, head<S>(grad_k, b, h).from(tile.first, 0), tile.count, p.depth);
    copy_tile<T, S>({grads.values, p.width}, head<S>(grad_v, b, h).from(tile.first, 0), tile.count, p.width);
    if (!p.mask) return temperature;
    T* target = grad_mask.mutable_data_ptr<T>() + bh * p.keys + tile.first;
    for (int64_t m = 0; m < tile.count; ++m)
      target[m] = tile.factors.get()[m] > 0 ? grads.biases[m] / tile.factors.get()[m] : T(0);
    return temperature;
  }

  void queries_in_chunks() {
    const int64_t tasks = p.matrices() * p.chunks, share = KeyGradients<T>::size(p, p.keys);
    Scratch<T> shares(tasks * share);
    std::vector<double> temperature(tasks);
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      if (FewKeys<S, T>::suit(p)) return few_keys(begin, end, shares.get(), temperature);
      auto tiles = make_parts<KeyTile<T>>(p, p.key_tiles());
      BackwardBlock<T> block(p);
      Scratch<T> probabilities(kKeys * kQueries), grad_logits(kKeys * kQueries);
      int64_t loaded = -1;
      p.each_task(begin, end, [&](int64_t bh, int64_t task, int64_t first, int64_t stop) {
        for (int64_t i = 0; i < p.key_tiles() && loaded != bh; ++i) tiles[i].template load<S>(p, k, v, bh, i * kKeys);
        loaded = bh;
        std::fill_n(shares.get() + task * share, share, T(0));
        const KeyGradients<T> grads(p, shares.get() + task * share, p.keys);
        for (int64_t n = first; n < stop; n += kQueries) {
          block.template load<S>(p, q, grad_out, out, log_sum_exp, bh, n);
          for (const auto& tile : tiles)
            if (!tile.masked_out)
              backward_step(p, p.scale(bh), block, tile, grads.from(p, tile.first), probabilities.get(), grad_logits.get());
          temperature[task] += finish_queries(bh, block, block.grad_query.get());
        }
      });
    });
    at::parallel_for(0, p.matrices() * p.key_tiles(), 1, [&](int64_t begin, int64_t end) {
      KeyTile<T> tile(p);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t bh = i / p.key_tiles(), m = i % p.key_tiles() * kKeys;
        tile.template load<S>(p, k, v, bh, m);
        T* first_share = shares.get() + bh * p.chunks * share;
        const auto total = KeyGradients<T>(p, first_share, p.keys).from(p, m);
        for (int64_t c = 1; c < p.chunks; ++c) {
          const auto other = KeyGradients<T>(p, first_share + c * share, p.keys).from(p, m);
          add_scaled(T(1), other.keys, total.keys, tile.count * p.depth);
          add_scaled(T(1), other.values, total.values, tile.count * p.width);
          add_scaled(T(1), other.biases, total.biases, tile.count);
        }
        finish_keys(bh, tile, total);
      }
    });
    add_temperatures(temperature);
  }

  void few_keys(int64_t begin, int64_t end, T* shares, std::vector<double>& temperature) {
    const int64_t share = KeyGradients<T>::size(p, p.keys);
    FewKeys<S, T> few(p);
    int64_t loaded = -1;
    p.each_task(begin, end, [&](int64_t bh, int64_t task, int64_t first, int64_t stop) {
      const int64_t b = bh / p.heads, h = bh % p.heads;
      if (loaded != bh) few.load(k, v, bh);
      loaded = bh;
      std::fill_n(shares + task * share, share, T(0));
      const KeyGradients<T> grads(p, shares + task * share, p.keys);
      const auto to = head<S>(grad_q, b, h).from(first, 0);
      if (few.masked_out()) std::fill_n(to.data, (stop - first) * p.depth, S(0));
      else temperature[task] = few.backward(head<const S>(q, b, h).from(first, 0), head<const S>(grad_out, b, h).from(first, 0),
                                       log_sum_exp.const_data_ptr<T>() + bh * p.queries + first, to, grads.keys,
                                       grads.values, grads.biases, stop - first);
    });
  }

  void keys_in_chunks() {
    const int64_t blocks = p.query_blocks(), tasks = p.matrices() * p.chunks, share = kQueries * p.depth;
    Scratch<T> shares(tasks * blocks * share);
    std::vector<double> temperature(tasks);
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      auto queries = make_parts<BackwardBlock<T>>(p, blocks);
      KeyTile<T> tile(p);
      Scratch<T> probabilities(kKeys * kQueries), grad_logits(kKeys * kQueries), memory(KeyGradients<T>::size(p, kKeys));
      const KeyGradients<T> grads(p, memory.get(), kKeys);
      p.each_task(begin, end, [&](int64_t bh, int64_t task, int64_t first, int64_t stop) {
        for (int64_t i = 0; i < blocks; ++i)
          queries[i].template load<S>(p, q, grad_out, out, log_sum_exp, bh, i * kQueries);
        for (int64_t m = first; m < stop; m += kKeys) {
          tile.template load<S>(p, k, v, bh, m);
          std::fill_n(memory.get(), KeyGradients<T>::size(p, kKeys), T(0));
          for (int64_t i = 0; i < blocks && !tile.masked_out; ++i)
            backward_step(p, p.scale(bh), queries[i], tile, grads, probabilities.get(), grad_logits.get());
          temperature[task] += finish_keys(bh, tile, grads);
        }
        for (int64_t i = 0; i < blocks; ++i)
          std::copy_n(queries[i].grad_query.get(), share, shares.get() + (task * blocks + i) * share);
      });
    });
    at::parallel_for(0, p.matrices() * blocks, 1, [&](int64_t begin, int64_t end) {
      QueryBlock<T> block(p);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t bh = i / blocks;
        T* total = shares.get() + (bh * p.chunks * blocks + i % blocks) * share;
        for (int64_t c = 1; c < p.chunks; ++c) add_scaled(T(1), total + c * blocks * share, total, share);
        block.template load<S>(p, q, bh, i % blocks * kQueries);
        finish_queries(bh, block, total);
      }
    });
    add_temperatures(temperature);
  }

  void add_temperatures(const std::vector<double>& shares) {
    for (int64_t bh = 0; bh < p.matrices(); ++bh) {
      double total = 0;
      for (int64_t i = 0; i < p.chunks; ++i) total += shares[bh * p.chunks + i];
      grad_temperature.mutable_data_ptr<T>()[bh] = static_cast<T>(total);
    }
  }
};

}  // namespace masked
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

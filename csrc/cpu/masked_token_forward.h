// The forward pass of masked attention between tokens: online softmax over tiles of keys.
#pragma once

#include <ATen/Parallel.h>

#include <cmath>
#include <limits>
#include <vector>

#include "masked_token_few_keys.h"
#include "masked_token_tiles.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace masked {

// Softmax statistics and output of a block of queries over the keys seen so far.
template <typename T>
struct Running {
  Scratch<T> memory;
  T *largest, *sum, *out;  // R, R, E x R
  bool empty = true;       // nothing has been added

  explicit Running(const Problem<T>& p)
      : memory((2 + p.width) * kQueries), largest(memory.get()), sum(largest + kQueries), out(sum + kQueries) {}
  static int64_t size(const Problem<T>& p) { return (2 + p.width) * kQueries; }

  void start(const Problem<T>& p) {
    std::fill_n(largest, kQueries, -std::numeric_limits<T>::infinity());
    std::fill_n(sum, (1 + p.width) * kQueries, T(0));
    empty = true;
  }

  // Multiplies what was summed under another maximum.
  void rescale(const Problem<T>& p, const T* factor, int64_t lanes = kQueries) {
    for (T* row = sum; row < out + p.width * kQueries; row += kQueries)
      at::vec::map2([](Vec<T> x, Vec<T> a) { return x * a; }, row, row, factor, lanes);
  }

  void add(const Problem<T>& p, T scale, const QueryBlock<T>& block, const KeyTile<T>& tile, T* logits) {
    make_logits(p, scale, block, tile, logits);
    T factor[kQueries] = {};
    for (int64_t n = 0; n < block.lanes; n += Vec<T>::size()) {
      const Vec<T> before = Vec<T>::loadu(largest + n);
      Vec<T> now = before, total(T(0));
      for (int64_t m = 0; m < tile.count; ++m) now = at::vec::maximum(now, Vec<T>::loadu(logits + m * kQueries + n));
      for (int64_t m = 0; m < tile.count; ++m) {
        T* row = logits + m * kQueries + n;
        const Vec<T> probability = (Vec<T>::loadu(row) - now).exp();
        probability.store(row);
        total = total + probability;
      }
      now.store(largest + n);
      (before - now).exp().store(factor + n);
      total.store(logits + kKeys * kQueries + n);  // kept until the old sum is rescaled
    }
    if (!empty) rescale(p, factor, block.lanes);
    empty = false;
    add_scaled(T(1), logits + kKeys * kQueries, sum, block.lanes);
    multiply_add<T>(Matrix<const T>(tile.value_rows(p)).transposed(), {logits, kQueries}, {out, kQueries}, p.width,
                    block.lanes, tile.count);
  }

  // Takes over another share of the same block.
  void merge(const Problem<T>& p, Running& other) {
    T own_factor[kQueries], other_factor[kQueries];
    for (int64_t n = 0; n < kQueries; ++n) {
      const T top = std::max(largest[n], other.largest[n]);
      const bool none = std::isinf(top) && top < 0;
      own_factor[n] = none ? T(1) : std::exp(largest[n] - top);
      other_factor[n] = none ? T(1) : std::exp(other.largest[n] - top);
      largest[n] = top;
    }
    rescale(p, own_factor);
    other.rescale(p, other_factor);
    add_scaled(T(1), other.sum, sum, (1 + p.width) * kQueries);
  }
};

template <typename S, typename T>
struct Forward {
  const Problem<T>& p;
  const Tensor &q, &k, &v;
  Tensor out, log_sum_exp, wide_out;

  void finish(Running<T>& state, int64_t bh, int64_t first, int64_t count) {
    T* statistics = log_sum_exp.mutable_data_ptr<T>() + bh * p.queries + first;
    T factor[kQueries] = {};
    for (int64_t n = 0; n < count; n += Vec<T>::size()) {
      const Vec<T> sum = Vec<T>::loadu(state.sum + n);
      (sum.reciprocal() & (sum > Vec<T>(T(0)))).store(factor + n);  // all keys are masked: 0
      (Vec<T>::loadu(state.largest + n) + sum.log()).store(statistics + n, std::min<int64_t>(Vec<T>::size(), count - n));
    }
    state.rescale(p, factor);
    const Matrix<const T> rows = Matrix<const T>{state.out, kQueries}.transposed();  // R x E
    copy_tile<T, S>(rows, head<S>(out, bh / p.heads, bh % p.heads).from(first, 0), count, p.width);
    if constexpr (!std::is_same_v<S, T>)
      copy_tile<T, T>(rows, head<T>(wide_out, bh / p.heads, bh % p.heads).from(first, 0), count, p.width);
  }

  void queries_in_chunks() {
    at::parallel_for(0, p.matrices() * p.chunks, 1, [&](int64_t begin, int64_t end) {
      if (FewKeys<S, T>::suit(p)) return few_keys(begin, end);
      auto tiles = make_parts<KeyTile<T>>(p, p.key_tiles());
      QueryBlock<T> block(p);
      Running<T> state(p);
      Scratch<T> logits((kKeys + 1) * kQueries);
      int64_t loaded = -1;
      p.each_task(begin, end, [&](int64_t bh, int64_t, int64_t first, int64_t stop) {
        for (int64_t i = 0; i < p.key_tiles() && loaded != bh; ++i) tiles[i].template load<S>(p, k, v, bh, i * kKeys);
        loaded = bh;
        for (int64_t n = first; n < stop; n += kQueries) {
          block.template load<S>(p, q, bh, n);
          state.start(p);
          for (const auto& tile : tiles)
            if (!tile.masked_out) state.add(p, p.scale(bh), block, tile, logits.get());
          finish(state, bh, n, block.count);
        }
      });
    });
  }

  void few_keys(int64_t begin, int64_t end) {
    FewKeys<S, T> keys(p);
    int64_t loaded = -1;
    p.each_task(begin, end, [&](int64_t bh, int64_t, int64_t first, int64_t stop) {
      const int64_t b = bh / p.heads, h = bh % p.heads, count = stop - first;
      if (loaded != bh) keys.load(k, v, bh);
      loaded = bh;
      T* statistics = log_sum_exp.mutable_data_ptr<T>() + bh * p.queries + first;
      const auto to = head<S>(out, b, h).from(first, 0);
      const auto wide = [&](Matrix<const T> rows, int64_t n, int64_t some) {
        if constexpr (!std::is_same_v<S, T>)
          copy_tile<T, T>(rows, head<T>(wide_out, b, h).from(first + n, 0), some, p.width);
      };
      if (!keys.masked_out()) return keys.forward(head<const S>(q, b, h).from(first, 0), to, statistics, count, wide);
      std::fill_n(statistics, count, -std::numeric_limits<T>::infinity());
      for (int64_t i = 0; i < count; ++i) std::fill_n(to.data + i * to.row, p.width, S(0));
      if constexpr (!std::is_same_v<S, T>) {
        T* wide_rows = head<T>(wide_out, b, h).from(first, 0).data;
        std::fill_n(wide_rows, count * p.width, T(0));
      }
    });
  }

  void keys_in_chunks() {
    const int64_t blocks = p.query_blocks(), tasks = p.matrices() * p.chunks;
    std::vector<Running<T>> shares = make_parts<Running<T>>(p, tasks * blocks);
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      auto queries = make_parts<QueryBlock<T>>(p, blocks);
      KeyTile<T> tile(p);
      Scratch<T> logits((kKeys + 1) * kQueries);
      int64_t loaded = -1;
      p.each_task(begin, end, [&](int64_t bh, int64_t task, int64_t first, int64_t stop) {
        for (int64_t i = 0; i < blocks; ++i) {
          if (loaded != bh) queries[i].template load<S>(p, q, bh, i * kQueries);
          shares[task * blocks + i].start(p);
        }
        loaded = bh;
        for (int64_t m = first; m < stop; m += kKeys) {
          tile.template load<S>(p, k, v, bh, m);
          if (tile.masked_out) continue;
          for (int64_t i = 0; i < blocks; ++i) 
            shares[task * blocks + i].add(p, p.scale(bh), queries[i], tile, logits.get());
        }
      });
    });
    at::parallel_for(0, p.matrices() * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t bh = i / blocks, block = i % blocks;
        Running<T>& total = shares[bh * p.chunks * blocks + block];
        for (int64_t c = 1; c < p.chunks; ++c) total.merge(p, shares[(bh * p.chunks + c) * blocks + block]);
        finish(total, bh, block * kQueries, std::min(kQueries, p.queries - block * kQueries));
      }
    });
  }
};

}  // namespace masked
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

// The two sides of masked attention between tokens: blocks of queries and tiles of keys, packed.
//
// Scores are kept transposed, keys x queries: then every product reads what lies in memory as rows of
// tokens, without a transpose (the tile product takes its first factor with any strides), and softmax,
// which runs along the keys, is plain vector arithmetic over queries.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "tile_gemm.h"
#include "tile_io.h"
#include "token_rows.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace masked {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kQueries = 48, kKeys = 128;  // of a block and of a tile: their scores stay in cache

inline int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Sizes and options of a call, and how it is divided: the longer side is cut into chunks, which are
// tasks; a task walks its chunk part by part and meets all of the shorter side with every part.
template <typename T>
struct Problem {
  int64_t batch, heads, queries, keys, depth, width;
  const Tensor& temperature;
  const OptionalTensor& mask;
  bool normalize;
  bool by_keys;  // the keys are the longer side
  int64_t chunk, chunks;

  Problem(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, const Tensor& temperature,
          bool normalize)
      : batch(q.size(0)), heads(q.size(1)), queries(q.size(2)), keys(k.size(2)), depth(q.size(3)), width(v.size(3)),
        temperature(temperature), mask(mask), normalize(normalize), by_keys(keys > queries) {
    constexpr int64_t kTasks = 8;
    const int64_t part = by_keys ? kKeys : kQueries, longer = by_keys ? keys : queries;
    const int64_t wanted = std::clamp<int64_t>(kTasks / std::max<int64_t>(batch * heads, 1), 1, parts(longer, part));
    chunk = parts(parts(longer, wanted), part) * part;
    chunks = parts(longer, chunk);
  }

  int64_t matrices() const { return batch * heads; }
  int64_t query_blocks() const { return parts(queries, kQueries); }
  int64_t key_tiles() const { return parts(keys, kKeys); }
  T scale(int64_t bh) const {
    return temperature.const_data_ptr<T>()[bh / heads * temperature.stride(0) + bh % heads * temperature.stride(1)];
  }

  // f(bh, task of the head, first token, end) for tasks of the longer side.
  template <typename F>
  void each_task(int64_t begin, int64_t end, F f) const {
    const int64_t longer = by_keys ? keys : queries;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % chunks * chunk;
      f(task / chunks, task, first, std::min(longer, first + chunk));
    }
  }
};

// All of the shorter side, or one part of the longer side, reused.
template <typename Part, typename T>
std::vector<Part> make_parts(const Problem<T>& p, int64_t count) {
  std::vector<Part> result;
  for (int64_t i = 0; i < count; ++i) result.emplace_back(p);
  return result;
}

// Asks for rows that will be read next; no harm if they are not there.
template <typename S>
void prefetch_rows(const Tensor& x, int64_t b, int64_t h, int64_t first, int64_t count) {
  const int64_t left = std::min(count, x.size(2) - first);
  if (left <= 0) return;
  Prefetch rows(head<const S>(x, b, h).from(first, 0), left, x.size(3));
  rows(rows.lines());
}

// Queries transposed: what is done to each of them is done to a vector of them at once.
template <typename T>
struct QueryBlock {
  Scratch<T> columns, norms, inverses;  // q̂ (D x R, rows kQueries apart), |q| and 1 / |q|
  int64_t first = 0, count = 0, lanes = 0;  // lanes: count rounded up to whole vectors

  explicit QueryBlock(const Problem<T>& p) : columns(kQueries * p.depth), norms(kQueries), inverses(kQueries) {}

  template <typename S>
  void load(const Problem<T>& p, const Tensor& q, int64_t bh, int64_t n) {
    first = n, count = std::min(kQueries, p.queries - n);
    lanes = parts(count, Vec<T>::size()) * Vec<T>::size();
    const int64_t b = bh / p.heads, h = bh % p.heads;
    if (count < lanes) std::fill_n(columns.get(), kQueries * p.depth, T(0));  // every lane is defined
    copy_tile<S, T>(head<const S>(q, b, h).from(n, 0), query_columns().transposed(), count, p.depth);
    prefetch_rows<S>(q, b, h, n + kQueries, kQueries);
    std::fill_n(norms.get(), kQueries, T(1));
    std::fill_n(inverses.get(), kQueries, T(1));
    if (p.normalize) normalize(p.depth);
  }

  Matrix<T> query_columns() const { return {columns.get(), kQueries}; }

 private:
  void normalize(int64_t depth) {
    for (int64_t n = 0; n < lanes; n += Vec<T>::size()) {
      Vec<T> even(T(0)), odd(T(0));
      auto at = [&](int64_t d) { return Vec<T>::loadu(columns.get() + d * kQueries + n); };
      for (int64_t d = 0; d + 1 < depth; d += 2) {
        even = at::vec::fmadd(at(d), at(d), even);
        odd = at::vec::fmadd(at(d + 1), at(d + 1), odd);
      }
      if (depth % 2) even = at::vec::fmadd(at(depth - 1), at(depth - 1), even);
      const Vec<T> norm = at::vec::maximum((even + odd).sqrt(), Vec<T>(T(kNormFloor)));
      norm.store(norms.get() + n);
      const Vec<T> inverse = norm.reciprocal();
      inverse.store(inverses.get() + n);
      for (int64_t d = 0; d < depth; ++d) (at(d) * inverse).store(columns.get() + d * kQueries + n);
    }
  }
};

template <typename T>
struct KeyTile {
  Scratch<T> units, values, norms, factors, log_factors;  // k̂ (T x D), v (T x E), the mask and its logarithm
  int64_t first = 0, count = 0;
  bool masked_out = false;  // all of it

  explicit KeyTile(const Problem<T>& p)
      : units(kKeys * p.depth), values(kKeys * p.width), norms(kKeys), factors(kKeys), log_factors(kKeys) {}

  template <typename S>
  void load(const Problem<T>& p, const Tensor& k, const Tensor& v, int64_t bh, int64_t m) {
    first = m, count = std::min(kKeys, p.keys - m);
    const int64_t b = bh / p.heads, h = bh % p.heads;
    load_mask(p, b, h);
    if (masked_out) return;
    copy_tile<S, T>(head<const S>(k, b, h).from(m, 0), key_rows(p), count, p.depth);
    copy_tile<S, T>(head<const S>(v, b, h).from(m, 0), value_rows(p), count, p.width);
    prefetch_rows<S>(k, b, h, m + kKeys, kKeys);
    prefetch_rows<S>(v, b, h, m + kKeys, kKeys);
    normalize_rows<T>(key_rows(p), norms.get(), count, p.depth, p.normalize);
  }

  Matrix<T> key_rows(const Problem<T>& p) const { return {units.get(), p.depth}; }
  Matrix<T> value_rows(const Problem<T>& p) const { return {values.get(), p.width}; }

 private:
  // Without a mask the factors are 1. What is not positive is left out: factor 0, logarithm -inf.
  void load_mask(const Problem<T>& p, int64_t b, int64_t h) {
    std::fill_n(factors.get(), count, T(1));
    masked_out = false;
    if (!p.mask) return;
    const Tensor& mask = *p.mask;
    const T* source = mask.const_data_ptr<T>() + b * mask.stride(0) + h * mask.stride(1) + first * mask.stride(2);
    bool any = false;
    for (int64_t i = 0; i < count; ++i) {
      const T factor = source[i * mask.stride(2)];
      factors.get()[i] = factor <= 0 ? T(0) : factor;
      any = any || !(factor <= 0);
    }
    masked_out = !any;
    at::vec::map([](Vec<T> x) { return x.log(); }, log_factors.get(), factors.get(), count);
  }
};

// logits (T x R, rows kQueries apart) = t k̂ q̂ᵀ + log mask
template <typename T>
void make_logits(const Problem<T>& p, T scale, const QueryBlock<T>& block, const KeyTile<T>& tile, T* logits) {
  multiply<T>(tile.key_rows(p), block.query_columns(), {logits, kQueries}, tile.count, block.lanes, p.depth);
  const Vec<T> t(scale);
  for (int64_t m = 0; m < tile.count; ++m) {
    const Vec<T> bias(p.mask ? tile.log_factors.get()[m] : T(0));
    for (T* row = logits + m * kQueries; row < logits + m * kQueries + block.lanes; row += Vec<T>::size())
      at::vec::fmadd(t, Vec<T>::loadu(row), bias).store(row);
  }
}

}  // namespace masked
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

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

#include "tile_gemm.h"
#include "tile_io.h"
#include "token_rows.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace masked {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kQueries = 48, kKeys = 128;  // of a block and of a tile: their scores stay in L1

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

template <typename T>
struct QueryBlock {
  Scratch<T> rows, columns, norms;  // t q̂ (R x D) and transposed (D x R)
  int64_t first = 0, count = 0;

  explicit QueryBlock(const Problem<T>& p) : rows(kQueries * p.depth), columns(kQueries * p.depth), norms(kQueries) {}

  template <typename S>
  void load(const Problem<T>& p, const Tensor& q, int64_t bh, int64_t n) {
    first = n, count = std::min(kQueries, p.queries - n);
    const Matrix<T> unit{rows.get(), p.depth};
    copy_tile<S, T>(head<const S>(q, bh / p.heads, bh % p.heads).from(n, 0), unit, count, p.depth);
    normalize_rows<T>(unit, norms.get(), count, p.depth, p.normalize);
    multiply_by<T>(p.scale(bh), rows.get(), count * p.depth);
    copy_tile<T, T>(Matrix<const T>(unit).transposed(), query_columns(), p.depth, count);
  }

  Matrix<T> query_columns() const { return {columns.get(), kQueries}; }
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
    normalize_rows<T>(key_rows(p), norms.get(), count, p.depth, p.normalize);
    copy_tile<S, T>(head<const S>(v, b, h).from(m, 0), value_rows(p), count, p.width);
  }

  Matrix<T> key_rows(const Problem<T>& p) const { return {units.get(), p.depth}; }
  Matrix<T> value_rows(const Problem<T>& p) const { return {values.get(), p.width}; }

 private:
  void load_mask(const Problem<T>& p, int64_t b, int64_t h) {
    masked_out = p.mask.has_value();
    for (int64_t i = 0; i < count; ++i) {
      T factor = 1;
      if (p.mask) {
        const Tensor& mask = *p.mask;
        factor = mask.const_data_ptr<T>()[b * mask.stride(0) + h * mask.stride(1) + (first + i) * mask.stride(2)];
      }
      const bool kept = !(factor <= 0);
      factors.get()[i] = kept ? factor : T(0);
      log_factors.get()[i] = kept ? std::log(factor) : -std::numeric_limits<T>::infinity();
      masked_out = masked_out && !kept;
    }
  }
};

// logits (T x R, rows kQueries apart) = k̂ (t q̂)ᵀ + log mask
template <typename T>
void make_logits(const Problem<T>& p, const QueryBlock<T>& block, const KeyTile<T>& tile, T* logits) {
  multiply<T>(tile.key_rows(p), block.query_columns(), {logits, kQueries}, tile.count, block.count, p.depth);
  if (!p.mask) return;
  for (int64_t m = 0; m < tile.count; ++m)
    at::vec::map([a = tile.log_factors.get()[m]](Vec<T> s) { return s + Vec<T>(a); }, logits + m * kQueries,
                 logits + m * kQueries, block.count);
}

}  // namespace masked
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

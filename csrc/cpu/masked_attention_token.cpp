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
// do and the results once each, so arithmetic is the bound. Extra memory: the shorter side, packed, per
// thread, and its gradients per task, at most 8 tasks of a head. Tasks depend on shapes alone, so sums do
// not depend on the number of threads.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <numeric>
#include <tuple>
#include <vector>

#include "masked_token_tiles.h"
#include "result_memory.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace {

using namespace masked;

// All of the shorter side, or one part of the longer side, reused.
template <typename Part, typename T>
std::vector<Part> make_parts(const Problem<T>& p, int64_t count) {
  std::vector<Part> result;
  for (int64_t i = 0; i < count; ++i) result.emplace_back(p);
  return result;
}

// --- forward ------------------------------------------------------------------------------------------

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
    for (int64_t n = 0; n < count; ++n) {
      factor[n] = state.sum[n] > 0 ? 1 / state.sum[n] : T(0);  // all keys are masked: 0
      statistics[n] = state.largest[n] + std::log(state.sum[n]);
    }
    state.rescale(p, factor);
    const Matrix<const T> rows = Matrix<const T>{state.out, kQueries}.transposed();  // R x E
    copy_tile<T, S>(rows, head<S>(out, bh / p.heads, bh % p.heads).from(first, 0), count, p.width);
    if constexpr (!std::is_same_v<S, T>)
      copy_tile<T, T>(rows, head<T>(wide_out, bh / p.heads, bh % p.heads).from(first, 0), count, p.width);
  }

  void queries_in_chunks() {
    at::parallel_for(0, p.matrices() * p.chunks, 1, [&](int64_t begin, int64_t end) {
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

// --- backward -----------------------------------------------------------------------------------------

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
    copy_tile<T, T>(Matrix<const T>(this->query_columns()).transposed(), {rows.get(), p.depth}, count, p.depth);
    const auto grad = head<const S>(grad_out, b, h).from(n, 0);
    copy_tile<S, T>(grad, {grad_rows.get(), p.width}, count, p.width);
    if (count < this->lanes) std::fill_n(grad_columns.get(), kQueries * p.width, T(0));
    copy_tile<S, T>(grad.transposed(), {grad_columns.get(), kQueries}, p.width, count);
    const T* out_rows = out.const_data_ptr<T>() + (bh * p.queries + n) * p.width;
    std::fill_n(delta.get(), kQueries, T(0));
    for (int64_t i = 0; i < count; ++i)
      delta.get()[i] = dot<T>(grad_rows.get() + i * p.width, out_rows + i * p.width, p.width);
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
  for (int64_t m = 0; m < tile.count; ++m) {
    Vec<T> total(T(0));
    for (int64_t n = 0; n < block.lanes; n += Vec<T>::size()) {
      T *row = probabilities + m * kQueries + n, *grad_row = grad_logits + m * kQueries + n;
      const Vec<T> weight = (Vec<T>::loadu(row) - Vec<T>::loadu(block.log_sum_exp.get() + n)).exp();
      const Vec<T> change = weight * (Vec<T>::loadu(grad_row) - Vec<T>::loadu(block.delta.get() + n));
      weight.store(row), change.store(grad_row);
      total = total + change;
    }
    grads.biases[m] += at::vec::vec_reduce_all<T>([](Vec<T> a, Vec<T> b) { return a + b; }, total);
  }
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
    for (int64_t m = 0; m < tile.count && !tile.masked_out; ++m) {
      T* grad = grads.keys + m * p.depth;
      const T *unit = tile.units.get() + m * p.depth, norm = tile.norms.get()[m];
      const T along = dot<T>(grad, unit, p.depth), radial = p.normalize && norm > T(kNormFloor) ? along : T(0);
      temperature += along;
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

// --- operators ----------------------------------------------------------------------------------------

template <typename S>
using Accumulate = std::conditional_t<std::is_same_v<S, double>, double, float>;

std::tuple<Tensor, Tensor, Tensor> masked_attention_token(const Tensor& q, const Tensor& k, const Tensor& v,
                                                          const OptionalTensor& mask, const Tensor& temperature,
                                                          bool normalize) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "masked_attention_token", [&] {
    using T = Accumulate<scalar_t>;
    const Problem<T> p(q, k, v, mask, temperature, normalize);
    const auto wide = q.options().dtype(c10::CppTypeToScalarType<T>::value);
    const std::vector<int64_t> shape{p.batch, p.heads, p.queries, p.width}, rows(shape.begin(), shape.end() - 1);
    Forward<scalar_t, T> pass{p, q, k, v, empty_result(shape, v.options()), at::empty(rows, wide),
                              std::is_same_v<scalar_t, T> ? at::empty({0}, wide) : at::empty(shape, wide)};
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
        at::empty(mask ? mask->sizes() : at::IntArrayRef{0}, statistics.options()),
        at::empty({p.batch, p.heads}, statistics.options())};
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

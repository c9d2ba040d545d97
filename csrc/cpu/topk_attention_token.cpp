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
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "tile_gemm.h"
#include "tile_io.h"
#include "topk_select.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace {

using at::Tensor;

constexpr double kNormFloor = 1e-12;

template <typename T>
using Vec = at::vec::Vectorized<T>;

template <typename T>
T dot(const T* x, const T* y, int64_t length) {
  return at::vec::map2_reduce_all<T>([](Vec<T> a, Vec<T> b) { return a * b; },
                                     [](Vec<T> a, Vec<T> b) { return a + b; }, x, y, length);
}

template <typename T>
void add_scaled(T scale, const T* x, T* y, int64_t length) {
  at::vec::map2([scale](Vec<T> a, Vec<T> b) { return at::vec::fmadd(Vec<T>(scale), a, b); }, y, x, y, length);
}

template <typename S>
Matrix<S> head(const Tensor& x, int64_t b, int64_t h) {
  S* data = const_cast<S*>(x.const_data_ptr<std::remove_const_t<S>>());
  return {data + b * x.stride(0) + h * x.stride(1), x.stride(2), x.stride(3)};
}

// Divides rows by their norm (clamped), which it keeps, when `normalize`; otherwise the norms are 1.
template <typename T>
void normalize_rows(Matrix<T> rows, T* norms, int64_t count, int64_t length, bool normalize) {
  for (int64_t i = 0; i < count; ++i) {
    T* row = rows.data + i * rows.row;
    norms[i] = normalize ? std::max<T>(std::sqrt(dot<T>(row, row, length)), T(kNormFloor)) : T(1);
    if (normalize) at::vec::map([n = norms[i]](Vec<T> x) { return x / Vec<T>(n); }, row, row, length);
  }
}

// grad of the unnormalised row, in place: (g - (g·x̂) x̂) / |x|; a clamped norm is a constant.
template <typename T>
void backward_norm(T* grad, const T* unit, T norm, int64_t length, bool normalize) {
  if (!normalize) return;
  const T along = norm > T(kNormFloor) ? dot<T>(grad, unit, length) : T(0);
  at::vec::map2([along, norm](Vec<T> g, Vec<T> u) { return (g - Vec<T>(along) * u) / Vec<T>(norm); }, grad, grad, unit,
                length);
}

template <typename T>
struct Problem {
  int64_t batch, heads, queries, keys, depth, width, branches;
  c10::ArrayRef<int64_t> topk;
  const Tensor &temperature, &weights;
  bool normalize;
  int64_t block, chunk, chunks;  // rows at a time, rows of a task, tasks of a head
  std::vector<int64_t> sparse;   // branches that do not keep everything, largest count first
  bool dense_product;            // P is dense enough for matrix products

  Problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature, const Tensor& weights,
          c10::ArrayRef<int64_t> topk, bool normalize)
      : batch(q.size(0)), heads(q.size(1)), queries(q.size(2)), keys(k.size(2)), depth(q.size(3)), width(v.size(3)),
        branches(static_cast<int64_t>(topk.size())), topk(topk), temperature(temperature), weights(weights),
        normalize(normalize) {
    constexpr int64_t kScores = 65536, kTasksOfHead = 8, kRowsOfTask = 64;
    block = std::clamp<int64_t>(kScores / keys / gemm::kRows * gemm::kRows, gemm::kRows, 8 * gemm::kRows);
    const int64_t tasks = std::max<int64_t>(1, std::min(kTasksOfHead / std::max<int64_t>(batch * heads, 1), queries / kRowsOfTask));
    chunk = std::max<int64_t>(1, (queries + tasks - 1) / tasks);
    chunks = std::max<int64_t>(1, (queries + chunk - 1) / chunk);
    for (int64_t j = 0; j < branches; ++j)
      if (topk[j] < keys) sparse.push_back(j);
    std::stable_sort(sparse.begin(), sparse.end(), [&](int64_t a, int64_t b) { return topk[a] > topk[b]; });
    dense_product = has_dense() || topk[sparse[0]] > keys / 4;
  }

  bool has_dense() const { return static_cast<int64_t>(sparse.size()) < branches; }
  int64_t largest() const { return sparse.empty() ? 0 : topk[sparse[0]]; }
  T scale(int64_t b, int64_t h) const {
    return temperature.const_data_ptr<T>()[b * temperature.stride(0) + h * temperature.stride(1)];
  }
  T weight(int64_t b, int64_t h, int64_t j) const {
    return weights.const_data_ptr<T>()[b * weights.stride(0) + h * weights.stride(1) + j * weights.stride(2)];
  }

  // f(b, h, task of the head, first row, end row, whether the head differs from this thread's last).
  template <typename F>
  void tasks_of_thread(int64_t begin, int64_t end, F f) const {
    int64_t last = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t bh = task / chunks, first = task % chunks * chunk;
      f(bh / heads, bh % heads, task, first, std::min(queries, first + chunk), bh != last);
      last = bh;
    }
  }
};

// One head's keys, as the matrix the scores are made with.
template <typename S, typename T>
struct PackedKeys {
  const Problem<T>& p;
  Scratch<T> rows, columns, norms, query_norms, query_block;

  explicit PackedKeys(const Problem<T>& p)
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
    multiply<T>(query_units(), {columns.get(), p.keys}, {target, p.keys}, count, p.keys, p.depth, false);
    at::vec::map([t = p.scale(b, h)](Vec<T> x) { return Vec<T>(t) * x; }, target, target, count * p.keys);
  }
};

// A row's selection, its softmax statistics and its mixture.
template <typename T>
class ForwardRow {
 public:
  explicit ForwardRow(const Problem<T>& p) : p_(p), selector_(p.largest()), exponential_(p.largest()), share_(p.branches) {}

  // Fills the statistics of the row (J each).
  void select(const T* scores, int64_t b, int64_t h, T* threshold, int32_t* last_tie, T* log_sum_exp) {
    entries_ = p_.sparse.empty() ? nullptr : &selector_.select(scores, p_.keys, p_.largest());
    largest_ = largest(scores);
    int64_t prefix = entries_ ? static_cast<int64_t>(entries_->size()) : 0;
    for (const int64_t j : p_.sparse) {
      const int64_t count = std::min(p_.topk[j], prefix);
      if (count == 0) {  // nothing comparable in the row
        threshold[j] = std::numeric_limits<T>::infinity(), last_tie[j] = -1;
        continue;
      }
      std::nth_element(entries_->begin(), entries_->begin() + (count - 1), entries_->begin() + prefix);
      threshold[j] = (*entries_)[count - 1].value;
      last_tie[j] = (*entries_)[count - 1].index;
      prefix = count;
    }
    dense_share_ = 0;
    normalise(scores, b, h, threshold, last_tie, log_sum_exp);
  }

  // Writes the mixture over the scores.
  void mixture(T* scores) const {
    if (p_.has_dense()) {
      at::vec::map([m = largest_, c = dense_share_](Vec<T> s) { return (s - Vec<T>(m)).exp() * Vec<T>(c); }, scores, scores,
                   p_.keys);
    } else {
      std::fill_n(scores, p_.keys, T(0));
    }
    each([&](int64_t index, T probability) { scores[index] += probability; });
  }

  // f(index, probability) for the entries of the sparse branches.
  template <typename F>
  void each(F f) const {
    if (!entries_) return;
    T share = 0;  // of the branches whose selection reaches entry i: more of them towards the front
    size_t j = 0;
    for (int64_t i = static_cast<int64_t>(entries_->size()) - 1; i >= 0; --i) {
      while (j < p_.sparse.size() && i < p_.topk[p_.sparse[j]]) share += share_[p_.sparse[j++]];
      f((*entries_)[i].index, exponential_[i] * share);
    }
  }

 private:
  T largest(const T* scores) const {
    if (p_.has_dense())
      return at::vec::reduce_all<T>([](Vec<T> a, Vec<T> b) { return at::vec::maximum(a, b); }, scores, p_.keys);
    T largest = -std::numeric_limits<T>::infinity();
    for (const auto& entry : *entries_) largest = std::max(largest, entry.value);
    return largest;
  }

  void normalise(const T* scores, int64_t b, int64_t h, T* threshold, int32_t* last_tie, T* log_sum_exp) {
    const int64_t count = entries_ ? static_cast<int64_t>(entries_->size()) : 0;
    for (int64_t i = 0; i < count; ++i) exponential_[i] = (*entries_)[i].value;
    at::vec::map([m = largest_](Vec<T> s) { return (s - Vec<T>(m)).exp(); }, exponential_.data(), exponential_.data(), count);
    T dense_sum = 0;
    if (p_.has_dense())
      dense_sum = at::vec::map_reduce_all<T>([m = largest_](Vec<T> s) { return (s - Vec<T>(m)).exp(); },
                                             [](Vec<T> x, Vec<T> y) { return x + y; }, scores, p_.keys);
    for (int64_t j = 0; j < p_.branches; ++j) {
      T sum = dense_sum;
      if (p_.topk[j] < p_.keys) {
        sum = std::accumulate(exponential_.begin(), exponential_.begin() + std::min(p_.topk[j], count), T(0));
      } else {
        threshold[j] = -std::numeric_limits<T>::infinity();
        last_tie[j] = static_cast<int32_t>(p_.keys - 1);
        dense_share_ += p_.weight(b, h, j) / sum;
      }
      share_[j] = p_.weight(b, h, j) / sum;
      log_sum_exp[j] = largest_ + std::log(sum);
    }
  }

  const Problem<T>& p_;
  TopSelector<T> selector_;
  std::vector<Entry<T>>* entries_ = nullptr;  // selections of the sparse branches, nested as prefixes
  std::vector<T> exponential_;                // exp(value - largest_) of the entries
  std::vector<T> share_;                      // weight / sum, per branch
  T largest_ = 0, dense_share_ = 0;
};

template <typename S, typename T>
void forward_task(const Problem<T>& p, PackedKeys<S, T>& keys, const T* values, const Tensor& q, const Tensor& out,
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
      row.select(scores_row, b, h, threshold.mutable_data_ptr<T>() + saved, last_tie.mutable_data_ptr<int32_t>() + saved,
                 log_sum_exp.mutable_data_ptr<T>() + saved);
      if (p.dense_product) row.mixture(scores_row);
      else row.each([&](int64_t index, T share) { add_scaled(share, values + index * p.width, out_row, p.width); });
    }
    if (p.dense_product)
      multiply<T>({scores.get(), p.keys}, {values, p.width}, {out_block.get(), p.width}, count, p.width, p.keys, false);
    copy_tile<T, S>({out_block.get(), p.width}, head<S>(out, b, h).from(n, 0), count, p.width);
  }
}

template <typename S, typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Problem<T>& p, const Tensor& q, const Tensor& k, const Tensor& v) {
  const auto options = q.options().dtype(c10::CppTypeToScalarType<T>::value);
  const std::vector<int64_t> statistics{p.batch, p.heads, p.queries, p.branches};
  const Tensor out = at::empty({p.batch, p.heads, p.queries, p.width}, v.options());
  const Tensor threshold = at::empty(statistics, options), log_sum_exp = at::empty(statistics, options);
  const Tensor last_tie = at::empty(statistics, options.dtype(at::kInt));
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

// A row's gradient of the scores and its mixture, from the saved statistics.
template <typename T>
class BackwardRow {
 public:
  explicit BackwardRow(const Problem<T>& p)
      : p_(p), index_(p.largest()), value_(p.largest()), grad_(p.largest()), mixture_(p.largest()), grad_scores_(p.largest()),
        probability_(std::max(p.largest(), p.dense_product ? p.keys : 0)) {}

  void set(const T* threshold, const int32_t* last_tie, const T* log_sum_exp) {
    threshold_ = threshold, last_tie_ = last_tie, log_sum_exp_ = log_sum_exp;
  }

  // Dense: grad (M), the gradient of the mixture, becomes that of the scores; scores become the mixture.
  void dense(T* scores, T* grad, T* mixture, int64_t b, int64_t h, double* grad_weights) {
    run(scores, grad, mixture, p_.keys, b, h, grad_weights, [](int64_t i) { return static_cast<int32_t>(i); });
    std::copy_n(mixture, p_.keys, scores);
  }

  // Sparse: the same for the kept entries alone. grad_of(index) gives the gradient of the mixture there,
  // use(index, mixture, gradient of the score) takes the results.
  template <typename Grad, typename Use>
  void sparse(const T* scores, int64_t b, int64_t h, double* grad_weights, Grad grad_of, Use use) {
    const int64_t j = p_.sparse[0];
    int64_t count = 0;
    scan_above<false>(scores, p_.keys, threshold_[j], [&](int64_t index) {
      if (count < p_.largest() && kept(scores[index], index, j))
        index_[count] = static_cast<int32_t>(index), value_[count++] = scores[index];
      return threshold_[j];
    });
    for (int64_t i = 0; i < count; ++i) grad_[i] = grad_of(index_[i]);
    run(value_.data(), grad_.data(), mixture_.data(), count, b, h, grad_weights, [&](int64_t i) { return index_[i]; });
    for (int64_t i = 0; i < count; ++i) use(index_[i], mixture_[i], grad_[i]);
  }

 private:
  bool kept(T score, int64_t index, int64_t j) const {
    return score > threshold_[j] || (score == threshold_[j] && index <= last_tie_[j]);
  }

  // Over `count` scores: mixture = sum_j w_j p_j; grad = sum_j w_j p_j (grad - sum p_j grad).
  template <typename Index>
  void run(const T* scores, T* grad, T* mixture, int64_t count, int64_t b, int64_t h, double* grad_weights, Index index_of) {
    T* sum = grad_scores(count);
    std::fill_n(sum, count, T(0));
    std::fill_n(mixture, count, T(0));
    for (int64_t j = 0; j < p_.branches; ++j) {
      T* probability = probability_.data();
      at::vec::map([t = threshold_[j], z = log_sum_exp_[j]](Vec<T> s) { return (s - Vec<T>(z)).exp() & (s >= Vec<T>(t)); },
                   probability, scores, count);
      drop_late_ties(scores, probability, count, j, index_of);
      const T mean = dot<T>(probability, grad, count), weight = p_.weight(b, h, j);
      grad_weights[j] += mean;
      at::vec::map3([weight, mean](Vec<T> s, Vec<T> p, Vec<T> g) { return s + Vec<T>(weight) * p * (g - Vec<T>(mean)); },
                    sum, sum, probability, grad, count);
      add_scaled(weight, probability, mixture, count);
    }
    std::copy_n(sum, count, grad);
  }

  template <typename Index>
  void drop_late_ties(const T* scores, T* probability, int64_t count, int64_t j, Index index_of) const {
    const Vec<T> threshold(threshold_[j]);
    for (int64_t i = 0; i < count; i += Vec<T>::size()) {
      const int64_t left = std::min<int64_t>(Vec<T>::size(), count - i);
      constexpr int kAll = (1 << Vec<T>::size()) - 1;
      if ((Vec<T>::loadu(scores + i, left) == threshold).zero_mask() == kAll) continue;
      for (int64_t l = i; l < i + left; ++l)
        if (!kept(scores[l], index_of(l), j)) probability[l] = 0;
    }
  }

  T* grad_scores(int64_t count) {
    if (static_cast<int64_t>(grad_scores_.size()) < count) grad_scores_.resize(count);
    return grad_scores_.data();
  }

  const Problem<T>& p_;
  std::vector<int32_t> index_;
  std::vector<T> value_, grad_, mixture_, grad_scores_, probability_;
  const T *threshold_ = nullptr, *log_sum_exp_ = nullptr;
  const int32_t* last_tie_ = nullptr;
};

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
  explicit BackwardTask(const Problem<T>& p)
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
    multiply<T>(grad_out, {value_columns.get(), p.keys}, ds, count, p.keys, p.width, false);
    for (int64_t i = 0; i < count; ++i) {
      statistics(i);
      row.dense(scores.get() + i * p.keys, grad_scores.get() + i * p.keys, mixture.get(), b, h, grads.weights);
    }
    scale_queries(b, h, count);
    multiply<T>(ds, keys.units(), {grad_q_block.get(), p.depth}, count, p.depth, p.keys, false);
    multiply<T>(ds.transposed(), {scaled_queries.data(), p.depth}, {grads.keys, p.depth}, p.keys, p.depth, count, true);
    multiply<T>(mixed.transposed(), grad_out, {grads.values, p.width}, p.keys, p.width, count, true);
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

  const Problem<T>& p;

 public:
  PackedKeys<S, T> keys;

 private:
  Scratch<T> values, value_columns, scores, grad_scores, mixture, grad_out_block, grad_q_block;
  std::vector<T> scaled_queries;
  BackwardRow<T> row;
};

// Adds up the tasks of every head, in order, and takes the gradient of the keys back through the norm.
template <typename S, typename T>
void finish_keys(const Problem<T>& p, T* shares, int64_t share_size, const Tensor& k, const Tensor& grad_k,
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
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Problem<T>& p, const Tensor& grad_out, const Tensor& q,
                                                            const Tensor& k, const Tensor& v, const Tensor& threshold,
                                                            const Tensor& last_tie, const Tensor& log_sum_exp) {
  const Tensor grad_q = at::empty(q.sizes(), q.options()), grad_k = at::empty(k.sizes(), k.options()),
               grad_v = at::empty(v.sizes(), v.options());
  const Tensor grad_temperature = at::empty({p.batch, p.heads}, threshold.options());
  const Tensor grad_weights = at::empty({p.batch, p.heads, p.branches}, threshold.options());
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

template <typename S>
using Accumulate = std::conditional_t<std::is_same_v<S, double>, double, float>;

std::tuple<Tensor, Tensor, Tensor, Tensor> topk_attention_token(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature, const Tensor& weights,
    at::IntArrayRef topk, bool normalize) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "topk_attention_token", [&] {
    using T = Accumulate<scalar_t>;
    return forward<scalar_t, T>(Problem<T>(q, k, v, temperature, weights, topk, normalize), q, k, v);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> topk_attention_token_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature,
    const Tensor& weights, const Tensor& threshold, const Tensor& last_tie, const Tensor& log_sum_exp,
    at::IntArrayRef topk, bool normalize) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "topk_attention_token_backward", [&] {
    using T = Accumulate<scalar_t>;
    return backward<scalar_t, T>(Problem<T>(q, k, v, temperature, weights, topk, normalize), grad_out, q, k, v,
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

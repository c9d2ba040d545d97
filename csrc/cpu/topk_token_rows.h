// One query of top-k attention between tokens: selection, mixture of the branches, and its derivative.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "tile_gemm.h"
#include "token_rows.h"
#include "topk_select.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {

// Sizes and options of a call, how it is divided, and whether the mixture is dense.
template <typename T>
struct TokenProblem {
  int64_t batch, heads, queries, keys, depth, width, branches;
  c10::ArrayRef<int64_t> topk;
  const at::Tensor &temperature, &weights;
  bool normalize;
  int64_t block, chunk, chunks;  // rows at a time, rows of a task, tasks of a head
  std::vector<int64_t> sparse;   // branches that do not keep everything, largest count first
  bool dense_product;            // P is dense enough for matrix products

  TokenProblem(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& temperature, const at::Tensor& weights,
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

// A row's selection, its softmax statistics and its mixture.
template <typename T>
class ForwardRow {
 public:
  explicit ForwardRow(const TokenProblem<T>& p)
      : p_(p), selector_(p.largest()), exponential_(p.largest()), share_(p.branches) {
    if (!p.dense_product) return;
    row_.assign(padded(), -std::numeric_limits<T>::infinity());
    dense_exponential_.resize(padded());
  }

  // Dense: fills the statistics of the row (J each) and writes the mixture over the scores. False, and nothing that
  // counts is written, where entries are too near to each other, or do not compare: then it takes select().
  bool dense(T* scores, int64_t b, int64_t h, T* threshold, int32_t* last_tie, T* log_sum_exp) {
    std::copy_n(scores, p_.keys, row_.begin());
    T low = smallest(scores, p_.keys);
    largest_ = largest(scores, p_.keys);
    if (!std::isfinite(low) || !std::isfinite(largest_)) return false;
    for (const int64_t j : p_.sparse) {
      if (!find_by_halving(row_.data(), padded(), p_.topk[j], low, largest_, threshold[j])) return false;
      low = threshold[j];
      last_tie[j] = static_cast<int32_t>(p_.keys - 1);
      while (row_[last_tie[j]] != low) --last_tie[j];
    }
    T* exponential = dense_exponential_.data();
    at::vec::map([m = largest_](Vec<T> s) { return (s - Vec<T>(m)).exp(); }, exponential, row_.data(), padded());
    dense_share_ = 0;
    for (int64_t j = 0; j < p_.branches; ++j) {
      const bool is_dense = p_.topk[j] >= p_.keys;
      if (is_dense) threshold[j] = -std::numeric_limits<T>::infinity(), last_tie[j] = static_cast<int32_t>(p_.keys - 1);
      Vec<T> sums(0);
      each_vector([&](int64_t l) { sums = sums + (Vec<T>::loadu(exponential + l) & reaches(l, threshold[j])); });
      const T sum = at::vec::vec_reduce_all<T>([](Vec<T> x, Vec<T> y) { return x + y; }, sums);
      share_[j] = p_.weight(b, h, j) / sum;
      if (is_dense) dense_share_ += share_[j];
      log_sum_exp[j] = largest_ + std::log(sum);
    }
    each_vector([&](int64_t l) {
      Vec<T> share(dense_share_);
      for (const int64_t j : p_.sparse) share = share + (Vec<T>(share_[j]) & reaches(l, threshold[j]));
      (Vec<T>::loadu(exponential + l) * share).store(scores + l, std::min<int64_t>(Vec<T>::size(), p_.keys - l));
    });
    return true;
  }

  // Fills the statistics of the row (J each).
  void select(const T* scores, int64_t b, int64_t h, T* threshold, int32_t* last_tie, T* log_sum_exp) {
    entries_ = p_.sparse.empty() ? nullptr : &selector_.select(scores, p_.keys, p_.largest());
    largest_ = p_.has_dense() ? largest(scores, p_.keys) : largest_entry();
    int64_t prefix = entries_ ? static_cast<int64_t>(entries_->size()) : 0;
    for (const int64_t j : p_.sparse) {
      const int64_t count = std::min(p_.topk[j], prefix);
      const Entry<T> last = selector_.first(count, prefix);
      threshold[j] = last.value, last_tie[j] = last.index;
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
  int64_t padded() const { return ceil_div(p_.keys, Vec<T>::size()) * Vec<T>::size(); }
  Vec<T> reaches(int64_t l, T threshold) const { return Vec<T>::loadu(row_.data() + l) >= Vec<T>(threshold); }

  template <typename F>
  void each_vector(F f) const {
    for (int64_t l = 0; l < padded(); l += Vec<T>::size()) f(l);
  }

  T largest_entry() const {
    T most = -std::numeric_limits<T>::infinity();
    for (const auto& entry : *entries_) most = std::max(most, entry.value);
    return most;
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

  const TokenProblem<T>& p_;
  TopSelector<T> selector_;
  std::vector<Entry<T>>* entries_ = nullptr;  // selections of the sparse branches, nested as prefixes
  std::vector<T> exponential_;                // exp(value - largest_) of the entries
  std::vector<T> share_;                      // weight / sum, per branch
  T largest_ = 0, dense_share_ = 0;
  std::vector<T> row_, dense_exponential_;  // of whole vectors: the scores, -inf after them; their exponentials
};

// A row's gradient of the scores and its mixture, from the saved statistics.
template <typename T>
class BackwardRow {
 public:
  explicit BackwardRow(const TokenProblem<T>& p)
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

  const TokenProblem<T>& p_;
  std::vector<int32_t> index_;
  std::vector<T> value_, grad_, mixture_, grad_scores_, probability_;
  const T *threshold_ = nullptr, *log_sum_exp_ = nullptr;
  const int32_t* last_tie_ = nullptr;
};

}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

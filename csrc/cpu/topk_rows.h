// One row of top-k attention in the channel layout: ranks, branch mixture, and its derivative.
//
// The rank of every entry is counted once and serves all branches: branch j keeps rank < topk[j].
// Counting costs length^2 vectorised compares; up to a thousand entries that beats sorting.
// All branches keep the row's maximum, so they share one shift and one set of exponentials, and the
// mixture is one row: sum_j w_j softmax_j = exp(s - max) * sum over kept branches of w_j / Z_j.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <limits>

namespace restore_kernels {
inline namespace CPU_CAPABILITY {

// Rows are padded to whole vectors: `padded()` entries, those past `length` with exponential 0.
// What a row knows lies in memory of the caller (`size()` elements), who may keep it for backward.
template <typename T>
class RowMixture {
  using Vec = at::vec::Vectorized<T>;

 public:
  RowMixture(int64_t length, c10::ArrayRef<int64_t> topk, T* memory)
      : length_(length), padded_(padded(length)), topk_(topk), rank_(memory), exponential_(rank_ + padded_),
        scale_(exponential_ + padded_), sum_(scale_ + topk.size()) {}

  static int64_t padded(int64_t length) { return (length + Vec::size() - 1) / Vec::size() * Vec::size(); }
  static int64_t size(int64_t length, c10::ArrayRef<int64_t> topk) {
    return 2 * padded(length) + 2 * static_cast<int64_t>(topk.size());
  }

  // Ranks, exponentials and normalisers of the row of scores scale * similarity (length).
  void set(const T* similarity, T scale, const T* weights, int64_t weight_stride) {
    T* scores = exponential_;  // until they are exponentiated
    std::fill_n(scores, padded_, -std::numeric_limits<T>::infinity());
    at::vec::map([scale](Vec a) { return Vec(scale) * a; }, scores, similarity, length_);
    count_ranks(scores);
    const Vec largest(*std::max_element(scores, scores + length_));
    each([&](int64_t l) { (Vec::loadu(scores + l) - largest).exp().store(exponential_ + l); });
    for (size_t j = 0; j < topk_.size(); ++j) {
      Vec sum(0);
      each([&](int64_t l) { sum = sum + (exponential(l) & kept(l, j)); });
      sum_[j] = total(sum);
      scale_[j] = weights[j * weight_stride] / sum_[j];
    }
  }

  void mixture(T* out) const {  // out (length)
    each([&](int64_t l) {
      Vec coefficient(0);
      for (size_t j = 0; j < topk_.size(); ++j) coefficient = coefficient + (Vec(scale_[j]) & kept(l, j));
      (exponential(l) * coefficient).store(out + l, std::min<int64_t>(Vec::size(), length_ - l));
    });
  }

  // grad_scores (padded) from the gradient of the mixture (padded); grad_weights[j] += its share.
  void backward(const T* grad, T* grad_scores, T* grad_weights) const {
    std::fill_n(grad_scores, padded_, T(0));
    for (size_t j = 0; j < topk_.size(); ++j) {
      Vec sum(0);
      each([&](int64_t l) { sum = at::vec::fmadd(exponential(l) & kept(l, j), Vec::loadu(grad + l), sum); });
      const T mean = total(sum) / sum_[j];  // of the gradient under branch j
      grad_weights[j] += mean;
      each([&](int64_t l) {
        const Vec share = (Vec(scale_[j]) * exponential(l)) & kept(l, j);
        at::vec::fmadd(share, Vec::loadu(grad + l) - Vec(mean), Vec::loadu(grad_scores + l)).store(grad_scores + l);
      });
    }
  }

 private:
  template <typename F>
  void each(F f) const {
    for (int64_t l = 0; l < padded_; l += Vec::size()) f(l);
  }
  Vec exponential(int64_t l) const { return Vec::loadu(exponential_ + l); }
  Vec kept(int64_t l, size_t j) const { return Vec::loadu(rank_ + l) < Vec(static_cast<T>(topk_[j])); }
  static T total(Vec x) {
    return at::vec::vec_reduce_all<T>([](Vec a, Vec b) { return a + b; }, x);
  }

  void count_ranks(const T* scores) {
    std::fill_n(rank_, padded_, T(0));
    if (std::all_of(topk_.begin(), topk_.end(), [&](int64_t kept) { return kept == length_; })) return;
    T counted = 0;
    each([&](int64_t l) {
      Vec rank(0);
      const Vec own = Vec::loadu(scores + l);
      for (int64_t m = 0; m < length_; ++m) rank = rank + Vec(scores[m]).gt(own);
      rank.store(rank_ + l);
    });
    for (int64_t l = 0; l < length_; ++l) counted += rank_[l];
    if (counted == T(length_) * T(length_ - 1) / 2) return;
    // Entries that compare equal were counted alike: the lower index goes first.
    for (int64_t l = 0; l < length_; ++l)
      for (int64_t m = 0; m < l; ++m) rank_[l] += scores[m] == scores[l];
  }

  int64_t length_, padded_;
  c10::ArrayRef<int64_t> topk_;
  T* rank_;
  T* exponential_;  // exp(score - largest score)
  T* scale_;        // weight_j / sum_j
  T* sum_;          // of the exponentials kept by branch j
};

}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

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
#include <vector>

namespace restore_kernels {
inline namespace CPU_CAPABILITY {

// Rows are padded to whole vectors: `padded()` entries, those past `length` with exponential 0.
template <typename T>
class RowMixture {
  using Vec = at::vec::Vectorized<T>;

 public:
  RowMixture(int64_t length, c10::ArrayRef<int64_t> topk)
      : length_(length), padded_((length + Vec::size() - 1) / Vec::size() * Vec::size()), topk_(topk),
        scores_(padded_, -std::numeric_limits<T>::infinity()), rank_(padded_), exponential_(padded_),
        scale_(topk.size()), sum_(topk.size()) {}

  int64_t padded() const { return padded_; }

  // Ranks, exponentials and normalisers of the row of scores scale * similarity (length).
  void set(const T* similarity, T scale, const T* weights, int64_t weight_stride) {
    at::vec::map([scale](Vec a) { return Vec(scale) * a; }, scores_.data(), similarity, length_);
    count_ranks();
    const Vec largest(*std::max_element(scores_.begin(), scores_.begin() + length_));
    each([&](int64_t l) { (at(scores_, l) - largest).exp().store(&exponential_[l]); });
    for (size_t j = 0; j < topk_.size(); ++j) {
      Vec sum(0);
      each([&](int64_t l) { sum = sum + (at(exponential_, l) & kept(l, j)); });
      sum_[j] = total(sum);
      scale_[j] = weights[j * weight_stride] / sum_[j];
    }
  }

  void mixture(T* out) const {  // out (length)
    each([&](int64_t l) {
      Vec coefficient(0);
      for (size_t j = 0; j < topk_.size(); ++j) coefficient = coefficient + (Vec(scale_[j]) & kept(l, j));
      (at(exponential_, l) * coefficient).store(out + l, std::min<int64_t>(Vec::size(), length_ - l));
    });
  }

  // grad_scores (padded) from the gradient of the mixture (padded); grad_weights[j] += its share.
  void backward(const T* grad, T* grad_scores, T* grad_weights) const {
    std::fill_n(grad_scores, padded_, T(0));
    for (size_t j = 0; j < topk_.size(); ++j) {
      Vec sum(0);
      each([&](int64_t l) { sum = at::vec::fmadd(at(exponential_, l) & kept(l, j), Vec::loadu(grad + l), sum); });
      const T mean = total(sum) / sum_[j];  // of the gradient under branch j
      grad_weights[j] += mean;
      each([&](int64_t l) {
        const Vec share = (Vec(scale_[j]) * at(exponential_, l)) & kept(l, j);
        at::vec::fmadd(share, Vec::loadu(grad + l) - Vec(mean), Vec::loadu(grad_scores + l)).store(grad_scores + l);
      });
    }
  }

 private:
  template <typename F>
  void each(F f) const {
    for (int64_t l = 0; l < padded_; l += Vec::size()) f(l);
  }
  static Vec at(const std::vector<T>& x, int64_t l) { return Vec::loadu(x.data() + l); }
  Vec kept(int64_t l, size_t j) const { return at(rank_, l) < Vec(static_cast<T>(topk_[j])); }
  static T total(Vec x) {
    return at::vec::vec_reduce_all<T>([](Vec a, Vec b) { return a + b; }, x);
  }

  void count_ranks() {
    const T* scores = scores_.data();
    T counted = 0;
    each([&](int64_t l) {
      Vec rank(0);
      const Vec own = at(scores_, l);
      for (int64_t m = 0; m < length_; ++m) rank = rank + Vec(scores[m]).gt(own);
      rank.store(&rank_[l]);
    });
    for (int64_t l = 0; l < length_; ++l) counted += rank_[l];
    if (counted == T(length_) * T(length_ - 1) / 2) return;
    // Entries that compare equal were counted alike: the lower index goes first.
    for (int64_t l = 0; l < length_; ++l)
      for (int64_t m = 0; m < l; ++m) rank_[l] += scores[m] == scores[l];
  }

  int64_t length_, padded_;
  c10::ArrayRef<int64_t> topk_;
  std::vector<T> scores_, rank_;
  std::vector<T> exponential_;  // exp(score - largest score)
  std::vector<T> scale_;        // weight_j / sum_j
  std::vector<T> sum_;          // of the exponentials kept by branch j
};

}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

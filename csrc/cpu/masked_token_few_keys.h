// Masked attention of many queries to a few keys, forward and backward: what learnable tokens are asked for.
//
// The keys, transposed, are the lanes of a vector or a few, and a query's scores are a row of them. So every product
// reads and writes queries, outputs and their gradients as the rows of tokens that they are, in place: packing and
// transposing them, as the blocks of masked_token_tiles.h are, would take longer than the few operations with each.
// All keys are in the row, so softmax needs no running maximum, and backward no output.
#pragma once

#include <limits>

#include "masked_token_tiles.h"
#include "row_products.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace masked {

template <typename S, typename T>
class FewKeys {
 public:
  static bool suit(const Problem<T>& p) { return !p.by_keys && p.keys <= kMost; }

  explicit FewKeys(const Problem<T>& p)
      : p_(p), lanes_(ceil_div(p.keys, Vec<T>::size()) * Vec<T>::size()), tile_(p), key_columns_(p.depth * lanes_),
        value_columns_(p.width * lanes_), scaled_keys_(p.keys * p.depth), biases_(lanes_), scores_(kRows * lanes_),
        weights_(kRows * lanes_), slopes_(kRows * lanes_), query_scratch_(kRows * p.depth), grad_scratch_(kRows * p.width),
        result_scratch_(kRows * std::max(p.depth, p.width)) {}

  void load(const Tensor& k, const Tensor& v, int64_t bh) {
    tile_.template load<S>(p_, k, v, bh, 0);
    scale_ = p_.scale(bh);
    if (tile_.masked_out) return;
    std::fill_n(key_columns_.get(), p_.depth * lanes_, T(0));
    std::fill_n(value_columns_.get(), p_.width * lanes_, T(0));
    copy_tile<T, T>(keys().transposed(), {key_columns_.get(), lanes_}, p_.depth, p_.keys);
    copy_tile<T, T>(values().transposed(), {value_columns_.get(), lanes_}, p_.width, p_.keys);
    at::vec::map([t = scale_](Vec<T> x) { return Vec<T>(t) * x; }, scaled_keys_.get(), keys().data, p_.keys * p_.depth);
    std::fill_n(biases_.get(), lanes_, -std::numeric_limits<T>::infinity());
    for (int64_t m = 0; m < p_.keys; ++m) biases_.get()[m] = p_.mask ? tile_.log_factors.get()[m] : T(0);
  }

  bool masked_out() const { return tile_.masked_out; }  // all keys: then there is nothing to compute

  // Output and log-sum-exp of `count` queries; wide(rows) is given the output before it is rounded.
  template <typename F>
  void forward(Matrix<const S> q, Matrix<S> out, T* log_sum_exp, int64_t count, F wide) {
    for (int64_t n = 0; n < count; n += kRows)
      forward_block(q.from(n, 0), out.from(n, 0), log_sum_exp + n, n, std::min(kRows, count - n), wide);
  }

  // Gradient of `count` queries; adds to those of k̂, v and the logits' biases. Returns that of the temperature.
  double backward(Matrix<const S> q, Matrix<const S> grad_out, const T* log_sum_exp, Matrix<S> grad_q, T* of_keys,
                  T* of_values, T* of_biases, int64_t count) {
    double temperature = 0;
    for (int64_t n = 0; n < count; n += kRows)
      temperature += backward_block(q.from(n, 0), grad_out.from(n, 0), log_sum_exp + n, grad_q.from(n, 0), of_keys,
                                    of_values, of_biases, std::min(kRows, count - n));
    return temperature;
  }

 private:
  static constexpr int64_t kMost = 48, kRows = 96;  // keys; queries at a time
  static constexpr int kTogether = row_products::kColumns;

  Matrix<const T> keys() const { return tile_.key_rows(p_); }
  Matrix<const T> values() const { return tile_.value_rows(p_); }

  // f(first lane) for the vectors of a row of scores.
  template <typename F>
  void each_vector(F f) const {
    for (int64_t l = 0; l < lanes_; l += Vec<T>::size()) f(l);
  }

  // to[i] = sum of the vector that f(i) returns, for `count` rows.
  template <typename F>
  static void sum_rows(int64_t count, T* to, F f) {
    std::fill_n(to, count, T(0));
    Vec<T> totals[kTogether];
    int64_t i = 0;
    for (; i + kTogether <= count; i += kTogether) {
      for (int r = 0; r < kTogether; ++r) totals[r] = f(i + r);
      row_products::add_lanes<T, kTogether>(totals, to + i);
    }
    for (; i < count; ++i) row_products::add_lanes<T, 1>(&(totals[0] = f(i)), to + i);
  }

  // scores = q k̂ᵀ and 1 / |q|, clamped, or 1.
  void score(Matrix<const T> q, int64_t count) {
    std::fill_n(inverses_, kRows, T(1));
    if (p_.normalize) {
      dot_rows<T>(q, q, count, p_.depth, inverses_);
      at::vec::map([](Vec<T> x) { return at::vec::maximum(x.sqrt(), Vec<T>(T(kNormFloor))).reciprocal(); }, inverses_,
                   inverses_, count);
    }
    multiply<T>(q, {key_columns_.get(), lanes_}, {scores_.get(), lanes_}, count, lanes_, p_.depth);
  }

  template <typename F>
  void forward_block(Matrix<const S> q, Matrix<S> out, T* log_sum_exp, int64_t first, int64_t count, F wide) {
    score(read_tile<S, T>(q, count, p_.depth, {query_scratch_.get(), p_.depth}), count);
    T largest[kRows], sums[kRows];
    sum_rows(count, sums, [&](int64_t i) {
      T* row = scores_.get() + i * lanes_;
      const Vec<T> factor(scale_ * inverses_[i]);
      Vec<T> top(-std::numeric_limits<T>::infinity()), total(T(0));
      each_vector([&](int64_t l) {
        const Vec<T> logit = at::vec::fmadd(factor, Vec<T>::loadu(row + l), Vec<T>::loadu(biases_.get() + l));
        logit.store(row + l);
        top = at::vec::maximum(top, logit);
      });
      largest[i] = at::vec::vec_reduce_all<T>([](Vec<T> a, Vec<T> b) { return at::vec::maximum(a, b); }, top);
      each_vector([&](int64_t l) {
        const Vec<T> weight = (Vec<T>::loadu(row + l) - Vec<T>(largest[i])).exp();
        weight.store(row + l);
        total = total + weight;
      });
      return total;
    });
    at::vec::map2([](Vec<T> top, Vec<T> sum) { return top + sum.log(); }, log_sum_exp, largest, sums, count);
    for (int64_t i = 0; i < count; ++i) multiply_by(1 / sums[i], scores_.get() + i * lanes_, lanes_);
    write_tile<S, T>(out, count, p_.width, {result_scratch_.get(), p_.width}, [&](Matrix<T> rows) {
      multiply<T>({scores_.get(), lanes_}, values(), rows, count, p_.width, p_.keys);
      wide(rows, first, count);
    });
  }

  double backward_block(Matrix<const S> q, Matrix<const S> grad_out, const T* log_sum_exp, Matrix<S> grad_q, T* of_keys,
                        T* of_values, T* of_biases, int64_t count) {
    const Matrix<const T> queries = read_tile<S, T>(q, count, p_.depth, {query_scratch_.get(), p_.depth});
    const Matrix<const T> grads = read_tile<S, T>(grad_out, count, p_.width, {grad_scratch_.get(), p_.width});
    score(queries, count);
    multiply<T>(grads, {value_columns_.get(), lanes_}, {slopes_.get(), lanes_}, count, lanes_, p_.width);
    T sums[kRows], means[kRows], along[kRows], radial[kRows];
    sum_rows(count, sums, [&](int64_t i) {
      T *row = scores_.get() + i * lanes_, *weights = weights_.get() + i * lanes_;
      const Vec<T> inverse(inverses_[i]), t(scale_), norm(log_sum_exp[i]);
      Vec<T> total(T(0));
      each_vector([&](int64_t l) {
        const Vec<T> cosine = Vec<T>::loadu(row + l) * inverse;
        const Vec<T> weight = (at::vec::fmadd(t, cosine, Vec<T>::loadu(biases_.get() + l)) - norm).exp();
        cosine.store(row + l), weight.store(weights + l);
        total = total + weight;
      });
      return total;
    });
    // The weights of a row share the rounding of its log-sum-exp: divided by their sum, they add up to 1.
    sum_rows(count, means, [&](int64_t i) {
      T *weights = weights_.get() + i * lanes_, *slopes = slopes_.get() + i * lanes_;
      const Vec<T> share(1 / sums[i]);
      Vec<T> total(T(0));
      each_vector([&](int64_t l) {
        const Vec<T> weight = Vec<T>::loadu(weights + l) * share;
        weight.store(weights + l);
        total = at::vec::fmadd(weight, Vec<T>::loadu(slopes + l), total);
      });
      return total;
    });
    sum_rows(count, along, [&](int64_t i) {  // q̂ · (dS k̂), whose sum is the temperature's gradient
      T *weights = weights_.get() + i * lanes_, *slopes = slopes_.get() + i * lanes_;
      const Vec<T> mean(means[i]), inverse(inverses_[i]);
      Vec<T> total(T(0));
      each_vector([&](int64_t l) {
        const Vec<T> change = Vec<T>::loadu(weights + l) * (Vec<T>::loadu(slopes + l) - mean);
        (change * inverse).store(slopes + l);
        changes_[l / Vec<T>::size()] = i == 0 ? change : changes_[l / Vec<T>::size()] + change;
        total = at::vec::fmadd(change, Vec<T>::loadu(scores_.get() + i * lanes_ + l), total);
      });
      return total;
    });
    double temperature = 0;
    for (int64_t i = 0; i < count; ++i) {
      temperature += along[i];
      // A clamped norm is a constant, and so is the norm where nothing is normalised.
      const bool differentiable = p_.normalize && inverses_[i] < T(1) / T(kNormFloor);
      radial[i] = differentiable ? -scale_ * along[i] * inverses_[i] * inverses_[i] : T(0);
    }
    each_vector([&](int64_t l) {
      const int64_t width = std::min<int64_t>(Vec<T>::size(), p_.keys - l);
      (Vec<T>::loadu(of_biases + l, width) + changes_[l / Vec<T>::size()]).store(of_biases + l, width);
    });
    const Matrix<const T> slopes{slopes_.get(), lanes_}, weights{weights_.get(), lanes_};
    write_tile<S, T>(grad_q, count, p_.depth, {result_scratch_.get(), p_.depth}, [&](Matrix<T> rows) {
      multiply<T>(slopes, {scaled_keys_.get(), p_.depth}, rows, count, p_.depth, p_.keys, {queries, radial});
    });
    multiply_add<T>(slopes.transposed(), queries, {of_keys, p_.depth}, p_.keys, p_.depth, count);
    multiply_add<T>(weights.transposed(), grads, {of_values, p_.width}, p_.keys, p_.width, count);
    return temperature;
  }

  const Problem<T>& p_;
  int64_t lanes_;
  KeyTile<T> tile_;
  T scale_ = 0;
  Scratch<T> key_columns_, value_columns_, scaled_keys_;  // k̂ᵀ (D x lanes), vᵀ (E x lanes), t k̂
  Scratch<T> biases_;                                     // logarithm of the mask; lanes without a key: -inf
  Scratch<T> scores_, weights_, slopes_;                  // queries x lanes
  Scratch<T> query_scratch_, grad_scratch_, result_scratch_;
  T inverses_[kRows];
  Vec<T> changes_[kMost / Vec<T>::size()];
};

}  // namespace masked
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

// Exact selection of the largest entries of one row.
//
// The order of entries is total: larger value first, equal values by lower index. Thresholds are found by halving the
// range of values, which takes a few vector compares per step and no branch that depends on an entry. Of a long row,
// the K-th largest of the maxima of some groups of entries is a bound that at least K entries reach, and few more.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace restore_kernels {
inline namespace CPU_CAPABILITY {

template <typename T>
struct Entry {
  T value;
  int32_t index;

  bool operator<(const Entry& other) const {  // comes before
    return value > other.value || (value == other.value && index < other.index);
  }
};

// Calls f(index) for every index with row[index] >= threshold (or > with `strict`), in order; f
// returns the threshold to go on with.
template <bool strict, typename T, typename F>
inline void scan_above(const T* row, int64_t length, T threshold, F f) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int kAll = (1 << Vec::size()) - 1;
  int64_t l = 0;
  for (; l + Vec::size() <= length; l += Vec::size()) {
    const Vec values = Vec::loadu(row + l), bound(threshold);
    int above = ~(strict ? values > bound : values >= bound).zero_mask() & kAll;
    for (; above; above &= above - 1) {
      const int64_t index = l + __builtin_ctz(above);
      if (strict ? row[index] > threshold : row[index] >= threshold) threshold = f(index);
    }
  }
  for (; l < length; ++l)
    if (strict ? row[l] > threshold : row[l] >= threshold) threshold = f(l);
}

template <typename T>
T smallest(const T* row, int64_t length) {
  using Vec = at::vec::Vectorized<T>;
  return at::vec::reduce_all<T>([](Vec a, Vec b) { return at::vec::minimum(a, b); }, row, length);
}

template <typename T>
T largest(const T* row, int64_t length) {
  using Vec = at::vec::Vectorized<T>;
  return at::vec::reduce_all<T>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, row, length);
}

// The `count`-th largest entry of a row of whole vectors, which lies in [low, high], by halving that range: a few
// vector compares per step, as many steps as the entries around it are near to each other. False where an equal entry
// is beyond the count, or they are nearer than kSteps halvings tell apart.
template <typename T>
bool find_by_halving(const T* row, int64_t length, int64_t count, T low, T high, T& found) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int kSteps = 40, kAll = (1 << Vec::size()) - 1;
  for (int step = 0; step < kSteps; ++step) {
    const T middle = low + (high - low) / 2;
    int64_t reached = 0;
    for (int64_t l = 0; l < length; l += Vec::size())
      reached += __builtin_popcount(~(Vec::loadu(row + l) >= Vec(middle)).zero_mask() & kAll);
    if (reached == count) {
      const Vec most(std::numeric_limits<T>::infinity());
      Vec least = most;
      for (int64_t l = 0; l < length; l += Vec::size()) {
        const Vec values = Vec::loadu(row + l);
        least = at::vec::minimum(least, Vec::blendv(most, values, values >= Vec(middle)));
      }
      found = at::vec::vec_reduce_all<T>([](Vec a, Vec b) { return at::vec::minimum(a, b); }, least);
      return true;
    }
    (reached > count ? low : high) = middle;
  }
  return false;
}

template <typename T>
class TopSelector {
  using Vec = at::vec::Vectorized<T>;

 public:
  explicit TopSelector(int64_t largest_count)
      : groups_(ceil_div(4 * largest_count, Vec::size()) * Vec::size()), maxima_(groups_) {
    entries_.reserve(groups_);
  }

  // The first `count` entries of the row's order, unordered; fewer only if the row holds NaN or -inf.
  std::vector<Entry<T>>& select(const T* row, int64_t length, int64_t count) {
    entries_.clear();
    const T bound = reached_by(row, length, count);
    const auto take = [&](int64_t index) {
      entries_.push_back({row[index], static_cast<int32_t>(index)});
      return bound;
    };
    if (bound > kNothing) scan_above<false>(row, length, bound, take);
    else scan_above<true>(row, length, bound, take);
    first(count, static_cast<int64_t>(entries_.size()));
    if (static_cast<int64_t>(entries_.size()) > count) entries_.resize(count);
    return entries_;
  }

  // Puts the first `count` of the first `size` entries at the front, and returns the last of their order.
  Entry<T> first(int64_t count, int64_t size) {
    const auto begin = entries_.begin(), end = begin + std::min(count, size);
    if (size > count) {
      const int64_t whole = ceil_div(size, Vec::size()) * Vec::size();
      values_.assign(whole, kNothing);
      for (int64_t i = 0; i < size; ++i) values_[i] = entries_[i].value;
      const T low = smallest(values_.data(), size), high = largest(values_.data(), size);
      T threshold;
      if (find_by_halving(values_.data(), whole, count, low, high, threshold))
        std::partition(begin, begin + size, [threshold](const Entry<T>& entry) { return entry.value >= threshold; });
      else std::nth_element(begin, end - 1, begin + size);
    }
    return begin == end ? Entry<T>{-kNothing, -1} : *std::max_element(begin, end);
  }

 private:
  static constexpr T kNothing = -std::numeric_limits<T>::infinity();

  // What at least `count` entries reach; -inf where it could not be found.
  T reached_by(const T* row, int64_t length, int64_t count) {
    std::fill(maxima_.begin(), maxima_.end(), kNothing);
    int64_t l = 0, group = 0;
    for (; l + Vec::size() <= length; l += Vec::size()) {
      const Vec values = Vec::loadu(row + l), most = Vec::loadu(maxima_.data() + group);
      Vec::blendv(most, values, values > most).store(maxima_.data() + group);  // NaN reaches nothing
      group = group + Vec::size() < groups_ ? group + Vec::size() : 0;
    }
    for (; l < length; ++l)
      if (row[l] > maxima_[group]) maxima_[group] = row[l];
    const T low = smallest(maxima_.data(), groups_), high = largest(maxima_.data(), groups_);
    T bound;
    return low > kNothing && find_by_halving(maxima_.data(), groups_, count, low, high, bound) ? bound : kNothing;
  }

  int64_t groups_;
  std::vector<T> maxima_, values_;  // of the groups; of the entries
  std::vector<Entry<T>> entries_;
};

}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

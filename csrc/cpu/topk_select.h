// Exact selection of the largest entries of one long row, and softmax over nested selections.
//
// The order of entries is total: larger value first, equal values by lower index. The K largest are
// found in one pass that keeps only entries above a running threshold, which rises every time the
// buffer fills; entries that arrive later lose ties, so the threshold test is a plain vector compare.
#pragma once

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
class TopSelector {
 public:
  explicit TopSelector(int64_t largest_count) : capacity_(std::max<int64_t>(4 * largest_count, 64)) {
    entries_.reserve(capacity_);
  }

  // The first `count` entries of the row's order, unordered; fewer only if the row holds NaN or -inf.
  std::vector<Entry<T>>& select(const T* row, int64_t length, int64_t count) {
    entries_.clear();
    scan_above<true>(row, length, -std::numeric_limits<T>::infinity(), [&](int64_t index) {
      entries_.push_back({row[index], static_cast<int32_t>(index)});
      if (static_cast<int64_t>(entries_.size()) == capacity_) keep(count);
      return threshold_;
    });
    keep(count);
    threshold_ = -std::numeric_limits<T>::infinity();
    return entries_;
  }

 private:
  void keep(int64_t count) {
    if (static_cast<int64_t>(entries_.size()) < count) return;
    std::nth_element(entries_.begin(), entries_.begin() + (count - 1), entries_.end());
    entries_.resize(count);
    threshold_ = entries_.back().value;
  }

  int64_t capacity_;
  T threshold_ = -std::numeric_limits<T>::infinity();
  std::vector<Entry<T>> entries_;
};

}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

// How the pairs of rows of queries and keys are walked and divided into tasks.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "pyramid_levels.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace pyramid {

// The pairs (y, y + offset) of a query row and a key row, y from `first` on, of one band and level.
struct Chain {
  int64_t band, level, offset, first, length;

  int64_t query_row(int64_t step) const { return first + step; }
  int64_t key_row(int64_t step) const { return first + step + offset; }
};

// All chains of some bands and levels, band by band, in one part of about equal work per thread: every part
// takes memory for what it adds to the results. Sums are the same for the same number of threads.
class Division {
 public:
  template <typename T>
  Division(int64_t height, const std::vector<Band>& bands, const std::vector<Level<T>>& levels, int64_t first_level,
           int64_t last_level) {
    std::vector<int64_t> work;  // up to and including each chain
    for (int64_t band = 0; band < static_cast<int64_t>(bands.size()); ++band)
      for (int64_t level = first_level; level < last_level; ++level)
        for (int64_t offset = 1 - height; offset < levels[level].height; ++offset) {
          const int64_t first = std::max<int64_t>(0, -offset), end = std::min(height, levels[level].height - offset);
          chains_.push_back({band, level, offset, first, end - first});
          work.push_back((work.empty() ? 0 : work.back()) + (end - first) * levels[level].width * bands[band].lanes);
        }
    const int64_t tasks = at::get_num_threads();
    bounds_.push_back(0);
    for (int64_t task = 1; task <= tasks; ++task)
      bounds_.push_back(std::upper_bound(work.begin(), work.end(), work.back() * task / tasks) - work.begin());
  }

  int64_t tasks() const { return bounds_.size() - 1; }

  // f(task, its chains in order), tasks in parallel; f is called for every task that has chains.
  template <typename F>
  void run(F f) const {
    at::parallel_for(0, tasks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task)
        if (bounds_[task] < bounds_[task + 1])
          f(task, chains_.data() + bounds_[task], chains_.data() + bounds_[task + 1]);
    });
  }

 private:
  std::vector<Chain> chains_;
  std::vector<int64_t> bounds_;
};

// What each task adds to each of several results, where it adds anything.
template <typename T>
class Shares {
 public:
  Shares(const Division& division, int64_t results)
      : tasks_(division.tasks()), results_(results), shares_(tasks_ * results) {}

  // A task's share of a result, `count` values, at first all `start`.
  T* of(int64_t task, int64_t result, int64_t count, T start = 0) {
    auto& share = shares_[task * results_ + result];
    if (!share) std::fill_n(share.emplace(count).get(), count, start);
    return share->get();
  }

  // The same, at first a copy of `start`.
  T* of(int64_t task, int64_t result, int64_t count, const T* start) {
    auto& share = shares_[task * results_ + result];
    if (!share) std::copy_n(start, count, share.emplace(count).get());
    return share->get();
  }

  // Those of a result, in the order of the tasks.
  std::vector<const T*> all(int64_t result) const {
    std::vector<const T*> found;
    for (int64_t task = 0; task < tasks_; ++task)
      if (const auto& share = shares_[task * results_ + result]) found.push_back(share->get());
    return found;
  }

 private:
  int64_t tasks_, results_;
  std::vector<std::optional<Scratch<T>>> shares_;
};

// sum[i] = scale * the sum of the shares' [offset + i]
template <typename T>
void add_up(const std::vector<const T*>& shares, int64_t offset, int64_t count, T scale, T* sum) {
  std::copy_n(shares[0] + offset, count, sum);
  for (size_t s = 1; s < shares.size(); ++s)
    for (int64_t i = 0; i < count; ++i) sum[i] += shares[s][offset + i];
  for (int64_t i = 0; i < count; ++i) sum[i] *= scale;
}

}  // namespace pyramid
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

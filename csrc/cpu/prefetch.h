// Asks the memory system for tiles that will be read or overwritten next, a few cache lines per call, so
// that the transfer runs beside the multiplications instead of before them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "matrix.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {

// Of one type for all tiles, so that the products, which call it, are compiled once.
class Prefetch {
 public:
  Prefetch() = default;

  // A tile (rows x columns) without contiguous lines is not asked for.
  template <typename S>
  Prefetch(Matrix<S> tile, int64_t rows, int64_t columns, bool write = false) : write_(write) {
    if (tile.col != 1) tile = tile.transposed(), std::swap(rows, columns);
    if (tile.col != 1) return;
    data_ = reinterpret_cast<const char*>(tile.data);
    row_ = tile.row * static_cast<int64_t>(sizeof(S));
    width_ = columns * static_cast<int64_t>(sizeof(S));
    rows_ = rows;
  }

  int64_t lines() const { return rows_ * ceil_div(width_, kLine); }

  // Asks for so many lines, if they are left. A call would move the caller's sums from registers to memory and back.
  __attribute__((always_inline)) void operator()(int64_t wanted) {
    while (wanted > 0 && rows_ > 0) {
      const int64_t end = std::min(width_, column_ + wanted * kLine);
      wanted -= ceil_div(end - column_, kLine);
      if (write_)
        for (; column_ < end; column_ += kLine) __builtin_prefetch(data_ + column_, 1, kIntoL2);
      else
        for (; column_ < end; column_ += kLine) __builtin_prefetch(data_ + column_, 0, kIntoL2);
      if (column_ >= width_) column_ = 0, data_ += row_, --rows_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;  // bytes
  static constexpr int kIntoL2 = 2;
  const char* data_ = nullptr;
  int64_t row_ = 0, width_ = 0, rows_ = 0, column_ = 0;
  bool write_ = false;
};

// Asks for all of some tiles at once: for those that no product comes before.
template <typename... Tiles>
void ask_for(Tiles... tiles) {
  (tiles(tiles.lines()), ...);
}

// What a product does on the side.
struct Prefetches {
  Prefetch first{}, second{};
  int64_t of_first = 0, of_second = 0;  // lines of a call

  // For a product of so many runs, each of `steps` steps: after how many steps of a run to call. All will then have
  // been asked for in time, and, where there are steps enough, no more at once than a core has buffers for: further
  // ones would stop it.
  int64_t spread(int64_t runs, int64_t steps) {
    constexpr int64_t kLines = 8, kFewest = 8;  // of a call, at most; steps between calls
    const int64_t lines = first.lines() + second.lines();
    if (lines == 0 || runs == 0) return std::max<int64_t>(1, steps);
    const int64_t wanted = std::clamp<int64_t>(ceil_div(lines, runs * kLines), 1, std::max<int64_t>(1, steps / kFewest));
    const int64_t stretch = std::max<int64_t>(1, ceil_div(steps, wanted));
    const int64_t calls = runs * std::max<int64_t>(1, ceil_div(steps, stretch));
    of_first = ceil_div(first.lines(), calls);
    of_second = ceil_div(second.lines(), calls);
    return stretch;
  }

  __attribute__((always_inline)) void operator()() { first(of_first), second(of_second); }
};

}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

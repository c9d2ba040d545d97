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

  // The whole tile (rows x columns) will have been asked for after `calls` calls. Tiles without
  // contiguous lines are not asked for.
  template <typename S>
  Prefetch(Matrix<S> tile, int64_t rows, int64_t columns, int64_t calls, bool write = false) : write_(write) {
    if (tile.col != 1) tile = tile.transposed(), std::swap(rows, columns);
    if (tile.col != 1) return;
    data_ = reinterpret_cast<const char*>(tile.data);
    row_ = tile.row * static_cast<int64_t>(sizeof(S));
    width_ = columns * static_cast<int64_t>(sizeof(S));
    rows_ = rows;
    lines_per_call_ = (rows * ((width_ + kLine - 1) / kLine) + calls - 1) / calls;
  }

  void operator()() {
    for (int64_t wanted = lines_per_call_; wanted > 0 && rows_ > 0;) {
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
  int64_t row_ = 0, width_ = 0, rows_ = 0, lines_per_call_ = 0, column_ = 0;
  bool write_ = false;
};

// What a product does on the side.
struct Prefetches {
  Prefetch first{}, second{};

  void operator()() { first(), second(); }
};

}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

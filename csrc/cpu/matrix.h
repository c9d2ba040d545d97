// A matrix in memory, with any strides, and the division that cuts one into tiles.
#pragma once

#include <cstdint>

namespace restore_kernels {
inline namespace CPU_CAPABILITY {

template <typename T>
struct Matrix {  // element (i, j) at data[i * row + j * col]
  T* data;
  int64_t row;
  int64_t col = 1;

  Matrix transposed() const { return {data, col, row}; }
  Matrix from(int64_t i, int64_t j) const { return {data + i * row + j * col, row, col}; }
  operator Matrix<const T>() const { return {data, row, col}; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The distance of packed rows, in elements: an odd number of cache lines, so that they do not fight for the same sets.
inline int64_t pitch(int64_t columns) {
  constexpr int64_t kLine = 16;
  return (ceil_div(columns, kLine) | 1) * kLine;
}

}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

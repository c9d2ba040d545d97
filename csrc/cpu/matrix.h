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

}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

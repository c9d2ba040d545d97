// Products of rows with rows: C += A Bᵀ, where A and B have long contiguous rows, as a Gram matrix over pixels has.
//
// Vectors lie along the rows, so neither factor is transposed or packed, and no lane is idle however few rows there
// are. kRows x kColumns sums, each a vector, stay in registers along the whole rows; then their lanes are added up,
// two shuffles each. Rows of A are read from L1 and those of B stream from L2, once for kRows rows of A.
//
// Bound: one multiply-add instruction per cycle; a step issues kRows * kColumns of them for kRows + kColumns loads.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>

#include "matrix.h"
#include "prefetch.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace row_products {

// The sums, the vectors of the shorter side and one of the longer fit the register file.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kRows = 6, kColumns = 4;
#else
constexpr int kRows = 3, kColumns = 4;
#endif

// to[j] += the sum of the lanes of sum[j]
template <typename T, int columns>
inline void add_lanes(const at::vec::Vectorized<T>* sum, T* to) {
  using Vec = at::vec::Vectorized<T>;
  for (int j = 0; j < columns; ++j) to[j] += at::vec::vec_reduce_all<T>([](Vec a, Vec b) { return a + b; }, sum[j]);
}

#if defined(CPU_CAPABILITY_AVX512)
template <>
inline void add_lanes<float, 4>(const at::vec::Vectorized<float>* sum, float* to) {
  const auto pairs = [](__m512 a, __m512 b) {
    return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  };
  const __m512d first = pairs(sum[0], sum[1]), second = pairs(sum[2], sum[3]);
  const __m512 four = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(first, second)),
                                    _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
  const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
  const __m128 one = _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), one));
}
#elif defined(CPU_CAPABILITY_AVX2)
template <>
inline void add_lanes<float, 4>(const at::vec::Vectorized<float>* sum, float* to) {
  const __m256 two = _mm256_hadd_ps(_mm256_hadd_ps(sum[0], sum[1]), _mm256_hadd_ps(sum[2], sum[3]));
  const __m128 one = _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), one));
}
#endif

template <typename T, int rows, int columns>
inline __attribute__((always_inline)) void block(Matrix<const T> a, Matrix<const T> b, Matrix<T> c, int64_t length,
                                                 int64_t stretch, Prefetches& idle) {
  using Vec = at::vec::Vectorized<T>;
  Vec sum[rows][columns];
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) sum[i][j] = Vec(T(0));
  const int64_t whole = length / Vec::size() * Vec::size();
  for (int64_t begin = 0; begin < whole; begin += stretch * Vec::size()) {
    const int64_t end = std::min(whole, begin + stretch * Vec::size());
    for (int64_t n = begin; n < end; n += Vec::size()) {
      if constexpr (rows < columns) {
        Vec a_n[rows];
        for (int i = 0; i < rows; ++i) a_n[i] = Vec::loadu(a.data + i * a.row + n);
        for (int j = 0; j < columns; ++j) {
          const Vec b_n = Vec::loadu(b.data + j * b.row + n);
          for (int i = 0; i < rows; ++i) sum[i][j] = at::vec::fmadd(a_n[i], b_n, sum[i][j]);
        }
      } else {
        Vec b_n[columns];
        for (int j = 0; j < columns; ++j) b_n[j] = Vec::loadu(b.data + j * b.row + n);
        for (int i = 0; i < rows; ++i) {
          const Vec a_n = Vec::loadu(a.data + i * a.row + n);
          for (int j = 0; j < columns; ++j) sum[i][j] = at::vec::fmadd(a_n, b_n[j], sum[i][j]);
        }
      }
    }
    idle();
  }
  if (whole < length)
    for (int j = 0; j < columns; ++j) {
      const Vec b_n = Vec::loadu(b.data + j * b.row + whole, length - whole);
      for (int i = 0; i < rows; ++i)
        sum[i][j] = at::vec::fmadd(Vec::loadu(a.data + i * a.row + whole, length - whole), b_n, sum[i][j]);
    }
  for (int i = 0; i < rows; ++i) add_lanes<T, columns>(sum[i], c.data + i * c.row);
}

// to[i] = a[i] · b[i] for the first rows
template <typename T, int rows>
inline __attribute__((always_inline)) void dots(Matrix<const T> a, Matrix<const T> b, int64_t length, T* to) {
  using Vec = at::vec::Vectorized<T>;
  Vec sum[rows];
  for (int i = 0; i < rows; ++i) sum[i] = Vec(T(0));
  int64_t n = 0;
  for (; n + Vec::size() <= length; n += Vec::size())
    for (int i = 0; i < rows; ++i)
      sum[i] = at::vec::fmadd(Vec::loadu(a.data + i * a.row + n), Vec::loadu(b.data + i * b.row + n), sum[i]);
  if (n < length)
    for (int i = 0; i < rows; ++i)
      sum[i] = at::vec::fmadd(Vec::loadu(a.data + i * a.row + n, length - n),
                              Vec::loadu(b.data + i * b.row + n, length - n), sum[i]);
  std::fill_n(to, rows, T(0));
  add_lanes<T, rows>(sum, to);
}

template <typename T, int rows>
void block_row(Matrix<const T> a, Matrix<const T> b, Matrix<T> c, int64_t columns, int64_t length, int64_t stretch,
               Prefetches& idle) {
  int64_t j = 0;
  for (; j + kColumns <= columns; j += kColumns)
    block<T, rows, kColumns>(a, b.from(j, 0), c.from(0, j), length, stretch, idle);
  for (; j < columns; ++j) block<T, rows, 1>(a, b.from(j, 0), c.from(0, j), length, stretch, idle);
}

}  // namespace row_products

// c (rows x columns) += a bᵀ with a (rows x length), b (columns x length) and a.col == b.col == c.col == 1.
template <typename T>
void multiply_rows(Matrix<const T> a, Matrix<const T> b, Matrix<T> c, int64_t rows, int64_t columns, int64_t length,
                   Prefetches idle = {}) {
  constexpr int kRows = row_products::kRows;
  const int64_t runs = ceil_div(rows, kRows) * ceil_div(columns, row_products::kColumns), width = at::vec::Vectorized<T>::size();
  const int64_t stretch = idle.spread(runs, length / width);
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    row_products::block_row<T, kRows>(a.from(i, 0), b, c.from(i, 0), columns, length, stretch, idle);
  for (; i + 2 <= rows; i += 2) row_products::block_row<T, 2>(a.from(i, 0), b, c.from(i, 0), columns, length, stretch, idle);
  for (; i < rows; ++i) row_products::block_row<T, 1>(a.from(i, 0), b, c.from(i, 0), columns, length, stretch, idle);
}

// to[i] = a[i] · b[i] for `count` rows of `length`.
template <typename T>
void dot_rows(Matrix<const T> a, Matrix<const T> b, int64_t count, int64_t length, T* to) {
  constexpr int kTogether = row_products::kColumns;
  int64_t i = 0;
  for (; i + kTogether <= count; i += kTogether)
    row_products::dots<T, kTogether>(a.from(i, 0), b.from(i, 0), length, to + i);
  for (; i < count; ++i) row_products::dots<T, 1>(a.from(i, 0), b.from(i, 0), length, to + i);
}

}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

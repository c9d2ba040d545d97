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
#include <type_traits>

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
constexpr int kFirstRows = kRows - kRows / 3;  // leave registers for what is done with rows of B when they are first read

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

// Some rows of B, as they lie.
template <typename T>
struct Rows {
  using Vec = at::vec::Vectorized<T>;
  Matrix<const T> b;

  Vec load(int j, int64_t n, int64_t count = Vec::size()) { return Vec::loadu(b.data + j * b.row + n, count); }
  void finish() {}
};

// load(j, n) gives a vector of row j of B; finish() comes last.
template <typename T, int rows, int columns, typename B>
inline __attribute__((always_inline)) void block(Matrix<const T> a, B b, Matrix<T> c, int64_t length, int64_t stretch,
                                                 Prefetches& idle) {
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
          const Vec b_n = b.load(j, n);
          for (int i = 0; i < rows; ++i) sum[i][j] = at::vec::fmadd(a_n[i], b_n, sum[i][j]);
        }
      } else {
        Vec b_n[columns];
        for (int j = 0; j < columns; ++j) b_n[j] = b.load(j, n);
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
      const Vec b_n = b.load(j, whole, length - whole);
      for (int i = 0; i < rows; ++i)
        sum[i][j] = at::vec::fmadd(Vec::loadu(a.data + i * a.row + whole, length - whole), b_n, sum[i][j]);
    }
  for (int i = 0; i < rows; ++i) add_lanes<T, columns>(sum[i], c.data + i * c.row);
  b.finish();
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

// b.template rows<count>(j) are so many rows of B from row j on.
template <typename T, int rows, typename B>
void block_row(Matrix<const T> a, B b, Matrix<T> c, int64_t columns, int64_t length, int64_t stretch, Prefetches& idle) {
  int64_t j = 0;
  for (; j + kColumns <= columns; j += kColumns)
    block<T, rows, kColumns>(a, b.template rows<kColumns>(j), c.from(0, j), length, stretch, idle);
  for (; j < columns; ++j) block<T, rows, 1>(a, b.template rows<1>(j), c.from(0, j), length, stretch, idle);
}

template <typename T>
struct Plain {
  Matrix<const T> b;
  template <int count>
  Rows<T> rows(int64_t j) const { return {b.from(j, 0)}; }
};

struct Nothing {
  void operator()(int64_t, int64_t) const {}
};

}  // namespace row_products

// c (rows x columns) += a bᵀ with a (rows x length), b (columns x length) and a.col == b.col == c.col == 1.
// The first rows of a meet rows of b as `first` gives them (block_row), which may have made them in that moment.
// before_rows(i, count) is called before those rows of a are first read: who has something to do with them does it here,
// where it brings them into L1.
template <typename T, typename First, typename BeforeRows>
void multiply_rows(Matrix<const T> a, First first, Matrix<const T> b, Matrix<T> c, int64_t rows, int64_t columns,
                   int64_t length, Prefetches idle, BeforeRows before_rows) {
  constexpr int kRows = row_products::kRows, kFirst = row_products::kFirstRows;
  constexpr bool is_plain = std::is_same_v<First, row_products::Plain<T>>;
  const int64_t runs = ceil_div(rows, kRows) * ceil_div(columns, row_products::kColumns), width = at::vec::Vectorized<T>::size();
  const int64_t stretch = idle.spread(runs, length / width);
  int64_t i = 0;
  const auto next = [&]<int count>(auto from) {
    before_rows(i, count);
    row_products::block_row<T, count>(a.from(i, 0), from, c.from(i, 0), columns, length, stretch, idle);
    i += count;
  };
  if constexpr (!is_plain) {
    if (rows >= kFirst) next.template operator()<kFirst>(first);
    else next.template operator()<1>(first);
  }
  const row_products::Plain<T> plain{b};
  while (i + kRows <= rows) next.template operator()<kRows>(plain);
  while (i + 2 <= rows) next.template operator()<2>(plain);
  while (i < rows) next.template operator()<1>(plain);
}

// The same, of rows that are there.
template <typename T>
void multiply_rows(Matrix<const T> a, Matrix<const T> b, Matrix<T> c, int64_t rows, int64_t columns, int64_t length,
                   Prefetches idle = {}) {
  multiply_rows<T>(a, row_products::Plain<T>{b}, b, c, rows, columns, length, idle, row_products::Nothing());
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

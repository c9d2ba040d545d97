// Moves tiles between tensors (any dtype, any strides) and packed scratch in the accumulation type.
//
// Packing is what lets the kernels take any strides without copying a tensor: rows of an image lie
// a power of two apart, so a tile read in place would fight itself for the same cache sets; packed,
// it is read many times from L1.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <type_traits>

#include "scratch.h"
#include "tile_gemm.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {

// What numbers of type S are computed in.
template <typename S>
using Accumulate = std::conditional_t<std::is_same_v<S, double>, double, float>;

namespace tile_io {

constexpr int kBlock = 16;

#if defined(CPU_CAPABILITY_AVX512)
// In registers. The library's function of the same purpose keeps its 16 rows in memory, which takes
// several times as long.
inline void transpose_block(const float* source, int64_t source_row, float* target, int64_t target_row) {
  __m512 a[kBlock], b[kBlock];
  for (int i = 0; i < kBlock; ++i) a[i] = _mm512_loadu_ps(source + i * source_row);
  for (int i = 0; i < kBlock; i += 2) {  // pairs of rows
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  auto low = [](__m512 x, __m512 y) { return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))); };
  auto high = [](__m512 x, __m512 y) { return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))); };
  for (int i = 0; i < kBlock; i += 4) {  // a[i + c]: columns c, 4 + c, 8 + c, 12 + c of four rows
    a[i] = low(b[i], b[i + 2]), a[i + 1] = high(b[i], b[i + 2]);
    a[i + 2] = low(b[i + 1], b[i + 3]), a[i + 3] = high(b[i + 1], b[i + 3]);
  }
  for (int c = 0; c < 4; ++c) {  // even and odd quarters of eight rows
    b[c] = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88), b[4 + c] = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
    b[8 + c] = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88), b[12 + c] = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
  }
  for (int c = 0; c < 4; ++c) {
    _mm512_storeu_ps(target + c * target_row, _mm512_shuffle_f32x4(b[c], b[8 + c], 0x88));
    _mm512_storeu_ps(target + (4 + c) * target_row, _mm512_shuffle_f32x4(b[4 + c], b[12 + c], 0x88));
    _mm512_storeu_ps(target + (8 + c) * target_row, _mm512_shuffle_f32x4(b[c], b[8 + c], 0xdd));
    _mm512_storeu_ps(target + (12 + c) * target_row, _mm512_shuffle_f32x4(b[4 + c], b[12 + c], 0xdd));
  }
}
#elif defined(CPU_CAPABILITY_AVX2)
// Half rows are joined as they are loaded, which leaves two steps of shuffles for 8 x 8 numbers.
inline void transpose_block(const float* source, int64_t source_row, float* target, int64_t target_row) {
  auto low = [](__m256 x, __m256 y) { return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(x), _mm256_castps_pd(y))); };
  auto high = [](__m256 x, __m256 y) { return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(x), _mm256_castps_pd(y))); };
  for (int i = 0; i < kBlock; i += 8)
    for (int j = 0; j < kBlock; j += 4) {
      __m256 a[4];
      for (int r = 0; r < 4; ++r) {  // four numbers of row i + r, four of row i + r + 4
        const float* from = source + (i + r) * source_row + j;
        a[r] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from)), _mm_loadu_ps(from + 4 * source_row), 1);
      }
      const __m256 first = _mm256_unpacklo_ps(a[0], a[1]), second = _mm256_unpackhi_ps(a[0], a[1]);
      const __m256 third = _mm256_unpacklo_ps(a[2], a[3]), fourth = _mm256_unpackhi_ps(a[2], a[3]);
      float* to = target + j * target_row + i;
      _mm256_storeu_ps(to, low(first, third));
      _mm256_storeu_ps(to + target_row, high(first, third));
      _mm256_storeu_ps(to + 2 * target_row, low(second, fourth));
      _mm256_storeu_ps(to + 3 * target_row, high(second, fourth));
    }
}
#endif

template <typename T>
void transpose_block(const T* source, int64_t source_row, T* target, int64_t target_row) {
  at::vec::transpose_mxn<T, kBlock, kBlock>(source, source_row, target, target_row);
}

template <typename T>
void transpose_block(const T* source, int64_t source_row, T* target, int64_t target_row, int64_t rows,
                     int64_t columns) {
  if (rows == kBlock && columns == kBlock)
    transpose_block(source, source_row, target, target_row);
  else
    at::vec::transpose_mxn<T>(source, source_row, target, target_row, static_cast<int>(rows), static_cast<int>(columns));
}

// As many rows and columns as a vector has elements.
template <typename T>
void transpose_square(const T* source, int64_t source_row, T* target, int64_t target_row) {
  constexpr int size = at::vec::Vectorized<T>::size();
  if constexpr (size == kBlock) transpose_block(source, source_row, target, target_row);
  else at::vec::transpose_mxn<T, size, size>(source, source_row, target, target_row);
}

// target (columns x rows) = source (rows x columns) transposed, both with contiguous rows.
template <typename S, typename T>
void transpose(const S* source, int64_t source_row, T* target, int64_t target_row, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += kBlock) {
    const int64_t height = std::min<int64_t>(kBlock, rows - i);
    for (int64_t j = 0; j < columns; j += kBlock) {
      const int64_t width = std::min<int64_t>(kBlock, columns - j);
      const S* from = source + i * source_row + j;
      T* to = target + j * target_row + i;
      if constexpr (std::is_same_v<S, T>) {
        transpose_block(from, source_row, to, target_row, height, width);
      } else {
        alignas(64) std::conditional_t<sizeof(S) < sizeof(T), T, S> block[kBlock * kBlock];
        if constexpr (sizeof(S) < sizeof(T)) {  // widen, then transpose
          for (int64_t r = 0; r < height; ++r) at::vec::convert(from + r * source_row, block + r * kBlock, width);
          transpose_block(block, kBlock, to, target_row, height, width);
        } else {  // transpose, then narrow
          transpose_block(from, source_row, block, kBlock, height, width);
          for (int64_t r = 0; r < width; ++r) at::vec::convert(block + r * kBlock, to + r * target_row, height);
        }
      }
    }
  }
}

}  // namespace tile_io

// target = source, converting; either may have any strides.
template <typename S, typename T>
void copy_tile(Matrix<const S> source, Matrix<T> target, int64_t rows, int64_t columns) {
  if (source.col == 1 && target.col == 1) {
    for (int64_t i = 0; i < rows; ++i)
      at::vec::convert(source.data + i * source.row, target.data + i * target.row, columns);
  } else if (source.row == 1 && target.row == 1) {
    copy_tile(source.transposed(), target.transposed(), columns, rows);
  } else if (source.row == 1 && target.col == 1) {
    tile_io::transpose(source.data, source.col, target.data, target.row, columns, rows);
  } else if (source.col == 1 && target.row == 1) {
    tile_io::transpose(source.data, source.row, target.data, target.col, rows, columns);
  } else {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        target.data[i * target.row + j * target.col] = static_cast<T>(source.data[i * source.row + j * source.col]);
  }
}

// A tile with contiguous rows: where it lies if its rows are and it is of the accumulation type, else packed.
template <typename S, typename T>
Matrix<const T> read_tile(Matrix<const S> x, int64_t rows, int64_t columns, Matrix<T> scratch) {
  if constexpr (std::is_same_v<S, T>)
    if (x.col == 1) return x;
  copy_tile<S, T>(x, scratch, rows, columns);
  return scratch;
}

// compute(tile) makes such a tile, by way of `scratch` where read_tile would pack it.
template <typename S, typename T, typename F>
void write_tile(Matrix<S> x, int64_t rows, int64_t columns, Matrix<T> scratch, F compute) {
  if constexpr (std::is_same_v<S, T>)
    if (x.col == 1) return compute(x);
  compute(scratch);
  copy_tile<T, S>(scratch, x, rows, columns);
}

namespace tile_io {

// Rows, each with a sum of its own: while one waits for its last addition, others are added to.
template <typename T, int rows>
void add_lane_squares(Matrix<const T> x, T* lanes, int64_t length) {
  using Vec = at::vec::Vectorized<T>;
  Vec total[rows];
  for (int r = 0; r < rows; ++r) total[r] = Vec::loadu(lanes + r * Vec::size());
  int64_t j = 0;
  for (; j + Vec::size() <= length; j += Vec::size())
    for (int r = 0; r < rows; ++r) {
      const Vec each = Vec::loadu(x.data + r * x.row + j);
      total[r] = at::vec::fmadd(each, each, total[r]);
    }
  if (j < length)
    for (int r = 0; r < rows; ++r) {
      const Vec each = Vec::loadu(x.data + r * x.row + j, length - j);
      total[r] = at::vec::fmadd(each, each, total[r]);
    }
  for (int r = 0; r < rows; ++r) total[r].store(lanes + r * Vec::size());
}

}  // namespace tile_io

// lanes (count x one vector) += squares of the rows' elements, each in the lane where it lies. fold_lanes adds the
// lanes up: once for many tiles, since that takes as long as the squares of a tile.
template <typename T>
void add_lane_squares(Matrix<const T> rows, T* lanes, int64_t count, int64_t length) {
  constexpr int64_t size = at::vec::Vectorized<T>::size();
  int64_t i = 0;
  for (; i + 6 <= count; i += 6) tile_io::add_lane_squares<T, 6>(rows.from(i, 0), lanes + i * size, length);
  for (; i + 4 <= count; i += 4) tile_io::add_lane_squares<T, 4>(rows.from(i, 0), lanes + i * size, length);
  for (; i + 2 <= count; i += 2) tile_io::add_lane_squares<T, 2>(rows.from(i, 0), lanes + i * size, length);
  for (; i < count; ++i) tile_io::add_lane_squares<T, 1>(rows.from(i, 0), lanes + i * size, length);
}

template <typename T>
void fold_lanes(const T* lanes, T* sum, int64_t count) {
  using Vec = at::vec::Vectorized<T>;
  for (int64_t i = 0; i < count; ++i)
    sum[i] = at::vec::vec_reduce_all<T>([](Vec a, Vec b) { return a + b; }, Vec::loadu(lanes + i * Vec::size()));
}

}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

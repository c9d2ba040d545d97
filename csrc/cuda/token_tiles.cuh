// Tiles of rows of q, k, v and their gradients in shared memory, and their products by matrix instructions.
// For the kernels of token attention: a block of four warps owns 64 rows, 16 a warp, and streams tiles of
// other rows past them.
//
// Two kinds of operands:
//   Narrow<T>  bfloat16 or float16 as they come, by mma.m16n8k16. The norms of normalised rows scale the
//              products, which are exact; probabilities and gradients of scores are rounded to T.
//   Wide       float32, in three tf32 products (high·high + high·low + low·high), whose error is that of
//              float32, added up by add_rounded. Rows are divided by their norms in shared memory. Also for bfloat16 and float16 in
//              rows shorter than 16: the gradients of the shortest normalised rows are what is left of
//              larger terms that cancel, and similarities of ±1 are wanted exactly. And in rows longer than 64.
//
// A tile has DIM columns, of which those that a tensor lacks hold zeros up to the next multiple of 16 and
// are not multiplied beyond. A thread's pitch from row to row puts what a warp reads together into different
// banks: 8 words of ldmatrix rows, or words `member` of rows `group` and rows 2 `member` of columns `group`.
#pragma once

#include "strided.cuh"

namespace restore_kernels::token {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kRows = 16 * kWarps;  // that a block owns
constexpr int kShort = 16;          // rows shorter than this are Wide
constexpr float kNormClamp = 1e-12f;
constexpr float kLargest = 3.4028234663852886e38f;
constexpr float kInfinity = __builtin_huge_valf();

struct Wide {
  using Element = float;
  static constexpr bool kNarrow = false;
  static constexpr int kDepth = 8, kPad = 4;  // of a matrix instruction; elements between rows
};
template <typename T>
struct Narrow {
  using Element = T;
  static constexpr bool kNarrow = true;
  static constexpr int kDepth = 16, kPad = 8;
};

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

// A tensor (B, H, rows, columns) of any strides, in elements.
struct Matrices {
  const void* data;
  int64_t stride[4];
  int64_t rows;
  int columns;
  Dtype dtype;
  bool copies;  // rows are contiguous and begin at multiples of 16 bytes, in the kind's own dtype

  __device__ const char* head(int64_t batch, int64_t head) const {
    return static_cast<const char*>(data) +
           (batch * stride[0] + head * stride[1]) * (dtype == Dtype::kFloat32 ? 4 : 2);
  }
};

template <typename K, int COUNT, int DIM>
struct Tile {
  static constexpr int kPitch = DIM + K::kPad;
  typename K::Element row[COUNT][kPitch];
};

struct Lane {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;

  // Of element i of a 16 x 8 accumulator of this warp, among the rows that the block owns.
  __device__ int row(int i) const { return 16 * warp + group + i / 2 * 8; }
  __device__ int column(int n, int i) const { return 8 * n + 2 * member + i % 2; }
};

__device__ __forceinline__ int padded(int columns) { return (columns + 15) & ~15; }

// The sum, or the largest, over the four lanes that hold parts of the same row.
__device__ __forceinline__ float sum_of_group(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}
__device__ __forceinline__ float max_of_group(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

// --- loading -------------------------------------------------------------------------------------

// Element i of memory in this dtype.
__device__ __forceinline__ float load_float(const void* memory, int64_t i, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return __ldg(static_cast<const float*>(memory) + i);
  const unsigned bits = __ldg(static_cast<const unsigned short*>(memory) + i);
  return dtype == Dtype::kBFloat16 ? unpack<bfloat16>(bits).x : unpack<float16>(bits).x;
}

template <typename K>
__device__ __forceinline__ typename K::Element load_element(const void* memory, int64_t i, Dtype dtype) {
  if constexpr (K::kNarrow) {
    return __ldg(static_cast<const typename K::Element*>(memory) + i);
  } else {
    return load_float(memory, i, dtype);
  }
}

// Rows [first, first + COUNT) of one head, zeros outside: begun, where they are copied 16 bytes at a time.
template <typename K, int COUNT, int DIM>
__device__ __forceinline__ void load_rows(Tile<K, COUNT, DIM>& tile, const Matrices& x, const char* head,
                                          int64_t first) {
  using Element = typename K::Element;
  const int columns = padded(x.columns);
  if (x.copies) {
    constexpr int per_copy = 16 / sizeof(Element), copies = DIM / per_copy;  // of a row
#pragma unroll
    for (int i = 0; i < COUNT * copies / kThreads; ++i) {
      const int r = (i * kThreads + threadIdx.x) / copies, c = threadIdx.x % copies * per_copy;
      if (c >= columns) continue;
      const int left = first + r < x.rows ? x.columns - c : 0;
      const int count = left < 0 ? 0 : left < per_copy ? left : per_copy;
      const Element* from = reinterpret_cast<const Element*>(head) + (count ? (first + r) * x.stride[2] + c : 0);
      copy_async(&tile.row[r][c], from, count * static_cast<int>(sizeof(Element)));
    }
    return;
  }
  // Element by element, lanes along the smaller stride.
  const bool along_columns = x.stride[3] <= x.stride[2];
#pragma unroll 4
  for (int i = threadIdx.x; i < COUNT * DIM; i += kThreads) {
    const int r = along_columns ? i / DIM : i % COUNT, c = along_columns ? i % DIM : i / COUNT;
    if (c >= columns) continue;
    const bool inside = first + r < x.rows && c < x.columns;
    tile.row[r][c] = inside ? load_element<K>(head, (first + r) * x.stride[2] + c * x.stride[3], x.dtype) : Element{};
  }
}

// --- norms ---------------------------------------------------------------------------------------

// What four lanes do for every row: the L2 norm, clamped from below, of `length` elements. The order of its
// sum is the same in every tile, so that scores are the same bits wherever they are computed.
template <typename Element>
__device__ __forceinline__ float norm_of_row(const Element* row, int length, int member) {
  constexpr int chunk = 16 / sizeof(Element);
  float squares = 0;
  for (int c = member * chunk; c < padded(length); c += 4 * chunk) {
#pragma unroll
    for (int i = 0; i < chunk; ++i) {
      const float x = to_float(row[c + i]);
      squares += x * x;
    }
  }
  const float norm = sqrtf(sum_of_group(squares));
  return norm < kNormClamp ? kNormClamp : norm;  // NaN stays
}

// Norms of COUNT rows; Wide rows are divided by them. All threads, four a row. Without `normalize` ones.
template <typename K, int COUNT, int DIM>
__device__ __forceinline__ void normalize_rows(Tile<K, COUNT, DIM>& tile, float (&norms)[COUNT], int length,
                                               bool normalize) {
  const int member = threadIdx.x % 4;
#pragma unroll
  for (int r = threadIdx.x / 4; r < COUNT; r += kThreads / 4) {
    const float norm = normalize ? norm_of_row(tile.row[r], length, member) : 1.0f;
    if (member == 0) norms[r] = norm;
    if constexpr (!K::kNarrow) {
      if (!normalize) continue;
      const float inverse = 1 / norm;
      for (int c = member * 4; c < padded(length); c += 16) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& x = tile.row[r][c + i];
          x = length < kShort ? x / norm : x * inverse;
        }
      }
    }
  }
}

// --- products ------------------------------------------------------------------------------------

// One operand's registers for a matrix instruction.
template <typename K, int N>
struct Operand {
  unsigned pair[N];
};
template <int N>
struct Operand<Wide, N> {
  unsigned high[N], low[N];

  __device__ __forceinline__ void set(int i, float x) {
    high[i] = to_tf32(x);
    low[i] = to_tf32(x - __uint_as_float(high[i]));
  }
};

// d += a b. The order of the terms is that of exchanged operands if SWAPPED.
template <bool SWAPPED = false, typename K>
__device__ __forceinline__ void multiply_add(float (&d)[4], const Operand<K, 4>& a, const Operand<K, 2>& b) {
  if constexpr (K::kNarrow) {
    multiply_m16n8k16<typename K::Element>(d, a.pair, b.pair);
  } else {
    add_rounded(d, [&](float (&sum)[4]) {
      if constexpr (SWAPPED) multiply_m16n8k8(sum, a.high, b.low);
      multiply_m16n8k8(sum, a.low, b.high);
      if constexpr (!SWAPPED) multiply_m16n8k8(sum, a.high, b.low);
      multiply_m16n8k8(sum, a.high, b.high);
    });
  }
}

// d (16, COUNT) = a bᵀ for this warp's 16 rows of a; of `length` products, and `count` rows of b. With SWAPPED
// the bits are those of b aᵀ: the terms of one matrix instruction are exact and added up together.
template <bool SWAPPED, typename K, int COUNT, int DIM>
__device__ __forceinline__ void multiply_transposed(float (&d)[COUNT / 8][4], const Tile<K, kRows, DIM>& a,
                                                    const Tile<K, COUNT, DIM>& b, int length, int count) {
  const Lane own;
#pragma unroll
  for (auto& tile : d) tile[0] = tile[1] = tile[2] = tile[3] = 0;
#pragma unroll 2
  for (int k = 0; k < length; k += K::kDepth) {
    Operand<K, 4> left;
    if constexpr (K::kNarrow) {
      load_matrices<false>(left.pair, &a.row[16 * own.warp + own.lane % 16][k + own.lane / 16 * 8]);
#pragma unroll
      for (int n = 0; n < COUNT / 8; n += 2) {
        if (8 * n >= count) break;
        unsigned words[4];  // of two tiles of eight rows
        load_matrices<false>(words, &b.row[8 * (n + own.lane / 16) + own.lane % 8][k + own.lane / 8 % 2 * 8]);
        multiply_add<SWAPPED>(d[n], left, Operand<K, 2>{{words[0], words[1]}});
        multiply_add<SWAPPED>(d[n + 1], left, Operand<K, 2>{{words[2], words[3]}});
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) left.set(i, a.row[own.row(i % 2 * 2)][k + own.member + i / 2 * 4]);
#pragma unroll
      for (int n = 0; n < COUNT / 8; ++n) {
        if (8 * n >= count) break;
        Operand<K, 2> right;
#pragma unroll
        for (int i = 0; i < 2; ++i) right.set(i, b.row[8 * n + own.group][k + own.member + i * 4]);
        multiply_add<SWAPPED>(d[n], left, right);
      }
    }
  }
}

// How the factors that a Narrow kernel computed are multiplied: rounded to T; as the sum of two numbers of T;
// or, where their range is not that of float16, rounded to tf32, with values of float16, which are exact there.
enum class Rounding { kOnce, kTwoTerms, kTf32 };

// d (16, width) += p (16, count) b (count, width), p in the accumulators of a product.
template <Rounding ROUNDING, typename K, int COUNT, int DIM>
__device__ __forceinline__ void multiply_rows(float (&d)[DIM / 8][4], const float (&p)[COUNT / 8][4],
                                              const Tile<K, COUNT, DIM>& b, int width, int count) {
  const Lane own;
  if constexpr (K::kNarrow && ROUNDING != Rounding::kTf32) {
    using T = typename K::Element;
#pragma unroll
    for (int m = 0; m < COUNT / 16; ++m) {
      if (16 * m >= count) break;
      Operand<K, 4> high, low;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = p[2 * m + i / 2][i % 2 * 2], y = p[2 * m + i / 2][i % 2 * 2 + 1];
        high.pair[i] = pack<T>(x, y);
        if constexpr (ROUNDING == Rounding::kTwoTerms) {
          const float2 rounded = unpack<T>(high.pair[i]);
          low.pair[i] = pack<T>(x - rounded.x, y - rounded.y);
        }
      }
#pragma unroll
      for (int n = 0; n < DIM / 8; n += 2) {
        if (8 * n >= width) break;
        unsigned words[4];
        load_matrices<true>(words, &b.row[16 * m + own.lane % 16][8 * (n + own.lane / 16)]);
        const Operand<K, 2> left{{words[0], words[1]}}, right{{words[2], words[3]}};
        if constexpr (ROUNDING == Rounding::kTwoTerms) {
          multiply_add(d[n], low, left);
          multiply_add(d[n + 1], low, right);
        }
        multiply_add(d[n], high, left);
        multiply_add(d[n + 1], high, right);
      }
    }
  } else {
    // Which row of b an instruction takes as its k-th is free: the one whose factor the lane holds.
#pragma unroll
    for (int m = 0; m < COUNT / 8; ++m) {
      if (8 * m >= count) break;
      Operand<Wide, 4> left;
#pragma unroll
      for (int i = 0; i < 4; ++i) left.set(i, p[m][i % 2 * 2 + i / 2]);
#pragma unroll
      for (int n = 0; n < DIM / 8; ++n) {
        if (8 * n >= width) break;
        Operand<Wide, 2> right;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float x = to_float(b.row[8 * m + 2 * own.member + i][8 * n + own.group]);
          if constexpr (K::kNarrow) {
            right.high[i] = __float_as_uint(x);
          } else {
            right.set(i, x);
          }
        }
        if constexpr (K::kNarrow) {
          multiply_m16n8k8(d[n], left.high, right.high);
        } else {
          multiply_add(d[n], left, right);
        }
      }
    }
  }
}

// --- results -------------------------------------------------------------------------------------

// Two neighbours of a contiguous row of `columns`, which begins at element `row`.
__device__ __forceinline__ void store_pair(void* memory, int64_t row, int column, int columns, float x, float y,
                                           Dtype dtype) {
  const bool both = column + 1 < columns;
  if (column >= columns) return;
  if (dtype == Dtype::kFloat32) {
    float* to = static_cast<float*>(memory) + row + column;
    to[0] = x;
    if (both) to[1] = y;
    return;
  }
  const unsigned pair = dtype == Dtype::kBFloat16 ? pack<bfloat16>(x, y) : pack<float16>(x, y);
  unsigned short* to = static_cast<unsigned short*>(memory) + row + column;
  if (both && columns % 2 == 0) {
    *reinterpret_cast<unsigned*>(to) = pair;
    return;
  }
  to[0] = static_cast<unsigned short>(pair);
  if (both) to[1] = static_cast<unsigned short>(pair >> 16);
}

// This warp's rows of d to rows [first, first + kRows) of a contiguous matrix (rows, columns).
template <int TILES>
__device__ __forceinline__ void store_rows(void* memory, Dtype dtype, int64_t first, int64_t rows, int columns,
                                           const float (&d)[TILES][4]) {
  const Lane own;
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    if (8 * n >= columns) break;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const int64_t row = first + own.row(i);
      if (row < rows) store_pair(memory, row * columns, own.column(n, 0), columns, d[n][i], d[n][i + 1], dtype);
    }
  }
}

// The same to matrix number `matrix` of many.
template <int TILES>
__device__ __forceinline__ void store_matrix(void* memory, Dtype dtype, int64_t matrix, int64_t first, int64_t rows,
                                             int columns, const float (&d)[TILES][4]) {
  const int64_t bytes = matrix * rows * columns * (dtype == Dtype::kFloat32 ? 4 : 2);
  store_rows(static_cast<char*>(memory) + bytes, dtype, first, rows, columns, d);
}

// The gradient of rows from that of the rows over their norms, in accumulators; x and its norms as
// normalize_rows left them.
template <typename K, int DIM>
__device__ __forceinline__ void through_norm(float (&grad)[DIM / 8][4], const Tile<K, kRows, DIM>& x,
                                             const float (&norms)[kRows], int length) {
  const Lane own;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = own.row(2 * half);
    const float norm = norms[r], inverse = 1 / norm;
    const auto unit = [&](int n, int i) {
      const float value = to_float(x.row[r][own.column(n, i)]);
      return K::kNarrow ? value * inverse : value;
    };
    float radial = 0;
#pragma unroll
    for (int n = 0; n < DIM / 8; ++n) {
      if (8 * n >= length) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) radial += grad[n][2 * half + i] * unit(n, i);
    }
    radial = sum_of_group(radial);
    if (norm <= kNormClamp) radial = 0;
#pragma unroll
    for (int n = 0; n < DIM / 8; ++n) {
      if (8 * n >= length) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) grad[n][2 * half + i] = (grad[n][2 * half + i] - radial * unit(n, i)) * inverse;
    }
  }
}

}  // namespace restore_kernels::token

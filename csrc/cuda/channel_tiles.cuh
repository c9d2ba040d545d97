// What the kernels of channel attention share: rows over the pixels, tiles of them in shared memory, and
// products of tiles by matrix instructions.
//
// A tile is 48 rows and 128 bytes of pixels. It comes to shared memory by cp.async, 16 bytes a thread, where
// pixels are contiguous and every row begins at a multiple of 16 bytes (`rows_align`); else element by
// element, lanes along the smaller stride: coalesced for NCHW and channels_last alike, but each thread waits
// for what it loads. Rows and pixels outside of the tensor are zeros, and are never read.
//
// Each of a block's four warps owns 32 bytes of every row of a tile, its slice: a word that is in shared
// memory is multiplied by one warp alone.
//
// Arithmetic. float32 is multiplied in three tf32 products (high·high + high·low + low·high), whose error is
// that of float32, added up by add_rounded. 16-bit elements are multiplied as they are, their products being
// exact, or, WIDE, as tf32, which holds them exactly too: where the other factor is float32, because a gate or a
// matrix of gradients beyond float16's range must not be rounded to 16 bits.
#pragma once

#include "strided.cuh"

namespace restore_kernels::channel {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kTile = 48;           // rows of a tile
constexpr int kStages = 3;          // tiles in shared memory: one is used while two are on their way
constexpr int kWords = 8 * kWarps;  // 32-bit words of a row of a tile: eight for each warp
// Words from row to row. Its remainder by 32 spreads over 32 banks what the lanes of a warp read together:
// word `member` of row `group`, or word `group` of row `2 member`.
constexpr int kPitch = kWords + 4;

using Tile = unsigned[kTile][kPitch];

template <typename T>
constexpr int kElements = 4 / static_cast<int>(sizeof(T));  // of a word
template <typename T>
constexpr int kTilePixels = kWords * kElements<T>;

// The rows of a group: of one head, or of all heads of an image, numbered through them.
template <typename T>
struct Rows {
  Strided<T> x;      // (B, H, C, N)
  int64_t channels;  // C

  // Of the first row's first pixel. The second index is 0 where all heads are one group.
  __host__ __device__ T* group(int64_t batch, int64_t index) const { return x.at(batch, index); }
  __device__ int64_t offset(int row) const {
    const int c = static_cast<int>(channels);
    if (row < c) return row * x.stride[2];  // always so in groups of one head, without a division
    return row / c * x.stride[1] + row % c * x.stride[2];
  }
};

// Whether tiles of x may be copied 16 bytes at a time.
template <typename T>
bool rows_align(const Strided<T>& x) {
  const auto aligned = [](int64_t stride) { return stride * static_cast<int64_t>(sizeof(T)) % 16 == 0; };
  return x.stride[3] == 1 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && aligned(x.stride[0]) &&
         aligned(x.stride[1]) && aligned(x.stride[2]);
}

// --- loading ----------------------------------------------------------------------------------------

// Rows [row, row + kTile) of so many, pixels [pixel, end).
template <typename T>
__device__ __forceinline__ void copy_tile(const T* group, const Rows<const T>& x, int row, int rows, int64_t pixel,
                                          int64_t end, Tile& tile) {
  constexpr int per_copy = 16 / sizeof(T), copies = kWords / 4;  // of a row
  static_assert(kTile * copies % kThreads == 0);
#pragma unroll
  for (int i = 0; i < kTile * copies / kThreads; ++i) {
    const int r = (i * kThreads + threadIdx.x) / copies, c = threadIdx.x % copies;
    const int64_t first = pixel + c * per_copy;
    const int64_t left = row + r < rows ? end - first : 0;
    const int count = left < 0 ? 0 : left < per_copy ? static_cast<int>(left) : per_copy;
    const T* from = count ? group + x.offset(row + r) + first : x.x.data;  // an address in any case
    copy_async(&tile[r][c * 4], from, count * static_cast<int>(sizeof(T)));
  }
}

// By single elements, lanes along the smaller stride.
template <typename T>
__device__ __forceinline__ void load_elements(const T* group, const Rows<const T>& x, int row, int rows,
                                              int64_t pixel, int64_t end, Tile& tile) {
  constexpr int pixels = kTilePixels<T>;
  const bool along_pixels = x.x.stride[3] <= x.x.stride[2];
#pragma unroll 8
  for (int i = 0; i < kTile * pixels / kThreads; ++i) {
    const int at = i * kThreads + threadIdx.x;
    const int r = along_pixels ? at / pixels : at % kTile, p = along_pixels ? at % pixels : at / kTile;
    const bool inside = row + r < rows && pixel + p < end;
    reinterpret_cast<T*>(tile[r])[p] =
        inside ? __ldg(group + x.offset(row + r) + (pixel + p) * x.x.stride[3]) : T{};
  }
}

template <typename T>
__device__ __forceinline__ void load_tile(bool copies, const T* group, const Rows<const T>& x, int row, int rows,
                                          int64_t pixel, int64_t end, Tile& tile) {
  if (copies) copy_tile<T>(group, x, row, rows, pixel, end, tile);
  else load_elements<T>(group, x, row, rows, pixel, end, tile);
}

// --- multiplying ------------------------------------------------------------------------------------

// The e-th element of a word.
template <typename T>
__device__ __forceinline__ float element(unsigned word, int e) {
  if constexpr (sizeof(T) == 4) return __uint_as_float(word);
  else return e ? unpack<T>(word).y : unpack<T>(word).x;
}

// N registers of one operand of a matrix instruction: of pairs of T, of values that tf32 holds exactly, or
// of values in two parts.
template <typename T, int N>
struct Pairs {
  unsigned pair[N];
};
template <int N>
struct Exact {
  unsigned value[N];

  __device__ void set(int i, float x) { value[i] = __float_as_uint(x); }
};
template <int N>
struct Split {
  unsigned high[N], low[N];

  __device__ void set(int i, float x) {
    high[i] = to_tf32(x);
    low[i] = to_tf32(x - __uint_as_float(high[i]));
  }
};

template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const Pairs<T, 4>& a, const Pairs<T, 2>& b) {
  multiply_m16n8k16<T>(d, a.pair, b.pair);
}
__device__ __forceinline__ void multiply_add(float (&d)[4], const Exact<4>& a, const Split<2>& b) {
  add_rounded(d, [&](float (&sum)[4]) {
    multiply_m16n8k8(sum, a.value, b.low);
    multiply_m16n8k8(sum, a.value, b.high);
  });
}
__device__ __forceinline__ void multiply_add(float (&d)[4], const Split<4>& a, const Split<2>& b,
                                             bool exact_b = false) {
  add_rounded(d, [&](float (&sum)[4]) {
    multiply_m16n8k8(sum, a.low, b.high);
    if (!exact_b) multiply_m16n8k8(sum, a.high, b.low);
    multiply_m16n8k8(sum, a.high, b.high);
  });
}

}  // namespace restore_kernels::channel

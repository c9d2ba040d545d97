// Rows of two images in shared memory, and the matrix products of pyramid attention between them.
//
// An image lies pixel by pixel, channels adjacent, in 32-bit words (one float, or two 16-bit elements),
// eight or a multiple of them a pixel. A warp multiplies 16 A pixels of a row of the image that its block
// owns with 8 B pixels of a row of the streamed one, and sums over the three shifts along x of a patch:
// t[x, j] = Σ_dx <owned[x + dx], streamed[j + dx]>.
//
// Rows and columns of a matrix may have any order. Here neighbouring pixels lie in the same thread: row
// `group` of the half h of 16 x 8 tile i is pixel 2 A group + 2 i + h, and column c of tile k is pixel B c + k.
// The operands of a shifted product are then those of the neighbouring half or tile: 2 A + 2 halves and B + 2
// tiles come from shared memory for three products, instead of 6 A and 3 B. Pixels are stored in that order
// too (`slot`), so that the eight pixels that ldmatrix reads together lie side by side; four words more than
// a pixel has put them into different banks.
#pragma once

#include "device.cuh"

namespace restore_kernels::pyramid {

template <typename T>
constexpr int kElements = 4 / static_cast<int>(sizeof(T));  // in a word

constexpr int kMostMultiplied = 32, kMostMixed = 64;  // channels of query and keys, of values

// How a block works on operands of T: its warps, of which each walks one chain at a time; rows that it owns;
// A and B.
template <typename T>
struct Tile {
  static constexpr int kWarps = 8, kRows = 4, A = 2, B = 2;
};
template <>
struct Tile<float> {
  static constexpr int kWarps = 4, kRows = 4, A = 1, B = 2;
};

// Operands of T as the kernels read them: (B, height * width, words).
struct Image {
  const unsigned* data;
  int height, width, words;

  __host__ __device__ int64_t pixels() const { return static_cast<int64_t>(height) * width; }
  constexpr __host__ __device__ int pitch() const { return words + 4; }  // of a pixel in shared memory
};

// Rows of 8 SPREAD + 2 pixels in shared memory, with one more pixel at either side than a tile has.
template <int SPREAD>
struct Strip {
  static constexpr int kPixels = 8 * SPREAD + 2, kSlots = 9 * SPREAD;

  // Of pixel SPREAD group + offset, offset 0 to SPREAD + 1.
  static __device__ int slot(int offset, int group) { return offset % SPREAD * 9 + offset / SPREAD + group; }

  unsigned* data;
  int pitch;

  __device__ unsigned* row(int r) const { return data + r * kSlots * pitch; }
};

// Rows [first, first + count) of an image, columns from left on, to rows (place + i) % ring of the strip; zeros
// outside of the image.
template <int SPREAD>
__device__ __forceinline__ void copy_rows(const Image& image, const unsigned* data, int first, int count, int left,
                                          const Strip<SPREAD>& strip, int place, int ring) {
  constexpr int pixels = Strip<SPREAD>::kPixels;
  const int copies = image.words / 4;  // of a pixel
  for (int i = threadIdx.x; i < count * pixels * copies; i += blockDim.x) {
    const int word = i % copies * 4, pixel = i / copies % pixels, row = i / copies / pixels;
    const int y = first + row, x = left + pixel;
    const bool inside = y >= 0 && y < image.height && x >= 0 && x < image.width;
    const unsigned* from = data + (inside ? (static_cast<int64_t>(y) * image.width + x) * image.words + word : 0);
    unsigned* to = strip.row((place + row) % ring) + strip.slot(pixel % SPREAD, pixel / SPREAD) * strip.pitch + word;
    copy_async(to, from, inside ? 16 : 0);
  }
}

// Eight rows of A, or columns of B, of a matrix instruction.
template <typename T>
struct Half {
  unsigned pair[2];

  __device__ void set(unsigned first, unsigned second) { pair[0] = first, pair[1] = second; }
};
template <>
struct Half<float> {
  unsigned high[2], low[2];

  __device__ void set(unsigned first, unsigned second) {
    const float x[2] = {__uint_as_float(first), __uint_as_float(second)};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      high[i] = to_tf32(x[i]);
      low[i] = to_tf32(x[i] - __uint_as_float(high[i]));
    }
  }
};

template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const Half<T>& top, const Half<T>& bottom,
                                             const Half<T>& b) {
  multiply_m16n8k16<T>(d, {top.pair[0], bottom.pair[0], top.pair[1], bottom.pair[1]}, b.pair);
}
__device__ __forceinline__ void multiply_add(float (&d)[4], const Half<float>& top, const Half<float>& bottom,
                                             const Half<float>& b) {
  const unsigned low[4] = {top.low[0], bottom.low[0], top.low[1], bottom.low[1]};
  const unsigned high[4] = {top.high[0], bottom.high[0], top.high[1], bottom.high[1]};
  add_rounded(d, [&](float (&sum)[4]) {
    multiply_m16n8k8(sum, low, b.high);
    multiply_m16n8k8(sum, high, b.low);
    multiply_m16n8k8(sum, high, b.high);
  });
}

// Words [word, word + 8) of the pixels SPREAD group + offset, offset 0 to SPREAD + 1.
template <typename T, int SPREAD>
__device__ __forceinline__ void load_halves(Half<T> (&halves)[SPREAD + 2], const unsigned* row, int pitch, int word) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < SPREAD + 2; i += 2) {
    const int slot = Strip<SPREAD>::slot(i + lane / 16, lane % 8);
    unsigned words[4];
    load_matrices<false>(words, row + slot * pitch + word + lane / 8 % 2 * 4);
    halves[i].set(words[0], words[1]);
    halves[i + 1].set(words[2], words[3]);
  }
}

// A warp's tile of products: d[i][k][2 h + e] is of row 2 i + h and column (e, k), see above.
template <int A, int B>
using Products = float[A][B][4];

template <typename T, int A, int B>
__device__ __forceinline__ void multiply_rows(Products<A, B>& d, const unsigned* owned, const unsigned* streamed,
                                              int pitch) {
#pragma unroll 1
  for (int word = 0; word < pitch - 4; word += 8) {
    Half<T> a[2 * A + 2], b[B + 2];
    load_halves<T, 2 * A>(a, owned, pitch, word);
    load_halves<T, B>(b, streamed, pitch, word);
#pragma unroll
    for (int shift = 0; shift < 3; ++shift) {
#pragma unroll
      for (int i = 0; i < A; ++i) {
#pragma unroll
        for (int k = 0; k < B; ++k) multiply_add(d[i][k], a[2 * i + shift], a[2 * i + 1 + shift], b[k + shift]);
      }
    }
  }
}

// The diagonal box filter along y: sums of three consecutive tiles of a chain.
template <int A, int B>
struct Box {
  Products<A, B> pair = {}, last = {};

  // A tile comes; in its place the sum of it and the two before.
  __device__ void add(Products<A, B>& tile) {
#pragma unroll
    for (int i = 0; i < A; ++i) {
#pragma unroll
      for (int k = 0; k < B; ++k) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float x = tile[i][k][c];
          tile[i][k][c] = pair[i][k][c] + x;
          pair[i][k][c] = last[i][k][c] + x;
          last[i][k][c] = x;
        }
      }
    }
  }
};

// Weights of a warp's keys as the left operand of a product: the rows of a strip, of which a chain takes
// kChunks<T> times eight words.
template <typename T, int B>
constexpr int kChunks = B / kElements<T>;

template <typename T, int A, int B>
__device__ __forceinline__ void store_weights(const Products<A, B>& weights, unsigned* row, int pitch, int word) {
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2 * A; ++half) {
    unsigned* to = row + Strip<2 * A>::slot(half + 1, group) * pitch + word;
#pragma unroll
    for (int k = 0; k < B; ++k) {
      const float* pair = weights[half / 2][k] + half % 2 * 2;
      if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<float2*>(to + 8 * k + 2 * member) = {pair[0], pair[1]};
      } else {
        to[4 * k + member] = pack<T>(pair[0], pair[1]);
      }
    }
  }
}

// The right operands of a product with weights: eight channels, from `channel` on, of all pixels of a row.
template <typename T, int B>
struct Channels {
  static_assert(B == 2);  // four matrices at a time
  unsigned words[B + 2];

  __device__ void load(const unsigned* row, int pitch, int channel) {
    const int lane = threadIdx.x % 32;
    load_matrices<true>(words, row + Strip<B>::slot(lane / 8, lane % 8) * pitch + channel / 2);
  }
  // Of the weights' chunk, the pixels shifted by `shift` - 1.
  __device__ Half<T> at(int chunk, int shift) const {
    return {{words[2 * chunk + shift], words[2 * chunk + 1 + shift]}};
  }
};
template <int B>
struct Channels<float, B> {
  Half<float> halves[B + 2];

  __device__ void load(const unsigned* row, int pitch, int channel) {
    const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
    const auto word = [&](int k, int pixel) { return row[Strip<B>::slot(k, pixel) * pitch + channel + group]; };
#pragma unroll
    for (int k = 0; k < B + 2; ++k) halves[k].set(word(k, member), word(k, member + 4));
  }
  __device__ const Half<float>& at(int chunk, int shift) const { return halves[chunk + shift]; }
};

}  // namespace restore_kernels::pyramid

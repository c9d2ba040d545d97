// The passes of pyramid attention, what each is given, and the sizes of what a block has.
#pragma once

#include <algorithm>
#include <cfloat>

#include "pyramid_tiles.cuh"

namespace restore_kernels::pyramid {

// A block owns pixels of the query; in the last two, of the keys of a level.
enum class Pass { kStatistics, kRowSums, kOut, kGradQuery, kGradKey, kGradValue };

// Every pass multiplies query and keys, the first pair of images; `both`: also the second pair, gradient of the
// output and values. One that mixes adds up pixels of a streamed image, of the first pair or of the second.
template <Pass PASS>
struct Kind {
  static constexpr bool owns_keys = PASS == Pass::kGradKey || PASS == Pass::kGradValue;
  static constexpr bool mixes = PASS != Pass::kStatistics && PASS != Pass::kRowSums;
  static constexpr bool mixes_first = PASS == Pass::kGradQuery || PASS == Pass::kGradKey;
  static constexpr bool both = mixes_first || PASS == Pass::kRowSums;
  static constexpr int halo = mixes ? 1 : 0;  // of scores around the pixels whose sums a block makes
  static constexpr int mixed = mixes_first ? 0 : 1;
};

struct Problem {
  Image owned[2], streamed[2];
  const float *log_sum_exp, *row_sums;  // (B, pixels of the query)
  const float* scales;                  // (B, keys)
  float out_scale;
  int tiles_x, tiles_y;         // of the owned image
  int splits, tiles_per_split;  // of columns of the streamed image, in tiles of 8 B
  int64_t batch;
  float* result;  // (splits, batch, owned pixels) of float2, or float, or the channels that are mixed
  float* radial;  // (splits, batch, keys): Σ_n dS S, of the gradient to keys
};

// Largest of some scores and sum of their exponentials over that of the largest.
struct Statistics {
  float largest = -FLT_MAX, sum = 0;

  __device__ void add(const Statistics& other) {
    const float now = fmaxf(largest, other.largest);
    sum = sum * __expf(largest - now) + other.sum * __expf(other.largest - now);
    largest = now;
  }
};

template <typename T, Pass PASS>
struct Shape {
  using Does = Kind<PASS>;
  static constexpr int A = Tile<T>::A, B = Tile<T>::B, R = Tile<T>::kRows, W = Tile<T>::kWarps;
  static constexpr int kThreads = 32 * W;
  static constexpr int kColumns = 16 * A - 2 * Does::halo;  // that a block owns
  static constexpr int kSteps = R + 2 * Does::halo + 2;     // rows of products that a chain needs
  static constexpr int kStreamed = kSteps + W - 1;          // rows that W chains read
  static constexpr int kRing = kStreamed + (Does::mixes ? 0 : W);
  static constexpr int kParts = W / R;                      // warps that share the channels of a row of sums
  // Of eight channels, sums of a warp.
  static constexpr int kTiles = (Does::mixes_first ? kMostMultiplied : kMostMixed) / 8 / kParts;
  static constexpr int kPitch = W * 8 * kChunks<T, B> + 4;  // of a pixel's weights
  using Owned = Strip<2 * A>;
  using Streamed = Strip<B>;

  static constexpr __host__ __device__ bool owns(int i) { return i == 0 || Does::both; }
  static constexpr __host__ __device__ bool streams(int i) { return i == 0 || Does::both || (Does::mixes && Does::mixed == 1); }

  static constexpr size_t shared_bytes(const Problem& p) {
    size_t words = Does::mixes ? R * Owned::kSlots * kPitch : 0;
    for (int i = 0; i < 2; ++i) {
      if (owns(i)) words += kSteps * Owned::kSlots * p.owned[i].pitch();
      if (streams(i)) words += kRing * Streamed::kSlots * p.streamed[i].pitch();
    }
    return std::max(words * sizeof(unsigned), W * R * 16 * A * sizeof(Statistics));
  }
  static constexpr bool fits(size_t bytes) {  // images of as many channels as there may be
    Problem p{};
    for (int i = 0; i < 2; ++i)
      p.owned[i].words = p.streamed[i].words = (i == 0 ? kMostMultiplied : kMostMixed) / kElements<T>;
    return shared_bytes(p) <= bytes;
  }
};

__device__ __forceinline__ float sum_of_members(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

}  // namespace restore_kernels::pyramid

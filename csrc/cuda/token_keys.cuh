// What token attention's kernels share beside tiles: tensors per head, the mask of keys, scores.
#pragma once

#include "token_tiles.cuh"

namespace restore_kernels::token {

// float32 (B, H) or (B, H, columns) of any strides; nullptr: absent.
struct PerHead {
  const float* data;
  int64_t stride[3];

  __device__ const float* head(int64_t batch, int64_t head) const {
    return data + batch * stride[0] + head * stride[1];
  }
};

struct Inputs {
  Matrices q, k, v;  // (B, H, N, D), (B, H, M, D), (B, H, M, E)
  PerHead mask;      // (B, H, M)
  PerHead temperature;
  int64_t heads;
  bool normalize;
};

// Of a row: its share of the scores' scale.
template <typename K>
__device__ __forceinline__ float scale_of(float norm) {
  return K::kNarrow ? 1 / norm : 1.0f;
}

// The similarity before the scale of the query, from a product of operands and the scale of the key. What
// overflows belongs to an infinite norm, whose scale is 0; norms carry NaN of the inputs.
template <typename K>
__device__ __forceinline__ float similarity_of(float product, float key_scale, bool normalize) {
  if constexpr (K::kNarrow) {
    if (normalize) product = fminf(fmaxf(product, -kLargest), kLargest);
    return __fmul_rn(product, key_scale);
  }
  return product;
}

// COUNT keys: norms, scales, and the logarithm of the mask: -inf for what is no key or masked. The value of a
// mask is fetched early and used when its tile has come.
template <typename K, int COUNT>
struct Keys {
  float norm[COUNT], scale[COUNT], bias[COUNT];
  int alive[kWarps];  // whether a warp found any key

  static constexpr int kFetches = (COUNT + kThreads / 4 - 1) / (kThreads / 4);
  struct Fetched {
    float mask[kFetches];
  };

  // For the rows that this thread will prepare; 0 for what is no key.
  __device__ __forceinline__ static Fetched fetch(const float* mask, int64_t stride, int64_t first, int64_t keys) {
    Fetched fetched;
#pragma unroll
    for (int i = 0; i < kFetches; ++i) {
      const int64_t key = first + i * (kThreads / 4) + threadIdx.x / 4;
      fetched.mask[i] = key >= keys ? 0.0f : mask ? __ldg(mask + key * stride) : 1.0f;
    }
    return fetched;
  }

  // Zeros to the rows of a tile that are no keys. Four threads a row, as `prepare`.
  template <int DIM>
  __device__ __forceinline__ static void hide(const Fetched& fetched, Tile<K, COUNT, DIM>& tile, int columns) {
#pragma unroll
    for (int i = 0; i < kFetches; ++i) {
      auto& row = tile.row[i * (kThreads / 4) + threadIdx.x / 4];
      if (fetched.mask[i] > 0) continue;  // NaN is not
      for (int c = threadIdx.x % 4; c < padded(columns); c += 4) row[c] = typename K::Element{};
    }
  }

  // All threads, four a row; the tile of k is there, its rows that are no keys hidden.
  template <int DIM>
  __device__ __forceinline__ void prepare(const Fetched& fetched, Tile<K, COUNT, DIM>& k, int length,
                                          bool normalize) {
    __syncwarp();
    normalize_rows(k, norm, length, normalize);
    bool any = false;
#pragma unroll
    for (int i = 0; i < kFetches; ++i) {
      const int r = i * (kThreads / 4) + threadIdx.x / 4;
      const bool is_key = fetched.mask[i] > 0;
      any |= is_key;
      if (threadIdx.x % 4 > 0) continue;
      bias[r] = is_key ? logf(fetched.mask[i]) : -kInfinity;
      scale[r] = scale_of<K>(norm[r]);
    }
    any = __any_sync(0xffffffff, any);
    if (threadIdx.x % 32 == 0) alive[threadIdx.x / 32] = any;
  }

  __device__ bool any_alive() const { return alive[0] | alive[1] | alive[2] | alive[3]; }
};

}  // namespace restore_kernels::token

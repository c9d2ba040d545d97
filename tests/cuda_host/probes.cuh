// Small kernels that try out the host execution of CUDA kernels, faults planted in them on request.
#pragma once

#include "device.cuh"

namespace restore_kernels::probes {

enum class Fence { kNone, kWarp, kBlock };

// out[i] = in[n - 1 - i] within every block of n threads, through dynamic shared memory.
template <Fence FENCE>
__global__ void reverse(const float* in, float* out) {
  DYNAMIC_SHARED(float, shared);
  const unsigned first = blockIdx.x * blockDim.x;
  shared[threadIdx.x] = __ldg(in + first + threadIdx.x);
  if constexpr (FENCE == Fence::kBlock) __syncthreads();
  if constexpr (FENCE == Fence::kWarp) __syncwarp();
  out[first + threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

// out[i] = in[i], with 16-byte accesses.
__global__ void copy_vectors(const float4* in, float4* out) {
  const unsigned block = blockIdx.y * gridDim.x + blockIdx.x, thread = threadIdx.y * blockDim.x + threadIdx.x;
  const unsigned i = block * blockDim.x * blockDim.y + thread;
  out[i] = in[i];
}

// out[i] = in[i] through shared memory by asynchronous copies of 16 bytes, of which the first `bytes` are
// copied; each thread reads what it copied itself.
struct Slots {
  uint4 slot[32];
};
template <bool WAIT>
__global__ void copy_through_shared(const uint4* in, uint4* out, int bytes) {
  SHARED(Slots, shared);
  copy_async(&shared.slot[threadIdx.x], in + threadIdx.x, bytes);
  commit_copies();
  if constexpr (WAIT) wait_for_copies<0>();
  out[threadIdx.x] = shared.slot[threadIdx.x];
}

// Rows of 32 per warp: flipped by `flip`, read from `source` within each half of the warp, and three
// votes on x > 0 within each half.
__global__ void warp_calls(const float* in, float* flipped, float* read, unsigned* votes, int flip, int source) {
  const unsigned half = threadIdx.x % 32 / 16, mask = 0xffffu << 16 * half;
  const float x = in[threadIdx.x];
  flipped[threadIdx.x] = __shfl_xor_sync(0xffffffff, x, flip);
  read[threadIdx.x] = __shfl_sync(mask, x, 16 * half + source);
  votes[3 * threadIdx.x] = __ballot_sync(mask, x > 0);
  votes[3 * threadIdx.x + 1] = __any_sync(mask, x > 0);
  votes[3 * threadIdx.x + 2] = __all_sync(mask, x > 0);
}

// total += the sum of in, count[bin]++ for every element.
__global__ void histogram(const float* in, const int* bins, float* total, int* count) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(total, in[i]);
  atomicAdd(count + bins[i], 1);
}

// Registers a (32, 4), b (32, 2), d (32, 4) of one warp.
template <typename T>
__global__ void multiply(const unsigned (*a)[4], const unsigned (*b)[2], float (*d)[4]) {
  unsigned mine_a[4], mine_b[2];
  float mine_d[4];
  for (int i = 0; i < 4; ++i) mine_a[i] = a[threadIdx.x][i];
  for (int i = 0; i < 2; ++i) mine_b[i] = b[threadIdx.x][i];
  for (int i = 0; i < 4; ++i) mine_d[i] = d[threadIdx.x][i];
  if constexpr (sizeof(T) == 4) {
    multiply_m16n8k8(mine_d, mine_a, mine_b);
  } else {
    multiply_m16n8k16<T>(mine_d, mine_a, mine_b);
  }
  for (int i = 0; i < 4; ++i) d[threadIdx.x][i] = mine_d[i];
}

// Four matrices (8, 8) of 16-bit elements, as they are and transposed, to words (32, 4) of one warp.
struct alignas(16) Matrices {
  unsigned short element[4][8][8];
};
__global__ void load_four_matrices(const unsigned short* in, unsigned (*words)[4], unsigned (*transposed)[4]) {
  SHARED(Matrices, shared);
  const unsigned lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) shared.element[lane / 8][lane % 8][i] = in[lane * 8 + i];
  __syncwarp();
  unsigned mine[4];
  load_matrices<false>(mine, shared.element[lane / 8][lane % 8]);
  for (int i = 0; i < 4; ++i) words[lane][i] = mine[i];
  load_matrices<true>(mine, shared.element[lane / 8][lane % 8]);
  for (int i = 0; i < 4; ++i) transposed[lane][i] = mine[i];
}

// pairs[i] = in[2 i], in[2 i + 1] rounded to T.
template <typename T>
__global__ void pack_pairs(const float* in, unsigned* pairs) {
  pairs[threadIdx.x] = pack<T>(in[2 * threadIdx.x], in[2 * threadIdx.x + 1]);
}

// --- planted faults -------------------------------------------------------------------------------

__global__ void some_threads_leave() {
  if (threadIdx.x % 2) return;
  __syncthreads();
}

__global__ void two_barriers() {
  if (threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void lanes_stay_away(float* out) {
  if (threadIdx.x != 5) out[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1.0f, 1);
}

__global__ void mask_without_caller(float* out) { out[threadIdx.x] = __shfl_sync(0xffff, 1.0f, 0); }

__global__ void source_outside_mask(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffff, 1.0f, 20);
}

__global__ void misaligned_copy(const unsigned* in) {
  SHARED(uint4, shared);
  copy_async(&shared, in + 1, 16);
}

__global__ void write_past_tensor(float* out) { out[threadIdx.x + 1] = 1; }

__global__ void write_past_shared(float* out) {
  DYNAMIC_SHARED(float, shared);
  shared[threadIdx.x + 1] = 1;
  out[threadIdx.x] = shared[threadIdx.x];
}

}  // namespace restore_kernels::probes

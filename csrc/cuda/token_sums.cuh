// Sums over the splits and the rows of token attention's backward pass, each in one order.
#pragma once

#include "token_keys.cuh"

namespace restore_kernels::token {

// grad = the gradient of x (B, H, rows, columns) from the parts (B * H, splits, rows, columns) of that of its
// normalised rows. Grid and block: a warp for every row, four columns a lane.
__global__ void __launch_bounds__(kThreads)
    token_finish_kernel(const float* parts, const Matrices x, void* grad, int64_t matrices, int64_t heads,
                        int64_t splits, bool normalize) {
  const int lane = threadIdx.x % 32;
  const int64_t owned = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (owned >= matrices * x.rows) return;
  const int64_t matrix = owned / x.rows, row = owned % x.rows;
  const char* values = x.head(matrix / heads, matrix % heads);
  float sum[4] = {}, value[4] = {}, squares = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int c = lane + 32 * i;
    if (c >= x.columns) break;
    const float* part = parts + (matrix * splits * x.rows + row) * x.columns + c;
#pragma unroll 4
    for (int64_t s = 0; s < splits; ++s) sum[i] += __ldg(part + s * x.rows * x.columns);
    if (normalize) value[i] = load_float(values, row * x.stride[2] + c * x.stride[3], x.dtype);
    squares += value[i] * value[i];
  }
  const auto sum_of_warp = [](float y) {
    for (int flip = 16; flip; flip /= 2) y += __shfl_xor_sync(0xffffffff, y, flip);
    return y;
  };
  if (normalize) {
    const float root = sqrtf(sum_of_warp(squares)), norm = root < kNormClamp ? kNormClamp : root;
    float radial = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) radial += sum[i] * (value[i] /= norm);
    radial = sum_of_warp(radial);
    if (norm <= kNormClamp) radial = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = (sum[i] - radial * value[i]) / norm;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int c = lane + 32 * i;
    if (c < x.columns) store_pair(grad, owned * x.columns, c, c + 1, sum[i], 0, x.dtype);
  }
}

// sums (outer, inner) of x (outer, length, inner). Grid: outer * inner.
__global__ void __launch_bounds__(kThreads)
    token_sum_kernel(const float* x, float* sums, int64_t length, int64_t inner) {
  struct Shared {
    float sum[kWarps];
  };
  SHARED(Shared, shared);
  const float* first = x + blockIdx.x / inner * length * inner + blockIdx.x % inner;
  float sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < length; i += kThreads) sum += __ldg(first + i * inner);
  for (int flip = 16; flip; flip /= 2) sum += __shfl_xor_sync(0xffffffff, sum, flip);
  if (threadIdx.x % 32 == 0) shared.sum[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) sums[blockIdx.x] = (shared.sum[0] + shared.sum[1]) + (shared.sum[2] + shared.sum[3]);
}

// sums (outer, inner) of x (outer, splits, inner). Grid and block: a thread for every sum.
__global__ void __launch_bounds__(kThreads)
    token_sum_splits_kernel(const float* x, float* sums, int64_t outer, int64_t splits, int64_t inner) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (entry >= outer * inner) return;
  const float* first = x + entry / inner * splits * inner + entry % inner;
  float sum = 0;
#pragma unroll 4
  for (int64_t s = 0; s < splits; ++s) sum += __ldg(first + s * inner);
  sums[entry] = sum;
}

}  // namespace restore_kernels::token

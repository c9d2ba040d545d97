// Between the streams of channel attention: rows of the C x C matrices of every head.
//
// With the Gram matrix G = q kᵀ and the norms: similarity A = G / (|q| |k|ᵀ), scores S = temperature A, and
// P = sum_j w_j softmax(the topk_j largest entries of a row of S; equal ones: lower index first). Backward,
// from dP: dS of every branch's softmax, dA = temperature dS, X = dA / (|q| |k|ᵀ) and
// y_q = rowsum(dA A) / |q|², y_k = colsum(dA A) / |k|², zero where the norm is clamped.
//
// Schedule
//   channel_mixture_kernel, channel_row_backward_kernel
//       A block owns a row. Its four warps add up the row's partial sums over the chunks of the pixels, each
//       a quarter of the chunks, so that 50 chunks are 13 loads one after the other at most and most of them
//       at once. Then the first warp has the row in registers, ENTRIES columns a lane. The rank of an entry,
//       counted once for all branches, is the number of entries before it: each lane compares its own with
//       all of the row, which it reads from shared memory, one word for all lanes.
//   channel_column_sums_kernel
//       A block owns a head: adds up the rows' terms of y_k and of the small gradients, in order.
// Latency is the bound: a row is C numbers, and at C = 48 the partial sums of one wave of blocks are 4 MB, read
// from the L2 cache. Expected 2 to 3 µs each on H200 and A100. Not measured yet.
#pragma once

#include "channel_tiles.cuh"

namespace restore_kernels::channel {

constexpr float kNormClamp = 1e-12f;
constexpr int kMostBranches = 32;
constexpr int kMostChannels = 256;  // of a head

// A small matrix of each head, of any dtype.
enum class Format { kFloat32, kBFloat16, kFloat16 };
struct Matrices {
  void* data;
  int64_t stride[4];  // (B, H, rows, columns)
  Format format;

  __device__ int64_t offset(int64_t batch, int64_t head, int64_t row, int64_t column) const {
    return batch * stride[0] + head * stride[1] + row * stride[2] + column * stride[3];
  }
  __device__ float load(int64_t at) const {
    if (format == Format::kFloat32) return static_cast<const float*>(data)[at];
    if (format == Format::kBFloat16) return to_float(static_cast<const bfloat16*>(data)[at]);
    return to_float(static_cast<const float16*>(data)[at]);
  }
  __device__ void store(int64_t at, float x) const {
    if (format == Format::kFloat32) static_cast<float*>(data)[at] = x;
    else if (format == Format::kBFloat16) static_cast<bfloat16*>(data)[at] = rounded_to<bfloat16>(x);
    else static_cast<float16*>(data)[at] = rounded_to<float16>(x);
  }
};

struct Branches {
  const float *temperature, *weights;  // (B, H), (B, H, J); no weights: all are 1
  int64_t temperature_stride[2], weights_stride[3];
  int64_t heads;
  int channels, count;
  int topk[kMostBranches];
  bool normalize;
};

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int flip = 16; flip; flip /= 2) x += __shfl_xor_sync(0xffffffff, x, flip);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int flip = 16; flip; flip /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, flip));
  return x;
}

template <int ENTRIES>
struct RowStorage {
  float partial[kWarps][2][32 * ENTRIES];
  float partial_square[kWarps];
  float scores[32 * ENTRIES];
};

// A lane's columns of a row: lane, lane + 32, ...
template <int ENTRIES>
struct Row {
  float exponential[ENTRIES];  // exp(score - largest score); 0 past the row
  int rank[ENTRIES];

  // Of the row's scores, by the first warp. Entries past the row count as -inf.
  __device__ void set(const Branches& branches, const float (&scores)[ENTRIES], float* shared) {
    const int lane = threadIdx.x;
    bool dense = true;
    for (int j = 0; j < branches.count; ++j) dense &= branches.topk[j] == branches.channels;
    float largest = scores[0];
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) {
      shared[lane + 32 * e] = scores[e];
      rank[e] = 0;
      largest = fmaxf(largest, scores[e]);
    }
    __syncwarp();
    if (!dense) {
#pragma unroll 4
      for (int other = 0; other < branches.channels; ++other) {
        const float score = shared[other];
#pragma unroll
        for (int e = 0; e < ENTRIES; ++e)
          rank[e] += score > scores[e] || (score == scores[e] && other < lane + 32 * e);
      }
    }
    largest = warp_max(largest);
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e)
      exponential[e] = lane + 32 * e < branches.channels ? expf(scores[e] - largest) : 0;
  }
  __device__ float kept(const Branches& branches, int j, int e) const {
    return rank[e] < branches.topk[j] ? exponential[e] : 0;
  }
  __device__ float kept_sum(const Branches& branches, int j) const {
    float sum = 0;
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) sum += kept(branches, j, e);
    return warp_sum(sum);
  }
};

// Which row a block owns.
struct RowIndex {
  int64_t batch, head, matrix;
  int row;

  __device__ explicit RowIndex(const Branches& branches)
      : matrix(blockIdx.x / branches.channels), row(blockIdx.x % branches.channels) {
    batch = matrix / branches.heads;
    head = matrix % branches.heads;
  }
  __device__ float temperature(const Branches& b) const {
    return b.temperature[batch * b.temperature_stride[0] + head * b.temperature_stride[1]];
  }
  __device__ float weight(const Branches& b, int j) const {
    if (!b.weights) return 1;
    return b.weights[batch * b.weights_stride[0] + head * b.weights_stride[1] + j * b.weights_stride[2]];
  }
};

// This warp's share of the sums over the chunks of `length` values each, to shared memory.
template <int ENTRIES>
__device__ __forceinline__ void sum_share(const float* partials, int64_t chunks, int64_t size, int length,
                                          float (&to)[32 * ENTRIES]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float sum[ENTRIES] = {};
#pragma unroll 4
  for (int64_t chunk = warp; chunk < chunks; chunk += kWarps) {
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e)
      if (lane + 32 * e < length) sum[e] += __ldg(partials + chunk * size + lane + 32 * e);
  }
#pragma unroll
  for (int e = 0; e < ENTRIES; ++e) to[lane + 32 * e] = sum[e];
}

template <int ENTRIES>
__device__ __forceinline__ float sum_of_shares(const RowStorage<ENTRIES>& storage, int which, int column) {
  float sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += storage.partial[w][which][column];
  return sum;
}

struct Mixture {
  Branches branches;
  const float* partials;  // (B * H, chunks, C * C + 2 C) of channel_gram_kernel
  int64_t chunks;
  float *similarity, *norms;  // (B, H, C, C), (B, H, 2, C)
  Matrices mixture;           // P
};

template <int ENTRIES>
__global__ void __launch_bounds__(kThreads) channel_mixture_kernel(const Mixture p) {
  SHARED(RowStorage<ENTRIES>, storage);
  const Branches& branches = p.branches;
  const int C = branches.channels, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const RowIndex own(branches);
  const int64_t size = static_cast<int64_t>(C) * C + 2 * C;
  const float* partials = p.partials + own.matrix * p.chunks * size;
  sum_share<ENTRIES>(partials + own.row * C, p.chunks, size, C, storage.partial[warp][0]);
  sum_share<ENTRIES>(partials + C * C + C, p.chunks, size, C, storage.partial[warp][1]);
  float square = 0;
#pragma unroll 4
  for (int64_t chunk = warp; chunk < p.chunks; chunk += kWarps)
    square += __ldg(partials + chunk * size + C * C + own.row);
  if (lane == 0) storage.partial_square[warp] = square;
  __syncthreads();
  if (warp > 0) return;

  square = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) square += storage.partial_square[w];
  const float norm_q = branches.normalize ? fmaxf(sqrtf(square), kNormClamp) : 1;
  if (lane == 0) p.norms[own.matrix * 2 * C + own.row] = norm_q;
  const float temperature = own.temperature(branches);
  float scores[ENTRIES];
#pragma unroll
  for (int e = 0; e < ENTRIES; ++e) {
    const int column = lane + 32 * e;
    scores[e] = __uint_as_float(0xff800000);  // -inf
    if (column >= C) continue;
    float similarity = sum_of_shares<ENTRIES>(storage, 0, column), norm_k = 1;
    if (branches.normalize) {
      norm_k = fmaxf(sqrtf(sum_of_shares<ENTRIES>(storage, 1, column)), kNormClamp);
      // Exactly ±1 for parallel rows of one pixel. Squares that overflow make a norm infinite.
      const float norms = norm_q * norm_k;
      similarity = norms <= 3.4028235e38f ? similarity / norms : 0;
    }
    if (own.row == 0) p.norms[own.matrix * 2 * C + C + column] = norm_k;
    p.similarity[(own.matrix * C + own.row) * C + column] = similarity;
    scores[e] = temperature * similarity;
  }

  Row<ENTRIES> row;
  row.set(branches, scores, storage.scores);
  float mixture[ENTRIES] = {};
  for (int j = 0; j < branches.count; ++j) {
    const float scale = own.weight(branches, j) / row.kept_sum(branches, j);
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) mixture[e] += scale * row.kept(branches, j, e);
  }
#pragma unroll
  for (int e = 0; e < ENTRIES; ++e) {
    if (lane + 32 * e < C)
      p.mixture.store(p.mixture.offset(own.batch, own.head, own.row, lane + 32 * e), mixture[e]);
  }
}

struct RowBackward {
  Branches branches;
  const float* partials;  // (B * H, chunks, size), dP in front
  int64_t chunks, size;
  const float *similarity, *norms;
  Matrices mixture, coefficients, coefficients_transposed;  // P, X, Xᵀ
  float *radial_q, *terms;    // (B * H, C), (B * H, C, C + J + 1): dA A, then of the weights, of the temperature
};

template <int ENTRIES>
__global__ void __launch_bounds__(kThreads) channel_row_backward_kernel(const RowBackward p) {
  SHARED(RowStorage<ENTRIES>, storage);
  const Branches& branches = p.branches;
  const int C = branches.channels, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const RowIndex own(branches);
  sum_share<ENTRIES>(p.partials + own.matrix * p.chunks * p.size + own.row * C, p.chunks, p.size, C,
                     storage.partial[warp][0]);
  __syncthreads();
  if (warp > 0) return;

  const float temperature = own.temperature(branches);
  float grad_mixture[ENTRIES], similarity[ENTRIES], scores[ENTRIES];
#pragma unroll
  for (int e = 0; e < ENTRIES; ++e) {
    const int column = lane + 32 * e;
    const bool inside = column < C;
    grad_mixture[e] = inside ? sum_of_shares<ENTRIES>(storage, 0, column) : 0;
    similarity[e] = inside ? __ldg(p.similarity + (own.matrix * C + own.row) * C + column) : 0;
    scores[e] = inside ? temperature * similarity[e] : __uint_as_float(0xff800000);  // -inf
  }
  Row<ENTRIES> row;
  row.set(branches, scores, storage.scores);
  float mixture[ENTRIES] = {}, grad_scores[ENTRIES] = {};
  float* terms = p.terms + (own.matrix * C + own.row) * (C + branches.count + 1);
  for (int j = 0; j < branches.count; ++j) {
    const float weight = own.weight(branches, j), scale = 1 / row.kept_sum(branches, j);
    float mean = 0;
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) mean += scale * row.kept(branches, j, e) * grad_mixture[e];
    mean = warp_sum(mean);
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) {
      const float share = weight * (scale * row.kept(branches, j, e));
      mixture[e] += share;
      grad_scores[e] += share * (grad_mixture[e] - mean);
    }
    if (lane == 0) terms[C + j] = mean;
  }

  const float norm_q = __ldg(p.norms + own.matrix * 2 * C + own.row);
  float product = 0, radial = 0;
#pragma unroll
  for (int e = 0; e < ENTRIES; ++e) {
    const int column = lane + 32 * e;
    if (column >= C) continue;
    product += grad_scores[e] * similarity[e];
    float coefficient = temperature * grad_scores[e];
    if (branches.normalize) {
      terms[column] = coefficient * similarity[e];
      radial += coefficient * similarity[e];
      coefficient = coefficient / norm_q / __ldg(p.norms + own.matrix * 2 * C + C + column);
    }
    p.mixture.store(p.mixture.offset(own.batch, own.head, own.row, column), mixture[e]);
    p.coefficients.store(p.coefficients.offset(own.batch, own.head, own.row, column), coefficient);
    const auto& transposed = p.coefficients_transposed;
    transposed.store(transposed.offset(own.batch, own.head, column, own.row), coefficient);
  }
  product = warp_sum(product);
  radial = warp_sum(radial);
  if (lane > 0) return;
  terms[C + branches.count] = product;
  if (branches.normalize)
    p.radial_q[own.matrix * C + own.row] = norm_q <= kNormClamp ? 0 : radial / norm_q / norm_q;
}

struct ColumnSums {
  const float *terms, *norms;
  int channels, branches;
  bool normalize;
  float *radial_k, *grad_temperature, *grad_weights;  // (B * H, C), (B, H), (B, H, J)
};

__global__ void __launch_bounds__(kThreads) channel_column_sums_kernel(const ColumnSums p) {
  const int C = p.channels, width = C + p.branches + 1;
  const int64_t matrix = blockIdx.x;
  // Without normalisation the terms of y are not written, hence not read.
  for (int column = threadIdx.x + (p.normalize ? 0 : C); column < width; column += kThreads) {
    float sum = 0;
#pragma unroll 16
    for (int row = 0; row < C; ++row) sum += __ldg(p.terms + (matrix * C + row) * width + column);
    if (column < C) {
      const float norm_k = __ldg(p.norms + matrix * 2 * C + C + column);
      p.radial_k[matrix * C + column] = norm_k <= kNormClamp ? 0 : sum / norm_k / norm_k;
    } else if (column < C + p.branches) {
      p.grad_weights[matrix * p.branches + column - C] = sum;
    } else {
      p.grad_temperature[matrix] = sum;
    }
  }
}

}  // namespace restore_kernels::channel

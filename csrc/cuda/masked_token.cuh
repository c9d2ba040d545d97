// Masked token attention, forward: out = P v with P = softmax(S), S = temperature * q̂ k̂ᵀ + log mask, of
// q (B, H, N, D), k (B, H, M, D), v (B, H, M, E), mask (B, H, M) with D, E <= DIM; float32, bfloat16, float16.
//
// Schedule
//   masked_token_kernel          A block owns 64 queries of one head, 16 a warp, and one split of the keys.
//                                It streams tiles of keys and values (64 Narrow, 32 Wide) through two stages
//                                of shared memory: one is multiplied while the next is on its way. Products
//                                and the softmax stay in registers: a row is spread over four lanes. Every
//                                tile may raise the row's largest score, and then scales what was added up.
//   masked_token_combine_kernel  Where the rows alone do not fill the GPU, there are several splits of the
//                                keys: a block owns a row and adds up the splits' parts, in order.
// The result depends on the sizes of tiles and splits, not on the order of blocks.
//
// A key of mask 0 is left out: its rows become zeros, its probability is exactly 0, and a tile of nothing
// else is skipped. A row without keys has out = 0 and log_sum_exp = -inf.
//
// Narrow probabilities are multiplied as the sum of two numbers of T. So out is as exact as in float32, and
// the backward pass finds rowsum(P dP) as rowsum(do out) instead of by a pass of its own.
//
// Bytes and operations: q, out once; k, v once per 64 queries, but for the first time from the L2 cache;
// splits write 4 (E + 2) bytes a row and read them again. 2 (D + 2 E) operations a score on the tensor cores
// (Wide: 6 (D + E) of tf32), one exponential and about twenty instructions elsewhere.
// Bound: with 16 queries and 65,536 keys of D = E = 48 in bfloat16 the memory: k and v are 12.6 MB, 2.9 us on
// H200 at 4.3 TB/s, 7 us on A100 at 1.8 TB/s. With many queries what is neither product nor copy: 64 x 64
// scores take some 700 cycles of a multiprocessor, N = M = 4096 some 15 us a head on H200. Not measured yet.
//
// Occupancy with DIM 64: 47 KiB of shared memory (Wide 53) and at most 168 registers a thread: three blocks (12
// warps) a multiprocessor.
#pragma once

#include "token_keys.cuh"

namespace restore_kernels::token {

struct MaskedForward {
  Inputs in;
  int64_t splits, keys_per_split;  // a multiple of the tile
  void* out;                       // (B, H, N, E)
  float* wide_out;                 // the same before it was rounded; nullptr for float32
  float* log_sum_exp;              // (B, H, N)
  float* partials;                 // (B * H, splits, N, E), with splits > 1
  float* statistics;               // (B * H, splits, 2, N): largest score, sum of exponentials
};

template <typename K, int DIM>
struct MaskedTiles {
  static constexpr int kCount = K::kNarrow ? 64 : 32;  // keys of a tile
  Tile<K, kRows, DIM> q;
  struct {
    Tile<K, kCount, DIM> k, v;
  } stage[2];
  float norm[kRows];
  Keys<K, kCount> keys;
};
template <typename K, int DIM>
constexpr int kMaskedBlocks = DIM > 64 ? 1 : 3;

// Grid: B * H * splits * tiles of queries, the tile running fastest.
template <typename K, int DIM>
__global__ void __launch_bounds__(kThreads, kMaskedBlocks<K, DIM>) masked_token_kernel(const MaskedForward p) {
  using Shared = MaskedTiles<K, DIM>;
  constexpr int COUNT = Shared::kCount;
  DYNAMIC_SHARED(Shared, shared);
  const Lane own;
  const Inputs& in = p.in;
  const int64_t queries = in.q.rows, tiles = (queries + kRows - 1) / kRows;
  const int64_t row = blockIdx.x % tiles * kRows, part = blockIdx.x / tiles;  // of (B * H, splits)
  const int64_t split = part % p.splits, matrix = part / p.splits;
  const int64_t batch = matrix / in.heads, head = matrix % in.heads;
  const char *q = in.q.head(batch, head), *k = in.k.head(batch, head), *v = in.v.head(batch, head);
  const float* mask = in.mask.data ? in.mask.head(batch, head) : nullptr;
  const float temperature = *in.temperature.head(batch, head);
  const int64_t begin = split * p.keys_per_split;
  const int64_t end = begin + p.keys_per_split < in.k.rows ? begin + p.keys_per_split : in.k.rows;
  const int length = in.q.columns, width = in.v.columns;

  typename Keys<K, COUNT>::Fetched fetched{};
  const auto load = [&](int64_t first) {
    auto& stage = shared->stage[(first - begin) / COUNT % 2];
    fetched = Keys<K, COUNT>::fetch(mask, in.mask.stride[2], first, end);
    load_rows(stage.k, in.k, k, first);
    load_rows(stage.v, in.v, v, first);
    commit_copies();
  };

  float out[DIM / 8][4] = {};
  float largest[2] = {-kLargest, -kLargest}, total[2] = {};  // the sum's part of this lane
  load_rows(shared->q, in.q, q, row);
  if (begin < end) load(begin);
  for (int64_t first = begin; first < end; first += COUNT) {
    auto& stage = shared->stage[(first - begin) / COUNT % 2];
    const auto mine = fetched;
    wait_for_copies<0>();
    __syncthreads();  // the tile is there, and the one that the next load replaces is read
    if (first + COUNT < end) load(first + COUNT);
    if (first == begin) normalize_rows(shared->q, shared->norm, length, in.normalize);
    shared->keys.hide(mine, stage.k, length);
    shared->keys.hide(mine, stage.v, width);
    shared->keys.prepare(mine, stage.k, length, in.normalize);
    __syncthreads();
    if (!shared->keys.any_alive()) continue;

    const int count = end - first < COUNT ? static_cast<int>(end - first) : COUNT;
    float scores[COUNT / 8][4];
    multiply_transposed<false>(scores, shared->q, stage.k, length, count);
    const float row_scale[2] = {temperature * scale_of<K>(shared->norm[own.row(0)]),
                                temperature * scale_of<K>(shared->norm[own.row(2)])};
    float raised[2] = {largest[0], largest[1]};
#pragma unroll
    for (int n = 0; n < COUNT / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = own.column(n, i);
        const float bias = shared->keys.bias[key];
        const float score =
            similarity_of<K>(scores[n][i], shared->keys.scale[key], in.normalize) * row_scale[i / 2] + bias;
        scores[n][i] = bias == -kInfinity ? -kInfinity : score;
        raised[i / 2] = fmaxf(raised[i / 2], scores[n][i]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      raised[half] = max_of_group(raised[half]);
      const float factor = __expf(largest[half] - raised[half]);
      largest[half] = raised[half];
      total[half] *= factor;
#pragma unroll
      for (int n = 0; n < DIM / 8; ++n) {
        out[n][2 * half] *= factor;
        out[n][2 * half + 1] *= factor;
      }
    }
#pragma unroll
    for (int n = 0; n < COUNT / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] = __expf(scores[n][i] - largest[i / 2]);
        total[i / 2] += scores[n][i];
      }
    }
    multiply_rows<Rounding::kTwoTerms>(out, scores, stage.v, width, count);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] = sum_of_group(total[half]);
    const int64_t n = row + own.row(2 * half);
    const bool writes = own.member == 0 && n < queries;
    if (p.splits > 1) {
      if (writes) p.statistics[2 * part * queries + n] = largest[half];
      if (writes) p.statistics[(2 * part + 1) * queries + n] = total[half];
      continue;
    }
    const float divisor = total[half] == 0 ? 1 : total[half];  // a row without keys has out = 0
#pragma unroll
    for (int i = 0; i < DIM / 8; ++i) {
      out[i][2 * half] /= divisor;
      out[i][2 * half + 1] /= divisor;
    }
    if (writes) p.log_sum_exp[matrix * queries + n] = total[half] == 0 ? -kInfinity : largest[half] + logf(divisor);
  }
  if (p.splits > 1) {
    store_rows(p.partials + part * queries * width, Dtype::kFloat32, row, queries, width, out);
    return;
  }
  store_matrix(p.out, in.q.dtype, matrix, row, queries, width, out);
  if (p.wide_out) store_matrix(p.wide_out, Dtype::kFloat32, matrix, row, queries, width, out);
}

constexpr int kCombineThreads = 256;

// Grid: B * H * N. Threads take `padded width` columns times as many groups of splits as fit.
__global__ void __launch_bounds__(kCombineThreads) masked_token_combine_kernel(const MaskedForward p) {
  struct Shared {
    float sum[kCombineThreads], total[kCombineThreads], largest[kCombineThreads / 32];
  };
  SHARED(Shared, shared);
  const int64_t queries = p.in.q.rows, row = blockIdx.x % queries, matrix = blockIdx.x / queries;
  const int width = p.in.v.columns, span = width <= 32 ? 32 : width <= 64 ? 64 : 128;
  const int groups = kCombineThreads / span, group = threadIdx.x / span, column = threadIdx.x % span;
  const float* statistics = p.statistics + matrix * p.splits * 2 * queries + row;
  const float* partials = p.partials + (matrix * p.splits * queries + row) * width + column;

  float largest = -kLargest;
  for (int64_t s = threadIdx.x; s < p.splits; s += kCombineThreads)
    largest = fmaxf(largest, __ldg(statistics + s * 2 * queries));
#pragma unroll
  for (int flip = 16; flip; flip /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, flip));
  if (threadIdx.x % 32 == 0) shared.largest[threadIdx.x / 32] = largest;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kCombineThreads / 32; ++warp) largest = fmaxf(largest, shared.largest[warp]);

  float sum = 0, total = 0;
#pragma unroll 8
  for (int64_t s = group; s < p.splits; s += groups) {
    const float factor = __expf(__ldg(statistics + s * 2 * queries) - largest);
    total += factor * __ldg(statistics + (s * 2 + 1) * queries);
    if (column < width) sum += factor * __ldg(partials + s * queries * width);
  }
  shared.sum[threadIdx.x] = sum;
  shared.total[threadIdx.x] = total;
  __syncthreads();
  if (group > 0 || column >= width) return;
  for (int g = 1; g < groups; ++g) {
    sum += shared.sum[g * span + column];
    total += shared.total[g * span + column];
  }
  const float divisor = total == 0 ? 1 : total, out = sum / divisor;
  const int64_t at = (matrix * queries + row) * width;
  store_pair(p.out, at, column, column + 1, out, 0, p.in.q.dtype);
  if (p.wide_out) p.wide_out[at + column] = out;
  if (column == 0) p.log_sum_exp[matrix * queries + row] = total == 0 ? -kInfinity : largest + logf(divisor);
}

}  // namespace restore_kernels::token

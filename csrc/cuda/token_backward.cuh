// Token attention, backward, under a mask and of the branches of top-k (token_weights.cuh). With dP = do vᵀ:
// dS = P (dP - r) where r = rowsum(P dP), dq = D_q (T dS k̂ - c q̂) where c = rowsum(T dS A) is zero where the
// norm is clamped; dk is its mirror image, dv = Pᵀ do, dmask_m = sum_n dS_nm / mask_m, dT = sum dS A.
//
// Schedule
//   token_grad_q_kernel   A block owns 64 queries of one head and one split of the keys, which it streams in
//                         tiles of 32: dq, r, the terms of dT. Under a mask r = rowsum(do out); of top-k's
//                         branches it takes a pass of its own over the keys.
//   token_grad_kv_kernel  A block owns 64 keys of one head and one split of the queries, which it streams in
//                         tiles of 32: dk, dv, dmask. It multiplies k qᵀ where the other kernels multiply
//                         q kᵀ, so that P and dS come out of the matrix instructions as they go into the next.
// and, in token_sums.cuh,
//   token_finish_kernel   With more than one split (few queries or few keys): adds up the splits' gradients
//                         of normalised rows, in order, and leads them through the norm.
//   token_sum_kernel, token_sum_splits_kernel  sums over rows and over splits.
// Scores are recomputed, to the same bits as in the forward pass: selections compare them.
//
// Bytes and operations: q, do once and k, v once per 64 queries; k, v once and q, do once per 64 keys, but for
// the first time from the L2 cache. 2 (2 D + E) and 4 (D + E) operations a score (Wide: three times as many,
// of tf32), two exponentials. With 16 queries and 65,536 keys of D = E = 48 in bfloat16 k and v are read twice
// and dk, dv written: 38 MB, 9 us on H200 at 4.3 TB/s, 21 us on A100. With many of both the products bound it:
// N = M = 4096, D = E = 32 are 4 GFLOP a head, some 13 us on H200 at 300 TFLOP/s. Not measured yet.
//
// Occupancy with DIM 64: 39 KiB of shared memory (Wide 71), up to 8 KiB more for branches, and at most 255
// registers a thread: two blocks (8 warps) a multiprocessor at least; one with DIM 128.
#pragma once

#include "token_weights.cuh"

namespace restore_kernels::token {

constexpr int kStreamed = 32;  // rows of a streamed tile

template <typename K, int DIM, typename Policy, int COUNT, int OWN, int KEYS>
struct BackwardTiles {
  Tile<K, kRows, DIM> first, second;  // owned: q and do, or k and v
  struct {
    Tile<K, kStreamed, DIM> first, second;
  } stage[2];
  float norm[OWN];
  Keys<K, KEYS> keys;
  typename Policy::template Rows<COUNT> rows;
};
template <typename K, int DIM, typename Policy>
using GradQTiles = BackwardTiles<K, DIM, Policy, kRows, kRows, kStreamed>;
template <typename K, int DIM, typename Policy>
using GradKvTiles = BackwardTiles<K, DIM, Policy, kStreamed, kStreamed, kRows>;
template <int DIM>
constexpr int kBackwardBlocks = DIM > 64 ? 1 : 2;

// Of the coefficients that multiply q and k: float16 has not the range of gradients over norms.
template <typename K>
constexpr Rounding kGradient = Rounding::kOnce;
template <>
constexpr Rounding kGradient<Narrow<float16>> = Rounding::kTf32;

__device__ __forceinline__ int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

// Grid: B * H * splits of the keys * tiles of queries, the tile running fastest.
template <typename K, int DIM, typename Policy>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<DIM>) token_grad_q_kernel(const Backward p) {
  using Shared = GradQTiles<K, DIM, Policy>;
  DYNAMIC_SHARED(Shared, shared);
  const Lane own;
  const Inputs& in = p.in;
  const int64_t queries = in.q.rows, tiles = (queries + kRows - 1) / kRows;
  const int64_t row = blockIdx.x % tiles * kRows, part = blockIdx.x / tiles;  // of (B * H, splits)
  const int64_t split = part % p.key_splits, matrix = part / p.key_splits;
  const int64_t batch = matrix / in.heads, head = matrix % in.heads;
  const char *k = in.k.head(batch, head), *v = in.v.head(batch, head);
  const float* mask = in.mask.data ? in.mask.head(batch, head) : nullptr;
  const float temperature = *in.temperature.head(batch, head);
  const int64_t begin = split * p.keys_per_split, end = smaller(begin + p.keys_per_split, in.k.rows);
  const int length = in.q.columns, width = in.v.columns;

  typename Keys<K, kStreamed>::Fetched fetched{};
  const auto load = [&](int64_t first) {
    auto& stage = shared->stage[(first - begin) / kStreamed % 2];
    fetched = Keys<K, kStreamed>::fetch(mask, in.mask.stride[2], first, end);
    load_rows(stage.first, in.k, k, first);
    load_rows(stage.second, in.v, v, first);
    commit_copies();
  };

  load_rows(shared->first, in.q, in.q.head(batch, head), row);
  load_rows(shared->second, p.grad_out, p.grad_out.head(batch, head), row);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  normalize_rows(shared->first, shared->norm, length, in.normalize);
  shared->rows.fetch(p, matrix, row, queries, true);
  if constexpr (!Policy::kSelects) {
    const char* out = p.out.head(batch, head);
    __syncthreads();  // the rows are fetched
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = own.row(2 * half);
      const int64_t n = row + r;
      float sum = 0;
      for (int c = own.member; n < queries && c < width; c += 4)
        sum += to_float(shared->second.row[r][c]) *
               load_float(out, n * p.out.stride[2] + c * p.out.stride[3], p.out.dtype);
      sum = sum_of_group(sum);
      if (own.member == 0) shared->rows.sum[r] = sum;
      if (own.member == 0 && n < queries && split == 0) p.row_sums[matrix * queries + n] = sum;
    }
  }

  // visit(products, grads, count): q kᵀ and dP of every tile with a key in it.
  const auto for_each_tile = [&](auto&& visit) {
    __syncthreads();  // the stages are free
    load(begin);
    for (int64_t first = begin; first < end; first += kStreamed) {
      auto& stage = shared->stage[(first - begin) / kStreamed % 2];
      const auto mine = fetched;
      wait_for_copies<0>();
      __syncthreads();
      if (first + kStreamed < end) load(first + kStreamed);
      shared->keys.hide(mine, stage.first, length);
      shared->keys.hide(mine, stage.second, width);
      shared->keys.prepare(mine, stage.first, length, in.normalize);
      __syncthreads();
      if (!shared->keys.any_alive()) continue;
      const int count = static_cast<int>(smaller(end - first, kStreamed));
      float products[kStreamed / 8][4], grads[kStreamed / 8][4];
      multiply_transposed<false>(products, shared->first, stage.first, length, count);
      multiply_transposed<false>(grads, shared->second, stage.second, width, count);
      visit(products, grads, first, count, stage.first);
    }
  };
  const auto score_of = [&](float similarity, int key, int i) {
    const float row_scale = temperature * scale_of<K>(shared->norm[own.row(i)]);
    const float bias = shared->keys.bias[key], score = __fmul_rn(similarity, row_scale);
    return bias == -kInfinity ? -kInfinity : Policy::kSelects ? score : score + bias;
  };

  if constexpr (Policy::kSelects) {
    float sums[kMostBranches][2] = {};
    for_each_tile([&](auto& scores, auto& terms, int64_t first, int, auto&) {
#pragma unroll
      for (int n = 0; n < kStreamed / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = own.column(n, i);
          const float similarity = similarity_of<K>(scores[n][i], shared->keys.scale[column], in.normalize);
          scores[n][i] = score_of(similarity, column, i);
          terms[n][i] *= __expf(scores[n][i] - shared->rows.reference[own.row(i)]);
        }
      }
#pragma unroll 1
      for (int j = 0; j < p.branches; ++j) {
        const Selection::Branch branch[2] = {shared->rows.branch[own.row(0)][j], shared->rows.branch[own.row(2)][j]};
        float part[2] = {};
#pragma unroll
        for (int n = 0; n < kStreamed / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (branch[i / 2].keeps(scores[n][i], first + own.column(n, i))) part[i / 2] += terms[n][i];
        }
#pragma unroll
        for (int other = 0; other < kMostBranches; ++other) {  // registers have no address
#pragma unroll
          for (int half = 0; half < 2; ++half)
            if (other == j) sums[other][half] += part[half] * branch[half].factor;
        }
      }
    });
    const float* weights = p.weights.head(batch, head);
#pragma unroll
    for (int j = 0; j < kMostBranches; ++j) {
      if (j >= p.branches) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = sum_of_group(sums[j][half]);
        const int r = own.row(2 * half);
        if (own.member > 0) continue;
        shared->rows.branch[r][j].sum = sum;
        shared->rows.branch[r][j].factor *= __ldg(weights + j * p.weights.stride[2]);
        if (row + r < queries) p.row_sums[(matrix * queries + row + r) * p.branches + j] = sum;
      }
    }
  }

  float grad_q[DIM / 8][4] = {}, terms[2] = {};  // terms of dS A before q's scale
  for_each_tile([&](auto& products, auto& grads, int64_t first, int count, auto& tile) {
#pragma unroll
    for (int n = 0; n < kStreamed / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = own.column(n, i);
        const float scale = shared->keys.scale[column];
        const float similarity = similarity_of<K>(products[n][i], scale, in.normalize);
        const float score = score_of(similarity, column, i);
        const float gradient = shared->rows.weigh(p, own.row(i), first + column, score, grads[n][i]).gradient;
        terms[i / 2] += gradient * similarity;
        grads[n][i] = K::kNarrow ? gradient * scale : gradient;
      }
    }
    multiply_rows<kGradient<K>>(grad_q, grads, tile, length, count);
  });

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = own.row(2 * half);
    const float term = sum_of_group(terms[half]) * scale_of<K>(shared->norm[r]);
    if (own.member == 0 && row + r < queries) p.temperature_terms[part * queries + row + r] = term;
  }
#pragma unroll
  for (auto& tile : grad_q) {
#pragma unroll
    for (float& x : tile) x *= temperature;
  }
  if (p.key_splits > 1) {
    store_rows(p.partial_q + part * queries * length, Dtype::kFloat32, row, queries, length, grad_q);
    return;
  }
  if (in.normalize) through_norm<K>(grad_q, shared->first, shared->norm, length);
  store_matrix(p.grad_q, in.q.dtype, matrix, row, queries, length, grad_q);
}

// Grid: B * H * splits of the queries * tiles of keys, the tile running fastest.
template <typename K, int DIM, typename Policy>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<DIM>) token_grad_kv_kernel(const Backward p) {
  using Shared = GradKvTiles<K, DIM, Policy>;
  DYNAMIC_SHARED(Shared, shared);
  const Lane own;
  const Inputs& in = p.in;
  const int64_t keys = in.k.rows, tiles = (keys + kRows - 1) / kRows;
  const int64_t row = blockIdx.x % tiles * kRows, part = blockIdx.x / tiles;  // of (B * H, splits)
  const int64_t split = part % p.query_splits, matrix = part / p.query_splits;
  const int64_t batch = matrix / in.heads, head = matrix % in.heads;
  const char *q = in.q.head(batch, head), *grad_out = p.grad_out.head(batch, head);
  const float* mask = in.mask.data ? in.mask.head(batch, head) : nullptr;
  const float temperature = *in.temperature.head(batch, head);
  const int64_t begin = split * p.queries_per_split, end = smaller(begin + p.queries_per_split, in.q.rows);
  const int length = in.q.columns, width = in.v.columns;

  const auto load = [&](int64_t first) {
    auto& stage = shared->stage[(first - begin) / kStreamed % 2];
    load_rows(stage.first, in.q, q, first);
    load_rows(stage.second, p.grad_out, grad_out, first);
    commit_copies();
  };
  const auto fetched = Keys<K, kRows>::fetch(mask, in.mask.stride[2], row, keys);
  load_rows(shared->first, in.k, in.k.head(batch, head), row);
  load_rows(shared->second, in.v, in.v.head(batch, head), row);
  load(begin);
  wait_for_copies<0>();
  __syncthreads();
  shared->keys.hide(fetched, shared->first, length);
  shared->keys.hide(fetched, shared->second, width);
  shared->keys.prepare(fetched, shared->first, length, in.normalize);
  __syncthreads();

  float grad_k[DIM / 8][4] = {}, grad_v[DIM / 8][4] = {}, grad_bias[2] = {};  // of the mask's logarithm
  for (int64_t first = begin; first < end && shared->keys.any_alive(); first += kStreamed) {
    auto& stage = shared->stage[(first - begin) / kStreamed % 2];
    wait_for_copies<0>();
    __syncthreads();
    if (first + kStreamed < end) load(first + kStreamed);
    normalize_rows(stage.first, shared->norm, length, in.normalize);
    shared->rows.fetch(p, matrix, first, end, false);
    __syncthreads();

    const int count = static_cast<int>(smaller(end - first, kStreamed));
    float products[kStreamed / 8][4], grads[kStreamed / 8][4];  // k qᵀ, dPᵀ
    multiply_transposed<true>(products, shared->first, stage.first, length, count);
    multiply_transposed<true>(grads, shared->second, stage.second, width, count);
#pragma unroll
    for (int n = 0; n < kStreamed / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int query = own.column(n, i), key = own.row(i);
        const float row_scale = temperature * scale_of<K>(shared->norm[query]);
        const float similarity = similarity_of<K>(products[n][i], shared->keys.scale[key], in.normalize);
        const float bias = shared->keys.bias[key];
        float score = __fmul_rn(similarity, row_scale);
        if constexpr (!Policy::kSelects) score += bias;
        if (bias == -kInfinity) score = -kInfinity;
        const Weight weight = shared->rows.weigh(p, query, row + key, score, grads[n][i]);
        grad_bias[i / 2] += weight.gradient;
        products[n][i] = weight.probability;
        grads[n][i] = weight.gradient * row_scale;
      }
    }
    multiply_rows<Rounding::kOnce>(grad_v, products, stage.second, width, count);
    multiply_rows<kGradient<K>>(grad_k, grads, stage.first, length, count);
  }
  wait_for_copies<0>();

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = sum_of_group(grad_bias[half]);
    const int64_t m = row + own.row(2 * half);
    if (!p.grad_mask || own.member > 0 || m >= keys) continue;
    const float value = __ldg(mask + m * in.mask.stride[2]);
    p.grad_mask[part * keys + m] = value > 0 ? sum / value : 0.0f;
  }
  if (p.query_splits > 1) {
    store_rows(p.partial_k + part * keys * length, Dtype::kFloat32, row, keys, length, grad_k);
    store_rows(p.partial_v + part * keys * width, Dtype::kFloat32, row, keys, width, grad_v);
    return;
  }
  if (in.normalize) through_norm<K>(grad_k, shared->first, shared->keys.norm, length);
  store_matrix(p.grad_k, in.k.dtype, matrix, row, keys, length, grad_k);
  store_matrix(p.grad_v, in.v.dtype, matrix, row, keys, width, grad_v);
}

}  // namespace restore_kernels::token

// Top-k token attention, forward: out = (sum_j w_j softmax_j(S)) v, S = temperature * q̂ k̂ᵀ, where branch j
// keeps the kept[j] largest scores of a row, of equal ones those of the lower index; q (B, H, N, D),
// k (B, H, M, D), v (B, H, M, E) with D, E <= DIM; float32, bfloat16, float16. No score is stored.
//
// Schedule
//   topk_token_kernel  A block owns 64 queries of one head, 16 a warp, and streams tiles of keys (64 Narrow,
//                      32 Wide) past them, several times, computing the same scores each time:
//     search   per branch: a radix select of the bit patterns of the scores, which are ordered as unsigned
//              numbers once negative ones are complemented. A pass counts, in a histogram per row, the next
//              seven bits of the scores that share the bits found so far; then the warp finds the digit at
//              which as many scores as are wanted have been seen. It ends when no score in any row of the
//              block is left in doubt: after three or four passes on continuous data, after five at most;
//              then equal scores straddle the limit.
//     measure  per branch, one pass: the smallest kept score, its last kept index, the sum of exponentials.
//     output   one pass for all branches: one exponential a score, times the sum of the factors
//              w_j exp(r - log_sum_exp_j) of the branches that keep it; one product with v.
//   One tile alone (windows) stays in shared memory through the passes.
// The counts are whole numbers, so that atomic additions in any order give the same.
//
// Bytes and operations: q, out once; k once a pass and v once per 64 queries, but for the first time from the
// L2 cache. 2 D operations a score and pass, and 2 E in the last. Beside them some fifteen instructions and an
// atomic addition in shared memory a score and search pass: about 500 cycles of a multiprocessor for 64 x 64
// scores, so that N = M = 4096 takes some 60 us a head and branch on H200 in six passes: that bounds it, not
// memory. Not measured yet.
//
// Occupancy with DIM 64: 71 KiB of shared memory (Wide 79) and at most 168 registers a thread: two blocks (8
// warps) a multiprocessor on A100 and H200, three Narrow ones on H200.
#pragma once

#include "token_weights.cuh"

namespace restore_kernels::token {

struct TopKForward {
  Inputs in;
  PerHead weights;  // (B, H, J)
  int branches;
  int64_t kept[kMostBranches];
  void* out;           // (B, H, N, E)
  float* threshold;    // (B, H, N, J): the smallest kept score
  int* last_tie;       // the last kept index among those equal to it
  float* log_sum_exp;  // of the kept scores
};

constexpr int kBins = 128, kDigits = 5;
__device__ __forceinline__ int digit_shift(int digit) { return digit < kDigits - 1 ? 25 - 7 * digit : 0; }
__device__ __forceinline__ int digit_bits(int digit) { return digit < kDigits - 1 ? 7 : 4; }

// Ordered as the scores are; -0 counts as 0, which it equals, and NaN as the largest.
__device__ __forceinline__ unsigned to_ordered(float x) {
  const unsigned bits = x == 0 ? 0 : __float_as_uint(x);
  return x != x ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(unsigned x) {
  return __uint_as_float(x & 0x80000000u ? x & 0x7fffffffu : ~x);
}

template <typename K, int DIM>
struct TopKTiles {
  static constexpr int kCount = K::kNarrow ? 64 : 32;  // keys of a tile
  Tile<K, kRows, DIM> q;
  Tile<K, kCount, DIM> k[2];
  union {
    Tile<K, kCount, DIM> v[2];
    unsigned histogram[kRows][kBins];
  };
  float norm[kRows];
  Keys<K, kCount> keys;
  Selection::Rows<kRows> rows;
  // Of the search, per row: the bits found; how many scores of these bits are wanted; whether all of them are,
  // so that those from `bits` on are kept.
  unsigned bits[kRows];
  int wanted[kRows];
  bool found[kRows];
  int last_tie[kRows];
  int open[kWarps];  // whether a warp searches on
};

// Finds the next digit of one row, which this warp owns. Lanes take four bins each.
template <typename Shared>
__device__ __forceinline__ void find_digit(Shared& shared, int row, int digit) {
  const int lane = threadIdx.x % 32;
  const unsigned* bins = &shared.histogram[row][4 * lane];
  const unsigned count[4] = {bins[0], bins[1], bins[2], bins[3]};
  const unsigned sum = count[0] + count[1] + count[2] + count[3];
  unsigned reached = sum;  // scores in this lane's bins and above
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const unsigned other = __shfl_sync(0xffffffff, reached, (lane + offset) % 32);
    if (lane + offset < 32) reached += other;
  }
  const unsigned wanted = shared.wanted[row];
  unsigned above = reached - sum;
  __syncwarp();
  if (above >= wanted || reached < wanted) return;
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    if (above >= wanted) break;
    if (above + count[i] >= wanted) {
      shared.bits[row] = shared.bits[row] << digit_bits(digit) | (4 * lane + i);
      shared.wanted[row] = wanted - above;
      if (count[i] == wanted - above) {
        shared.found[row] = true;
        shared.bits[row] <<= digit_shift(digit);
      }
      break;
    }
    above += count[i];
  }
}

// Grid: B * H * tiles of queries, the tile running fastest.
template <typename K, int DIM>
__global__ void __launch_bounds__(kThreads, DIM > 64 ? 1 : 3) topk_token_kernel(const TopKForward p) {
  using Shared = TopKTiles<K, DIM>;
  constexpr int COUNT = Shared::kCount;
  DYNAMIC_SHARED(Shared, shared);
  const Lane own;
  const Inputs& in = p.in;
  const int64_t queries = in.q.rows, keys = in.k.rows, tiles = (queries + kRows - 1) / kRows;
  const int64_t row = blockIdx.x % tiles * kRows, matrix = blockIdx.x / tiles;
  const int64_t batch = matrix / in.heads, head = matrix % in.heads;
  const char *k = in.k.head(batch, head), *v = in.v.head(batch, head);
  const float temperature = *in.temperature.head(batch, head);
  const int length = in.q.columns, width = in.v.columns;
  const bool one_tile = keys <= COUNT;
  bool resident = false;

  load_rows(shared->q, in.q, in.q.head(batch, head), row);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  normalize_rows(shared->q, shared->norm, length, in.normalize);
  __syncthreads();
  const float row_scale[2] = {temperature * scale_of<K>(shared->norm[own.row(0)]),
                              temperature * scale_of<K>(shared->norm[own.row(2)])};

  // visit(scores, first, count) for every tile; with values, their tile is in v[step % 2].
  const auto for_each_tile = [&](bool values, auto&& visit) {
    const auto load = [&](int64_t first) {
      const int stage = first / COUNT % 2;
      if (!resident) load_rows(shared->k[stage], in.k, k, first);
      if (values) load_rows(shared->v[stage], in.v, v, first);
      commit_copies();
    };
    __syncthreads();  // the stages are free
    load(0);
    for (int64_t first = 0; first < keys; first += COUNT) {
      const int stage = first / COUNT % 2;
      wait_for_copies<0>();
      __syncthreads();
      if (first + COUNT < keys) load(first + COUNT);
      if (!resident) {
        const auto valid = Keys<K, COUNT>::fetch(nullptr, 0, first, keys);
        shared->keys.prepare(valid, shared->k[stage], length, in.normalize);
      }
      __syncthreads();
      const int count = keys - first < COUNT ? static_cast<int>(keys - first) : COUNT;
      float scores[COUNT / 8][4];
      multiply_transposed<false>(scores, shared->q, shared->k[stage], length, count);
#pragma unroll
      for (int n = 0; n < COUNT / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float scale = shared->keys.scale[own.column(n, i)];
          scores[n][i] = __fmul_rn(similarity_of<K>(scores[n][i], scale, in.normalize), row_scale[i / 2]);
        }
      }
      visit(scores, first, count, stage);
    }
    resident = one_tile;
  };

  for (int j = 0; j < p.branches; ++j) {
    const int64_t kept = p.kept[j];
    if (own.lane < 16) {
      const int r = 16 * own.warp + own.lane;
      shared->bits[r] = 0;
      shared->wanted[r] = static_cast<int>(kept);
      shared->found[r] = kept == keys || row + r >= queries;  // from 0 on, which is everything
    }
    for (int digit = 0; digit < kDigits && kept < keys; ++digit) {
      __syncthreads();  // the values are used, and whether rows are open is read
      for (int i = own.lane; i < 16 * kBins; i += 32) shared->histogram[16 * own.warp + i / kBins][i % kBins] = 0;
      __syncwarp();
      const unsigned bits[2] = {shared->bits[own.row(0)], shared->bits[own.row(2)]};
      const bool open[2] = {!shared->found[own.row(0)], !shared->found[own.row(2)]};
      const int shift = digit_shift(digit), digit_mask = (1 << digit_bits(digit)) - 1;
      for_each_tile(false, [&](auto& scores, int64_t, int count, int) {
#pragma unroll
        for (int n = 0; n < COUNT / 8; ++n) {
          if (8 * n >= count) break;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const unsigned ordered = to_ordered(scores[n][i]);
            const bool shares = digit == 0 || ordered >> shift >> digit_bits(digit) == bits[i / 2];
            if (open[i / 2] && shares && own.column(n, i) < count)
              atomicAdd(&shared->histogram[own.row(i)][ordered >> shift & digit_mask], 1u);
          }
        }
      });
      __syncwarp();
      bool any = false;
      for (int r = 16 * own.warp; r < 16 * own.warp + 16; ++r) {
        if (shared->found[r]) continue;
        find_digit(*shared, r, digit);
        __syncwarp();
        any |= !shared->found[r];
      }
      if (own.lane == 0) shared->open[own.warp] = any;
      __syncthreads();
      if (!(shared->open[0] | shared->open[1] | shared->open[2] | shared->open[3])) break;
    }
    __syncwarp();

    // Kept are the scores from `bound` on and, of those equal to `tie` where the limit is straddled, the first.
    unsigned bound[2];
    float tie[2], largest[2] = {-kLargest, -kLargest}, total[2] = {}, threshold[2] = {kInfinity, kInfinity};
    int wanted[2], seen[2] = {}, last[2] = {-1, -1};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = own.row(2 * half);
      const unsigned bits = shared->bits[r];
      wanted[half] = shared->found[r] ? 0 : shared->wanted[r];
      tie[half] = from_ordered(bits);
      bound[half] = wanted[half] ? bits + 1 : bits;
    }
    const bool straddled = __any_sync(0xffffffff, wanted[0] | wanted[1]);
    for_each_tile(false, [&](auto& scores, int64_t first, int count, int) {
      float raised[2] = {largest[0], largest[1]};  // of this lane's scores
#pragma unroll
      for (int n = 0; n < COUNT / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (own.column(n, i) < count) raised[i / 2] = fmaxf(raised[i / 2], scores[n][i]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        total[half] *= __expf(largest[half] - raised[half]);
        largest[half] = raised[half];
      }
#pragma unroll
      for (int n = 0; n < COUNT / 8; ++n) {
        if (8 * n >= count) break;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float score = scores[n][i];
          const int half = i / 2, key = static_cast<int>(first) + own.column(n, i);
          if (own.column(n, i) >= count || to_ordered(score) < bound[half]) continue;
          total[half] += __expf(score - largest[half]);
          if (score <= threshold[half]) last[half] = key;  // lanes meet their keys in order
          threshold[half] = fminf(threshold[half], score);
        }
        if (!straddled) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const auto equal = [&](int i) { return own.column(n, i) < count && scores[n][2 * half + i] == tie[half]; };
          const bool mine[2] = {equal(0), equal(1)};
          const unsigned even = __ballot_sync(0xffffffff, mine[0]) >> 4 * own.group & 15;
          const unsigned odd = __ballot_sync(0xffffffff, mine[1]) >> 4 * own.group & 15;
          const unsigned before = (1 << own.member) - 1;
          int rank = seen[half] + __popc(even & before) + __popc(odd & before);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            rank += mine[i];
            if (mine[i] && rank == wanted[half])
              shared->last_tie[own.row(2 * half)] = static_cast<int>(first) + own.column(n, i);
          }
          seen[half] += __popc(even) + __popc(odd);
        }
      }
    });
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = own.row(2 * half);
      const float common = max_of_group(largest[half]);
      float sum = sum_of_group(total[half] * __expf(largest[half] - common));
      const float smallest = -max_of_group(-threshold[half]);
      // fmaxf of what is exact in float: the last index is sought among integers.
      int latest = threshold[half] == smallest ? last[half] : -1;
#pragma unroll
      for (int flip = 1; flip < 4; flip *= 2) {
        const int other = __shfl_xor_sync(0xffffffff, latest, flip);
        latest = latest > other ? latest : other;
      }
      if (wanted[half]) sum += static_cast<float>(wanted[half]) * __expf(tie[half] - common);
      const float least = wanted[half] ? tie[half] : smallest;
      latest = wanted[half] ? shared->last_tie[r] : latest;
      if (own.member > 0) continue;
      const float log_sum_exp = common + logf(sum);
      shared->rows.branch[r][j] = {least, latest, log_sum_exp, 0};
      if (row + r >= queries) continue;
      const int64_t at = (matrix * queries + row + r) * p.branches + j;
      p.threshold[at] = least;
      p.last_tie[at] = latest;
      p.log_sum_exp[at] = log_sum_exp;
    }
  }

  __syncwarp();
  if (own.lane < 16) {
    const int r = 16 * own.warp + own.lane;
    auto& branch = shared->rows.branch[r];
    float reference = branch[0].factor;  // each a log_sum_exp yet
    for (int j = 1; j < p.branches; ++j) reference = fmaxf(reference, branch[j].factor);
    const float* weights = p.weights.head(batch, head);
    for (int j = 0; j < p.branches; ++j)
      branch[j].factor = __ldg(weights + j * p.weights.stride[2]) * __expf(reference - branch[j].factor);
    shared->rows.reference[r] = reference;
  }
  __syncwarp();
  float out[DIM / 8][4] = {};
  for_each_tile(true, [&](auto& scores, int64_t first, int count, int stage) {
#pragma unroll
    for (int n = 0; n < COUNT / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = own.column(n, i), r = own.row(i);
        float factors = 0;
#pragma unroll 1
        for (int j = 0; j < p.branches; ++j) {
          const auto branch = shared->rows.branch[r][j];
          if (branch.keeps(scores[n][i], first + column)) factors += branch.factor;
        }
        scores[n][i] = column < count ? __expf(scores[n][i] - shared->rows.reference[r]) * factors : 0.0f;
      }
    }
    multiply_rows<Rounding::kOnce>(out, scores, shared->v[stage], width, count);
  });
  store_matrix(p.out, in.q.dtype, matrix, row, queries, width, out);
}

}  // namespace restore_kernels::token

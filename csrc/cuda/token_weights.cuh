// How the backward pass of token attention finds the probability of a score and the gradient of the score,
// from what is known of its row: one policy for attention under a mask, one for the branches of top-k.
#pragma once

#include "token_keys.cuh"

namespace restore_kernels::token {

constexpr int kMostBranches = 8;

struct Backward {
  Inputs in;
  Matrices grad_out;            // (B, H, N, E)
  const float* log_sum_exp;     // (B, H, N), (B, H, N, J)
  float* row_sums;              // rowsum(P dP), of every branch: (B, H, N), (B, H, N, J)
  Matrices out;                 // masked: (B, H, N, E) in float32
  const float* threshold;       // top-k: (B, H, N, J)
  const int* last_tie;          // top-k: (B, H, N, J)
  PerHead weights;              // top-k: (B, H, J)
  int branches;
  void *grad_q, *grad_k, *grad_v;
  float* grad_mask;             // (B * H, splits of the queries, M); nullptr without a mask
  float* temperature_terms;     // (B * H, splits of the keys, N)
  int64_t key_splits, keys_per_split, query_splits, queries_per_split;
  float *partial_q, *partial_k, *partial_v;  // (B * H, splits, rows, columns), with more than one split
};

struct Weight {
  float probability, gradient;  // P; dS from dP
};

// P = exp(S - log_sum_exp), dS = P (dP - r).
struct Softmax {
  static constexpr bool kSelects = false;

  template <int COUNT>
  struct Rows {
    float reference[COUNT], sum[COUNT];

    // What is known of rows [first, first + COUNT) of a head, sums unless they are yet to be found
    // (`first_pass`); outside it, probabilities of 0.
    __device__ __forceinline__ void fetch(const Backward& p, int64_t matrix, int64_t first, int64_t end,
                                          bool first_pass) {
      for (int r = threadIdx.x; r < COUNT; r += kThreads) {
        const int64_t at = matrix * p.in.q.rows + first + r;
        const bool inside = first + r < end;
        const float log_sum_exp = inside ? __ldg(p.log_sum_exp + at) : -kInfinity;
        reference[r] = log_sum_exp == -kInfinity ? kInfinity : log_sum_exp;
        sum[r] = inside && !first_pass ? p.row_sums[at] : 0.0f;
      }
    }

    __device__ __forceinline__ Weight weigh(const Backward&, int row, int64_t, float score, float grad) const {
      const float probability = __expf(score - reference[row]);
      return {probability, probability * (grad - sum[row])};
    }
  };
};

// The branches share one exponential: w_j P_j = exp(S - r) w_j exp(r - log_sum_exp_j), where r is the largest
// log_sum_exp. A branch keeps scores above its threshold, and those at it up to the index last_tie.
struct Selection {
  static constexpr bool kSelects = true;

  struct alignas(16) Branch {
    float threshold;
    int last_tie;
    float factor, sum;

    __device__ __forceinline__ bool keeps(float score, int64_t key) const {
      return score > threshold || (score == threshold && key <= last_tie);
    }
  };

  template <int COUNT>
  struct Rows {
    float reference[COUNT];
    Branch branch[COUNT][kMostBranches];

    // In the first pass the factors lack their weights besides.
    __device__ __forceinline__ void fetch(const Backward& p, int64_t matrix, int64_t first, int64_t end,
                                          bool first_pass) {
      const float* weights = p.weights.head(matrix / p.in.heads, matrix % p.in.heads);
      for (int r = threadIdx.x; r < COUNT; r += kThreads) {
        const int64_t at = (matrix * p.in.q.rows + first + r) * p.branches;
        const bool inside = first + r < end;
        float largest = inside ? __ldg(p.log_sum_exp + at) : kInfinity;
        for (int j = 1; inside && j < p.branches; ++j) largest = fmaxf(largest, __ldg(p.log_sum_exp + at + j));
        reference[r] = largest;
        for (int j = 0; j < p.branches; ++j) {
          if (!inside) {
            branch[r][j] = {kInfinity, -1, 0, 0};
            continue;
          }
          const float factor = __expf(largest - __ldg(p.log_sum_exp + at + j));
          const float weight = first_pass ? 1.0f : __ldg(weights + j * p.weights.stride[2]);
          branch[r][j] = {__ldg(p.threshold + at + j), __ldg(p.last_tie + at + j), weight * factor,
                          first_pass ? 0.0f : p.row_sums[at + j]};
        }
      }
    }

    __device__ __forceinline__ Weight weigh(const Backward& p, int row, int64_t key, float score, float grad) const {
      float factors = 0, gradients = 0;
#pragma unroll 1
      for (int j = 0; j < p.branches; ++j) {
        const Branch b = branch[row][j];
        if (!b.keeps(score, key)) continue;
        factors += b.factor;
        gradients += b.factor * (grad - b.sum);
      }
      const float exponential = __expf(score - reference[row]);
      return {exponential * factors, exponential * gradients};
    }
  };
};

}  // namespace restore_kernels::token

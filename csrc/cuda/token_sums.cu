// Launches of the sums of token attention's backward pass.
#include "token_sums.cuh"

#include "launch.h"
#include "token_sums.h"

namespace restore_kernels::token {

void finish_gradient(const float* parts, const Matrices& x, void* grad, int64_t matrices, int64_t heads,
                     int64_t splits, bool normalize) {
  const int64_t blocks = (matrices * x.rows + kWarps - 1) / kWarps;
  launch(token_finish_kernel, blocks, kThreads, 0, parts, x, grad, matrices, heads, splits, normalize);
}

void sum_rows(const float* x, float* sums, int64_t outer, int64_t length, int64_t inner) {
  launch(token_sum_kernel, outer * inner, kThreads, 0, x, sums, length, inner);
}

void sum_splits(const float* x, float* sums, int64_t outer, int64_t splits, int64_t inner) {
  launch(token_sum_splits_kernel, (outer * inner + kThreads - 1) / kThreads, kThreads, 0, x, sums, outer, splits,
         inner);
}

}  // namespace restore_kernels::token

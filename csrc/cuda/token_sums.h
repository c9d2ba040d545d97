// Sums of token attention's backward pass, launched (token_sums.cuh).
#pragma once

#include "token_keys.cuh"

namespace restore_kernels::token {

// grad (B, H, rows, columns) of x from the parts (B * H, splits, rows, columns) of its normalised rows' gradient.
void finish_gradient(const float* parts, const Matrices& x, void* grad, int64_t matrices, int64_t heads,
                     int64_t splits, bool normalize);

// sums (outer, inner) of x (outer, length, inner): of few long sums, of many short ones.
void sum_rows(const float* x, float* sums, int64_t outer, int64_t length, int64_t inner);
void sum_splits(const float* x, float* sums, int64_t outer, int64_t splits, int64_t inner);

}  // namespace restore_kernels::token

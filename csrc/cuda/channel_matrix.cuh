// Products of the small matrices of channel attention, for the output projection W: M = W P, dP = Wᵀ dM,
// dW = sum over the batch of dM Pᵀ. In float32, whatever the matrices are.
//
// Schedule. A block owns 32 x 32 of one product, a thread eight entries of a column. 2 C_out C² operations a
// head: at C_out = 384 and C = 48, 1.8 million for 340 KB, so arithmetic (60 TFLOP/s on H200, 19 on A100) or
// rather the latency of shared memory is the bound. Not measured yet.
#pragma once

#include "channel_rows.cuh"

namespace restore_kernels::channel {

constexpr int kMatrixBlock = 32;

struct MatrixProduct {
  Matrices a, b, out;  // (B, H, rows, inner), (B, H, inner, columns), (B, H, rows, columns)
  int64_t heads;
  int64_t terms;  // of the batch that are added up; the grid has one batch of sums
  int rows, columns, inner;
};

struct MatrixStorage {
  float a[kMatrixBlock][kMatrixBlock + 1], b[kMatrixBlock][kMatrixBlock + 1];
};

// Grid: B * H * tiles of the product.
__global__ void __launch_bounds__(kThreads) channel_matrix_product_kernel(const MatrixProduct p) {
  SHARED(MatrixStorage, storage);
  constexpr int per_thread = kMatrixBlock * kMatrixBlock / kThreads;
  const int row_tiles = (p.rows + kMatrixBlock - 1) / kMatrixBlock;
  const int column_tiles = (p.columns + kMatrixBlock - 1) / kMatrixBlock;
  const int first_column = blockIdx.x % column_tiles * kMatrixBlock;
  const int first_row = blockIdx.x / column_tiles % row_tiles * kMatrixBlock;
  const int64_t matrix = blockIdx.x / (column_tiles * row_tiles), batch = matrix / p.heads, head = matrix % p.heads;
  const int column = threadIdx.x % 32, row = threadIdx.x / 32 * per_thread;

  float sum[per_thread] = {};
  for (int64_t term = batch; term < batch + p.terms; ++term) {
    for (int start = 0; start < p.inner; start += kMatrixBlock) {
      __syncthreads();  // the tiles before are read
#pragma unroll
      for (int i = 0; i < per_thread; ++i) {
        const int r = row + i, a_row = first_row + r, a_column = start + column, b_row = start + r;
        const bool in_a = a_row < p.rows && a_column < p.inner, in_b = b_row < p.inner && first_column + column < p.columns;
        storage.a[r][column] = in_a ? p.a.load(p.a.offset(term, head, a_row, a_column)) : 0;
        storage.b[r][column] = in_b ? p.b.load(p.b.offset(term, head, b_row, first_column + column)) : 0;
      }
      __syncthreads();
#pragma unroll 8
      for (int k = 0; k < kMatrixBlock; ++k) {
        const float b = storage.b[k][column];
#pragma unroll
        for (int i = 0; i < per_thread; ++i) sum[i] += storage.a[row + i][k] * b;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < per_thread; ++i) {
    if (first_row + row + i < p.rows && first_column + column < p.columns)
      p.out.store(p.out.offset(batch, head, first_row + row + i, first_column + column), sum[i]);
  }
}

}  // namespace restore_kernels::channel

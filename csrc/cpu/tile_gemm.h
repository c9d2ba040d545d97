// Matrix products of cache-resident tiles: C (+)= A B, accumulated in registers.
//
// One micro-kernel serves every product of the CPU backend. It holds kRows x kVectors accumulators,
// reads B by whole vectors and A one element at a time, so A may have any strides: A and its
// transpose are equally good. What a caller wants as a transposed B it packs once per tile
// (tile_io.h); that costs a vector operation per vector of B against kRows multiply-adds.
//
// Bound: one multiply-add instruction per cycle. A step of the inner loop issues kRows * kVectors of
// them for kRows + kVectors loads.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>

#include "matrix.h"
#include "prefetch.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {

// What is added to a product: row i of `matrix` times scale[i] (1 without scale); nothing without data.
template <typename T>
struct Addend {
  Matrix<const T> matrix{nullptr, 0};
  const T* scale = nullptr;

  Addend from(int64_t i, int64_t j) const {
    return {matrix.data ? matrix.from(i, j) : matrix, scale ? scale + i : nullptr};
  }
};

namespace gemm {

// Accumulators, a row of B and one broadcast element fit the register file: 32 registers with
// AVX-512, 16 without.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kRows = 8, kVectors = 3;
#else
constexpr int kRows = 4, kVectors = 3;
#endif
constexpr int kRemainder = 2;  // row blocks of 2, then single rows, finish what kRows leaves

static_assert(kVectors == 3, "multiply() finishes with one to three vectors");

// What is done with an element of A, an element of B and their sum.
struct MultiplyAdd {
  template <typename Vec>
  Vec operator()(const Vec& a, const Vec& b, const Vec& sum) const {
    return at::vec::fmadd(a, b, sum);
  }
};

// Steps of the inner loop, and how many of them come between two calls of `idle`.
struct Depth {
  int64_t steps, stretch;
};

// `full`: the last vector of a row is whole; otherwise only its first `last` elements exist. It must be
// known at compile time: where it is not, the compiler keeps the accumulators in memory.
template <typename T, typename Fma, int rows, int vectors, bool full>
inline __attribute__((always_inline)) void micro_kernel(
    Matrix<const T> a, Matrix<const T> b, Matrix<T> c, Depth depth, Addend<T> addend, int64_t last, Prefetches& idle) {
  using Vec = at::vec::Vectorized<T>;
  auto load = [last](const T* p, int v) {
    return (full || v + 1 < vectors) ? Vec::loadu(p + v * Vec::size()) : Vec::loadu(p + v * Vec::size(), last);
  };
  Vec sum[rows][vectors];
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < vectors; ++v) sum[i][v] = Vec(T(0));
  const T* b_row = b.data;
  const T* a_column = a.data;
  for (int64_t begin = 0; begin < depth.steps; begin += depth.stretch) {
    const int64_t end = std::min(depth.steps, begin + depth.stretch);
    for (int64_t k = begin; k < end; ++k, b_row += b.row, a_column += a.col) {
      Vec b_k[vectors];
      for (int v = 0; v < vectors; ++v) b_k[v] = load(b_row, v);
      for (int i = 0; i < rows; ++i) {
        const Vec a_ik(a_column[i * a.row]);
        for (int v = 0; v < vectors; ++v) sum[i][v] = Fma()(a_ik, b_k[v], sum[i][v]);
      }
    }
    idle();
  }
  // Added at the end, not started from: long sums are then sums of short ones, which round less.
  if (addend.matrix.data)
    for (int i = 0; i < rows; ++i) {
      const Vec scale(addend.scale ? addend.scale[i] : T(1));
      for (int v = 0; v < vectors; ++v)
        sum[i][v] = at::vec::fmadd(scale, load(addend.matrix.data + i * addend.matrix.row, v), sum[i][v]);
    }
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < vectors; ++v) {
      T* p = c.data + i * c.row + v * Vec::size();
      if (full || v + 1 < vectors) sum[i][v].store(p);
      else sum[i][v].store(p, last);
    }
}

template <typename T, typename Fma, int vectors, bool full>
void row_blocks(Matrix<const T> a, Matrix<const T> b, Matrix<T> c, int64_t rows, Depth depth,
                Addend<T> addend, int64_t last, Prefetches& idle) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    micro_kernel<T, Fma, kRows, vectors, full>(a.from(i, 0), b, c.from(i, 0), depth, addend.from(i, 0), last, idle);
  for (; i + kRemainder <= rows; i += kRemainder)
    micro_kernel<T, Fma, kRemainder, vectors, full>(a.from(i, 0), b, c.from(i, 0), depth, addend.from(i, 0), last, idle);
  for (; i < rows; ++i)
    micro_kernel<T, Fma, 1, vectors, full>(a.from(i, 0), b, c.from(i, 0), depth, addend.from(i, 0), last, idle);
}

// The last columns, `vectors` of them, of the last vector `last` elements.
template <typename T, typename Fma, int vectors>
void rest(Matrix<const T> a, Matrix<const T> b, Matrix<T> c, int64_t rows, int64_t last, Depth depth,
          Addend<T> addend, Prefetches& idle) {
  if (last == at::vec::Vectorized<T>::size()) row_blocks<T, Fma, vectors, true>(a, b, c, rows, depth, addend, last, idle);
  else row_blocks<T, Fma, vectors, false>(a, b, c, rows, depth, addend, last, idle);
}

}  // namespace gemm

// c = a b + addend, with a (rows x steps), b (steps x columns), c and addend (rows x columns), and
// b.col == c.col == addend.matrix.col == 1. The addend may be c itself.
// `idle` is done meanwhile, evenly: the memory system has time for something else.
// With another Fma an element of A and B may hold what that makes of it, see bfloat16_pairs.h.
template <typename T, typename Fma = gemm::MultiplyAdd>
void multiply(Matrix<const T> a, Matrix<const T> b, Matrix<T> c, int64_t rows, int64_t columns, int64_t steps,
              Addend<T> addend = {}, Prefetches idle = {}) {
  constexpr int64_t width = at::vec::Vectorized<T>::size(), panel = gemm::kVectors * width;
  const gemm::Depth depth{steps, idle.spread(ceil_div(rows, gemm::kRows) * ceil_div(columns, panel), steps)};
  // One vector left alone would wait for its own sums: the last four are two and two.
  const int64_t in_panels = columns >= panel + width && columns % panel == width ? columns - panel - width : columns;
  int64_t j = 0;
  for (; j + panel <= in_panels; j += panel)
    gemm::row_blocks<T, Fma, gemm::kVectors, true>(a, b.from(0, j), c.from(0, j), rows, depth, addend.from(0, j), width, idle);
  if (in_panels < columns) {
    gemm::row_blocks<T, Fma, 2, true>(a, b.from(0, j), c.from(0, j), rows, depth, addend.from(0, j), width, idle);
    j += 2 * width;
  }
  const int64_t left = columns - j, whole = left > 0 ? (left - 1) / width : -1, last = left - whole * width;
  if (whole == 2) gemm::rest<T, Fma, 3>(a, b.from(0, j), c.from(0, j), rows, last, depth, addend.from(0, j), idle);
  else if (whole == 1) gemm::rest<T, Fma, 2>(a, b.from(0, j), c.from(0, j), rows, last, depth, addend.from(0, j), idle);
  else if (whole == 0) gemm::rest<T, Fma, 1>(a, b.from(0, j), c.from(0, j), rows, last, depth, addend.from(0, j), idle);
}

// c += a b
template <typename T>
void multiply_add(Matrix<const T> a, Matrix<const T> b, Matrix<T> c, int64_t rows, int64_t columns, int64_t depth,
                  Prefetches idle = {}) {
  multiply<T>(a, b, c, rows, columns, depth, {c}, idle);
}

}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

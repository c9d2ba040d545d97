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
#include <type_traits>
#include <utility>

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

static_assert(kVectors == 3, "each_panel() finishes with one to three vectors");

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

// f(0), f(1) and so on with constants: however long f is, what it indexes stays in registers.
template <int count, typename F>
inline __attribute__((always_inline)) void unrolled(F f) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, i>()), ...);
  }(std::make_integer_sequence<int, count>());
}

// Some vectors of a row. All are whole if `full`; otherwise only the first `last` elements of the last one exist. That
// must be known at compile time: where it is not, the compiler keeps the accumulators in memory.
template <typename T, int vectors, bool full>
struct RowPart {
  using Vec = at::vec::Vectorized<T>;
  int64_t last;

  static bool whole(int v) { return full || v + 1 < vectors; }
  Vec load(const T* p, int v) const {
    return whole(v) ? Vec::loadu(p + v * Vec::size()) : Vec::loadu(p + v * Vec::size(), last);
  }
  void store(const Vec& x, T* p, int v) const {
    if (whole(v)) x.store(p + v * Vec::size());
    else x.store(p + v * Vec::size(), last);
  }
};

// A factor A whose columns are contiguous, as `Matrix` is one of any strides. Its elements of a step are then at constant
// distances, for which the inner loop needs no registers.
template <typename T>
struct Columns {
  T* data;
  int64_t col;
  static constexpr int64_t row = 1;

  Columns from(int64_t i, int64_t j) const { return {data + i + j * col, col}; }
};

// The rows of B one after the other, where they lie.
template <typename T>
struct Rows {
  const T* row;
  int64_t step;

  explicit Rows(Matrix<const T> b) : row(b.data), step(b.row) {}
  template <typename Vec, int vectors, bool full>
  void next(Vec (&to)[vectors], const RowPart<T, vectors, full>& part) {
    for (int v = 0; v < vectors; ++v) to[v] = part.load(row, v);
    row += step;
  }
};

// What becomes of the sums: they are stored, an addend with them.
template <typename T>
struct Store {
  Matrix<T> c;
  Addend<T> addend;

  Store from(int64_t i, int64_t j) const { return {c.from(i, j), addend.from(i, j)}; }

  template <typename Vec, int rows, int vectors, bool full>
  void operator()(Vec (&sum)[rows][vectors], const RowPart<T, vectors, full>& part) const {
    // Added at the end, not started from: long sums are then sums of short ones, which round less.
    if (addend.matrix.data)
      for (int i = 0; i < rows; ++i) {
        const Vec scale(addend.scale ? addend.scale[i] : T(1));
        for (int v = 0; v < vectors; ++v)
          sum[i][v] = at::vec::fmadd(scale, part.load(addend.matrix.data + i * addend.matrix.row, v), sum[i][v]);
      }
    for (int i = 0; i < rows; ++i)
      for (int v = 0; v < vectors; ++v) part.store(sum[i][v], c.data + i * c.row, v);
  }
};

template <typename T, typename Fma, int rows, int vectors, bool full, typename A, typename Source, typename Finish>
inline __attribute__((always_inline)) void micro_kernel(A a, Source b, Depth depth, Finish finish,
                                                        RowPart<T, vectors, full> part, Prefetches& idle) {
  using Vec = at::vec::Vectorized<T>;
  Vec sum[rows][vectors];
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < vectors; ++v) sum[i][v] = Vec(T(0));
  const T* a_column = a.data;
  for (int64_t begin = 0; begin < depth.steps; begin += depth.stretch) {
    const int64_t end = std::min(depth.steps, begin + depth.stretch);
    for (int64_t k = begin; k < end; ++k, a_column += a.col) {
      Vec b_k[vectors];
      b.next(b_k, part);
      for (int i = 0; i < rows; ++i) {
        const Vec a_ik(a_column[i * a.row]);
        for (int v = 0; v < vectors; ++v) sum[i][v] = Fma()(a_ik, b_k[v], sum[i][v]);
      }
    }
    idle();
  }
  finish(sum, part);
}

// The first row block reads B from `first`, the others from `b`.
template <typename T, typename Fma, int vectors, bool full, typename A, typename First, typename Finish>
void row_blocks(A a, First first, Matrix<const T> b, int64_t rows, Depth depth, const Finish& finish,
                int64_t last, Prefetches& idle) {
  const RowPart<T, vectors, full> part{last};
  int64_t i = 0;
  const auto next = [&]<int count>() __attribute__((always_inline)) {
    if (std::is_same_v<First, Rows<T>> || i > 0)
      micro_kernel<T, Fma, count>(a.from(i, 0), Rows<T>(b), depth, finish.from(i, 0), part, idle);
    else
      micro_kernel<T, Fma, count>(a, first, depth, finish, part, idle);
    i += count;
  };
  while (i + kRows <= rows) next.template operator()<kRows>();
  while (i + kRemainder <= rows) next.template operator()<kRemainder>();
  while (i < rows) next.template operator()<1>();
}

// Calls f(vectors, whether the last is whole, first column, elements of the last) for panels of columns.
template <typename T, typename F>
void each_panel(int64_t columns, F f) {
  constexpr int64_t width = at::vec::Vectorized<T>::size(), panel = kVectors * width;
  const auto call = [&]<int vectors, bool full>(int64_t j, int64_t last) {
    f(std::integral_constant<int, vectors>(), std::bool_constant<full>(), j, last);
  };
  const auto rest = [&]<int vectors>(int64_t j, int64_t last) {
    if (last == width) call.template operator()<vectors, true>(j, last);
    else call.template operator()<vectors, false>(j, last);
  };
  // One vector left alone would wait for its own sums: the last four are two and two.
  const int64_t in_panels = columns >= panel + width && columns % panel == width ? columns - panel - width : columns;
  int64_t j = 0;
  for (; j + panel <= in_panels; j += panel) call.template operator()<kVectors, true>(j, width);
  if (in_panels < columns) {
    call.template operator()<2, true>(j, width);
    j += 2 * width;
  }
  const int64_t left = columns - j, whole = left > 0 ? (left - 1) / width : -1, last = left - whole * width;
  if (whole == 2) rest.template operator()<3>(j, last);
  else if (whole == 1) rest.template operator()<2>(j, last);
  else if (whole == 0) rest.template operator()<1>(j, last);
}

// The depth of a product that has so much to ask the memory system for.
template <typename T>
Depth depth_of(int64_t rows, int64_t columns, int64_t steps, Prefetches& idle) {
  return {steps, idle.spread(ceil_div(rows, kRows) * ceil_div(columns, kVectors * at::vec::Vectorized<T>::size()), steps)};
}

}  // namespace gemm

// c = a b + addend, with a (rows x steps), b (steps x columns), c and addend (rows x columns), and
// b.col == c.col == addend.matrix.col == 1. The addend may be c itself.
// `idle` is done meanwhile, evenly: the memory system has time for something else.
// With another Fma an element of A and B may hold what that makes of it, see bfloat16_pairs.h.
template <typename T, typename Fma = gemm::MultiplyAdd>
void multiply(Matrix<const T> a, Matrix<const T> b, Matrix<T> c, int64_t rows, int64_t columns, int64_t steps,
              Addend<T> addend = {}, Prefetches idle = {}) {
  const gemm::Depth depth = gemm::depth_of<T>(rows, columns, steps, idle);
  const gemm::Store<T> store{c, addend};
  gemm::each_panel<T>(columns, [&](auto vectors, auto full, int64_t j, int64_t last) {
    const Matrix<const T> panel = b.from(0, j);
    gemm::row_blocks<T, Fma, vectors(), full()>(a, gemm::Rows<T>(panel), panel, rows, depth, store.from(0, j), last, idle);
  });
}

// c += a b
template <typename T>
void multiply_add(Matrix<const T> a, Matrix<const T> b, Matrix<T> c, int64_t rows, int64_t columns, int64_t depth,
                  Prefetches idle = {}) {
  multiply<T>(a, b, c, rows, columns, depth, {c}, idle);
}

}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

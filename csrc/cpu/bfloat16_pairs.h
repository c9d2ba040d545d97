// Products of bfloat16 by the processor's own instructions: on tiles where it has them (amx.h), or by vectors, at up to
// twice the rate of float32.
//
// They multiply pairs and add both products to a float32 sum. So the factors hold pairs of numbers that follow each
// other along the depth of the product, in the 32 bits of a float that is only ever moved: multiply() of tile_gemm.h
// serves them as it is, at half of the depth. What makes the depth a multiple of kDepth, as tiles are, is 0.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstring>

#include "amx.h"
#include "tile_gemm.h"
#include "tile_io.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace pairs {

#if defined(CPU_CAPABILITY_AVX512) && defined(__GNUC__)
inline bool supported() {
  static const bool known = amx::supported() || __builtin_cpu_supports("avx512bf16");
  return known;
}

struct MultiplyAdd {
  at::vec::Vectorized<float> operator()(const at::vec::Vectorized<float>& a, const at::vec::Vectorized<float>& b,
                                        const at::vec::Vectorized<float>& sum) const {
    __m512 result = sum;
    // As an intrinsic it would want its whole caller compiled for this instruction.
    asm("vdpbf16ps %2, %1, %0" : "+v"(result) : "v"(static_cast<__m512>(a)), "v"(static_cast<__m512>(b)));
    return result;
  }
};
#else
inline bool supported() { return false; }
using MultiplyAdd = gemm::MultiplyAdd;  // never called
#endif

// The same bytes under other types.
using Number __attribute__((may_alias)) = uint16_t;
using Pair __attribute__((may_alias)) = uint32_t;

// By which of its instructions the processor multiplies them.
inline const char* instructions() { return amx::supported() ? "AMX" : supported() ? "AVX512_BF16" : "none"; }

// What multiply() takes for a depth of so many numbers.
inline int64_t padded(int64_t depth) { return ceil_div(depth, amx::kDepth) * amx::kDepth; }

// Rows of numbers, at the distance of `row` pairs, as a first factor.
inline void copy_rows(Matrix<const c10::BFloat16> source, float* target, int64_t row, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    auto* to = reinterpret_cast<Number*>(target + i * row);
    const auto* from = reinterpret_cast<const Number*>(source.data + i * source.row);
    if (source.col == 1) std::memcpy(to, from, columns * sizeof(Number));
    else
      for (int64_t j = 0; j < columns; ++j) to[j] = from[j * source.col];
    std::fill(to + columns, to + padded(columns), Number(0));
  }
}

// Pairs of a row's numbers and the next row's, as a second factor. The source has `source_row` numbers between rows.
inline void join_rows(const void* source, int64_t source_row, float* target, int64_t target_row, int64_t rows,
                      int64_t columns) {
  for (int64_t i = 0; i < padded(rows); i += 2) {
    const auto* first = static_cast<const Number*>(source) + i * source_row;
    const auto* second = first + source_row;
    auto* to = reinterpret_cast<Pair*>(target + i / 2 * target_row);
    if (i + 1 < rows)
      for (int64_t j = 0; j < columns; ++j) to[j] = first[j] | static_cast<uint32_t>(second[j]) << 16;
    else if (i < rows)
      for (int64_t j = 0; j < columns; ++j) to[j] = first[j];
    else std::fill_n(to, columns, Pair(0));
  }
}

// c = a b + addend, in an amx::Session, see there.
inline void multiply(Matrix<const float> a, Matrix<const float> b, Matrix<float> c, int64_t rows, int64_t columns,
                     int64_t depth, Addend<float> addend, Prefetches idle) {
  if (amx::supported()) return amx::multiply(a, b, c, rows, columns, depth, addend, idle);
  restore_kernels::multiply<float, MultiplyAdd>(a, b, c, rows, columns, ceil_div(depth, 2), addend, idle);
}

inline void widen(const float* source, float* target, int64_t count) {
  const auto* from = reinterpret_cast<const Number*>(source);
  auto* to = reinterpret_cast<Pair*>(target);
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint32_t>(from[i]) << 16;
}

}  // namespace pairs
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

// Products of bfloat16 by the processor's own instruction, at twice the rate of float32.
//
// It multiplies two pairs and adds both products to a float32 sum. So the factors hold pairs of numbers that follow
// each other along the depth of the product, in the 32 bits of a float that is only ever moved: multiply() of
// tile_gemm.h serves them as it is, at half of the depth. Where a pair has no second number it is 0.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <cstring>

#include "tile_gemm.h"
#include "tile_io.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace pairs {

#if defined(CPU_CAPABILITY_AVX512) && defined(__GNUC__)
inline bool supported() {
  static const bool known = __builtin_cpu_supports("avx512bf16");
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
using MultiplyAdd = gemm::MultiplyAdd;  // never used
#endif

// The same bytes under other types.
using Number __attribute__((may_alias)) = uint16_t;
using Pair __attribute__((may_alias)) = uint32_t;

// Rows of numbers, at the distance of `row` pairs, each followed by a 0 where it is odd.
inline void copy_rows(Matrix<const c10::BFloat16> source, float* target, int64_t row, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    auto* to = reinterpret_cast<Number*>(target + i * row);
    const auto* from = reinterpret_cast<const Number*>(source.data + i * source.row);
    if (source.col == 1) std::memcpy(to, from, columns * sizeof(Number));
    else
      for (int64_t j = 0; j < columns; ++j) to[j] = from[j * source.col];
    if (columns % 2) to[columns] = 0;
  }
}

// target (ceil(rows / 2) x columns): pairs of a row's numbers and the next row's. The source has `source_row` numbers
// between rows.
inline void join_rows(const void* source, int64_t source_row, float* target, int64_t target_row, int64_t rows,
                      int64_t columns) {
  for (int64_t i = 0; i < rows; i += 2) {
    const auto* first = static_cast<const Number*>(source) + i * source_row;
    const auto* second = first + source_row;
    auto* to = reinterpret_cast<Pair*>(target + i / 2 * target_row);
    if (i + 1 < rows)
      for (int64_t j = 0; j < columns; ++j) to[j] = first[j] | static_cast<uint32_t>(second[j]) << 16;
    else
      for (int64_t j = 0; j < columns; ++j) to[j] = first[j];
  }
}

inline void widen(const float* source, float* target, int64_t count) {
  const auto* from = reinterpret_cast<const Number*>(source);
  auto* to = reinterpret_cast<Pair*>(target);
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint32_t>(from[i]) << 16;
}

}  // namespace pairs
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

// What the launches of token attention's kernels share: tensors as the kernels take them, the kind of
// operands and the size of tiles, and splits of what is summed over.
#pragma once

#include <algorithm>

#include "launch.h"
#include "tensors.h"
#include "token_keys.cuh"

namespace restore_kernels::token {

constexpr int64_t kMostColumns = 128;

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      throw std::runtime_error("the CUDA kernels take float32, bfloat16 and float16");
  }
}

// narrow: whether the tensor is an operand of a Narrow kernel; those of Wide ones are float32 where copied.
inline Matrices matrices(const Tensor& x, bool narrow) {
  if (x.size(3) > kMostColumns)
    throw std::runtime_error("the CUDA kernels take rows of at most " + std::to_string(kMostColumns));
  Matrices m{x.data_ptr(), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}, x.size(2),
             static_cast<int>(x.size(3)), dtype_of(x), false};
  const int64_t bytes = m.dtype == Dtype::kFloat32 ? 4 : 2;
  const auto aligned = [&](int dim) { return x.size(dim) == 1 || m.stride[dim] * bytes % 16 == 0; };
  m.copies = narrow == (bytes == 2) && m.stride[3] == 1 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0 &&
             aligned(0) && aligned(1) && aligned(2);
  return m;
}

inline PerHead per_head(const Tensor& x) {
  return {static_cast<const float*>(x.data_ptr()),
          {x.stride(0), x.stride(1), x.dim() > 2 ? x.stride(2) : 0}};
}

inline bool fits_small_tiles(const Tensor& q, const Tensor& v) { return std::max(q.size(3), v.size(3)) <= 64; }

// Long rows of bfloat16 and float16 are Wide too, which are the least used and would take the longest to compile.
inline bool is_narrow(const Tensor& q, const Tensor& v) {
  return q.scalar_type() != ScalarType::Float && q.size(3) >= kShort && fits_small_tiles(q, v);
}

inline Inputs inputs(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                     const Tensor& temperature, bool normalize) {
  const bool narrow = is_narrow(q, v);
  return {matrices(q, narrow), matrices(k, narrow), matrices(v, narrow), mask ? per_head(*mask) : PerHead{},
          per_head(temperature), q.size(1), normalize};
}

// function.template operator()<K, DIM>() for the kind of operands and the columns of a tile.
template <typename Function>
void with_kind(const Tensor& q, const Tensor& v, Function&& function) {
  if (is_narrow(q, v) && q.scalar_type() == ScalarType::BFloat16)
    return function.template operator()<Narrow<bfloat16>, 64>();
  if (is_narrow(q, v)) return function.template operator()<Narrow<float16>, 64>();
  if (fits_small_tiles(q, v)) return function.template operator()<Wide, 64>();
  function.template operator()<Wide, 128>();
}

// launch() of a kernel whose tiles have DIM columns.
template <typename Shared, int DIM, typename... Arguments, typename Kernel>
void launch_with(Kernel kernel, int64_t blocks, const Arguments&... arguments) {
  static_assert(sizeof(Shared) <= (DIM <= 64 ? kSharedEverywhere : kSharedOfMany));
  launch(kernel, blocks, kThreads, sizeof(Shared), arguments...);
}

struct Split {
  int64_t rows, count;  // of one split, a multiple of the tile; splits
};

// Of a sum over `rows` in tiles, where so many blocks would do without: as many as keep the GPU busy. Fewer
// than four tiles would write more than they read.
inline Split split(int64_t rows, int64_t tile, int64_t blocks) {
  const int64_t tiles = ceil_div(rows, tile), wanted = ceil_div(4 * processors(), std::max<int64_t>(1, blocks));
  const int64_t each = std::max<int64_t>(4, ceil_div(tiles, wanted)) * tile;
  return {each, std::max<int64_t>(1, ceil_div(rows, each))};
}

inline float* floats(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

}  // namespace restore_kernels::token

// Tensors of PyTorch's stable ABI as kernels take them: pointer and strides, dtype, results.
//
//   REGISTER(library) { library.impl("name.cuda", TORCH_BOX(function)); }
//
// registers the `cuda` overload of an operator, for CUDA tensors or, in the tests' build for the host,
// for CPU tensors. The operators' schemas are in restore_kernels/*/ops.py; semantic checks come before.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "strided.cuh"

#ifdef __CUDACC__
#define REGISTER(library) STABLE_TORCH_LIBRARY_IMPL(restore_kernels, CUDA, library)
#else
#define REGISTER(library) STABLE_TORCH_LIBRARY_IMPL(restore_kernels, CPU, library)
#endif

namespace restore_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
Strided<const T> strided(const Tensor& x) {
  return {static_cast<const T*>(x.data_ptr()), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}};
}
template <typename T>
Strided<T> strided_result(const Tensor& x) {
  return {static_cast<T*>(x.data_ptr()), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}};
}

// function.template operator()<T>() for T of the tensor's dtype.
template <typename Function>
auto with_dtype(const Tensor& x, Function&& function) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return function.template operator()<float>();
    case ScalarType::BFloat16:
      return function.template operator()<bfloat16>();
    case ScalarType::Half:
      return function.template operator()<float16>();
    default:
      throw std::runtime_error("the CUDA kernels take float32, bfloat16 and float16");
  }
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(like, shape);
}
inline Tensor empty_float32(const Tensor& like, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

// Uninitialised (B, H, C, N), or (B, C, N) for heads = 0, in the dtype and memory format of x (B, H, C, N),
// as restore_kernels/tensors.py's empty_like_rows.
inline Tensor empty_like_rows(const Tensor& x, int64_t heads, int64_t channels) {
  const int64_t batch = x.size(0), pixels = x.size(3);
  const bool pixel_major = x.stride(2) == 1 && x.stride(3) > 1;
  if (heads == 0) {
    if (!pixel_major) return empty(x, {batch, channels, pixels});
    return torch::stable::transpose(empty(x, {batch, pixels, channels}), 1, 2);
  }
  if (!pixel_major) return empty(x, {batch, heads, channels, pixels});
  // (B, N, H, C) -> (B, H, N, C) -> (B, H, C, N)
  return torch::stable::transpose(torch::stable::transpose(empty(x, {batch, pixels, heads, channels}), 1, 2), 2, 3);
}

}  // namespace restore_kernels

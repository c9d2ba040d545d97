// Rows of tokens: products of vectors, L2 normalisation and its derivative.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "row_products.h"
#include "tile_gemm.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {

using at::Tensor;

template <typename T>
using Vec = at::vec::Vectorized<T>;

constexpr double kNormFloor = 1e-12;

template <typename T>
T dot(const T* x, const T* y, int64_t length) {
  return at::vec::map2_reduce_all<T>([](Vec<T> a, Vec<T> b) { return a * b; },
                                     [](Vec<T> a, Vec<T> b) { return a + b; }, x, y, length);
}

template <typename T>
void add_scaled(T scale, const T* x, T* y, int64_t length) {
  at::vec::map2([scale](Vec<T> a, Vec<T> b) { return at::vec::fmadd(Vec<T>(scale), a, b); }, y, x, y, length);
}

template <typename T>
void multiply_by(T scale, T* x, int64_t length) {
  at::vec::map([scale](Vec<T> a) { return Vec<T>(scale) * a; }, x, x, length);
}

// The tokens of one head as the rows of a matrix.
template <typename S>
Matrix<S> head(const Tensor& x, int64_t b, int64_t h) {
  S* data = const_cast<S*>(x.const_data_ptr<std::remove_const_t<S>>());
  return {data + b * x.stride(0) + h * x.stride(1), x.stride(2), x.stride(3)};
}

// Divides rows by their norm (clamped), which it keeps, when `normalize`; otherwise the norms are 1.
template <typename T>
void normalize_rows(Matrix<T> rows, T* norms, int64_t count, int64_t length, bool normalize) {
  std::fill_n(norms, count, T(1));
  if (!normalize) return;
  dot_rows<T>(rows, rows, count, length, norms);
  for (int64_t i = 0; i < count; ++i) {
    norms[i] = std::max<T>(std::sqrt(norms[i]), T(kNormFloor));
    T* row = rows.data + i * rows.row;
    // Quotients, so that rows of one element become exactly 1 or -1, tied as they should be.
    at::vec::map([n = norms[i]](Vec<T> x) { return x / Vec<T>(n); }, row, row, length);
  }
}

// grad of the unnormalised row, in place: (g - (g·x̂) x̂) / |x|; a clamped norm is a constant.
template <typename T>
void backward_norm(T* grad, const T* unit, T norm, int64_t length, bool normalize) {
  if (!normalize) return;
  const T along = norm > T(kNormFloor) ? dot<T>(grad, unit, length) : T(0);
  at::vec::map2([along, norm](Vec<T> g, Vec<T> u) { return (g - Vec<T>(along) * u) / Vec<T>(norm); }, grad, grad, unit,
                length);
}

}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

// What follows the convolution, and its gradient: out = activation(pre) * gate, row by row.
//
// Exact GELU is x Φ(x), with Φ the distribution of the normal one; its derivative is Φ(x) + x φ(x). At zero the
// derivatives of ReLU and PReLU are those of the negative side, as PyTorch has them.
#pragma once

#include <string_view>

#include "depthwise_planes.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace depthwise {

enum class Activation { none, relu, gelu, prelu };

inline Activation activation_of(std::optional<std::string_view> name) {
  if (!name) return Activation::none;
  return *name == "relu" ? Activation::relu : *name == "gelu" ? Activation::gelu : Activation::prelu;
}

// Φ(x)
template <typename T>
at::vec::Vectorized<T> normal_distribution(at::vec::Vectorized<T> x) {
  using Vec = at::vec::Vectorized<T>;
  return Vec(T(0.5)) * ((x * Vec(T(M_SQRT1_2))).erf() + Vec(T(1)));
}

// φ(x)
template <typename T>
at::vec::Vectorized<T> normal_density(at::vec::Vectorized<T> x) {
  using Vec = at::vec::Vectorized<T>;
  return (x * x * Vec(T(-0.5))).exp() * Vec(T(M_2_SQRTPI * M_SQRT1_2 / 2));
}

template <typename T, Activation kActivation>
at::vec::Vectorized<T> activate(at::vec::Vectorized<T> x, T slope) {
  using Vec = at::vec::Vectorized<T>;
  const Vec zero(T(0));
  if constexpr (kActivation == Activation::relu) return at::vec::clamp_min(x, zero);
  if constexpr (kActivation == Activation::gelu) return x * normal_distribution(x);
  if constexpr (kActivation == Activation::prelu) return Vec::blendv(x * Vec(slope), x, x > zero);
  return x;
}

// What the gradient of the activated becomes for x.
template <typename T, Activation kActivation>
at::vec::Vectorized<T> through(at::vec::Vectorized<T> grad, at::vec::Vectorized<T> x, T slope) {
  using Vec = at::vec::Vectorized<T>;
  const Vec zero(T(0));
  if constexpr (kActivation == Activation::relu) return Vec::blendv(grad, zero, x <= zero);
  if constexpr (kActivation == Activation::gelu)
    return grad * at::vec::fmadd(x, normal_density(x), normal_distribution(x));
  if constexpr (kActivation == Activation::prelu) return Vec::blendv(grad * Vec(slope), grad, x > zero);
  return grad;
}

// Vectors of a row, the last of which may be in part outside.
template <typename T, typename F>
void each_vector(int64_t width, F f) {
  constexpr int64_t kSize = at::vec::Vectorized<T>::size();
  int64_t x = 0;
  for (; x + kSize <= width; x += kSize) f(x, kSize);
  if (x < width) f(x, width - x);
}

template <typename T>
at::vec::Vectorized<T> load_part(const T* p, int64_t count) {
  using Vec = at::vec::Vectorized<T>;
  return count == Vec::size() ? Vec::loadu(p) : Vec::loadu(p, count);
}

template <typename T>
void store_part(at::vec::Vectorized<T> x, T* p, int64_t count, bool streamed = false) {
  if (count < x.size()) x.store(p, static_cast<int>(count));
  else if (streamed) stream(x, p);
  else x.store(p);
}

// out (rows x width) = activation(pre) * gate, where there is one.
template <typename T, Activation kActivation>
void finish(Matrix<const T> pre, Matrix<const T> gate, T slope, Matrix<T> out, int64_t rows, int64_t width, bool streamed) {
  for (int64_t y = 0; y < rows; ++y) {
    each_vector<T>(width, [&](int64_t x, int64_t count) {
      auto result = activate<T, kActivation>(load_part(pre.data + y * pre.row + x, count), slope);
      if (gate.data) result = result * load_part(gate.data + y * gate.row + x, count);
      store_part(result, out.data + y * out.row + x, count, streamed);
    });
  }
}

// grad (rows x width) of the result becomes that of pre; returns what the slope gets from these rows. Writes that of
// the gate where it has a place. Without either pre need not be known.
template <typename T, Activation kActivation>
T differentiate(Matrix<const T> pre, Matrix<const T> gate, T slope, Matrix<T> grad, Matrix<T> grad_gate, int64_t rows,
                int64_t width, bool streamed) {
  using Vec = at::vec::Vectorized<T>;
  const Vec zero(T(0));
  const bool is_known = kActivation != Activation::none || grad_gate.data;
  Vec of_slope = zero;
  for (int64_t y = 0; y < rows; ++y) {
    each_vector<T>(width, [&](int64_t column, int64_t count) {
      const Vec x = is_known ? load_part(pre.data + y * pre.row + column, count) : zero;
      T* at_grad = grad.data + y * grad.row + column;
      Vec g = load_part(at_grad, count);
      if (grad_gate.data)
        store_part(g * activate<T, kActivation>(x, slope), grad_gate.data + y * grad_gate.row + column, count, streamed);
      if (gate.data) g = g * load_part(gate.data + y * gate.row + column, count);
      if constexpr (kActivation == Activation::prelu) of_slope = of_slope + Vec::blendv(g * x, zero, x > zero);
      store_part(through<T, kActivation>(g, x, slope), at_grad, count);
    });
  }
  return at::vec::vec_reduce_all<T>([](Vec a, Vec b) { return a + b; }, of_slope);
}

template <typename T>
struct Activations {
  decltype(&finish<T, Activation::none>) finish;
  decltype(&differentiate<T, Activation::none>) differentiate;
};

template <typename T>
Activations<T> activations_for(Activation activation) {
  switch (activation) {
    case Activation::relu: return {&finish<T, Activation::relu>, &differentiate<T, Activation::relu>};
    case Activation::gelu: return {&finish<T, Activation::gelu>, &differentiate<T, Activation::gelu>};
    case Activation::prelu: return {&finish<T, Activation::prelu>, &differentiate<T, Activation::prelu>};
    default: return {&finish<T, Activation::none>, &differentiate<T, Activation::none>};
  }
}

}  // namespace depthwise
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

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

template <typename T>
struct Normal {
  at::vec::Vectorized<T> distribution, density;
};

// Φ and φ. In float32 by the approximation of the error function that the library has too (Abramowitz and Stegun
// 7.1.26, to 1.5e-7), so that both are made of one exponential.
template <typename T>
Normal<T> normal(at::vec::Vectorized<T> x) {
  using Vec = at::vec::Vectorized<T>;
  const Vec half_square = x * x * Vec(T(-0.5)), factor(T(M_2_SQRTPI * M_SQRT1_2 / 2)), one(T(1));
  if constexpr (std::is_same_v<T, float>) {
    const Vec exponential = half_square.exp_u20();
    const Vec t = one / at::vec::fmadd(x.abs(), Vec(T(0.3275911 * M_SQRT1_2)), one);
    Vec polynomial(1.061405429f);
    for (const float coefficient : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
      polynomial = at::vec::fmadd(polynomial, t, Vec(coefficient));
    const Vec tail = Vec(0.5f) * polynomial * t * exponential;
    return {Vec::blendv(one - tail, tail, x < Vec(0.0f)), exponential * factor};
  } else {
    return {Vec(T(0.5)) * ((x * Vec(T(M_SQRT1_2))).erf() + one), half_square.exp() * factor};
  }
}

// The activated x, and what the gradient of it becomes for x.
template <typename T, Activation kActivation>
struct Activated {
  using Vec = at::vec::Vectorized<T>;
  Vec x, slope, normal_distribution, normal_density;

  Activated(Vec x, T slope) : x(x), slope(slope) {
    if constexpr (kActivation == Activation::gelu) {
      const auto [distribution, density] = normal(x);
      normal_distribution = distribution, normal_density = density;
    }
  }

  Vec value() const {
    const Vec zero(T(0));
    if constexpr (kActivation == Activation::relu) return at::vec::clamp_min(x, zero);
    if constexpr (kActivation == Activation::gelu) return x * normal_distribution;
    if constexpr (kActivation == Activation::prelu) return Vec::blendv(x * slope, x, x > zero);
    return x;
  }

  Vec through(Vec grad) const {
    const Vec zero(T(0));
    if constexpr (kActivation == Activation::relu) return Vec::blendv(grad, zero, x <= zero);
    if constexpr (kActivation == Activation::gelu) return grad * at::vec::fmadd(x, normal_density, normal_distribution);
    if constexpr (kActivation == Activation::prelu) return Vec::blendv(grad * slope, grad, x > zero);
    return grad;
  }
};

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
      auto result = Activated<T, kActivation>(load_part(pre.data + y * pre.row + x, count), slope).value();
      if (gate.data) result = result * load_part(gate.data + y * gate.row + x, count);
      store_part(result, out.data + y * out.row + x, count, streamed);
    });
  }
}

// grad (rows x width) = the gradient of pre from that of the result; returns what the slope gets from these rows.
// Writes the gate's where it has a place. Without activation and that, pre need not be known.
template <typename T, Activation kActivation>
T differentiate(Matrix<const T> pre, Matrix<const T> gate, T slope, Matrix<const T> grad_out, Matrix<T> grad,
                Matrix<T> grad_gate, int64_t rows, int64_t width, bool streamed) {
  using Vec = at::vec::Vectorized<T>;
  const Vec zero(T(0));
  const bool is_known = kActivation != Activation::none || grad_gate.data;
  Vec of_slope = zero;
  for (int64_t y = 0; y < rows; ++y) {
    each_vector<T>(width, [&](int64_t column, int64_t count) {
      const Vec x = is_known ? load_part(pre.data + y * pre.row + column, count) : zero;
      const Activated<T, kActivation> activated(x, slope);
      Vec g = load_part(grad_out.data + y * grad_out.row + column, count);
      if (grad_gate.data) store_part(g * activated.value(), grad_gate.data + y * grad_gate.row + column, count, streamed);
      if (gate.data) g = g * load_part(gate.data + y * gate.row + column, count);
      if constexpr (kActivation == Activation::prelu) of_slope = of_slope + Vec::blendv(g * x, zero, x > zero);
      store_part(activated.through(g), grad.data + y * grad.row + column, count);
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

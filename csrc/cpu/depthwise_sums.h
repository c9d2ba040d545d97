// The two sums over planes that depthwise convolution and its gradients consist of.
#pragma once

#include "depthwise_planes.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace depthwise {

constexpr int kMostTaps = 49;

// Keeps a vector in a register, `if_held`, i.e. where there is one for it beside the sums. Otherwise each
// multiplication would load it anew, from two cache lines where it is not aligned.
template <bool if_held, typename T>
at::vec::Vectorized<T> in_register(const at::vec::Vectorized<T>& x) {
#if defined(CPU_CAPABILITY_AVX512)
  std::conditional_t<std::is_same_v<T, float>, __m512, __m512d> bits = x;
#elif defined(CPU_CAPABILITY_AVX2)
  std::conditional_t<std::is_same_v<T, float>, __m256, __m256d> bits = x;
#else
  const at::vec::Vectorized<T>& bits = x;
#endif
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if constexpr (if_held) asm("" : "+v"(bits));
#endif
  return bits;
}

// How the sums become results.
template <typename T>
struct Epilogue {
  T first;  // is added, the bias
  bool relu;
  bool streamed;  // see streams()
};

// kRows rows of kVectors vectors of the correlation; `in` is what the first tap of the first one reads.
template <typename T, int K, int D, int kVectors>
void correlate_block(const T* in, int64_t pitch, int64_t plane, const at::vec::Vectorized<T>* weights, int64_t inputs,
                     const Epilogue<T>& epilogue, Matrix<T> out, int64_t rows, int64_t columns) {
  using Vec = at::vec::Vectorized<T>;
  Vec sum[kRows][kVectors];
  for (auto& row : sum)
    for (Vec& part : row) part = Vec(epilogue.first);
  for (int64_t m = 0; m < inputs; ++m, in += plane, weights += K * K) {
#pragma GCC unroll 16
    for (int y = 0; y < kRows + (K - 1) * D; ++y) {
#pragma GCC unroll 8
      for (int i = 0; i < K; ++i) {
        Vec x[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) x[v] = in_register<K <= 5>(Vec::loadu(in + y * pitch + i * D + v * Vec::size()));
#pragma GCC unroll 8
        for (int j = 0; j < K; ++j) {
          const int r = y - j * D;
          if (r < 0 || r >= kRows) continue;
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) sum[r][v] = at::vec::fmadd(weights[j * K + i], x[v], sum[r][v]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const Vec result = epilogue.relu ? at::vec::clamp_min(sum[r][v], Vec(T(0))) : sum[r][v];
      T* target = out.data + r * out.row + v * Vec::size();
      const int64_t left = columns - v * Vec::size();
      if (left < Vec::size()) result.store(target, static_cast<int>(left));
      else if (epilogue.streamed) stream(result, target);
      else result.store(target);
    }
  }
}

// out (rows x width) = the products of the weights (inputs x K x K) and the planes around every pixel, summed.
// `in` is row 0, column 0 of the first plane. `idle` is done meanwhile.
template <typename T, int K, int D>
void correlate(const T* in, int64_t pitch, int64_t plane, const T* weight, int64_t inputs, const Epilogue<T>& epilogue,
               Matrix<T> out, int64_t rows, int64_t width, Prefetches idle) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int64_t kReach = D * (K / 2);
  constexpr int kVectors = K == 5 ? 1 : 2;  // share a weight; not where the registers are as many as weights and sums
  Vec weights[2 * K * K];
  for (int64_t i = 0; i < inputs * K * K; ++i) weights[i] = Vec(weight[i]);
  in -= kReach * pitch + kReach;
  idle.spread(ceil_div(rows, kRows) * ceil_div(width, kVectors * Vec::size()), 1);
  for (int64_t y = 0; y < rows; y += kRows) {
    int64_t x = 0;
    const auto blocks = [&](auto vectors, int64_t end) {
      for (; x < end; x += vectors() * Vec::size()) {
        correlate_block<T, K, D, vectors()>(in + y * pitch + x, pitch, plane, weights, inputs, epilogue, out.from(y, x),
                                            rows - y, width - x);
        idle();
      }
    };
    if constexpr (kVectors == 2) blocks(std::integral_constant<int, 2>(), width - Vec::size());
    blocks(std::integral_constant<int, 1>(), width);
  }
}

// sum[j * K + i] += the products of grad (rows x width) and x moved by tap (j, i). Beside both must be zeros, as far as
// the taps reach.
template <typename T, int K, int D, int kTapRows>
void add_tap_products(const T* x, int64_t x_pitch, const T* grad, int64_t pitch, int64_t rows, int64_t width, int tap_row,
                      at::vec::Vectorized<T>* sum) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int64_t kReach = D * (K / 2);
  Vec total[kTapRows][K];
  for (auto& row : total)
    for (Vec& part : row) part = Vec(T(0));
  for (int64_t column = 0; column < width; column += Vec::size()) {
    const T* at_x = x + (D * tap_row - kReach) * x_pitch + column;
    const T* at_grad = grad + column + kReach;
    for (int64_t y = 0; y < rows; ++y, at_x += x_pitch, at_grad += pitch) {
      Vec rows_of_x[kTapRows];
#pragma GCC unroll 8
      for (int j = 0; j < kTapRows; ++j) rows_of_x[j] = Vec::loadu(at_x + j * D * x_pitch);
#pragma GCC unroll 8
      for (int i = 0; i < K; ++i) {
        const Vec g = Vec::loadu(at_grad - i * D);
#pragma GCC unroll 8
        for (int j = 0; j < kTapRows; ++j) total[j][i] = at::vec::fmadd(g, rows_of_x[j], total[j][i]);
      }
    }
  }
  for (int j = 0; j < kTapRows; ++j)
    for (int i = 0; i < K; ++i) sum[(tap_row + j) * K + i] = sum[(tap_row + j) * K + i] + total[j][i];
}

// The same for all taps of 3x3, which have a register each, as has what they multiply. An array of them would be memory.
template <typename T, int D>
void add_three_taps(const T* x, int64_t x_pitch, const T* grad, int64_t pitch, int64_t rows, int64_t width,
                    at::vec::Vectorized<T>* sum) {
  using at::vec::fmadd;
  using Vec = at::vec::Vectorized<T>;
  Vec a0(T(0)), a1(T(0)), a2(T(0)), b0(T(0)), b1(T(0)), b2(T(0)), c0(T(0)), c1(T(0)), c2(T(0));
  for (int64_t column = 0; column < width; column += Vec::size()) {
    const T *at_x = x - D * x_pitch + column, *at_grad = grad + column;
    for (int64_t y = 0; y < rows; ++y, at_x += x_pitch, at_grad += pitch) {
      const Vec above = in_register<true>(Vec::loadu(at_x)), here = in_register<true>(Vec::loadu(at_x + D * x_pitch)),
                below = in_register<true>(Vec::loadu(at_x + 2 * D * x_pitch));
      const Vec right = in_register<true>(Vec::loadu(at_grad + D));
      a0 = fmadd(right, above, a0), b0 = fmadd(right, here, b0), c0 = fmadd(right, below, c0);
      const Vec middle = in_register<true>(Vec::loadu(at_grad));
      a1 = fmadd(middle, above, a1), b1 = fmadd(middle, here, b1), c1 = fmadd(middle, below, c1);
      const Vec left = in_register<true>(Vec::loadu(at_grad - D));
      a2 = fmadd(left, above, a2), b2 = fmadd(left, here, b2), c2 = fmadd(left, below, c2);
    }
  }
  int i = 0;
  for (const Vec& total : {a0, a1, a2, b0, b1, b2, c0, c1, c2}) sum[i++] = total;
}

template <typename T, int K, int D>
void tap_products(const T* x, int64_t x_pitch, const T* grad, int64_t pitch, int64_t rows, int64_t width, T* out) {
  using Vec = at::vec::Vectorized<T>;
#if defined(CPU_CAPABILITY_AVX512)
  constexpr int kAccumulators = 28;  // what the vector registers hold beside the operands
#else
  constexpr int kAccumulators = 12;
#endif
  constexpr int kTapRows = std::clamp(kAccumulators / K, 1, K), kRest = K % kTapRows;
  Vec sum[K * K];
  for (Vec& part : sum) part = Vec(T(0));
  if constexpr (K == 3) {
    add_three_taps<T, D>(x, x_pitch, grad, pitch, rows, width, sum);
  } else {
    int j = 0;
    for (; j + kTapRows <= K; j += kTapRows)
      add_tap_products<T, K, D, kTapRows>(x, x_pitch, grad, pitch, rows, width, j, sum);
    if constexpr (kRest != 0) add_tap_products<T, K, D, kRest>(x, x_pitch, grad, pitch, rows, width, j, sum);
  }
  for (int i = 0; i < K * K; ++i)
    out[i] = at::vec::vec_reduce_all<T>([](Vec a, Vec b) { return a + b; }, sum[i]);
}

// Both for one size of kernel.
template <typename T>
struct Sums {
  decltype(&correlate<T, 3, 1>) correlate;
  decltype(&tap_products<T, 3, 1>) tap_products;
};

template <typename T, int D>
Sums<T> sums_for(int64_t size) {
  if (size == 1) return {&correlate<T, 1, 1>, &tap_products<T, 1, 1>};
  if (size == 3) return {&correlate<T, 3, D>, &tap_products<T, 3, D>};
  if (size == 5) return {&correlate<T, 5, D>, &tap_products<T, 5, D>};
  return {&correlate<T, 7, D>, &tap_products<T, 7, D>};
}

template <typename T>
Sums<T> sums_for(int64_t size, int64_t dilation) {
  return dilation == 1 ? sums_for<T, 1>(size) : sums_for<T, 2>(size);
}

template <typename T>
T sum_of_rows(const T* x, int64_t pitch, int64_t rows, int64_t width) {
  using Vec = at::vec::Vectorized<T>;
  Vec sum(T(0));
  for (int64_t y = 0; y < rows; ++y)
    for (int64_t i = 0; i < width; i += Vec::size()) sum = sum + Vec::loadu(x + y * pitch + i);
  return at::vec::vec_reduce_all<T>([](Vec a, Vec b) { return a + b; }, sum);
}

}  // namespace depthwise
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

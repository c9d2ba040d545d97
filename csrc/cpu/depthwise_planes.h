// Planes of images in scratch, with zeros around them, and the two sums that depthwise convolution and its
// gradients consist of.
//
// Packed, every dtype and memory layout is the same to the sums, no tap needs to ask whether it is inside
// of the image, and the rows of neighbouring taps stay in cache.
#pragma once

#include <ATen/cpu/vec/functional.h>

#include "image_tiles.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace depthwise {

// Zeros between two rows: whole vectors, and no fewer than seven taps of dilation 2 reach.
constexpr int64_t kMargin = 16;
constexpr int kMostTaps = 49;
constexpr int kRows = 4;  // computed together: what they read overlaps

inline int64_t round_up(int64_t x, int64_t multiple) { return ceil_div(x, multiple) * multiple; }

// Images (B, C, H, W) of any strides.
template <typename S>
struct Images {
  S* data;
  int64_t image, channel, row, column;  // strides

  bool pixel_major() const { return channel == 1 && column != 1; }
};

template <typename S>
Images<const S> read(const Tensor& x) {
  return {x.const_data_ptr<S>(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

template <typename S>
Images<S> write(const Tensor& x) {
  return {x.mutable_data_ptr<S>(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// `count` planes of `rows` rows, and `above` and `below` more rows; all zero at first.
template <typename T>
class Planes {
 public:
  Planes(int64_t count, int64_t rows, int64_t above, int64_t below, int64_t width)
      : pitch(round_up(width, kMargin) + kMargin),
        plane((above + round_up(rows, kRows) + below) * pitch),
        first_(kMargin + above * pitch),
        memory_(kMargin + count * plane + kMargin) {
    std::fill_n(memory_.get(), kMargin + count * plane + kMargin, T(0));
  }

  const int64_t pitch, plane;  // from row to row, from plane to plane
  T* at(int64_t index, int64_t y) const { return memory_.get() + first_ + index * plane + y * pitch; }

 private:
  int64_t first_;
  Scratch<T> memory_;
};

struct Rows {
  int64_t begin, end;
};

// These rows of channels c ... c + count of image b come to `row` of the planes and on; those that are not in
// [0, height) are zero.
template <typename S, typename T>
void load(const Images<const S>& images, int64_t b, int64_t c, int64_t count, Rows rows, int64_t height, int64_t width,
          const Planes<T>& planes, int64_t row) {
  const auto [begin, end] = rows;
  const S* source = images.data + b * images.image + c * images.channel;
  const int64_t first = std::clamp<int64_t>(0, begin, end), last = std::clamp(height, first, end);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t y = begin; y < first; ++y) std::fill_n(planes.at(i, row + y - begin), width, T(0));
    for (int64_t y = last; y < end; ++y) std::fill_n(planes.at(i, row + y - begin), width, T(0));
  }
  if (images.pixel_major()) {
    for (int64_t y = first; y < last; ++y)
      copy_tile<S, T>({source + y * images.row, images.channel, images.column},
                      {planes.at(0, row + y - begin), planes.plane, 1}, count, width);
  } else {
    for (int64_t i = 0; i < count; ++i)
      copy_tile<S, T>({source + i * images.channel + first * images.row, images.row, images.column},
                      {planes.at(i, row + first - begin), planes.pitch, 1}, last - first, width);
  }
}

// Rows [0, rows) of the planes become rows y and on of channels c ... c + count of image b.
template <typename S, typename T>
void store(const Planes<T>& planes, int64_t rows, int64_t width, const Images<S>& images, int64_t b, int64_t c,
           int64_t count, int64_t y) {
  S* target = images.data + b * images.image + c * images.channel + y * images.row;
  if (images.pixel_major()) {
    for (int64_t i = 0; i < rows; ++i)
      copy_tile<T, S>({planes.at(0, i), planes.plane, 1}, {target + i * images.row, images.channel, images.column}, count,
                      width);
  } else {
    for (int64_t i = 0; i < count; ++i)
      copy_tile<T, S>({planes.at(i, 0), planes.pitch, 1}, {target + i * images.channel, images.row, images.column}, rows,
                      width);
  }
}

// How the sums become results.
template <typename T>
struct Epilogue {
  T first;        // is added, the bias
  bool relu;
  bool streamed;  // past the caches, which a large result would clear of all else; whole aligned vectors
};

template <typename T>
void stream(at::vec::Vectorized<T> x, T* target) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) _mm512_stream_ps(target, x);
  else _mm512_stream_pd(target, x);
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) _mm256_stream_ps(target, x);
  else _mm256_stream_pd(target, x);
#else
  x.store(target);
#endif
}

// Before other threads read what was streamed.
inline void finish_streaming() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

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
        for (int v = 0; v < kVectors; ++v) x[v] = Vec::loadu(in + y * pitch + i * D + v * Vec::size());
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
// `in` is row 0, column 0 of the first plane.
template <typename T, int K, int D>
void correlate(const T* in, int64_t pitch, int64_t plane, const T* weight, int64_t inputs, const Epilogue<T>& epilogue,
               Matrix<T> out, int64_t rows, int64_t width) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int64_t kReach = D * (K / 2);
  constexpr int kVectors = K <= 5 ? 1 : 2;  // 49 weights come from memory: two vectors share each
  Vec weights[2 * K * K];
  for (int64_t i = 0; i < inputs * K * K; ++i) weights[i] = Vec(weight[i]);
  in -= kReach * pitch + kReach;
  for (int64_t y = 0; y < rows; y += kRows) {
    int64_t x = 0;
    const auto blocks = [&](auto vectors, int64_t end) {
      for (; x < end; x += vectors() * Vec::size())
        correlate_block<T, K, D, vectors()>(in + y * pitch + x, pitch, plane, weights, inputs, epilogue, out.from(y, x),
                                            rows - y, width - x);
    };
    if constexpr (kVectors == 2) blocks(std::integral_constant<int, 2>(), width - Vec::size());
    blocks(std::integral_constant<int, 1>(), width);
  }
}

// sum[j * K + i] += the products of x (rows x width) and grad moved by tap (j, i). Around x must be zeros, twice as
// far as the taps reach above and below.
template <typename T, int K, int D, int kTapRows>
void add_tap_products(const T* x, int64_t x_pitch, const T* grad, int64_t pitch, int64_t rows, int64_t width, int tap_row,
                      at::vec::Vectorized<T>* sum) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int64_t kReach = D * (K / 2);
  Vec total[kTapRows][K];
  for (auto& row : total)
    for (Vec& part : row) part = Vec(T(0));
  for (int64_t column = 0; column < width; column += Vec::size()) {
    const T* at_x = x + (D * tap_row - 2 * kReach) * x_pitch + column;
    const T* at_grad = grad - kReach * pitch + column + kReach;
    for (int64_t y = 0; y < rows + 2 * kReach; ++y, at_x += x_pitch, at_grad += pitch) {
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
  int j = 0;
  for (; j + kTapRows <= K; j += kTapRows)
    add_tap_products<T, K, D, kTapRows>(x, x_pitch, grad, pitch, rows, width, j, sum);
  if constexpr (kRest != 0) add_tap_products<T, K, D, kRest>(x, x_pitch, grad, pitch, rows, width, j, sum);
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

// Where the rectified output is zero, so is the derivative. Whole vectors.
template <typename T>
void clear_where_not_positive(const T* out, T* grad, int64_t count) {
  using Vec = at::vec::Vectorized<T>;
  for (int64_t i = 0; i < count; i += Vec::size())
    Vec::blendv(Vec::loadu(grad + i), Vec(T(0)), Vec::loadu(out + i) <= Vec(T(0))).store(grad + i);
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

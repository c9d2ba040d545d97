// The transforms of weights for Winograd's minimal filtering (winograd.h), and of their gradients back.
//
// A vector holds the same tap of several weights. In memory the nine taps of a weight follow each other, so that they
// are transposed in registers on the way: one number at a time takes longer than the products of a small image.
#pragma once

#include "winograd.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace winograd {

// Weights taken together where lanes are channels: more than the processor has stores in flight, since what was just
// stored number by number cannot be loaded as a vector.
constexpr int64_t kTogether = 64;

// Taps of as many weights; in squares of vectors are those that a vector is short enough for, or else all.
template <typename T>
struct Taps {
  static constexpr int64_t size = at::vec::Vectorized<T>::size(), in_squares = size > kTaps ? kTaps : kTaps / size * size;
  alignas(64) T of[std::max<int64_t>(size, kTaps)][kTogether];

  // From `count` weights that follow each other.
  void take(const T* source, int64_t count) {
    const int64_t whole = count / size * size;
    for (int64_t i = 0; i < whole; i += size)
      if constexpr (size > kTaps) {
        alignas(64) T rows[size][size];
        for (int64_t r = 0; r < size; ++r) std::copy_n(source + (i + r) * kTaps, kTaps, rows[r]);
        tile_io::transpose_square(rows[0], size, of[0] + i, kTogether);
      } else {
        for (int64_t tap = 0; tap < in_squares; tap += size)
          tile_io::transpose_square(source + i * kTaps + tap, kTaps, of[tap] + i, kTogether);
      }
    for (int64_t tap = 0; tap < kTaps; ++tap)
      for (int64_t i = tap < in_squares ? whole : 0; i < count; ++i) of[tap][i] = source[i * kTaps + tap];
  }

  void put(T* target, int64_t count) const {
    const int64_t whole = count / size * size;
    for (int64_t i = 0; i < whole; i += size)
      if constexpr (size > kTaps) {
        alignas(64) T rows[size][size];
        tile_io::transpose_square(of[0] + i, kTogether, rows[0], size);
        for (int64_t r = 0; r < size; ++r) std::copy_n(rows[r], kTaps, target + (i + r) * kTaps);
      } else {
        for (int64_t tap = 0; tap < in_squares; tap += size)
          tile_io::transpose_square(of[tap] + i, kTogether, target + i * kTaps + tap, kTaps);
      }
    for (int64_t tap = 0; tap < kTaps; ++tap)
      for (int64_t i = tap < in_squares ? whole : 0; i < count; ++i) target[i * kTaps + tap] = of[tap][i];
  }
};

// G g Gᵀ of one vector of weights, or, `turned`, of the weights turned by 180 degrees. Taps lie `tap` apart, results
// `plane`; `room`: as many of them may be written.
template <typename Filter, typename T = typename Filter::T>
void weight(const T* taps, int64_t tap, bool turned, T* target, int64_t plane, int64_t room) {
  constexpr int kSide = Filter::kSide;
  using Vec = at::vec::Vectorized<T>;
  if (turned) taps += (kTaps - 1) * tap, tap = -tap;
  const auto g = [&](int i) { return Vec::loadu(taps + i * tap); };
  std::array<Vec, kSide> t[3];
  for (int c = 0; c < 3; ++c) t[c] = Filter::weight({g(c), g(3 + c), g(6 + c)});
  for (int r = 0; r < kSide; ++r) {
    const auto results = Filter::weight({t[0][r], t[1][r], t[2][r]});
    for (int c = 0; c < kSide; ++c) store_up_to(results[c], target + (r * kSide + c) * plane, room);
  }
}

// Gᵀ m G of one vector of weights, of which `room` may be read.
template <typename Filter, typename T = typename Filter::T>
void weight_gradient(const T* source, int64_t plane, T* taps, int64_t tap, int64_t room) {
  constexpr int kSide = Filter::kSide;
  using Vec = at::vec::Vectorized<T>;
  std::array<Vec, kSide> t[3];
  for (int c = 0; c < kSide; ++c) {
    std::array<Vec, kSide> m;
    for (int r = 0; r < kSide; ++r) m[r] = load_up_to(source + (r * kSide + c) * plane, room);
    const auto column = Filter::weight_gradient(m);
    for (int r = 0; r < 3; ++r) t[r][c] = column[r];
  }
  for (int r = 0; r < 3; ++r) {
    const auto results = Filter::weight_gradient(t[r]);
    for (int c = 0; c < 3; ++c) results[c].store(taps + (r * 3 + c) * tap);
  }
}

// G g Gᵀ of `count` weights of 3x3, which follow each other; point p at target[p * plane].
template <typename Filter, typename T = typename Filter::T>
void weights(const T* source, bool turned, T* target, int64_t plane, int64_t count) {
  Taps<T> taps;
  for (int64_t begin = 0; begin < count; begin += kTogether) {
    const int64_t n = std::min(kTogether, count - begin);
    taps.take(source + begin * kTaps, n);
    for (int64_t i = 0; i < n; i += Taps<T>::size)
      weight<Filter>(taps.of[0] + i, kTogether, turned, target + begin + i, plane, n - i);
  }
}

// The same of `rows` x `columns` weights, rows `source_row` weights apart, as `columns` x `rows`: lanes are rows.
template <typename Filter, typename T = typename Filter::T>
void weights_transposed(const T* source, int64_t source_row, bool turned, const PointMatrices<T>& target, int64_t rows,
                        int64_t columns) {
  constexpr int64_t size = at::vec::Vectorized<T>::size();
  alignas(64) T taps[size * kTaps * size];
  for (int64_t i = 0; i < rows; i += size)
    for (int64_t j = 0; j < columns; j += size) {
      const int64_t height = std::min(size, rows - i), width = std::min(size, columns - j);
      const T* from = source + (i * source_row + j) * kTaps;
      if (height == size && width == size)
        for (int tap = 0; tap < kTaps; ++tap)
          tile_io::transpose_square(from + tap * size, source_row * kTaps, taps + tap * size * size, size);
      else
        for (int64_t r = 0; r < height; ++r)
          for (int64_t k = 0; k < width * kTaps; ++k) taps[k * size + r] = from[r * source_row * kTaps + k];
      for (int64_t k = 0; k < width; ++k)
        weight<Filter>(taps + k * kTaps * size, size, turned, target.at(j + k, i), target.plane, height);
    }
}

// Gᵀ m G, the gradient of `count` weights from that of their transforms.
template <typename Filter, typename T = typename Filter::T>
void weight_gradients(const T* source, int64_t plane, T* target, int64_t count) {
  Taps<T> taps;
  for (int64_t begin = 0; begin < count; begin += kTogether) {
    const int64_t n = std::min(kTogether, count - begin);
    for (int64_t i = 0; i < n; i += Taps<T>::size)
      weight_gradient<Filter>(source + begin + i, plane, taps.of[0] + i, kTogether, n - i);
    taps.put(target + begin * kTaps, n);
  }
}

}  // namespace winograd
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

// The transforms of Winograd's minimal filtering F(2x2, 3x3): convolution by 16 instead of 36 multiplications for
// every 2x2 results (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308).
//
// A tile is 2x2 pixels of the result, which see 4x4 pixels d of the input. With g the 3x3 weight:
//   result = Aᵀ [ (G g Gᵀ) ∘ (Bᵀ d B) ] A
//        | 1  0 -1  0 |       | 1    0    0  |       | 1  0 |
//   Bᵀ = | 0  1  1  0 |   G = | 1/2  1/2 1/2 |   A = | 1  1 |
//        | 0 -1  1  0 |       | 1/2 -1/2 1/2 |       | 1 -1 |
//        | 0  1  0 -1 |       | 0    0    1  |       | 0 -1 |
// Summed over channels the product is one of matrices for each of the 16 points. All coefficients are 1 but for those
// of the weight, so that rounding stays that of a plain sum. The gradient of g is Gᵀ [ (A dy Aᵀ) ∘ (Bᵀ d B) ] G; that
// of the input is a convolution by the weight turned by 180 degrees, whose transform is the same numbers in the order
// of turned().
//
// Even and odd columns of an image lie apart here, so that a vector holds the same pixel of neighbouring tiles.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "result_memory.h"
#include "tile_io.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace winograd {

constexpr int kSide = 4, kPoints = kSide * kSide, kTaps = 9;

inline int turned(int point) {
  constexpr int order[kSide] = {3, 1, 2, 0};
  return order[point / kSide] * kSide + order[point % kSide];
}

// Of every point a matrix: rows are channels, columns tiles.
template <typename T>
struct PointMatrices {
  T* data;
  int64_t row, plane;  // distances

  Matrix<T> operator[](int point) const { return {data + point * plane, row}; }
  T* at(int64_t i, int64_t j) const { return data + i * row + j; }
  PointMatrices from(int64_t i, int64_t j) const { return {at(i, j), row, plane}; }
};

// Memory for them.
template <typename T>
class Planes {
 public:
  Planes(int64_t rows, int64_t columns) : Planes(rows, columns, (ceil_div(columns, kLine) | 1) * kLine) {}

  // `row`: the distance of rows.
  Planes(int64_t rows, int64_t columns, int64_t row)
      // Planes start in different sets of L1, for a transform writes to all of them at once.
      : plane_(ceil_div(rows * row, kSets * kLine) * kSets * kLine + kSets / kPoints * kLine),
        memory_(empty_result({kPoints * plane_}, c10::CppTypeToScalarType<T>::value)),
        all_{memory_.mutable_data_ptr<T>(), row, plane_} {}

  const PointMatrices<T>& all() const { return all_; }
  Matrix<T> operator[](int point) const { return all_[point]; }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T), kSets = 64;
  int64_t plane_;
  at::Tensor memory_;  // kept between calls, where it is large: its first touch takes time
  PointMatrices<T> all_;
};

// The first `count` elements at p, zeros after them; none where count is not positive.
template <typename T>
at::vec::Vectorized<T> load_up_to(const T* p, int64_t count) {
  using Vec = at::vec::Vectorized<T>;
  if (count >= Vec::size()) return Vec::loadu(p);
  return count > 0 ? Vec::loadu(p, count) : Vec(T(0));
}

template <typename T>
void store_up_to(const at::vec::Vectorized<T>& x, T* p, int64_t count) {
  if (count >= at::vec::Vectorized<T>::size()) x.store(p);
  else if (count > 0) x.store(p, count);
}

// Rows of a channel, the even and the odd pixels of each apart, zero outside of the image.
template <typename T>
class SplitRows {
  using Vec = at::vec::Vectorized<T>;

 public:
  SplitRows(int64_t rows, int64_t tiles)
      : half_((tiles + 3 * Vec::size()) / Vec::size() * Vec::size()), data_(rows * 2 * half_) {}

  // Rows y to y + count of a channel (height x width), from the even pixel x on, for this many tiles, and the pixel
  // before and after those.
  void load(const T* channel, int64_t row, int64_t height, int64_t width, int64_t y, int64_t x, int64_t count,
            int64_t tiles) const {
    for (int64_t i = 0; i < count; ++i) {
      T *to_even = even(i), *to_odd = odd(i);
      if (y + i < 0 || y + i >= height) {
        std::fill_n(data_.get() + i * 2 * half_, 2 * half_, T(0));
        continue;
      }
      const T* from = channel + (y + i) * row + x;
      to_odd[-1] = x > 0 ? from[-1] : T(0);
      for (int64_t j = 0; j <= tiles; j += Vec::size()) {
        const int64_t left = width - x - 2 * j;
        const auto [evens, odds] =
            at::vec::deinterleave2(load_up_to(from + 2 * j, left), load_up_to(from + 2 * j + Vec::size(), left - Vec::size()));
        evens.store(to_even + j);
        odds.store(to_odd + j);
      }
    }
  }

  T* even(int64_t i) const { return data_.get() + i * 2 * half_; }
  T* odd(int64_t i) const { return data_.get() + (i * 2 + 1) * half_ + Vec::size(); }

 private:
  int64_t half_;
  Scratch<T> data_;
};

// Bᵀ d B of the tiles whose first row is row i of `rows`. `room`: as many columns may be written.
template <typename T>
void input(const SplitRows<T>& rows, int64_t i, T* target, int64_t plane, int64_t tiles, int64_t room) {
  using Vec = at::vec::Vectorized<T>;
  for (int64_t j = 0; j < tiles; j += Vec::size()) {
    Vec t[kSide][kSide];
    for (int r = 0; r < kSide; ++r) {
      const T *even = rows.even(i + r) + j, *odd = rows.odd(i + r) + j;
      const Vec d0 = Vec::loadu(odd - 1), d1 = Vec::loadu(even), d2 = Vec::loadu(odd), d3 = Vec::loadu(even + 1);
      t[r][0] = d0 - d2, t[r][1] = d1 + d2, t[r][2] = d2 - d1, t[r][3] = d1 - d3;
    }
    for (int c = 0; c < kSide; ++c) {
      const Vec results[kSide] = {t[0][c] - t[2][c], t[1][c] + t[2][c], t[2][c] - t[1][c], t[1][c] - t[3][c]};
      for (int r = 0; r < kSide; ++r) store_up_to(results[r], target + (r * kSide + c) * plane + j, room - j);
    }
  }
}

// A dy Aᵀ of the tiles whose rows are rows i and i + 1.
template <typename T>
void output_gradient(const SplitRows<T>& rows, int64_t i, T* target, int64_t plane, int64_t tiles, int64_t room) {
  using Vec = at::vec::Vectorized<T>;
  const auto apply = [](const Vec& first, const Vec& second) {
    return std::array<Vec, kSide>{first, first + second, first - second, second.neg()};
  };
  for (int64_t j = 0; j < tiles; j += Vec::size()) {
    const auto upper = apply(Vec::loadu(rows.even(i) + j), Vec::loadu(rows.odd(i) + j));
    const auto lower = apply(Vec::loadu(rows.even(i + 1) + j), Vec::loadu(rows.odd(i + 1) + j));
    for (int c = 0; c < kSide; ++c) {
      const auto results = apply(upper[c], lower[c]);
      for (int r = 0; r < kSide; ++r) store_up_to(results[r], target + (r * kSide + c) * plane + j, room - j);
    }
  }
}

// Aᵀ m A + bias of tiles, as two rows of which `height` and of each `width` pixels exist.
template <typename T>
void output(const T* source, int64_t plane, T bias, T* target, int64_t row, int64_t tiles, int64_t room, int64_t height,
            int64_t width) {
  using Vec = at::vec::Vectorized<T>;
  for (int64_t j = 0; j < tiles; j += Vec::size()) {
    Vec s[2][kSide];
    for (int c = 0; c < kSide; ++c) {
      const auto m = [&](int r) { return load_up_to(source + (r * kSide + c) * plane + j, room - j); };
      const Vec middle = m(1), third = m(2);
      s[0][c] = m(0) + middle + third;
      s[1][c] = middle - third - m(3);
    }
    for (int64_t r = 0; r < height; ++r) {
      const Vec even = s[r][0] + s[r][1] + s[r][2] + Vec(bias), odd = s[r][1] - s[r][2] - s[r][3] + Vec(bias);
      const auto [first, second] = at::vec::interleave2(even, odd);
      store_up_to(first, target + r * row + 2 * j, width - 2 * j);
      store_up_to(second, target + r * row + 2 * j + Vec::size(), width - 2 * j - Vec::size());
    }
  }
}

}  // namespace winograd
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

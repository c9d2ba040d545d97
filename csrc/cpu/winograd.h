// The transforms of Winograd's minimal filtering F(n x n, 3x3), n = 2 or 4 (Lavin and Gray, "Fast Algorithms for
// Convolutional Neural Networks", arXiv 1509.09308): convolution by 16 instead of 36 multiplications for every 2x2
// results, by 36 instead of 144 for every 4x4.
//
// A tile is n x n pixels of the result, which see (n + 2) x (n + 2) pixels d of the input. With g the 3x3 weight:
//   result = Aᵀ [ (G g Gᵀ) ∘ (Bᵀ d B) ] A
// Summed over channels the product is one of matrices for each of the (n + 2)² points. The gradient of g is
// Gᵀ [ (A dy Aᵀ) ∘ (Bᵀ d B) ] G; that of the input is a convolution by the weight turned by 180 degrees.
// A filter, Two or Four, has these matrices, as functions that multiply a vector of each number by them.
//
// Columns of an image lie apart here by their place in a tile, so that a vector holds the same pixel of neighbouring
// tiles.
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

constexpr int kTaps = 9;

// F(2x2, 3x3), from the points 0, 1, -1 and infinity. All coefficients are 1 but for those of the weight, so that
// rounding stays that of a plain sum.
template <typename Number>
struct Two {
  using T = Number;
  using Vec = at::vec::Vectorized<T>;
  static constexpr int kTile = 2, kSide = kTile + 2, kPoints = kSide * kSide;

  static std::array<Vec, 4> input(const std::array<Vec, 4>& d) {
    return {d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]};
  }
  static std::array<Vec, 2> output(const std::array<Vec, 4>& m) { return {m[0] + m[1] + m[2], m[1] - m[2] - m[3]}; }
  static std::array<Vec, 4> output_gradient(const std::array<Vec, 2>& y) {
    return {y[0], y[0] + y[1], y[0] - y[1], y[1].neg()};
  }
  static std::array<Vec, 4> weight(const std::array<Vec, 3>& g) {
    const Vec half(T(0.5)), ends = (g[0] + g[2]) * half, middle = g[1] * half;
    return {g[0], ends + middle, ends - middle, g[2]};
  }
  static std::array<Vec, 3> weight_gradient(const std::array<Vec, 4>& m) {
    const Vec half(T(0.5)), sum = (m[1] + m[2]) * half;
    return {m[0] + sum, (m[1] - m[2]) * half, sum + m[3]};
  }
};

// F(4x4, 3x3), from the points 0, 5/8, -5/8, 3/2, -3/2 and infinity, with which errors are half as large as with the
// usual 0, 1, -1, 2, -2: 3 to 4 times those of a plain sum.
template <typename Number>
struct Four {
  using T = Number;
  using Vec = at::vec::Vectorized<T>;
  static constexpr int kTile = 4, kSide = kTile + 2, kPoints = kSide * kSide;

  static std::array<Vec, 6> input(const std::array<Vec, 6>& d) {
    const Vec inner = fmadd(d[2], Vec(-kB * kB), d[4]), outer = fmadd(d[2], Vec(-kA * kA), d[4]);
    const Vec odd_inner = fmadd(d[1], Vec(-kB * kB), d[3]), odd_outer = fmadd(d[1], Vec(-kA * kA), d[3]);
    const Vec squares(-kA * kA - kB * kB), product(kA * kA * kB * kB);
    return {fmadd(d[0], product, fmadd(d[2], squares, d[4])),
            fmadd(odd_inner, Vec(kA), inner), fmadd(odd_inner, Vec(-kA), inner),
            fmadd(odd_outer, Vec(kB), outer), fmadd(odd_outer, Vec(-kB), outer),
            fmadd(d[1], product, fmadd(d[3], squares, d[5]))};
  }
  static std::array<Vec, 4> output(const std::array<Vec, 6>& m) {
    const Vec inner = m[1] + m[2], odd_inner = (m[1] - m[2]) * Vec(kA), outer = m[3] + m[4], odd_outer = (m[3] - m[4]) * Vec(kB);
    return {m[0] + inner + outer, odd_inner + odd_outer, fmadd(inner, Vec(kA * kA), outer * Vec(kB * kB)),
            fmadd(odd_inner, Vec(kA * kA), fmadd(odd_outer, Vec(kB * kB), m[5]))};
  }
  static std::array<Vec, 6> output_gradient(const std::array<Vec, 4>& y) {
    const Vec inner = fmadd(y[2], Vec(kA * kA), y[0]), odd_inner = fmadd(y[3], Vec(kA * kA), y[1]);
    const Vec outer = fmadd(y[2], Vec(kB * kB), y[0]), odd_outer = fmadd(y[3], Vec(kB * kB), y[1]);
    return {y[0], fmadd(odd_inner, Vec(kA), inner), fmadd(odd_inner, Vec(-kA), inner), fmadd(odd_outer, Vec(kB), outer),
            fmadd(odd_outer, Vec(-kB), outer), y[3]};
  }
  static std::array<Vec, 6> weight(const std::array<Vec, 3>& g) {
    const Vec inner = fmadd(g[2], Vec(kA * kA), g[0]) * Vec(kInner), outer = fmadd(g[2], Vec(kB * kB), g[0]) * Vec(kOuter);
    return {g[0] * Vec(kZero), fmadd(g[1], Vec(kA * kInner), inner), fmadd(g[1], Vec(-kA * kInner), inner),
            fmadd(g[1], Vec(kB * kOuter), outer), fmadd(g[1], Vec(-kB * kOuter), outer), g[2]};
  }
  static std::array<Vec, 3> weight_gradient(const std::array<Vec, 6>& m) {
    const Vec inner = (m[1] + m[2]) * Vec(kInner), odd_inner = (m[1] - m[2]) * Vec(kA * kInner);
    const Vec outer = (m[3] + m[4]) * Vec(kOuter), odd_outer = (m[3] - m[4]) * Vec(kB * kOuter);
    return {fmadd(m[0], Vec(kZero), inner + outer), odd_inner + odd_outer,
            fmadd(inner, Vec(kA * kA), fmadd(outer, Vec(kB * kB), m[5]))};
  }

 private:
  static constexpr T kA = 0.625, kB = 1.5;
  // One over the product of the differences of a point from all others.
  static constexpr T kZero = 1 / (kA * kA * kB * kB), kInner = 1 / (2 * kA * kA * (kA * kA - kB * kB)),
                     kOuter = 1 / (2 * kB * kB * (kB * kB - kA * kA));
};

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
template <typename Filter>
class Planes {
  using T = typename Filter::T;

 public:
  Planes(int64_t rows, int64_t columns) : Planes(rows, columns, (ceil_div(columns, kLine) | 1) * kLine) {}

  // `row`: the distance of rows.
  Planes(int64_t rows, int64_t columns, int64_t row)
      // Planes start in different sets of L1, for a transform writes to all of them at once.
      : plane_(ceil_div(rows * row, kSets * kLine) * kSets * kLine + kSets / Filter::kPoints * kLine),
        memory_(empty_result({Filter::kPoints * plane_}, c10::CppTypeToScalarType<T>::value)),
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

// Rows of a channel, the pixels of each apart by their place in a tile, zero outside of the image.
template <typename Filter>
class SplitRows {
  using T = typename Filter::T;
  using Vec = at::vec::Vectorized<T>;
  static constexpr int kTile = Filter::kTile;

 public:
  SplitRows(int64_t rows, int64_t tiles)
      : part_((tiles + 3 * Vec::size()) / Vec::size() * Vec::size()), data_(rows * kTile * part_) {}

  // Rows y to y + count of a channel (height x width), from pixel x on, for this many tiles, and the pixel before and
  // after those.
  void load(const T* channel, int64_t row, int64_t height, int64_t width, int64_t y, int64_t x, int64_t count,
            int64_t tiles) const {
    for (int64_t i = 0; i < count; ++i) {
      if (y + i < 0 || y + i >= height) {
        std::fill_n(data_.get() + i * kTile * part_, kTile * part_, T(0));
        continue;
      }
      const T* from = channel + (y + i) * row + x;
      at(i, kTile - 1)[-1] = x > 0 ? from[-1] : T(0);
      for (int64_t j = 0; j < tiles; j += Vec::size()) {
        std::array<Vec, kTile> pixels;
        for (int p = 0; p < kTile; ++p) {
          const int64_t first = kTile * j + p * Vec::size();
          pixels[p] = load_up_to(from + first, width - x - first);
        }
        pixels = apart(pixels);
        for (int p = 0; p < kTile; ++p) pixels[p].store(at(i, p) + j);
      }
      at(i, 0)[tiles] = x + kTile * tiles < width ? from[kTile * tiles] : T(0);
    }
  }

  // In row i pixel `place` of every tile.
  T* at(int64_t i, int place) const {
    return data_.get() + (i * kTile + place) * part_ + (place == kTile - 1 ? Vec::size() : 0);
  }

  // A row of the pixels that tiles see, or that they are, from tile j on.
  std::array<Vec, Filter::kSide> seen(int64_t i, int64_t j) const {
    std::array<Vec, Filter::kSide> d;
    d[0] = Vec::loadu(at(i, kTile - 1) + j - 1);
    for (int p = 0; p < kTile; ++p) d[p + 1] = Vec::loadu(at(i, p) + j);
    d[kTile + 1] = Vec::loadu(at(i, 0) + j + 1);
    return d;
  }
  std::array<Vec, kTile> own(int64_t i, int64_t j) const {
    std::array<Vec, kTile> y;
    for (int p = 0; p < kTile; ++p) y[p] = Vec::loadu(at(i, p) + j);
    return y;
  }

  // From vectors of pixels that follow each other to vectors of one place in every tile, and back.
  static std::array<Vec, kTile> apart(const std::array<Vec, kTile>& pixels) {
    if constexpr (kTile == 2) {
      const auto [even, odd] = at::vec::deinterleave2(pixels[0], pixels[1]);
      return {even, odd};
    } else {
      const auto [even, odd] = at::vec::deinterleave2(pixels[0], pixels[1]);
      const auto [later_even, later_odd] = at::vec::deinterleave2(pixels[2], pixels[3]);
      const auto [first, third] = at::vec::deinterleave2(even, later_even);
      const auto [second, fourth] = at::vec::deinterleave2(odd, later_odd);
      return {first, second, third, fourth};
    }
  }
  static std::array<Vec, kTile> together(const std::array<Vec, kTile>& places) {
    if constexpr (kTile == 2) {
      const auto [first, second] = at::vec::interleave2(places[0], places[1]);
      return {first, second};
    } else {
      const auto [even, later_even] = at::vec::interleave2(places[0], places[2]);
      const auto [odd, later_odd] = at::vec::interleave2(places[1], places[3]);
      const auto [first, second] = at::vec::interleave2(even, odd);
      const auto [third, fourth] = at::vec::interleave2(later_even, later_odd);
      return {first, second, third, fourth};
    }
  }

 private:
  int64_t part_;
  Scratch<T> data_;
};

// Bᵀ d B of the tiles whose first row is row i of `rows`. `room`: as many columns may be written.
template <typename Filter, typename T = typename Filter::T>
void input(const SplitRows<Filter>& rows, int64_t i, T* target, int64_t plane, int64_t tiles, int64_t room) {
  constexpr int kSide = Filter::kSide;
  using Vec = at::vec::Vectorized<T>;
  for (int64_t j = 0; j < tiles; j += Vec::size()) {
    std::array<Vec, kSide> t[kSide];
    for (int r = 0; r < kSide; ++r) t[r] = Filter::input(rows.seen(i + r, j));
    for (int c = 0; c < kSide; ++c) {
      std::array<Vec, kSide> column;
      for (int r = 0; r < kSide; ++r) column[r] = t[r][c];
      const auto results = Filter::input(column);
      for (int r = 0; r < kSide; ++r) store_up_to(results[r], target + (r * kSide + c) * plane + j, room - j);
    }
  }
}

// A dy Aᵀ of the tiles whose first row is row i, and the sum of their pixels.
template <typename Filter, typename T = typename Filter::T>
T output_gradient(const SplitRows<Filter>& rows, int64_t i, T* target, int64_t plane, int64_t tiles, int64_t room) {
  constexpr int kSide = Filter::kSide, kTile = Filter::kTile;
  using Vec = at::vec::Vectorized<T>;
  Vec sum(T(0));
  for (int64_t j = 0; j < tiles; j += Vec::size()) {
    std::array<Vec, kSide> t[kTile];
    Vec pixels(T(0));
    for (int r = 0; r < kTile; ++r) {
      const auto y = rows.own(i + r, j);
      for (const Vec& pixel : y) pixels = pixels + pixel;
      t[r] = Filter::output_gradient(y);
    }
    sum = sum + Vec::set(Vec(T(0)), pixels, std::min<int64_t>(tiles - j, Vec::size()));
    for (int c = 0; c < kSide; ++c) {
      std::array<Vec, kTile> column;
      for (int r = 0; r < kTile; ++r) column[r] = t[r][c];
      const auto results = Filter::output_gradient(column);
      for (int r = 0; r < kSide; ++r) store_up_to(results[r], target + (r * kSide + c) * plane + j, room - j);
    }
  }
  return at::vec::vec_reduce_all<T>([](const Vec& a, const Vec& b) { return a + b; }, sum);
}

// Aᵀ m A + bias of tiles, as rows of which `height` and of each `width` pixels exist.
template <typename Filter, typename T = typename Filter::T>
void output(const T* source, int64_t plane, T bias, T* target, int64_t row, int64_t tiles, int64_t room, int64_t height,
            int64_t width) {
  constexpr int kSide = Filter::kSide, kTile = Filter::kTile;
  using Vec = at::vec::Vectorized<T>;
  for (int64_t j = 0; j < tiles; j += Vec::size()) {
    std::array<Vec, kSide> t[kTile];
    for (int c = 0; c < kSide; ++c) {
      std::array<Vec, kSide> m;
      for (int r = 0; r < kSide; ++r) m[r] = load_up_to(source + (r * kSide + c) * plane + j, room - j);
      const auto column = Filter::output(m);
      for (int r = 0; r < kTile; ++r) t[r][c] = column[r];
    }
    for (int64_t r = 0; r < height; ++r) {
      auto pixels = Filter::output(t[r]);
      for (Vec& pixel : pixels) pixel = pixel + Vec(bias);
      pixels = SplitRows<Filter>::together(pixels);
      for (int p = 0; p < kTile; ++p) {
        const int64_t first = kTile * j + p * Vec::size();
        store_up_to(pixels[p], target + r * row + first, width - first);
      }
    }
  }
}

}  // namespace winograd
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

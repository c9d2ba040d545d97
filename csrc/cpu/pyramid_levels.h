// The images of pyramid attention as its kernels read them: packed once per pass, in the accumulation
// type, so that inputs may have any strides and dtypes. O(pixels) memory.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "row_products.h"
#include "tile_gemm.h"
#include "tile_io.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace pyramid {

using at::Tensor;
template <typename T>
using Vec = at::vec::Vectorized<T>;

// Zeros beside every row of a tile: what lies left and right of an image. A multiple of the vector
// length, so that rows stay aligned, and no less than the radius of the largest patch.
template <typename T>
constexpr int64_t kMargin = Vec<T>::size() > 4 ? Vec<T>::size() : 4;

template <typename T>
int64_t whole_vectors(int64_t count) {
  return (count + Vec<T>::size() - 1) / Vec<T>::size() * Vec<T>::size();
}

// Calls f(typed null pointer) for the dtype of x, of those that are computed in T.
template <typename T, typename F>
void dispatch(const Tensor& x, F f) {
  if constexpr (std::is_same_v<T, double>) f(static_cast<double*>(nullptr));
  else if (x.scalar_type() == at::kFloat) f(static_cast<float*>(nullptr));
  else if (x.scalar_type() == at::kHalf) f(static_cast<at::Half*>(nullptr));
  else f(static_cast<at::BFloat16*>(nullptr));
}

// `count` pixels of row y of image b from column x on, channels x pixels.
template <typename S>
Matrix<S> image_row(const Tensor& image, int64_t b, int64_t y, int64_t x) {
  S* data = const_cast<S*>(image.const_data_ptr<std::remove_const_t<S>>());
  return {data + b * image.stride(0) + y * image.stride(2) + x * image.stride(3), image.stride(1), image.stride(3)};
}

template <typename T>
void load_row(const Tensor& image, int64_t b, int64_t y, int64_t x, int64_t count, Matrix<T> target) {
  dispatch<T>(image, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    copy_tile<S, T>(image_row<const S>(image, b, y, x), target, image.size(1), count);
  });
}

template <typename T>
void store_row(Matrix<const T> source, const Tensor& image, int64_t b, int64_t y, int64_t x, int64_t count) {
  dispatch<T>(image, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    copy_tile<T, S>(source, image_row<S>(image, b, y, x), image.size(1), count);
  });
}

template <typename F>
void each_row(int64_t rows, F f) {
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y) f(y);
  });
}

// An image pixel by pixel: the channels of each are adjacent. (H * W) x C.
template <typename T>
Scratch<T> pixel_major(const Tensor& image, int64_t b) {
  const int64_t channels = image.size(1), height = image.size(2), width = image.size(3);
  Scratch<T> packed(height * width * channels);
  each_row(height, [&](int64_t y) {
    load_row<T>(image, b, y, 0, width, {packed.get() + y * width * channels, 1, channels});
  });
  return packed;
}

// The columns of the query image that are worked on at a time, with a halo on either side where the
// image goes on: two filters, each of which reads `radius` columns to the left and right.
struct Band {
  int64_t begin, end;      // its own columns
  int64_t left, columns;   // of the image, with halo
  int64_t lanes;           // columns, up to a whole number of vectors
};

template <typename T>
std::vector<Band> equal_bands(int64_t width, int64_t count, int64_t halo) {
  std::vector<Band> bands;
  for (int64_t i = 0; i < count; ++i) {
    Band band;
    band.begin = i * width / count, band.end = (i + 1) * width / count;
    band.left = std::max<int64_t>(band.begin - halo, 0);
    band.columns = std::min(band.end + halo, width) - band.left;
    band.lanes = whole_vectors<T>(band.columns);
    bands.push_back(band);
  }
  return bands;
}

// About as few bands as keep the tiles, all keys of a row high, in the cache; of these numbers, the one with
// the fewest lanes in all.
template <typename T>
std::vector<Band> bands(int64_t width, int64_t widest_row_of_keys, int64_t radius) {
  constexpr int64_t kTile = 320 * 1024 / sizeof(T), kFewestLanes = 48;
  const int64_t halo = 2 * radius, most = std::max(kTile / widest_row_of_keys, kFewestLanes);
  const int64_t fewest = width <= most ? 1 : (width + most - 2 * halo - 1) / (most - 2 * halo);
  std::vector<Band> best;
  int64_t best_lanes = 0;
  for (int64_t count = fewest; count <= std::min(fewest + 3, width); ++count) {
    std::vector<Band> candidate = equal_bands<T>(width, count, halo);
    int64_t lanes = 0;
    for (const Band& band : candidate) lanes += band.lanes;
    if (best.empty() || lanes < best_lanes) best = candidate, best_lanes = lanes;
  }
  return best;
}

// The rows of an image within a band, each C x lanes; zeros beyond the image.
template <typename T>
Scratch<T> band_rows(const Tensor& image, int64_t b, const Band& band) {
  const int64_t channels = image.size(1), height = image.size(2), size = channels * band.lanes;
  Scratch<T> packed(height * size);
  each_row(height, [&](int64_t y) {
    T* row = packed.get() + y * size;
    std::fill_n(row, size, T(0));
    load_row<T>(image, b, y, band.left, band.columns, {row, band.lanes});
  });
  return packed;
}

// The sums of x (height x width) over squares of 2 * radius + 1 pixels a side.
template <typename T>
Scratch<T> box_sums(const T* x, int64_t height, int64_t width, int64_t radius) {
  Scratch<T> sums(height * width);
  each_row(height, [&](int64_t y) {
    for (int64_t column = 0; column < width; ++column) {
      T sum = 0;
      for (int64_t i = std::max<int64_t>(y - radius, 0); i <= std::min(y + radius, height - 1); ++i)
        for (int64_t j = std::max<int64_t>(column - radius, 0); j <= std::min(column + radius, width - 1); ++j)
          sum += x[i * width + j];
      sums.get()[y * width + column] = sum;
    }
  });
  return sums;
}

// One level of the pyramid of one image.
template <typename T>
struct Level {
  int64_t height, width, first;  // position of its first pixel among those of all levels
  Scratch<T> keys, values;       // pixel-major; keys divided by `unit`
  T unit, eps;                   // eps divided by `unit`
  Scratch<T> squares;            // of the norm of every key patch
  Scratch<T> factors;            // softmax_scale / max(norm, eps)

  Level(const Tensor& key, const Tensor& value, int64_t b, int64_t first, int64_t radius, T scale, T eps)
      : height(key.size(2)), width(key.size(3)), first(first), keys(pixel_major<T>(key, b)),
        values(pixel_major<T>(value, b)), unit(extract_unit(keys.get(), pixels() * key.size(1))), eps(eps / unit),
        squares(patch_squares(key.size(1), radius)), factors(pixels()) {
    for (int64_t l = 0; l < pixels(); ++l)
      factors.get()[l] = scale / std::max(std::sqrt(squares.get()[l]), this->eps);
  }

  int64_t pixels() const { return height * width; }

 private:
  // A power of two by which keys are divided whose squares could leave the range of T; scores are of
  // normalised patches and do not depend on it.
  static T extract_unit(T* keys, int64_t count) {
    T largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(keys[i]));
    constexpr int kSafe = std::numeric_limits<T>::max_exponent / 4;
    const int exponent = largest > 0 && std::isfinite(largest) ? std::ilogb(largest) : 0;
    if (std::abs(exponent) < kSafe) return T(1);
    const T unit = std::ldexp(T(1), exponent);
    for (int64_t i = 0; i < count; ++i) keys[i] /= unit;
    return unit;
  }

  Scratch<T> patch_squares(int64_t channels, int64_t radius) const {
    Scratch<T> squares(pixels());
    const Matrix<const T> rows{keys.get(), channels};
    dot_rows<T>(rows, rows, pixels(), channels, squares.get());
    return box_sums(squares.get(), height, width, radius);
  }
};

}  // namespace pyramid
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

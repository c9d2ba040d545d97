// What the schedules of dense convolution have in common: blocks of tiles, their transforms, and what the memory system
// is asked for meanwhile.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "tile_gemm.h"
#include "winograd.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace dense {

using at::Tensor;
using winograd::kPoints, winograd::kTaps;

// Some tiles of an image: rows x columns of them.
struct Block {
  int64_t row, column, rows, columns;
  int64_t tiles() const { return rows * columns; }
};

// A block of one of several images.
struct Place {
  int64_t image;
  Block block;
};

// How the tiles of an image are divided into blocks.
class Blocks {
 public:
  // Of images of height x width, whose tiles have this many channels on both sides together.
  Blocks(int64_t height, int64_t width, int64_t channels)
      : tile_rows_(ceil_div(height, 2)), tile_columns_(ceil_div(width, 2)) {
    constexpr int64_t kElements = 8192, kPanel = 48, kMost = 192;  // of the 16 planes: half a MiB of float32
    const int64_t most = std::clamp(kElements / std::max<int64_t>(channels, 1), kPanel, kMost);
    double best = 0;
    for (int64_t parts = 1; parts <= tile_columns_; ++parts) {
      const int64_t columns = ceil_div(tile_columns_, parts);
      if (columns > most) continue;
      for (int64_t rows = 1; rows <= std::min(most / columns, tile_rows_); ++rows) {
        const double cost = static_cast<double>(parts * ceil_div(tile_rows_, rows)) * vectors(rows * columns);
        if (best == 0 || cost < best) best = cost, rows_ = rows, columns_ = columns;
      }
      if (columns < kPanel / 3) break;
    }
    across_ = ceil_div(tile_columns_, columns_);
  }

  int64_t count() const { return ceil_div(tile_rows_, rows_) * across_; }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t tiles() const { return rows_ * columns_; }

  Place operator[](int64_t i) const {
    const int64_t row = i % count() / across_ * rows_, column = i % across_ * columns_;
    return {i / count(), {row, column, std::min(rows_, tile_rows_ - row), std::min(columns_, tile_columns_ - column)}};
  }

 private:
  // What products of so many columns cost, in vectors of 16: a panel that is not full has less work to hide its loads.
  static double vectors(int64_t columns) {
    constexpr double of_rest[] = {0, 1.3, 2.2, 3};
    return static_cast<double>(columns / 48 * 3) + of_rest[ceil_div(columns % 48, 16)];
  }

  int64_t tile_rows_, tile_columns_, rows_ = 1, columns_ = 1, across_ = 1;
};

// Contiguous, but for the distances of images and channels.
inline Tensor with_dense_rows(const Tensor& x) {
  const bool fits = x.stride(3) == 1 || x.size(3) == 1;
  return fits && (x.size(2) == 1 || x.stride(2) >= x.size(3)) ? x : x.contiguous();
}

// The channels of an image whose rows are dense.
template <typename T>
struct Channels {
  T* data;
  int64_t channel, row, height, width;

  Channels(const Tensor& x, int64_t image)
      : data(const_cast<T*>(x.const_data_ptr<std::remove_const_t<T>>()) + image * x.stride(0)), channel(x.stride(1)),
        row(x.stride(2)), height(x.size(2)), width(x.size(3)) {}

  T* operator[](int64_t i) const { return data + i * channel; }
  Channels from(int64_t i) const {
    Channels others = *this;
    others.data += i * channel;
    return others;
  }
};

// Of rows of pixels, in all channels, what the memory system is asked for while the product of a point is computed. Of
// more rows than points, which only narrow images have, the last are not asked for.
template <typename T>
Prefetch part_of_rows(const Channels<T>& image, int64_t channels, int64_t y, int64_t rows, int64_t x, int64_t columns, int point) {
  const int64_t parts = std::max<int64_t>(1, kPoints / rows), i = point / parts, part = point % parts;
  if (i >= rows || y + i < 0 || y + i >= image.height) return {};
  const int64_t first = part * channels / parts, last = (part + 1) * channels / parts;
  const Matrix<T> pixels{image[first] + (y + i) * image.row + x, image.channel};
  return {pixels, last - first, std::min(columns, image.width - x), !std::is_const_v<T>};
}

// Of what a block's tiles see, and of what it makes or has the gradient of.
template <typename T>
Prefetch part_of_input(const Channels<const T>& image, int64_t channels, const Block& block, int point) {
  return part_of_rows(image, channels, 2 * block.row - 1, 2 * block.rows + 2, 2 * block.column, 2 * block.columns, point);
}
template <typename T>
Prefetch part_of_output(const Channels<T>& image, int64_t channels, const Block& block, int point) {
  return part_of_rows(image, channels, 2 * block.row, 2 * block.rows, 2 * block.column, 2 * block.columns, point);
}

// Transforms of one block of an image: f(rows, first of their rows, target, plane, tiles, room) makes a row of tiles.
template <typename T, typename F>
void transform(const Channels<const T>& image, int64_t channels, const Block& block, const winograd::SplitRows<T>& rows,
               const winograd::PointMatrices<T>& target, F f) {
  for (int64_t c = 0; c < channels; ++c) {
    rows.load(image[c], image.row, image.height, image.width, 2 * block.row - 1, 2 * block.column, 2 * block.rows + 2,
              block.columns);
    for (int64_t i = 0; i < block.rows; ++i)
      f(rows, 2 * i, target.at(c, i * block.columns), target.plane, block.columns, (block.rows - i) * block.columns);
  }
}

// winograd::output_gradient as transform() calls it: rows start one above the block, as input() needs them.
constexpr auto kOutputGradient = [](const auto& rows, int64_t i, auto... rest) {
  winograd::output_gradient(rows, i + 1, rest...);
};

// A block of the result from its sums.
template <typename T>
void write(const winograd::PointMatrices<T>& sums, const Block& block, const T* bias, const Channels<T>& target,
           int64_t outputs) {
  const int64_t width = std::min(2 * block.columns, target.width - 2 * block.column);
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t i = 0; i < block.rows; ++i) {
      const int64_t y = 2 * (block.row + i);
      winograd::output(sums.at(o, i * block.columns), sums.plane, bias ? bias[o] : T(0),
                       target[o] + y * target.row + 2 * block.column, target.row, block.columns,
                       (block.rows - i) * block.columns, std::min<int64_t>(2, target.height - y), width);
    }
}

// The sum of a channel's gradient in so many tiles.
template <typename T>
T sum_of_pixels(const winograd::PointMatrices<T>& gradients, int64_t channel, int64_t tiles) {
  constexpr int kSum = 5;  // the point that holds the sum of a tile
  return at::vec::reduce_all<T>([](auto a, auto b) { return a + b; }, gradients[kSum].from(channel, 0).data, tiles);
}

}  // namespace dense
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

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
using winograd::kTaps;

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
template <typename Filter>
class Blocks {
 public:
  // Of images of height x width, whose tiles have this many channels on both sides together.
  Blocks(int64_t height, int64_t width, int64_t channels)
      : tile_rows_(ceil_div(height, Filter::kTile)), tile_columns_(ceil_div(width, Filter::kTile)) {
    // Of all planes: half a MiB of float32.
    constexpr int64_t kElements = (1 << 17) / Filter::kPoints, kPanel = 48, kMost = 192;
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
template <typename Filter, typename T>
Prefetch part_of_rows(const Channels<T>& image, int64_t channels, int64_t y, int64_t rows, int64_t x, int64_t columns, int point) {
  const int64_t parts = std::max<int64_t>(1, Filter::kPoints / rows), i = point / parts, part = point % parts;
  if (i >= rows || y + i < 0 || y + i >= image.height) return {};
  const int64_t first = part * channels / parts, last = (part + 1) * channels / parts;
  const Matrix<T> pixels{image[first] + (y + i) * image.row + x, image.channel};
  return {pixels, last - first, std::min(columns, image.width - x), !std::is_const_v<T>};
}

// Of what a block's tiles see, and of what it makes or has the gradient of.
template <typename Filter, typename T>
Prefetch part_of_input(const Channels<const T>& image, int64_t channels, const Block& block, int point) {
  constexpr int n = Filter::kTile;
  return part_of_rows<Filter>(image, channels, n * block.row - 1, n * block.rows + 2, n * block.column, n * block.columns, point);
}
template <typename Filter, typename T>
Prefetch part_of_output(const Channels<T>& image, int64_t channels, const Block& block, int point) {
  constexpr int n = Filter::kTile;
  return part_of_rows<Filter>(image, channels, n * block.row, n * block.rows, n * block.column, n * block.columns, point);
}

// Rows of a block and those above and below that its tiles see.
template <typename Filter>
winograd::SplitRows<Filter> rows_of(int64_t tile_rows, int64_t tile_columns) {
  return {Filter::kTile * tile_rows + 2, tile_columns};
}

// Runs f(channel, first of its `rows`, target, tiles, room) for every row of tiles of a block, in all channels.
template <typename Filter, typename T, typename F>
void for_rows(const Channels<const T>& image, int64_t channels, const Block& block, const winograd::SplitRows<Filter>& rows,
              const winograd::PointMatrices<T>& target, F f) {
  constexpr int n = Filter::kTile;
  for (int64_t c = 0; c < channels; ++c) {
    rows.load(image[c], image.row, image.height, image.width, n * block.row - 1, n * block.column, n * block.rows + 2,
              block.columns);
    for (int64_t i = 0; i < block.rows; ++i)
      f(c, n * i, target.at(c, i * block.columns), block.columns, (block.rows - i) * block.columns);
  }
}

// Transforms of one block of an image.
template <typename Filter, typename T>
void transform(const Channels<const T>& image, int64_t channels, const Block& block, const winograd::SplitRows<Filter>& rows,
               const winograd::PointMatrices<T>& target) {
  for_rows(image, channels, block, rows, target, [&](int64_t, int64_t i, T* to, int64_t tiles, int64_t room) {
    winograd::input(rows, i, to, target.plane, tiles, room);
  });
}

// Those of a gradient of the result; the sum of its pixels in every channel is added to `sums`.
template <typename Filter, typename T>
void transform_gradient(const Channels<const T>& grad, int64_t channels, const Block& block,
                        const winograd::SplitRows<Filter>& rows, const winograd::PointMatrices<T>& target, T* sums) {
  for_rows(grad, channels, block, rows, target, [&](int64_t c, int64_t i, T* to, int64_t tiles, int64_t room) {
    sums[c] += winograd::output_gradient(rows, i + 1, to, target.plane, tiles, room);
  });
}

// A block of the result from its sums.
template <typename Filter, typename T>
void write(const winograd::PointMatrices<T>& sums, const Block& block, const T* bias, const Channels<T>& target,
           int64_t outputs) {
  constexpr int64_t n = Filter::kTile;
  const int64_t width = std::min(n * block.columns, target.width - n * block.column);
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t i = 0; i < block.rows; ++i) {
      const int64_t y = n * (block.row + i);
      winograd::output<Filter>(sums.at(o, i * block.columns), sums.plane, bias ? bias[o] : T(0),
                               target[o] + y * target.row + n * block.column, target.row, block.columns,
                               (block.rows - i) * block.columns, std::min(n, target.height - y), width);
    }
}

}  // namespace dense
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

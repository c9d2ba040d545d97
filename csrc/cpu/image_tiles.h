// Images (B, H, C, N) of any strides as matrices of channels x pixels, and how their pixels are divided
// into tasks and tiles.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <bit>
#include <type_traits>

#include "tile_gemm.h"
#include "tile_io.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {

using at::Tensor;

// How the pixels are divided: chunks are tasks, tiles are what is worked on at a time. Depends on shapes
// alone, so that sums are the same for any number of threads.
struct Division {
  int64_t pixels, chunk, chunks, tile;

  // Tiles of matrices of this many rows whose pixels are the columns of a product, which takes 48, or 64 in two, at a time.
  static Division of_columns(int64_t pixels, int64_t rows, int64_t groups) {
    constexpr int64_t kElements = 12288, kPanel = 64, kMost = 384;
    return {pixels, rows, groups, std::clamp<int64_t>(kElements / std::max<int64_t>(rows, 1) / kPanel * kPanel, kPanel, kMost)};
  }
  // Tiles whose pixels are added up: the longer, the less often lanes are.
  static Division of_sums(int64_t pixels, int64_t rows, int64_t groups) {
    constexpr uint64_t kElements = 24576, kLeast = 64, kMost = 1024;
    const uint64_t most = std::bit_floor(kElements / std::max<uint64_t>(rows, 1));
    const uint64_t of_chunk = std::bit_ceil<uint64_t>(ceil_div(pixels, wanted_chunks(pixels, rows, groups)));
    return {pixels, rows, groups, static_cast<int64_t>(std::clamp(std::min(most, of_chunk), kLeast, kMost))};
  }

  Division(int64_t pixels, int64_t rows, int64_t groups, int64_t tile) : pixels(pixels), tile(tile) {
    chunk = std::max(tile, ceil_div(ceil_div(pixels, wanted_chunks(pixels, rows, groups)), tile) * tile);
    chunks = std::max<int64_t>(1, ceil_div(pixels, chunk));
  }

  // As many as leave each 1024 pixels, or, of many rows, fewer pixels but as many products as 48 rows of 1024 have: but no
  // more tasks than share out the work.
  static int64_t wanted_chunks(int64_t pixels, int64_t rows, int64_t groups) {
    constexpr int64_t kPixels = 1024, kProducts = kPixels * 48 * 48, kMost = 64, kFew = 8;
    const int64_t most = kMost / std::max<int64_t>(groups, 1), few = kFew / std::max<int64_t>(groups, 1);
    const int64_t wanted = std::max(pixels / kPixels, std::min(few, pixels * rows * rows / kProducts));
    return std::max<int64_t>(1, std::min(most, wanted));
  }

  // How many pixels the tile after the one at n has.
  int64_t after(int64_t n) const { return std::clamp<int64_t>(pixels - n - tile, 0, tile); }

  // Calls f(first pixel, count) for the tiles of a chunk.
  template <typename F>
  void tiles(int64_t index, F f) const {
    const int64_t end = std::min(pixels, (index + 1) * chunk);
    for (int64_t n = index * chunk; n < end; n += tile) f(n, std::min(tile, end - n));
  }
  // The same for the first tile of the chunk of a task.
  template <typename F>
  void first_tile(int64_t task, F f) const {
    const int64_t n = task % chunks * chunk;
    f(n, std::min(tile, pixels - n));
  }
};

// The channels of one or all heads of one image as the rows of a matrix with pixels as columns.
template <typename S>
struct Image {
  S* data;
  int64_t heads, channels, head_stride, channel_stride, pixel_stride;

  Matrix<S> first_head(int64_t n) const { return {data + n * pixel_stride, channel_stride, pixel_stride}; }

  // f(first row, matrix of one head's channels from pixel n on)
  template <typename F>
  void each_head(int64_t n, F f) const {
    for (int64_t h = 0; h < heads; ++h)
      f(h * channels, Matrix<S>{data + h * head_stride + n * pixel_stride, channel_stride, pixel_stride});
  }
};

template <typename S>
Image<S> one_head(const Tensor& x, int64_t b, int64_t h) {
  S* data = const_cast<S*>(x.const_data_ptr<std::remove_const_t<S>>());
  return {data + b * x.stride(0) + h * x.stride(1), 1, x.size(2), x.stride(1), x.stride(2), x.stride(3)};
}

template <typename S>
Image<S> all_heads(const Tensor& x, int64_t b) {
  Image<S> image = one_head<S>(x, b, 0);
  image.heads = x.size(1);
  return image;
}

// (B, R, N) output of the folded projection, its rows taken as the channels of one head.
template <typename S>
Image<S> projected(const Tensor& x, int64_t b) {
  S* data = const_cast<S*>(x.const_data_ptr<std::remove_const_t<S>>());
  return {data + b * x.stride(0), 1, x.size(1), 0, x.stride(1), x.stride(2)};
}

template <typename S, typename T>
void load_rows(const Image<const S>& image, int64_t n, int64_t count, Matrix<T> tile) {
  image.each_head(n, [&](int64_t row, Matrix<const S> source) {
    copy_tile<S, T>(source, tile.from(row, 0), image.channels, count);
  });
}

// Of the first head only: with several heads in a tile the products dwarf the transfers.
template <typename S>
Prefetch prefetch(const Image<S>& image, int64_t n, int64_t count) {
  return {image.first_head(n), image.channels, count};
}

template <typename S>
Prefetch prefetch_for_writing(const Image<S>& image, int64_t n, int64_t count) {
  return {image.first_head(n), image.channels, count, true};
}

// Whether the rows can be read and written where they lie: one matrix of the accumulation type whose
// pixels are contiguous.
template <typename T, typename S>
bool is_tile(const Image<S>& image) {
  const bool one_matrix = image.heads == 1 || image.head_stride == image.channels * image.channel_stride;
  return std::is_same_v<std::remove_const_t<S>, T> && image.pixel_stride == 1 && one_matrix;
}

// The rows of a tile that are read once: where they lie if they can be read there, else packed in `scratch`.
template <typename S, typename T>
Matrix<const T> read_rows_once(const Image<const S>& image, int64_t n, int64_t count, Matrix<T> scratch) {
  if constexpr (std::is_same_v<S, T>)
    if (is_tile<T>(image)) return image.first_head(n);
  load_rows<S, T>(image, n, count, scratch);
  return scratch;
}

// Of rows that are read often. Vectors that lie across two cache lines take twice as long to read; such rows had better
// be packed.
template <typename S, typename T>
Matrix<const T> read_rows(const Image<const S>& image, int64_t n, int64_t count, Matrix<T> scratch) {
  constexpr int64_t kLine = 64;
  const Matrix<const S> rows = image.first_head(n);
  const bool aligned = reinterpret_cast<uintptr_t>(rows.data) % kLine == 0 && rows.row * sizeof(S) % kLine == 0;
  if (aligned) return read_rows_once<S, T>(image, n, count, scratch);
  load_rows<S, T>(image, n, count, scratch);
  return scratch;
}

// product(target) makes the rows of a tile, in the image itself where its pixels are contiguous and of
// the accumulation type, otherwise in `scratch`, from where they are stored.
template <typename S, typename T, typename F>
void write_rows(const Image<S>& image, int64_t n, int64_t count, Matrix<T> scratch, F product) {
  if constexpr (std::is_same_v<S, T>)
    if (is_tile<T>(image)) return product(image.first_head(n));
  product(scratch);
  image.each_head(n, [&](int64_t row, Matrix<S> target) {
    copy_tile<T, S>(scratch.from(row, 0), target, image.channels, count);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

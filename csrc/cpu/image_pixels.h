// Images (B, C, H, W) of any strides as matrices of channels x pixels, for operators in which every pixel
// is by itself.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <type_traits>

#include "matrix.h"
#include "result_memory.h"
#include "tile_io.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {

using at::Tensor;

// Each pixel's channels side by side, as in channels_last.
inline bool is_pixel_major(const Tensor& x) { return x.stride(1) == 1 && x.stride(3) > 1; }

// Pixel-major where x is, otherwise contiguous, as tensors.py has it.
inline Tensor empty_image_like(const Tensor& x, int64_t channels, int64_t height, int64_t width) {
  const int64_t B = x.size(0);
  if (is_pixel_major(x)) return empty_result({B, height, width, channels}, x.options()).permute({0, 3, 1, 2});
  return empty_result({B, channels, height, width}, x.options());
}
inline Tensor empty_image_like(const Tensor& x, int64_t channels) {
  return empty_image_like(x, channels, x.size(2), x.size(3));
}

// How images are taken apart. A matrix is a whole image where the rows of every tensor follow each other at
// the distance of their pixels, else one row of it; matrices are numbered in the order of (B, H, W) in memory.
// Their pixels are cut into chunks, which are tasks, and those into tiles. Depends on shapes and strides
// alone, so that sums are the same for any number of threads.
class Pixels {
 public:
  Pixels(at::TensorList images, int64_t tile_elements) {
    constexpr int64_t kTasks = 64, kLine = 64;
    const Tensor& x = images[0];
    const bool whole = std::all_of(images.begin(), images.end(), [](const Tensor& image) {
      return image.size(2) == 1 || image.size(3) == 1 || image.stride(2) == image.size(3) * image.stride(3);
    });
    per_image_ = whole ? 1 : x.size(2);
    matrices_ = x.size(0) * per_image_;
    count_ = whole ? x.size(2) * x.size(3) : x.size(3);
    tile_ = std::min(std::max(tile_elements / x.size(1) / kLine, int64_t{1}) * kLine, (count_ + kLine - 1) / kLine * kLine);
    const int64_t tiles = (count_ + tile_ - 1) / tile_;
    const int64_t chunks = std::clamp<int64_t>(kTasks / std::max<int64_t>(matrices_, 1), 1, tiles);
    chunk_ = (tiles + chunks - 1) / chunks * tile_;
    chunks_ = (count_ + chunk_ - 1) / chunk_;
  }

  int64_t tasks() const { return matrices_ * chunks_; }
  int64_t tasks_of_image() const { return per_image_ * chunks_; }
  int64_t tile() const { return tile_; }

  // Calls f(matrix, first pixel, number of pixels, first pixel among those of all matrices) for a task's tiles.
  template <typename F>
  void tiles(int64_t task, F f) const {
    const int64_t index = task / chunks_, begin = task % chunks_ * chunk_, end = std::min(begin + chunk_, count_);
    for (int64_t n = begin; n < end; n += tile_) f(index, n, std::min(tile_, end - n), index * count_ + n);
  }

  // From pixel n of a matrix on: channels x pixels.
  template <typename S>
  Matrix<S> from(const Tensor& x, int64_t index, int64_t n) const {
    S* data = const_cast<S*>(x.const_data_ptr<std::remove_const_t<S>>());
    data += index / per_image_ * x.stride(0) + index % per_image_ * x.stride(2);
    const int64_t pixel = per_image_ == 1 && x.size(3) == 1 ? x.stride(2) : x.stride(3);
    return {data + n * pixel, x.stride(1), pixel};
  }

 private:
  int64_t matrices_, per_image_, count_, tile_, chunk_, chunks_;
};

}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

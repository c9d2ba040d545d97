// The gate of masked attention: multiplies tiles of keys and values as they are loaded, and sends
// their gradients back through. Without a mask every function here does nothing.
#pragma once

#include <ATen/cpu/vec/functional.h>

#include <optional>

#include "image_tiles.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {

// mask (B, H, 1 or C, N) of the accumulation type: one value per pixel, or one per channel and pixel.
template <typename T>
class Gate {
  using Vec = at::vec::Vectorized<T>;

 public:
  // For the tiles of one thread: at most `rows` x `tile`.
  Gate(const std::optional<Tensor>& mask, int64_t rows, int64_t tile)
      : mask_(mask), tile_(tile), per_channel_(mask && mask->size(2) > 1),
        factors_(mask ? (per_channel_ ? rows : mask->size(1)) * tile : 0), columns_(per_channel_ ? rows * tile : 0) {}

  explicit operator bool() const { return mask_.has_value(); }

  // Loads the factors of `heads` heads from h on, for the pixels n to n + count.
  void load(int64_t b, int64_t h, int64_t heads, int64_t n, int64_t count) {
    if (!mask_) return;
    Image<const T> image = one_head<const T>(*mask_, b, h);
    image.heads = heads;
    load_rows<T, T>(image, n, count, {factors_.get(), tile_});
  }

  // tile (heads * channels x count) *= factors
  void rows(Matrix<T> tile, int64_t heads, int64_t channels, int64_t count) const {
    if (!mask_) return;
    for (int64_t row = 0; row < heads * channels; ++row)
      at::vec::map2([](Vec x, Vec m) { return x * m; }, tile.data + row * tile.row, tile.data + row * tile.row,
                    factors(row, channels), count);
  }

  // tile (count x heads * channels) *= factors
  void columns(Matrix<T> tile, int64_t heads, int64_t channels, int64_t count) {
    if (!mask_) return;
    const int64_t width = heads * channels;
    if (per_channel_)
      copy_tile<T, T>(Matrix<const T>{factors_.get(), tile_}.transposed(), {columns_.get(), width}, count, width);
    for (int64_t i = 0; i < count; ++i) {
      T* row = tile.data + i * tile.row;
      if (per_channel_)
        at::vec::map2([](Vec x, Vec m) { return x * m; }, row, row, columns_.get() + i * width, width);
      else
        for (int64_t h = 0; h < heads; ++h)
          at::vec::map([m = factors_.get()[h * tile_ + i]](Vec x) { return x * Vec(m); }, row + h * channels,
                       row + h * channels, channels);
    }
  }

  // From the gradient of gated rows and the rows before gating: the mask's gradient for these pixels is
  // set (or added to), and the gradient becomes that of the rows before gating.
  void backward(Matrix<T> grad, Matrix<const T> ungated, const Tensor& grad_mask, int64_t b, int64_t h, int64_t heads,
                int64_t channels, int64_t n, int64_t count, bool add) const {
    if (!mask_) return;
    T* target = grad_mask.mutable_data_ptr<T>();
    for (int64_t row = 0; row < heads * channels; ++row) {
      const int64_t mask_row = per_channel_ ? (b * mask_->size(1) + h) * channels + row
                                            : b * mask_->size(1) + h + row / channels;
      T* grad_row = grad.data + row * grad.row;
      T* sum = target + mask_row * mask_->size(3) + n;
      const bool first = !add && (per_channel_ || row % channels == 0);
      if (first)
        at::vec::map2([](Vec g, Vec x) { return g * x; }, sum, grad_row, ungated.data + row * ungated.row, count);
      else
        at::vec::map3([](Vec s, Vec g, Vec x) { return at::vec::fmadd(g, x, s); }, sum, sum, grad_row,
                      ungated.data + row * ungated.row, count);
      at::vec::map2([](Vec g, Vec m) { return g * m; }, grad_row, grad_row, factors(row, channels), count);
    }
  }

 private:
  const T* factors(int64_t row, int64_t channels) const {
    return factors_.get() + (per_channel_ ? row : row / channels) * tile_;
  }

  const std::optional<Tensor>& mask_;
  int64_t tile_;
  bool per_channel_;
  Scratch<T> factors_, columns_;
};

}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

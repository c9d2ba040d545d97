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
        factors_(mask ? (per_channel_ ? rows : mask->size(1)) * tile : 0) {}

  explicit operator bool() const { return mask_.has_value(); }

  // Loads the factors of `heads` heads from h on, for the pixels n to n + count.
  void load(int64_t b, int64_t h, int64_t heads, int64_t n, int64_t count) {
    if (!mask_) return;
    Image<const T> image = one_head<const T>(*mask_, b, h);
    image.heads = heads;
    load_rows<T, T>(image, n, count, {factors_.get(), tile_});
  }

  // target (heads * channels x count) = source * factors
  void rows(Matrix<const T> source, Matrix<T> target, int64_t heads, int64_t channels, int64_t count) const {
    for (int64_t row = 0; row < heads * channels; ++row)
      at::vec::map2([](Vec x, Vec m) { return x * m; }, target.data + row * target.row, source.data + row * source.row,
                    factors(row, channels), count);
  }

  // From the gradient of gated rows and the rows before gating: the mask's gradient for these pixels is
  // set (or added to), and target receives the gradient of the rows before gating. It may be grad itself.
  void backward(Matrix<const T> grad, Matrix<const T> ungated, Matrix<T> target, const Tensor& grad_mask, int64_t b,
                int64_t h, int64_t heads, int64_t channels, int64_t n, int64_t count, bool add) const {
    const int64_t mask_rows = per_channel_ ? heads * channels : heads, rows = heads * channels / mask_rows;
    const int64_t first = (b * mask_->size(1) + h) * mask_->size(2);
    for (int64_t r = 0; r < mask_rows; ++r) {
      T* sums = grad_mask.mutable_data_ptr<T>() + (first + r) * mask_->size(3) + n;
      const T* factors = factors_.get() + r * tile_;
      int64_t row = 0;
      for (; row + kRows <= rows; row += kRows)
        blocks<kRows>(grad.from(r * rows + row, 0), ungated.from(r * rows + row, 0), target.from(r * rows + row, 0), factors,
                      sums, count, add || row > 0);
      for (; row < rows; ++row)
        blocks<1>(grad.from(r * rows + row, 0), ungated.from(r * rows + row, 0), target.from(r * rows + row, 0), factors,
                  sums, count, add || row > 0);
    }
  }

 private:
  const T* factors(int64_t row, int64_t channels) const {
    return factors_.get() + (per_channel_ ? row : row / channels) * tile_;
  }

  static constexpr int kRows = 4;

  // Some of the rows that share one row of the mask.
  template <int rows>
  static void blocks(Matrix<const T> grad, Matrix<const T> ungated, Matrix<T> target, const T* factors, T* sums,
                     int64_t count, bool add) {
    int64_t i = 0;
    for (; i + Vec::size() <= count; i += Vec::size())
      block<rows>(grad.from(0, i), ungated.from(0, i), target.from(0, i), factors + i, sums + i, Vec::size(), add);
    if (i < count) block<rows>(grad.from(0, i), ungated.from(0, i), target.from(0, i), factors + i, sums + i, count - i, add);
  }

  template <int rows>
  static inline __attribute__((always_inline)) void block(Matrix<const T> grad, Matrix<const T> ungated, Matrix<T> target,
                                                          const T* factors, T* sums, int64_t width, bool add) {
    const Vec factor = Vec::loadu(factors, width);
    Vec sum = add ? Vec::loadu(sums, width) : Vec(T(0));
    for (int row = 0; row < rows; ++row) {
      const Vec g = Vec::loadu(grad.data + row * grad.row, width);
      sum = at::vec::fmadd(g, Vec::loadu(ungated.data + row * ungated.row, width), sum);
      (g * factor).store(target.data + row * target.row, width);
    }
    sum.store(sums, width);
  }

  const std::optional<Tensor>& mask_;
  int64_t tile_;
  bool per_channel_;
  Scratch<T> factors_;
};

// As load_rows, through the gate, whose factors for these pixels are loaded.
template <typename S, typename T>
void load_gated_rows(const Image<const S>& image, const Gate<T>& gate, int64_t n, int64_t count, Matrix<T> tile) {
  if constexpr (std::is_same_v<S, T>)
    if (gate && is_tile<T>(image)) return gate.rows(image.first_head(n), tile, image.heads, image.channels, count);
  load_rows<S, T>(image, n, count, tile);
  if (gate) gate.rows(tile, tile, image.heads, image.channels, count);
}

// As read_rows, through the gate.
template <typename S, typename T>
Matrix<const T> read_gated_rows(const Image<const S>& image, const Gate<T>& gate, int64_t n, int64_t count, Matrix<T> scratch) {
  if (!gate) return read_rows<S, T>(image, n, count, scratch);
  load_gated_rows<S, T>(image, gate, n, count, scratch);
  return scratch;
}

// As write_rows, where the product is the gradient of rows that passed the gate: back through it.
// `ungated` are those rows before the gate, which `spare` may hold.
template <typename S, typename T, typename F>
void write_ungated_rows(const Image<S>& image, const Image<const S>& ungated, const Gate<T>& gate, Matrix<T> spare,
                        const Tensor& grad_mask, int64_t b, int64_t h, int64_t n, int64_t count, bool add,
                        Matrix<T> scratch, F product) {
  if (!gate) return write_rows<S, T>(image, n, count, scratch, product);
  product(scratch);
  auto backward = [&](Matrix<const T> rows, Matrix<T> target) {
    gate.backward(scratch, rows, target, grad_mask, b, h, image.heads, image.channels, n, count, add);
  };
  if constexpr (std::is_same_v<S, T>)
    if (is_tile<T>(image) && is_tile<T>(ungated)) return backward(ungated.first_head(n), image.first_head(n));
  load_rows<S, T>(ungated, n, count, spare);
  backward(spare, scratch);
  image.each_head(n, [&](int64_t row, Matrix<S> target) {
    copy_tile<T, S>(scratch.from(row, 0), target, image.channels, count);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

// Every channel times a number in (0, 1) that the averages of all channels give, and a residual added, on the CPU.
//
// Schedule, with the pixels of all images cut into chunks that threads own.
//   forward   1. chunks: the sums of every channel. Reads x.
//             2. one image after the other: down, rectifier, up, sigmoid: the gate.
//             3. chunks: x * gate + residual. Reads both, writes out.
//   backward  1. chunks: the sums of grad_out * x of every channel. Reads both.
//             2. one image after the other: back through the gate to the averages.
//             3. chunks: grad_out * gate + the averages' share. Reads grad_out, writes grad_x.
// Bound: memory, 4 tensors forward with a residual and 4 backward; step 2 takes 2 C R operations per image and pass.
// Sums are per chunk and image, not per thread, so results do not depend on the number of threads.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "image_pixels.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Rows as long as that, for they lie far apart. An image of 48 channels and 32x32 pixels is one task: a second thread
// takes as long to start as it would save.
constexpr int64_t kTileElements = 49152;

// Tiles of one of the images, rows of pixels or, pixel-major, pixels of rows; packed where they cannot be read in place.
template <typename S, typename T>
class Tiles {
 public:
  Tiles(const Tensor& x, bool pixel_major, int64_t tile)
      : x_(x), pixel_major_(pixel_major), packed_(x.size(1) * tile), pitch_(pixel_major ? x.size(1) : tile) {}

  Matrix<const T> read(const Pixels& pixels, int64_t index, int64_t n, int64_t count) const {
    const auto source = pixels.from<const S>(x_, index, n);
    const Matrix<T> packed{packed_.get(), pitch_};
    return pixel_major_ ? read_tile<S, T>(source.transposed(), count, x_.size(1), packed)
                        : read_tile<S, T>(source, x_.size(1), count, packed);
  }

  template <typename F>
  void write(const Pixels& pixels, int64_t index, int64_t n, int64_t count, F compute) const {
    const auto target = pixels.from<S>(x_, index, n);
    const Matrix<T> packed{packed_.get(), pitch_};
    if (pixel_major_) write_tile<S, T>(target.transposed(), count, x_.size(1), packed, compute);
    else write_tile<S, T>(target, x_.size(1), count, packed, compute);
  }

 private:
  Tensor x_;
  bool pixel_major_;
  Scratch<T> packed_;
  int64_t pitch_;
};

// sums (B, C): of x, or of factor * x, over the pixels.
template <typename S, typename T>
void sum_pixels(const Tensor& x, const Tensor* factor, T* sums) {
  const int64_t C = x.size(1);
  const bool pixel_major = is_pixel_major(x);
  const Pixels pixels = factor ? Pixels({x, *factor}, kTileElements) : Pixels({x}, kTileElements);
  Scratch<T> partials(pixels.tasks() * C);
  at::parallel_for(0, pixels.tasks(), 1, [&](int64_t begin, int64_t end) {
    const Tiles<S, T> of_x(x, pixel_major, pixels.tile()), of_factor(factor ? *factor : x, pixel_major, pixels.tile());
    const Scratch<T> of_tile(C);  // long sums are sums of short ones, which round less
    for (int64_t task = begin; task < end; ++task) {
      T *own = partials.get() + task * C, *tile = of_tile.get();
      std::fill_n(own, C, T(0));
      pixels.tiles(task, [&](int64_t index, int64_t n, int64_t count, int64_t) {
        if (pixel_major) std::fill_n(tile, C, T(0));
        const auto a = of_x.read(pixels, index, n, count), b = factor ? of_factor.read(pixels, index, n, count) : a;
        for (int64_t i = 0; i < (pixel_major ? count : C); ++i) {
          const T *left = a.data + i * a.row, *right = b.data + i * b.row;
          if (pixel_major && factor) {
            for (int64_t c = 0; c < C; ++c) tile[c] += left[c] * right[c];
          } else if (pixel_major) {
            for (int64_t c = 0; c < C; ++c) tile[c] += left[c];
          } else {
            T sum = 0;
            if (factor) {
#pragma omp simd reduction(+ : sum)
              for (int64_t j = 0; j < count; ++j) sum += left[j] * right[j];
            } else {
#pragma omp simd reduction(+ : sum)
              for (int64_t j = 0; j < count; ++j) sum += left[j];
            }
            tile[i] = sum;
          }
        }
        for (int64_t c = 0; c < C; ++c) own[c] += tile[c];
      });
    }
  });
  for (int64_t b = 0; b < x.size(0); ++b) {
    T* sum = sums + b * C;
    std::fill_n(sum, C, T(0));
    for (int64_t task = b * pixels.tasks_of_image(); task < (b + 1) * pixels.tasks_of_image(); ++task)
      for (int64_t c = 0; c < C; ++c) sum[c] += partials.get()[task * C + c];
  }
}

// x * factors, plus a residual or, without one, shifts, which may be missing too; factors and shifts are (B, C).
template <typename S, typename T>
Tensor scale_pixels(const Tensor& x, const Tensor& like, const T* factors, const OptionalTensor& residual, const T* shifts) {
  const int64_t C = x.size(1);
  const bool pixel_major = is_pixel_major(like);
  const Tensor out = empty_image_like(like, C);
  const Pixels pixels = residual ? Pixels({x, out, *residual}, kTileElements) : Pixels({x, out}, kTileElements);
  at::parallel_for(0, pixels.tasks(), 1, [&](int64_t begin, int64_t end) {
    const Tiles<S, T> of_x(x, pixel_major, pixels.tile()), of_out(out, pixel_major, pixels.tile()),
        of_residual(residual ? *residual : x, pixel_major, pixels.tile());
    const Scratch<T> zeros(C);
    std::fill_n(zeros.get(), C, T(0));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / pixels.tasks_of_image();
      const T *factor = factors + image * C, *shift = shifts ? shifts + image * C : zeros.get();
      pixels.tiles(task, [&](int64_t index, int64_t n, int64_t count, int64_t) {
        const auto source = of_x.read(pixels, index, n, count);
        const auto added = residual ? of_residual.read(pixels, index, n, count) : source;
        of_out.write(pixels, index, n, count, [&](Matrix<T> target) {
          for (int64_t i = 0; i < (pixel_major ? count : C); ++i) {
            const T *row = source.data + i * source.row, *other = added.data + i * added.row;
            T* result = target.data + i * target.row;
            const T own_factor = factor[pixel_major ? 0 : i], own_shift = shift[pixel_major ? 0 : i];
            if (pixel_major && residual)
              for (int64_t c = 0; c < C; ++c) result[c] = row[c] * factor[c] + other[c];
            else if (pixel_major)
              for (int64_t c = 0; c < C; ++c) result[c] = row[c] * factor[c] + shift[c];
            else if (residual)
              for (int64_t j = 0; j < count; ++j) result[j] = row[j] * own_factor + other[j];
            else
              for (int64_t j = 0; j < count; ++j) result[j] = row[j] * own_factor + own_shift;
          }
        });
      });
    }
  });
  return out;
}

// y (rows) = m x + bias with m (rows x columns)
template <typename T>
void apply(const T* m, const T* x, const T* bias, T* y, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < columns; ++j) sum += m[i * columns + j] * x[j];
    y[i] = bias ? sum + bias[i] : sum;
  }
}

// Back through y = m x + bias from the gradient of y: x's is set, those of m and bias are added to.
template <typename T>
void differentiate(const T* m, const T* x, const T* grad_y, T* grad_x, T* grad_m, T* grad_bias, int64_t rows, int64_t columns) {
  std::fill_n(grad_x, columns, T(0));
  for (int64_t i = 0; i < rows; ++i) {
    const T g = grad_y[i];
    grad_bias[i] += g;
    for (int64_t j = 0; j < columns; ++j) {
      grad_m[i * columns + j] += g * x[j];
      grad_x[j] += g * m[i * columns + j];
    }
  }
}

// Contiguous numbers of a tensor that may be missing.
template <typename T>
class Numbers {
 public:
  explicit Numbers(const OptionalTensor& x) : x_(x ? x->contiguous() : Tensor()) {}
  const T* get() const { return x_.defined() ? x_.const_data_ptr<T>() : nullptr; }

 private:
  Tensor x_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> channel_gate(const Tensor& x, const Tensor& down, const Tensor& up,
                                                        const OptionalTensor& down_bias, const OptionalTensor& up_bias,
                                                        const OptionalTensor& residual) {
  const int64_t B = x.size(0), C = x.size(1), R = down.size(0);
  const Tensor mean = empty_result({B, C}, down.options()), hidden = empty_result({B, R}, down.options()),
               gate = empty_result({B, C}, down.options());
  Tensor out;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "channel_gate", [&] {
    using T = Accumulate<scalar_t>;
    const Numbers<T> downs(down), ups(up), down_shifts(down_bias), up_shifts(up_bias);
    T *means = mean.mutable_data_ptr<T>(), *hiddens = hidden.mutable_data_ptr<T>(), *gates = gate.mutable_data_ptr<T>();
    sum_pixels<scalar_t, T>(x, nullptr, means);
    const T pixels = T(x.size(2) * x.size(3));
    for (int64_t i = 0; i < B * C; ++i) means[i] /= pixels;
    for (int64_t b = 0; b < B; ++b) {
      T *own_hidden = hiddens + b * R, *own_gate = gates + b * C;
      apply(downs.get(), means + b * C, down_shifts.get(), own_hidden, R, C);
      for (int64_t r = 0; r < R; ++r) own_hidden[r] = own_hidden[r] < 0 ? T(0) : own_hidden[r];  // NaN stays
      apply(ups.get(), own_hidden, up_shifts.get(), own_gate, C, R);
      for (int64_t c = 0; c < C; ++c) own_gate[c] = T(1) / (T(1) + std::exp(-own_gate[c]));
    }
    out = scale_pixels<scalar_t, T>(x, x, gates, residual, nullptr);
  });
  return {out, mean, hidden, gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> channel_gate_backward(
    const Tensor& grad_out, const Tensor& x, const Tensor& down, const Tensor& up, const Tensor& mean,
    const Tensor& hidden, const Tensor& gate) {
  const int64_t B = x.size(0), C = x.size(1), R = down.size(0);
  const Tensor grad_down = at::zeros(down.sizes(), down.options()), grad_up = at::zeros(up.sizes(), up.options()),
               grad_down_bias = at::zeros({R}, down.options()), grad_up_bias = at::zeros({C}, up.options());
  Tensor grad_x;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "channel_gate_backward", [&] {
    using T = Accumulate<scalar_t>;
    const Numbers<T> downs(down), ups(up), means(mean), hiddens(hidden), gates(gate);
    Scratch<T> grads(B * C), grad_hidden(R), shifts(B * C);
    sum_pixels<scalar_t, T>(x, &grad_out, grads.get());
    const T pixels = T(x.size(2) * x.size(3));
    for (int64_t b = 0; b < B; ++b) {
      const T *own_gate = gates.get() + b * C, *own_hidden = hiddens.get() + b * R;
      T *own_grad = grads.get() + b * C, *shift = shifts.get() + b * C;
      for (int64_t c = 0; c < C; ++c) own_grad[c] *= own_gate[c] * (T(1) - own_gate[c]);
      differentiate(ups.get(), own_hidden, own_grad, grad_hidden.get(), grad_up.mutable_data_ptr<T>(),
                    grad_up_bias.mutable_data_ptr<T>(), C, R);
      for (int64_t r = 0; r < R; ++r)
        if (own_hidden[r] <= 0) grad_hidden.get()[r] = 0;
      differentiate(downs.get(), means.get() + b * C, grad_hidden.get(), shift, grad_down.mutable_data_ptr<T>(),
                    grad_down_bias.mutable_data_ptr<T>(), R, C);
      for (int64_t c = 0; c < C; ++c) shift[c] /= pixels;
    }
    grad_x = scale_pixels<scalar_t, T>(grad_out, x, gates.get(), std::nullopt, shifts.get());
  });
  return {grad_x, grad_down, grad_up, grad_down_bias, grad_up_bias};
}

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(restore_kernels, CPU, m) {
  m.impl("channel_gate.cpu", channel_gate);
  m.impl("channel_gate_backward.cpu", channel_gate_backward);
}

}  // namespace restore_kernels

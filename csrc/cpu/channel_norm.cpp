// Layer normalisation of every pixel over its channels, on the CPU.
//
// Schedule. The pixels of all images are cut into chunks that threads own; a chunk is walked in tiles that
// stay in the L2 cache.
//   forward   of a tile: the means, the variances about them, the result. Reads x, writes out.
//   backward  of a tile: the sums over the channels of g = weight * grad_out and of g * normalised x, and every
//             channel's share of the gradients of weight and bias; then the gradient of x. Reads grad_out and x,
//             writes grad_x.
// Loops run along memory: where pixels are pixel-major over the channels of one pixel after the other, else
// over the pixels of one channel after the other, with one sum per pixel of the tile, and in long runs: rows
// lie far apart, often a power of two, which costs the more the shorter the runs, and a tile that is read
// again is packed.
// Bound: memory, 2 tensors forward and 3 backward, beside 8 bytes per pixel.
// The gradients of weight and bias are summed per chunk, not per thread, so results do not depend on the
// number of threads.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "image_pixels.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kTileElements = 16384;

template <typename T>
struct Parameters {
  const T *weight, *bias;  // of every channel; without a bias nullptr
  int64_t channels;
};

template <typename T>
struct Statistics {
  T *mean, *rstd;  // of every pixel of the tile

  // rstd from the sums of the squares.
  void finish(int64_t count, T share, T eps) const {
    for (int64_t i = 0; i < count; ++i) rstd[i] = T(1) / std::sqrt(rstd[i] * share + eps);
  }
};

// x and out: channels x count. `x` is read three times.
template <typename T>
void normalize_planes(Matrix<const T> x, Matrix<T> out, const Parameters<T>& p, Statistics<T> s, int64_t count, T eps) {
  std::fill_n(s.mean, count, T(0));
  std::fill_n(s.rstd, count, T(0));
  T *mean = s.mean, *rstd = s.rstd;
  for (int64_t c = 0; c < p.channels; ++c) {
    const T* row = x.data + c * x.row;
    for (int64_t i = 0; i < count; ++i) mean[i] += row[i];
  }
  const T share = T(1) / T(p.channels);
  for (int64_t i = 0; i < count; ++i) mean[i] *= share;
  for (int64_t c = 0; c < p.channels; ++c) {
    const T* row = x.data + c * x.row;
    for (int64_t i = 0; i < count; ++i) rstd[i] += (row[i] - mean[i]) * (row[i] - mean[i]);
  }
  s.finish(count, share, eps);
  for (int64_t c = 0; c < p.channels; ++c) {
    const T *row = x.data + c * x.row, weight = p.weight[c];
    T* result = out.data + c * out.row;
    if (p.bias)
      for (int64_t i = 0; i < count; ++i) result[i] = (row[i] - mean[i]) * rstd[i] * weight + p.bias[c];
    else
      for (int64_t i = 0; i < count; ++i) result[i] = row[i] * rstd[i] * weight;
  }
}

// x and out: count x channels.
template <typename T>
void normalize_pixels(Matrix<const T> x, Matrix<T> out, const Parameters<T>& p, Statistics<T> s, int64_t count, T eps) {
  const int64_t C = p.channels;
  const T share = T(1) / T(C);
  for (int64_t i = 0; i < count; ++i) {
    const T* pixel = x.data + i * x.row;
    T sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < C; ++c) sum += pixel[c];
    const T mean = sum * share;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < C; ++c) squares += (pixel[c] - mean) * (pixel[c] - mean);
    s.mean[i] = mean, s.rstd[i] = squares;
  }
  s.finish(count, share, eps);
  for (int64_t i = 0; i < count; ++i) {
    const T *pixel = x.data + i * x.row, mean = s.mean[i], rstd = s.rstd[i];
    T* result = out.data + i * out.row;
    if (p.bias)
      for (int64_t c = 0; c < C; ++c) result[c] = (pixel[c] - mean) * rstd * p.weight[c] + p.bias[c];
    else
      for (int64_t c = 0; c < C; ++c) result[c] = pixel[c] * rstd * p.weight[c];
  }
}

// A chunk's sums over its pixels, of every channel.
template <typename T>
struct Sums {
  T *weight, *bias;
};

// The sums of g and of g * normalised x over the channels of every pixel, and room for g and for normalised x.
template <typename T>
struct Scratches {
  Matrix<T> scaled, normal;  // channels x tile
  T *of_scaled, *of_products;
};

// grad, x and grad_x: channels x count.
template <typename T, bool biased>
void differentiate_planes(Matrix<const T> grad, Matrix<const T> x, Matrix<T> grad_x, const Parameters<T>& p,
                          Statistics<const T> s, const Scratches<T>& scratch, Sums<T> sums, int64_t count) {
  T *of_scaled = scratch.of_scaled, *of_products = scratch.of_products;
  std::fill_n(of_scaled, count, T(0));
  std::fill_n(of_products, count, T(0));
  for (int64_t c = 0; c < p.channels; ++c) {
    const T *g = grad.data + c * grad.row, *row = x.data + c * x.row, weight = p.weight[c];
    T *scaled = scratch.scaled.data + c * scratch.scaled.row, *normal = scratch.normal.data + c * scratch.normal.row;
    T of_weight = 0, of_bias = 0;
#pragma omp simd reduction(+ : of_weight, of_bias)
    for (int64_t i = 0; i < count; ++i) {
      const T gradient = g[i], value = row[i];  // scratch may lie in their place
      normal[i] = (value - s.mean[i]) * s.rstd[i];
      scaled[i] = gradient * weight;
      const T factor = biased ? normal[i] : value * s.rstd[i];
      of_weight += gradient * factor;
      of_products[i] += scaled[i] * factor;
      if constexpr (biased) of_bias += gradient, of_scaled[i] += scaled[i];
    }
    sums.weight[c] += of_weight;
    if constexpr (biased) sums.bias[c] += of_bias;
  }
  const T share = T(1) / T(p.channels);
  for (int64_t i = 0; i < count; ++i) of_scaled[i] *= share, of_products[i] *= share;
  for (int64_t c = 0; c < p.channels; ++c) {
    const T *scaled = scratch.scaled.data + c * scratch.scaled.row, *normal = scratch.normal.data + c * scratch.normal.row;
    T* result = grad_x.data + c * grad_x.row;
    for (int64_t i = 0; i < count; ++i) result[i] = (scaled[i] - of_scaled[i] - normal[i] * of_products[i]) * s.rstd[i];
  }
}

// grad, x and grad_x: count x channels.
template <typename T, bool biased>
void differentiate_pixels(Matrix<const T> grad, Matrix<const T> x, Matrix<T> grad_x, const Parameters<T>& p,
                          Statistics<const T> s, Sums<T> sums, int64_t count) {
  const int64_t C = p.channels;
  const T share = T(1) / T(C);
  for (int64_t i = 0; i < count; ++i) {
    const T *g = grad.data + i * grad.row, *pixel = x.data + i * x.row;
    T* result = grad_x.data + i * grad_x.row;
    const T mean = s.mean[i], rstd = s.rstd[i];
    T of_scaled = 0, of_products = 0;
#pragma omp simd reduction(+ : of_scaled, of_products)
    for (int64_t c = 0; c < C; ++c) {
      const T factor = (biased ? pixel[c] - mean : pixel[c]) * rstd, product = g[c] * factor;
      sums.weight[c] += product;
      of_products += product * p.weight[c];
      if constexpr (biased) sums.bias[c] += g[c], of_scaled += g[c] * p.weight[c];
    }
    of_scaled *= share, of_products *= share;
    for (int64_t c = 0; c < C; ++c)
      result[c] = (g[c] * p.weight[c] - of_scaled - (pixel[c] - mean) * rstd * of_products) * rstd;
  }
}

std::tuple<Tensor, Tensor, Tensor> channel_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                double eps) {
  const int64_t C = x.size(1);
  const Tensor out = empty_image_like(x, C);
  const Tensor mean = empty_result({x.size(0), x.size(2), x.size(3)}, weight.options()),
               rstd = empty_result(mean.sizes(), weight.options());
  const Tensor scales = weight.contiguous(), shifts = bias ? bias->contiguous() : Tensor();
  const Pixels pixels({x, out}, kTileElements);
  const int64_t tile = pixels.tile();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "channel_norm", [&] {
    using T = Accumulate<scalar_t>;
    const Parameters<T> p{scales.const_data_ptr<T>(), bias ? shifts.const_data_ptr<T>() : nullptr, C};
    at::parallel_for(0, pixels.tasks(), 1, [&](int64_t begin, int64_t end) {
      Scratch<T> read(C * tile), written(C * tile);
      for (int64_t task = begin; task < end; ++task)
        pixels.tiles(task, [&](int64_t index, int64_t n, int64_t count, int64_t first) {
          const auto source = pixels.from<const scalar_t>(x, index, n);
          const auto target = pixels.from<scalar_t>(out, index, n);
          const Statistics<T> s{mean.mutable_data_ptr<T>() + first, rstd.mutable_data_ptr<T>() + first};
          if (is_pixel_major(x)) {
            const Matrix<T> packed{read.get(), C}, result{written.get(), C};
            const auto rows = read_tile<scalar_t, T>(source.transposed(), count, C, packed);
            write_tile<scalar_t, T>(target.transposed(), count, C, result, [&](Matrix<T> to) {
              normalize_pixels<T>(rows, to, p, s, count, T(eps));
            });
          } else {
            const Matrix<T> packed{read.get(), tile}, result{written.get(), tile};
            copy_tile<scalar_t, T>(source, packed, C, count);
            write_tile<scalar_t, T>(target, C, count, result, [&](Matrix<T> to) {
              normalize_planes<T>(packed, to, p, s, count, T(eps));
            });
          }
        });
    });
  });
  return {out, mean, rstd};
}

// The sums of the tasks, in order.
template <typename T>
Tensor add_tasks(const T* partials, int64_t tasks, int64_t stride, int64_t count, const at::TensorOptions& options) {
  const Tensor sums = empty_result({count}, options);
  T* total = sums.mutable_data_ptr<T>();
  std::fill_n(total, count, T(0));
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t i = 0; i < count; ++i) total[i] += partials[task * stride + i];
  return sums;
}

template <typename S, bool biased>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                            const Tensor& mean, const Tensor& rstd) {
  using T = Accumulate<S>;
  const int64_t C = x.size(1), stride = 2 * C;
  const Tensor grad_x = empty_image_like(x, C);
  const Pixels pixels({grad_out, x, grad_x}, kTileElements);
  const int64_t tile = pixels.tile();
  const Parameters<T> p{weight.const_data_ptr<T>(), nullptr, C};
  Scratch<T> partials(pixels.tasks() * stride);
  at::parallel_for(0, pixels.tasks(), 1, [&](int64_t begin, int64_t end) {
    Scratch<T> read_grad(C * tile), read(C * tile), written(C * tile), sums_of_pixels(2 * tile);
    for (int64_t task = begin; task < end; ++task) {
      const Sums<T> sums{partials.get() + task * stride, partials.get() + task * stride + C};
      std::fill_n(sums.weight, stride, T(0));
      pixels.tiles(task, [&](int64_t index, int64_t n, int64_t count, int64_t first) {
        const auto grad = pixels.from<const S>(grad_out, index, n), source = pixels.from<const S>(x, index, n);
        const auto target = pixels.from<S>(grad_x, index, n);
        const Statistics<const T> s{mean.const_data_ptr<T>() + first, rstd.const_data_ptr<T>() + first};
        if (is_pixel_major(x)) {
          const Matrix<T> packed_grad{read_grad.get(), C}, packed{read.get(), C}, result{written.get(), C};
          const auto grads = read_tile<S, T>(grad.transposed(), count, C, packed_grad);
          const auto rows = read_tile<S, T>(source.transposed(), count, C, packed);
          write_tile<S, T>(target.transposed(), count, C, result, [&](Matrix<T> to) {
            differentiate_pixels<T, biased>(grads, rows, to, p, s, sums, count);
          });
        } else {
          const Matrix<T> packed_grad{read_grad.get(), tile}, packed{read.get(), tile}, result{written.get(), tile};
          const auto grads = read_tile<S, T>(grad, C, count, packed_grad);
          const auto rows = read_tile<S, T>(source, C, count, packed);
          const Scratches<T> scratch{packed_grad, packed, sums_of_pixels.get(), sums_of_pixels.get() + tile};
          write_tile<S, T>(target, C, count, result, [&](Matrix<T> to) {
            differentiate_planes<T, biased>(grads, rows, to, p, s, scratch, sums, count);
          });
        }
      });
    }
  });
  const auto total = [&](int64_t offset, int64_t count) {
    return add_tasks(partials.get() + offset, pixels.tasks(), stride, count, weight.options());
  };
  return {grad_x, total(0, C), total(C, biased ? C : 0)};
}

std::tuple<Tensor, Tensor, Tensor> channel_norm_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                                         const Tensor& mean, const Tensor& rstd, bool biased) {
  std::tuple<Tensor, Tensor, Tensor> grads;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "channel_norm_backward", [&] {
    auto* function = biased ? backward<scalar_t, true> : backward<scalar_t, false>;
    grads = function(grad_out, x, weight.contiguous(), mean.contiguous(), rstd.contiguous());
  });
  return grads;
}

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(restore_kernels, CPU, m) {
  m.impl("channel_norm.cpu", channel_norm);
  m.impl("channel_norm_backward.cpu", channel_norm_backward);
}

}  // namespace restore_kernels

// What pyramid attention does pixel by pixel: operands of the products, norms of patches, sums of shares.
// Every kernel: a thread for each element that it writes.
#pragma once

#include <cmath>

#include "pyramid_walk.cuh"
#include "strided.cuh"

namespace restore_kernels::pyramid {

constexpr int kThreads = 256;

__device__ __forceinline__ int64_t this_thread() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

// x (B, C, H, W) as an Image: (B, H * W, channels) of T, zeros from C on.
template <typename X, typename T>
__global__ void __launch_bounds__(kThreads) pack_kernel(const Strided<const X> x, int64_t channels_of_x, int64_t pixels,
                                                        int64_t width, int64_t channels, int64_t count, T* packed) {
  const int64_t i = this_thread();
  if (i >= count) return;
  const int64_t c = i % channels, pixel = i / channels % pixels, image = i / channels / pixels;
  packed[i] = c < channels_of_x ? rounded_to<T>(to_float(__ldg(x.at(image, c, pixel / width, pixel % width)))) : T{};
}

// Norms of the 3 x 3 patches around all pixels (B, H * W), and what products with them are multiplied by.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    norms_kernel(const T* keys, int64_t channels, int64_t height, int64_t width, int64_t count, float softmax_scale,
                 float eps, float* norms, float* scales) {
  const int64_t i = this_thread();
  if (i >= count) return;
  const int64_t x = i % width, y = i / width % height, image = i / width / height;
  float squares = 0;
  for (int64_t row = y > 0 ? y - 1 : 0; row <= y + 1 && row < height; ++row) {
    for (int64_t column = x > 0 ? x - 1 : 0; column <= x + 1 && column < width; ++column) {
      const T* key = keys + ((image * height + row) * width + column) * channels;
      for (int64_t c = 0; c < channels; ++c) {
        const float k = to_float(__ldg(key + c));
        squares += k * k;
      }
    }
  }
  norms[i] = sqrtf(squares);
  scales[i] = softmax_scale / fmaxf(norms[i], eps);
}

// log_sum_exp of every query (count) from those of its shares.
__global__ void __launch_bounds__(kThreads)
    log_sum_exp_kernel(const Statistics* shares, int64_t parts, int64_t count, float* log_sum_exp) {
  const int64_t i = this_thread();
  if (i >= count) return;
  Statistics total = shares[i];
  for (int64_t part = 1; part < parts; ++part) total.add(shares[part * count + i]);
  log_sum_exp[i] = total.largest + logf(total.sum);
}

// sums[i] = the sum of shares[..., i], in order.
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const float* shares, int64_t parts, int64_t count, float* sums) {
  const int64_t i = this_thread();
  if (i >= count) return;
  float sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += __ldg(shares + part * count + i);
  sums[i] = sum;
}

// out (B, C, H, W) = factor * the sum of shares (parts, B, H * W, channels), in order.
template <typename X>
__global__ void __launch_bounds__(kThreads)
    write_kernel(const float* shares, int64_t parts, int64_t channels, float factor, int64_t height, int64_t width,
                 int64_t channels_of_x, int64_t count, const Strided<X> out) {
  const int64_t i = this_thread();
  if (i >= count) return;
  const int64_t c = i % channels_of_x, pixel = i / channels_of_x % (height * width);
  const int64_t image = i / channels_of_x / (height * width), size = count / channels_of_x * channels;
  float sum = 0;
  for (int64_t part = 0; part < parts; ++part)
    sum += __ldg(shares + part * size + (image * height * width + pixel) * channels + c);
  *out.at(image, c, pixel / width, pixel % width) = rounded_to<X>(factor * sum);
}

// The gradient to keys: that of their patches, less what norms take away. A pixel has the same key in every
// patch that covers it, which loses Σ_n dS S / |patch|² of it, nothing where the norm is clamped.
template <typename X>
__global__ void __launch_bounds__(kThreads)
    write_grad_key_kernel(const float* shares, const float* radial, int64_t parts, int64_t channels,
                          const float* norms, float eps, int64_t height, int64_t width, int64_t channels_of_x,
                          int64_t count, const Strided<const X> keys, const Strided<X> out) {
  const int64_t i = this_thread();
  if (i >= count) return;
  const int64_t pixels = height * width, all = count / channels_of_x;
  const int64_t c = i % channels_of_x, pixel = i / channels_of_x % pixels, image = i / channels_of_x / pixels;
  const int64_t y = pixel / width, x = pixel % width;
  float sum = 0, loss = 0;
  for (int64_t part = 0; part < parts; ++part)
    sum += __ldg(shares + (part * all + image * pixels + pixel) * channels + c);
  for (int64_t row = y > 0 ? y - 1 : 0; row <= y + 1 && row < height; ++row) {
    for (int64_t column = x > 0 ? x - 1 : 0; column <= x + 1 && column < width; ++column) {
      const int64_t patch = image * pixels + row * width + column;
      const float norm = __ldg(norms + patch);
      if (norm < eps) continue;
      float of_patch = 0;
      for (int64_t part = 0; part < parts; ++part) of_patch += __ldg(radial + part * all + patch);
      loss += of_patch / norm / norm;
    }
  }
  const float key = to_float(__ldg(keys.at(image, c, y, x)));
  *out.at(image, c, y, x) = rounded_to<X>(sum - loss * key);
}

}  // namespace restore_kernels::pyramid

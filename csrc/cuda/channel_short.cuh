// Channel attention over fewer than 16 pixels: the streams of channel_gram.cuh and channel_apply.cuh in
// float32 throughout, one thread an entry, in the order of the pixels or channels.
//
// Similarities of the shortest rows are equal often enough (±1 at one pixel) to be wanted exactly, which
// products in two parts are not; and gradients of normalised rows are what is left of larger terms that
// cancel, all but a share 1 / N of them. Nothing is shared: speed does not matter at this size.
#pragma once

#include "channel_apply.cuh"
#include "channel_gram.cuh"

namespace restore_kernels::channel {

constexpr int64_t kShort = 16;  // pixels from which on rows are multiplied by matrix instructions

template <typename T>
__device__ float gated(const Rows<const T>& x, const Rows<const float>& gate, int64_t batch, int64_t index, int row,
                       int64_t pixel) {
  float value = to_float(x.group(batch, index)[x.offset(row) + pixel * x.x.stride[3]]);
  if (gate.x.data) value *= gate.group(batch, index)[gate.offset(row) + pixel * gate.x.stride[3]];
  return value;
}

// partials of one chunk. Grid and block: one thread for every entry of partials.
template <typename T>
__global__ void __launch_bounds__(kThreads) channel_short_gram_kernel(const Gram<T> p, int64_t entries) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (entry >= entries) return;
  const int64_t products = static_cast<int64_t>(p.a_rows) * p.b_rows, i = entry % p.size();
  const int64_t batch = entry / p.size() / p.groups, index = entry / p.size() % p.groups;
  const Rows<const float> no_gate{};
  float sum = 0;
  for (int64_t pixel = 0; pixel < p.pixels; ++pixel) {
    const auto a = [&](int64_t row) { return gated<T>(p.a, no_gate, batch, index, static_cast<int>(row), pixel); };
    const auto b = [&](int64_t row) { return gated<T>(p.b, p.gate, batch, index, static_cast<int>(row), pixel); };
    if (i < products) sum += a(i / p.b_rows) * b(i % p.b_rows);
    else if (i < products + p.a_rows) sum += a(i - products) * a(i - products);
    else sum += b(i - products - p.a_rows) * b(i - products - p.a_rows);
  }
  p.partials[entry] = sum;
}

// Of a gate of one row a head, every row is a part of its gradient. Grid and block: one thread for every
// element of out.
template <typename T>
__global__ void __launch_bounds__(kThreads) channel_short_apply_kernel(const Apply<T, float, 1> p, int64_t elements) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= elements) return;
  const auto& side = p.side[0];
  const int64_t pixel = at % p.pixels, matrix = at / p.pixels / p.rows;
  const int row = static_cast<int>(at / p.pixels % p.rows);
  const int64_t batch = matrix / p.groups, index = matrix % p.groups;
  float out = 0;
  for (int i = 0; i < p.inner; ++i)
    out += side.matrix[(matrix * p.rows + row) * p.pitch + i] * gated<T>(side.x, side.x_gate, batch, index, i, pixel);
  if (side.radial)
    out -= side.radial[matrix * p.rows + row] * gated<T>(side.own, side.out_gate, batch, index, row, pixel);
  if (const auto& gate = side.out_gate; gate.x.data) {
    const float term = out * gated<T>(side.own, {}, batch, index, row, pixel);
    const auto& gradient = side.gate_gradient;
    if (gradient.parts) {
      gradient.data[(matrix * gradient.parts + gradient.first + row) * p.pixels + pixel] = term;
    } else {
      gradient.data[at] = gradient.add ? gradient.data[at] + term : term;
    }
    out *= gate.group(batch, index)[gate.offset(row) + pixel * gate.x.stride[3]];
  }
  side.out.group(batch, index)[side.out.offset(row) + pixel * side.out.x.stride[3]] = rounded_to<T>(out);
}

}  // namespace restore_kernels::channel

// Depthwise convolution on the CPU: the operators of ops.py.
//
// A task packs a band of rows of one plane of an image (of sixteen planes where the channels of a pixel lie
// side by side, so that they are transposed in registers), with a halo of zeros, and computes it from L1 and L2:
// every tensor is read and written once, but for the rows that bands share. Backward packs the output's gradient
// once for both sums over it. K² multiply-adds per element and pass: at 3x3 the memory is the floor, from 5x5 on
// the multiplications are.
//
// Bands depend on shapes alone, and their shares of the weight's gradient are added in order, so that the result
// is the same for any number of threads.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "depthwise_planes.h"
#include "result_memory.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace depthwise {
namespace {

using OptionalTensor = std::optional<Tensor>;

bool is_pixel_major(const Tensor& x) { return x.stride(1) == 1 && x.stride(3) > 1; }

// Uninitialised (B, channels, H, W), pixel-major where the image is.
Tensor empty_image(const Tensor& x, int64_t channels) {
  const int64_t batch = x.size(0), height = x.size(2), width = x.size(3);
  if (is_pixel_major(x))
    return empty_result({batch, height, width, channels}, x.options()).permute({0, 3, 1, 2});
  return empty_result({batch, channels, height, width}, x.options());
}

// The sum of the rows, in their order.
Tensor added_up(const Tensor& rows) {
  const Tensor sum = at::zeros({rows.size(1)}, rows.options());
  for (int64_t i = 0; i < rows.size(0); ++i) sum.add_(rows.select(0, i));
  return sum;
}

// How a call is divided into tasks: blocks of groups, bands of rows.
struct Division {
  int64_t batch, groups, inputs, height, width, block, blocks, rows, bands;

  // For `packed` planes per group. Pixel-major images are divided into blocks of channels.
  Division(const Tensor& x, const Tensor& weight, bool pixel_major, int64_t packed)
      : batch(x.size(0)), groups(weight.size(0)), inputs(weight.size(1)), height(x.size(2)), width(x.size(3)) {
    constexpr int64_t kElements = 128 << 10;  // of all packed planes
    block = pixel_major ? std::min<int64_t>(16, groups) : 1;
    blocks = ceil_div(groups, block);
    rows = std::clamp<int64_t>(kElements / (block * packed * (width + kMargin)) / kRows * kRows, 2 * kRows, 64);
    rows = std::min(rows, round_up(height, kRows));
    bands = ceil_div(height, rows);
  }

  struct Task {
    int64_t image, group, groups, band, y, rows;
  };

  // make() gives each thread what its tasks, run(task, of this thread), share.
  template <typename Make, typename Run>
  void each(Make make, Run run) const {
    constexpr int64_t kGrain = 16 << 10;  // elements
    const int64_t tasks = std::max<int64_t>(1, kGrain / (block * inputs * rows * width));
    at::parallel_for(0, batch * bands * blocks, tasks, [&](int64_t begin, int64_t end) {
      const auto own = make();
      for (int64_t i = begin; i < end; ++i) {
        // Blocks of channels share cache lines: they come one after the other.
        const int64_t group = i % blocks * block, band = i / blocks % bands, y = band * rows;
        run(Task{i / blocks / bands, group, std::min(block, groups - group), band, y, std::min(rows, height - y)}, own);
      }
      finish_streaming();
    });
  }
};

// Where the rows of a channel are computed: in the image itself if they lie there as they are computed, else in
// its plane.
template <typename S, typename T>
Matrix<T> rows_of(const Images<S>& images, const Division::Task& t, int64_t channel, const Planes<T>& planes, int64_t plane) {
  if constexpr (std::is_same_v<S, T>)
    if (images.column == 1)
      return {images.data + t.image * images.image + channel * images.channel + t.y * images.row, images.row};
  return {planes.at(plane, 0), planes.pitch};
}

// Whether rows_of such images, a result, are better written past the caches.
template <typename S>
bool streams(const Images<S>& images, int64_t elements) {
  constexpr int64_t kLarge = 2 << 20, kVector = 64;  // bytes
  const auto aligned = [](int64_t stride) { return stride * static_cast<int64_t>(sizeof(S)) % kVector == 0; };
  return (std::is_same_v<S, float> || std::is_same_v<S, double>) && images.column == 1 &&
         elements * static_cast<int64_t>(sizeof(S)) >= kLarge && reinterpret_cast<uintptr_t>(images.data) % kVector == 0 &&
         aligned(images.image) && aligned(images.channel) && aligned(images.row);
}

template <typename S, typename T>
void store_unless_there(const Images<S>& images, const Division::Task& t, int64_t inputs, const Planes<T>& planes, int64_t width) {
  if (!std::is_same_v<S, T> || images.column != 1)
    store(planes, t.rows, width, images, t.image, t.group * inputs, t.groups * inputs, t.y);
}

template <typename S>
void forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t dilation, bool relu, const Tensor& out) {
  using T = Accumulate<S>;
  const auto sums = sums_for<T>(weight.size(2), dilation);
  const int64_t taps = weight.size(2) * weight.size(3), reach = dilation * (weight.size(2) / 2);
  const auto in = read<S>(x);
  const auto result = write<S>(out);
  const Division p(x, weight, in.pixel_major(), weight.size(1) + 1);
  const T* weights = weight.const_data_ptr<T>();
  const bool streamed = streams(result, out.numel());
  const T* biases = bias ? bias->const_data_ptr<T>() : nullptr;
  struct Own {
    Planes<T> in, out;
  };
  const auto make = [&] {
    return Own{{p.block * p.inputs, p.rows, reach, reach, p.width}, {p.block, p.rows, 0, 0, p.width}};
  };
  p.each(make, [&](const Division::Task& t, const Own& own) {
    load(in, t.image, t.group * p.inputs, t.groups * p.inputs, {t.y - reach, t.y + t.rows + reach}, p.height, p.width, own.in,
         -reach);
    for (int64_t g = 0; g < t.groups; ++g) {
      const int64_t channel = t.group + g;
      const Matrix<T> target = rows_of(result, t, channel, own.out, g);
      sums.correlate(own.in.at(g * p.inputs, 0), own.in.pitch, own.in.plane, weights + channel * p.inputs * taps, p.inputs,
                     {biases ? biases[channel] : T(0), relu, streamed}, target, t.rows, p.width);
    }
    store_unless_there(result, t, 1, own.out, p.width);
  });
}

// `shares`: of every task, what the gradients of weight and bias get from its rows.
template <typename S>
void backward(const Division& p, const Tensor& grad_out, const Tensor& x, const Tensor& weight, const OptionalTensor& out,
              int64_t dilation, const Tensor& grad_x, const Tensor& shares) {
  using T = Accumulate<S>;
  const auto sums = sums_for<T>(weight.size(2), dilation);
  const int64_t taps = weight.size(2) * weight.size(3), reach = dilation * (weight.size(2) / 2);
  const auto in = read<S>(x), grads = read<S>(grad_out), outputs = read<S>(out.value_or(grad_out));
  const auto result = write<S>(grad_x);
  const bool streamed = streams(result, grad_x.numel());
  const T* weights = weight.const_data_ptr<T>();
  struct Own {
    Planes<T> grad, out, in, result;
  };
  const auto make = [&] {
    const int64_t inputs = p.block * p.inputs;
    return Own{{p.block, p.rows, reach, reach, p.width},
               {out ? p.block : 0, p.rows, reach, reach, p.width},
               {inputs, p.rows, 2 * reach, 2 * reach, p.width},
               {inputs, p.rows, 0, 0, p.width}};
  };
  p.each(make, [&](const Division::Task& t, const Own& own) {
    const Rows with_halo{t.y - reach, t.y + t.rows + reach};
    load(grads, t.image, t.group, t.groups, with_halo, p.height, p.width, own.grad, -reach);
    if (out) {
      load(outputs, t.image, t.group, t.groups, with_halo, p.height, p.width, own.out, -reach);
      for (int64_t g = 0; g < t.groups; ++g)
        clear_where_not_positive(own.out.at(g, -reach), own.grad.at(g, -reach), (t.rows + 2 * reach) * own.grad.pitch - kMargin);
    }
    load(in, t.image, t.group * p.inputs, t.groups * p.inputs, {t.y, t.y + t.rows + 2 * reach}, t.y + t.rows, p.width, own.in,
         0);
    T* of_weight = shares.mutable_data_ptr<T>() + (t.image * p.bands + t.band) * shares.size(1);
    T* of_bias = of_weight + weight.numel();
    for (int64_t g = 0; g < t.groups; ++g) {
      const T* grad = own.grad.at(g, 0);
      of_bias[t.group + g] = sum_of_rows(grad, own.grad.pitch, t.rows, p.width);
      for (int64_t m = 0; m < p.inputs; ++m) {
        const int64_t plane = g * p.inputs + m, channel = t.group * p.inputs + plane;
        sums.tap_products(own.in.at(plane, 0), own.in.pitch, grad, own.grad.pitch, t.rows, p.width, of_weight + channel * taps);
        T flipped[kMostTaps];
        std::reverse_copy(weights + channel * taps, weights + (channel + 1) * taps, flipped);
        sums.correlate(grad, own.grad.pitch, 0, flipped, 1, {T(0), false, streamed},
                       rows_of(result, t, channel, own.result, plane), t.rows, p.width);
      }
    }
    store_unless_there(result, t, p.inputs, own.result, p.width);
  });
}

Tensor in_working_type(const Tensor& weight) {
  return weight.to(weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
}

Tensor depthwise_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t dilation, bool relu) {
  const Tensor out = empty_image(x, weight.size(0)), weights = in_working_type(weight);
  const OptionalTensor biases = bias ? OptionalTensor(in_working_type(*bias)) : std::nullopt;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "depthwise_conv",
                                  [&] { forward<scalar_t>(x, weights, biases, dilation, relu, out); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                                           const OptionalTensor& out, int64_t dilation) {
  const Tensor grad_x = empty_image(x, x.size(1)), weights = in_working_type(weight);
  const bool pixel_major = is_pixel_major(x) || is_pixel_major(grad_out);
  const Division p(x, weight, pixel_major, 2 * weight.size(1) + (out ? 2 : 1));
  const Tensor shares = at::empty({p.batch * p.bands, weights.numel() + p.groups}, weights.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "depthwise_conv_backward", [&] {
    backward<scalar_t>(p, grad_out, x, weights, out, dilation, grad_x, shares);
  });
  const Tensor sums = added_up(shares).to(weight.scalar_type());
  return {grad_x, sums.narrow(0, 0, weight.numel()).view(weight.sizes()), sums.narrow(0, weight.numel(), p.groups).clone()};
}

}  // namespace
}  // namespace depthwise
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(restore_kernels, CPU, m) {
  m.impl("depthwise_conv.cpu", depthwise::depthwise_conv);
  m.impl("depthwise_conv_backward.cpu", depthwise::depthwise_conv_backward);
}

}  // namespace restore_kernels

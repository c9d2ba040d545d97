// Depthwise convolution on the CPU: the operators of ops.py.
//
// A task packs a band of rows of one plane of an image (of sixteen planes where the channels of a pixel lie
// side by side, so that they are transposed in registers), with a halo of zeros, and computes it from L1 and L2:
// every tensor is read and written once, but for the rows that bands share. Backward packs the output's gradient
// once for both sums over it. K² multiply-adds per element and pass: at 3x3 the memory is the floor, from 5x5 on
// the multiplications are.
//
// During its sums the memory system is asked for what the next task packs, which would take as long as the sums.
//
// What is activated or gated is finished row by row while it is in cache. Backward computes its sums again, for the
// band and the rows around it that the taps reach: K² multiply-adds more instead of a tensor kept, written and read.
//
// Bands depend on shapes alone, and their shares of the weight's gradient are added in order, so that the result
// is the same for any number of threads.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <optional>

#include "depthwise_activation.h"
#include "depthwise_sums.h"
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

Tensor in_working_type(const Tensor& weight) {
  return weight.to(weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
}

// The sum of the rows, in their order.
Tensor added_up(const Tensor& rows) {
  const Tensor sum = at::zeros({rows.size(1)}, rows.options());
  for (int64_t i = 0; i < rows.size(0); ++i) sum.add_(rows.select(0, i));
  return sum;
}

// What both passes are given, small tensors in the working type.
struct Call {
  at::TensorList x;
  Tensor weight;
  OptionalTensor bias, slope, gate;  // slope: one per output channel
  int64_t dilation;
  Activation activation;

  Call(at::TensorList x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& slope,
       const OptionalTensor& gate, int64_t dilation, std::optional<std::string_view> activation)
      : x(x),
        weight(in_working_type(weight)),
        bias(bias ? OptionalTensor(in_working_type(*bias)) : std::nullopt),
        slope(slope ? OptionalTensor(in_working_type(*slope).expand({weight.size(0)}).contiguous()) : std::nullopt),
        gate(gate),
        dilation(dilation),
        activation(activation_of(activation)) {}

  int64_t taps() const { return weight.size(2) * weight.size(3); }
  int64_t reach() const { return dilation * (weight.size(2) / 2); }
  // Whether the sums make the result on their own.
  bool is_plain() const { return !gate && (activation == Activation::none || activation == Activation::relu); }
};

// Whether a tensor but the gradient of the result is pixel-major.
bool any_pixel_major(const Call& c) {
  return std::any_of(c.x.begin(), c.x.end(), is_pixel_major) || (c.gate && is_pixel_major(*c.gate));
}

template <typename T>
T element_or_zero(const OptionalTensor& x, int64_t i) {
  return x ? x->const_data_ptr<T>()[i] : T(0);
}

// How a call is divided into tasks: blocks of groups, bands of rows.
struct Division {
  int64_t batch, groups, inputs, height, width, block, blocks, rows, bands;

  // For `packed` planes per group. Where images are pixel-major, into blocks of channels.
  Division(const Call& c, bool pixel_major, int64_t packed)
      : batch(c.x[0].size(0)),
        groups(c.weight.size(0)),
        inputs(c.weight.size(1)),
        height(c.x[0].size(2)),
        width(c.x[0].size(3)) {
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

  // make() gives each thread what its tasks share, run(task, the one after it if there is one, that).
  template <typename Make, typename Run>
  void each(Make make, Run run) const {
    constexpr int64_t kGrain = 16 << 10;  // elements
    const int64_t tasks = std::max<int64_t>(1, kGrain / (block * inputs * rows * width));
    at::parallel_for(0, batch * bands * blocks, tasks, [&](int64_t begin, int64_t end) {
      const auto own = make();
      Task current = task(begin);
      for (int64_t i = begin; i < end; ++i) {
        const std::optional<Task> next = i + 1 < end ? std::optional(task(i + 1)) : std::nullopt;
        run(current, next, own);
        if (next) current = *next;
      }
      finish_streaming();
    });
  }

  // Whether a task reads so much that it pays to ask for it before.
  bool is_large() const {
    constexpr int64_t kElements = 2048;
    return block == 1 && rows * width >= kElements;
  }

  // Of rows that a task reads, with those that taps reach, of its first group.
  template <typename S>
  Prefetch prefetch(const Images<const S>& images, const Task& t, int64_t reach) const {
    return depthwise::prefetch(images.from(t.group), t.image, {t.y - reach, t.y + t.rows + reach}, height, width);
  }
  template <typename S>
  Prefetch prefetch(const Joined<const S>& images, const Task& t, int64_t channel, int64_t reach) const {
    const auto& part = images.at(channel);
    return depthwise::prefetch(part.images.from(channel - part.first), t.image, {t.y - reach, t.y + t.rows + reach}, height, width);
  }

 private:
  // Blocks of channels share cache lines: they come one after the other.
  Task task(int64_t i) const {
    const int64_t group = i % blocks * block, band = i / blocks % bands, y = band * rows;
    return {i / blocks / bands, group, std::min(block, groups - group), band, y, std::min(rows, height - y)};
  }
};

// What the next task will read, for the sums of this one to ask for: two images each, first what it packs. Where there
// are more images than that, the last come when they are read.
class Ahead {
 public:
  void add(const Prefetch& rows) { all_[count_++] = rows; }
  Prefetches next() {
    const auto one = [&] { return taken_ < count_ ? all_[taken_++] : Prefetch(); };
    const Prefetch first = one();
    return {first, one()};
  }

 private:
  std::array<Prefetch, 5> all_;  // at most two inputs, the gradient and the value of the result, the gate
  size_t count_ = 0, taken_ = 0;
};

// The gate of a channel from row y of the image on, where it lies or in its plane.
template <typename S, typename T>
Matrix<const T> gate_rows(const Call& c, const Images<const S>& gate, const Division::Task& t, int64_t y,
                          const Planes<T>& planes, int64_t plane, int64_t row) {
  if (!c.gate) return {nullptr, 0};
  return rows_of(gate.from(t.group + plane), t.image, y, planes, plane, row);
}

template <typename S>
void forward(const Call& c, const Tensor& out) {
  using T = Accumulate<S>;
  const auto sums = sums_for<T>(c.weight.size(2), c.dilation);
  const auto finish = activations_for<T>(c.activation).finish;
  const int64_t reach = c.reach();
  const auto in = join<const S>(c.x, c.x);
  const auto result = write<S>(out);
  const auto gate = read<S>(c.gate.value_or(out));
  const bool plain = c.is_plain(), packs_gate = c.gate && !is_in_place<T>(gate), streamed = streams(result, out.numel());
  const Division p(c, any_pixel_major(c), c.weight.size(1) + (c.gate ? 2 : 1));
  const T* weights = c.weight.const_data_ptr<T>();
  struct Own {
    Planes<T> in, gate, out;
  };
  const auto make = [&] {
    return Own{{p.block * p.inputs, p.rows, reach, p.width},
               {packs_gate ? p.block : 0, p.rows, 0, p.width},
               {p.block, p.rows, 0, p.width}};
  };
  p.each(make, [&](const Division::Task& t, const std::optional<Division::Task>& next, const Own& own) {
    Ahead ahead;
    if (next && p.is_large()) {
      for (int64_t m = 0; m < p.inputs; ++m) ahead.add(p.prefetch(in, *next, next->group * p.inputs + m, reach));
      if (c.gate) ahead.add(p.prefetch(gate, *next, 0));
    }
    load(in, t.image, t.group * p.inputs, t.groups * p.inputs, {t.y - reach, t.y + t.rows + reach}, p.height, p.width, own.in,
         -reach);
    if (packs_gate) load(gate.from(t.group), t.image, t.groups, {t.y, t.y + t.rows}, p.height, p.width, own.gate, 0, 0);
    for (int64_t g = 0; g < t.groups; ++g) {
      const int64_t channel = t.group + g;
      const Matrix<T> target = rows_of(result.from(channel), t.image, t.y, own.out, g, 0);
      const Matrix<T> sum = plain ? target : Matrix<T>{own.out.at(g, 0), own.out.pitch};
      sums.correlate(own.in.at(g * p.inputs, 0), own.in.pitch, own.in.plane, weights + channel * p.inputs * c.taps(), p.inputs,
                     {element_or_zero<T>(c.bias, channel), plain && c.activation == Activation::relu, plain && streamed}, sum,
                     t.rows, p.width, ahead.next());
      if (!plain)
        finish(sum, gate_rows(c, gate, t, t.y, own.gate, g, 0), element_or_zero<T>(c.slope, channel), target, t.rows, p.width,
               streamed);
    }
    if (!is_in_place<T>(result)) store(own.out, 0, t.rows, p.width, result.from(t.group), t.image, t.groups, t.y);
  });
}

// The gradients that are wanted; the others are empty.
struct Gradients {
  std::vector<Tensor> x;
  Tensor parameters;  // of every task, what weight, bias and slope get from its rows
  Tensor gate;
};

template <typename S>
void backward(const Division& p, const Call& c, const Tensor& grad_out, const OptionalTensor& out, const Gradients& to) {
  using T = Accumulate<S>;
  const auto sums = sums_for<T>(c.weight.size(2), c.dilation);
  const auto differentiate = activations_for<T>(c.activation).differentiate;
  const int64_t taps = c.taps(), reach = c.reach();
  const bool of_gate = to.gate.dim() == 4, of_parameters = to.parameters.numel() > 0;
  const bool of_x = std::any_of(to.x.begin(), to.x.end(), [](const Tensor& x) { return x.dim() == 4; });
  const bool summed_again = !out && (c.activation != Activation::none || of_gate);
  const auto in = join<const S>(c.x, c.x);
  const auto result = join<S>(to.x, c.x);
  const auto grads = read<S>(grad_out), outputs = read<S>(out.value_or(grad_out)), gate = read<S>(c.gate.value_or(grad_out));
  const auto gate_result = of_gate ? write<S>(to.gate) : Images<S>{};
  const bool packs_gate = c.gate && !is_in_place<T>(gate), stores_gate = of_gate && !is_in_place<T>(gate_result);
  const bool streamed = of_gate && streams(gate_result, to.gate.numel());
  const bool differentiated = c.gate || c.activation != Activation::none;
  const bool packs_grad = !differentiated || !is_in_place<T>(grads), packs_out = out && !is_in_place<T>(outputs);
  const T* weights = c.weight.const_data_ptr<T>();
  const int64_t in_reach = summed_again ? 2 * reach : reach;
  struct Own {
    Planes<T> grad, pre, gate, grad_gate, in, result;
  };
  const auto make = [&] {
    const int64_t inputs = p.block * p.inputs;
    return Own{{p.block, p.rows, reach, p.width},
               {packs_out || summed_again ? p.block : 0, p.rows, reach, p.width},
               {packs_gate ? p.block : 0, p.rows, reach, p.width},
               {stores_gate ? p.block : 0, p.rows, 0, p.width},
               {inputs, p.rows, in_reach, p.width},
               {inputs, p.rows, 0, p.width}};
  };
  p.each(make, [&](const Division::Task& t, const std::optional<Division::Task>& next, const Own& own) {
    Ahead ahead;
    if (next && p.is_large()) {
      ahead.add(p.prefetch(grads, *next, reach));
      for (int64_t m = 0; (summed_again || of_parameters) && m < p.inputs; ++m)
        ahead.add(p.prefetch(in, *next, next->group * p.inputs + m, in_reach));
      if (out) ahead.add(p.prefetch(outputs, *next, reach));
      if (c.gate) ahead.add(p.prefetch(gate, *next, reach));
    }
    const Rows with_halo{t.y - reach, t.y + t.rows + reach};
    if (packs_grad) load(grads.from(t.group), t.image, t.groups, with_halo, p.height, p.width, own.grad, 0, -reach);
    if (summed_again || of_parameters)
      load(in, t.image, t.group * p.inputs, t.groups * p.inputs, {t.y - in_reach, t.y + t.rows + in_reach}, p.height, p.width,
           own.in, -in_reach);
    if (packs_out) load(outputs.from(t.group), t.image, t.groups, with_halo, p.height, p.width, own.pre, 0, -reach);
    if (packs_gate) load(gate.from(t.group), t.image, t.groups, with_halo, p.height, p.width, own.gate, 0, -reach);
    const int64_t first = std::max(-reach, -t.y), last = std::min(t.rows + reach, p.height - t.y);
    const int64_t task = t.image * p.bands + t.band;
    T* shares = of_parameters ? to.parameters.mutable_data_ptr<T>() + task * to.parameters.size(1) : nullptr;
    for (int64_t g = 0; g < t.groups; ++g) {
      const int64_t channel = t.group + g, plane = g * p.inputs;
      if (summed_again)
        sums.correlate(own.in.at(plane, first), own.in.pitch, own.in.plane, weights + channel * p.inputs * taps, p.inputs,
                       {element_or_zero<T>(c.bias, channel), false, false}, {own.pre.at(g, first), own.pre.pitch}, last - first,
                       p.width, ahead.next());
      T of_slope(0);
      if (differentiated) {
        const auto rows = [&](int64_t begin, int64_t end, Matrix<T> grad_gate) {
          const int64_t y = t.y + begin;
          const Matrix<const T> pre = out ? rows_of(outputs.from(channel), t.image, y, own.pre, g, begin)
                                          : Matrix<const T>{own.pre.at(g, begin), own.pre.pitch};
          return differentiate(pre, gate_rows(c, gate, t, y, own.gate, g, begin), element_or_zero<T>(c.slope, channel),
                               rows_of(grads.from(channel), t.image, y, own.grad, g, begin),
                               {own.grad.at(g, begin), own.grad.pitch}, grad_gate, end - begin, p.width, streamed);
        };
        clear(own.grad, g, -reach, first, p.width);
        clear(own.grad, g, last, t.rows + reach, p.width);
        rows(first, 0, {nullptr, 0});
        of_slope = rows(0, t.rows, of_gate ? rows_of(gate_result.from(channel), t.image, t.y, own.grad_gate, g, 0)
                                           : Matrix<T>{nullptr, 0});
        rows(t.rows, last, {nullptr, 0});
      }
      const T* grad = own.grad.at(g, 0);
      if (of_parameters) {
        for (int64_t m = 0; m < p.inputs; ++m)
          sums.tap_products(own.in.at(plane + m, 0), own.in.pitch, grad, own.grad.pitch, t.rows, p.width,
                            shares + (channel * p.inputs + m) * taps);
        T* rest = shares + c.weight.numel();
        rest[channel] = sum_of_rows(grad, own.grad.pitch, t.rows, p.width);
        rest[p.groups + channel] = of_slope;
      }
      for (int64_t m = 0; of_x && m < p.inputs; ++m) {
        const int64_t of = channel * p.inputs + m;
        const auto& part = result.at(of);
        if (!part.images.data) continue;
        T flipped[kMostTaps];
        std::reverse_copy(weights + of * taps, weights + (of + 1) * taps, flipped);
        sums.correlate(grad, own.grad.pitch, 0, flipped, 1, {T(0), false, part.streamed},
                       rows_of(part.images.from(of - part.first), t.image, t.y, own.result, plane + m, 0), t.rows, p.width,
                       ahead.next());
      }
    }
    if (stores_gate) store(own.grad_gate, 0, t.rows, p.width, gate_result.from(t.group), t.image, t.groups, t.y);
    result.each(t.group * p.inputs, t.groups * p.inputs, [&](const Images<S>& images, int64_t count, int64_t plane) {
      if (images.data && !is_in_place<T>(images)) store(own.result, plane, t.rows, p.width, images, t.image, count, t.y);
    });
  });
}

Tensor depthwise_conv(at::TensorList x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& slope,
                      const OptionalTensor& gate, int64_t dilation, std::optional<std::string_view> activation) {
  const Call c(x, weight, bias, slope, gate, dilation, activation);
  const Tensor out = empty_image(x[0], weight.size(0));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), "depthwise_conv",
                                  [&] { forward<scalar_t>(c, out); });
  return out;
}

// `wanted`: of every image of x, then of weight, bias and slope together, then of the gate.
std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor> depthwise_conv_backward(
    const Tensor& grad_out, at::TensorList x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& slope,
    const OptionalTensor& gate, const OptionalTensor& out, int64_t dilation, std::optional<std::string_view> activation,
    const c10::List<bool>& wanted) {
  const Call c(x, weight, bias, slope, gate, dilation, activation);
  const Division p(c, is_pixel_major(grad_out) || any_pixel_major(c), 2 * weight.size(1) + 2 + (gate ? 2 : 0));
  const auto none = [&] { return at::empty({0}, weight.options()); };  // results must not share memory
  Gradients to{{}, at::empty({0, 0}, c.weight.options()), none()};
  for (size_t i = 0; i < x.size(); ++i) to.x.push_back(wanted[i] ? empty_image(x[i], x[i].size(1)) : none());
  const bool of_parameters = wanted[x.size()];
  if (of_parameters) to.parameters = at::empty({p.batch * p.bands, weight.numel() + 2 * p.groups}, c.weight.options());
  if (wanted[x.size() + 1]) to.gate = empty_image(*gate, gate->size(1));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad_out.scalar_type(), "depthwise_conv_backward",
                                  [&] { backward<scalar_t>(p, c, grad_out, out, to); });
  if (!of_parameters) return {to.x, none(), none(), none(), to.gate};
  const Tensor sums = added_up(to.parameters);
  const Tensor of_slope = sums.narrow(0, weight.numel() + p.groups, p.groups);
  const auto narrowed = [&](const Tensor& sum) { return sum.to(weight.scalar_type(), false, true); };
  return {to.x, narrowed(sums.narrow(0, 0, weight.numel()).view(weight.sizes())),
          narrowed(sums.narrow(0, weight.numel(), p.groups)),
          slope ? narrowed(of_slope.sum_to_size(slope->sizes())) : none(), to.gate};
}

}  // namespace
}  // namespace depthwise
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(restore_kernels, CPU, m) {
  m.impl("depthwise_conv.cpu", depthwise::depthwise_conv);
  m.impl("depthwise_conv_backward.cpu", depthwise::depthwise_conv_backward);
}

}  // namespace restore_kernels

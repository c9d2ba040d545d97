// Pointwise (1x1) convolution on the CPU: the operators of ops.py.
//
// Schedule. A task owns tiles of pixels. Where tiles are few, also only some of the output's channels, or in backward
// of the input's, so that all threads have work.
//   forward   packs kDepth channels of a tile from the images they come from, which are nowhere written together,
//             and multiplies them by the weight; the sums over all channels stay in L2 until they are written.
//   backward  packs the output's gradient and, transposed in registers, x once per tile, and makes the gradient of x
//             and a share of those of weight and bias of them.
// Meanwhile the memory system is asked for what comes next: a tile is too short for it to see that by itself.
// (Asking for what lies beyond the last tile does nothing.)
// Rows of an image lie a power of two apart; packed, at an odd number of cache lines, they do not fight for the same
// sets of L1. The image is read and written once: 4 (C + C_out) bytes per pixel forward and 4 (2 C + C_out) backward.
// Bound: C * C_out multiply-adds per pixel forward and twice that backward; at C of 16 and less the memory. bfloat16 is
// multiplied as such where the processor can (pointwise_factors.h).
//
// Tiles and shares depend on shapes and strides alone, and shares are added in their order, so results are the same
// for any number of threads.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <functional>

#include "image_pixels.h"
#include "pointwise_factors.h"
#include "tile_gemm.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace pointwise {
namespace {

using at::TensorList;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kTile = 256;  // pixels
constexpr int64_t kDepth = 128;  // steps of a sum whose factors stay in L1
constexpr int64_t kColumns = 192;  // of the weight's gradient that are made together
constexpr int64_t kSide = 16;  // parts of outputs or channels are multiples of it
constexpr int64_t kTasks = 8;  // to divide a call into, at least
constexpr int64_t kGrain = 1 << 19;  // multiply-adds that are worth a task

// Calls f(i, channel of image i, its place after `begin`, count) for the images that channels begin to end come from.
template <typename F>
void each_image(TensorList images, int64_t begin, int64_t end, F f) {
  int64_t first = 0;
  for (size_t i = 0; i < images.size(); ++i) {
    const int64_t channels = images[i].size(1), from = std::max(begin, first), to = std::min(end, first + channels);
    if (from < to) f(i, from - first, from - begin, to - from);
    first += channels;
  }
}

// c = a b + addend in stretches of about kDepth of the depth, whose part of b block(first, count) makes available.
// ahead(first, count) is what to ask the memory system for meanwhile.
template <typename Factors, typename T, typename Block, typename Ahead>
void multiply_in_stretches(Matrix<const T> a, Block block, Matrix<T> c, int64_t rows, int64_t columns, int64_t depth,
                           Addend<T> addend, Ahead ahead) {
  const int64_t stretch = ceil_div(ceil_div(depth, ceil_div(depth, kDepth)), Factors::kStep) * Factors::kStep;
  for (int64_t k = 0; k < depth; k += stretch) {
    const int64_t count = std::min(stretch, depth - k);
    Factors::multiply(a.from(0, k / Factors::kTogether), block(k, count), c, rows, columns, count,
                      k == 0 ? addend : Addend<T>{c}, ahead(k, count));
  }
}

// compute(tile) makes a tile of an image: in place if that holds what is computed and it is written only once.
template <typename S, typename T, typename F>
void write_once(Matrix<S> x, int64_t rows, int64_t columns, int64_t depth, Matrix<T> scratch, F compute) {
  if (depth <= kDepth) return write_tile<S, T>(x, rows, columns, scratch, compute);
  compute(scratch);
  copy_tile<T, S>(scratch, x, rows, columns);
}

// The sizes of a call.
struct Problem {
  int64_t outputs, channels, image_pixels, pixels;
  bool per_image;

  Problem(const Tensor& image, const Tensor& weight)
      : outputs(weight.size(-4)), channels(weight.size(-3)), image_pixels(image.size(2) * image.size(3)),
        pixels(image.size(0) * image_pixels), per_image(weight.dim() == 5) {}

  // Which weight belongs to the image with pixel `first` of all.
  int64_t weight_of(int64_t first) const { return per_image ? first / image_pixels : 0; }
  int64_t work() const { return outputs * channels * pixels; }
};

// Into how many parts to cut `size` so that there are kTasks of `tasks`, if there is work for them.
int64_t parts(int64_t tasks, int64_t work, int64_t size) {
  constexpr int64_t kLeast = 64;  // of size
  tasks = std::max<int64_t>(tasks, 1);
  const int64_t wanted = std::min(ceil_div(kTasks, tasks), work / (kGrain * tasks));
  return std::clamp<int64_t>(wanted, 1, ceil_div(size, kLeast));
}

template <typename Factors>
void forward(TensorList x, const Tensor& weight, const OptionalTensor& bias, const Tensor& out) {
  using S = typename Factors::Number;
  using T = Accumulate<S>;
  const Problem p(out, weight);
  const FirstFactors<Factors> weights(weight, false);
  std::vector<Tensor> images(x.begin(), x.end());
  images.push_back(out);
  const Pixels pixels(images, kTile * x[0].size(1));
  const int64_t row = pitch(pixels.tile()), count_parts = parts(pixels.tasks(), p.work(), p.outputs);
  const int64_t rows = ceil_div(ceil_div(p.outputs, count_parts), kSide) * kSide, tasks = pixels.tasks() * count_parts;
  const std::vector<T> ones(pixels.tile(), T(1));
  const int64_t grain = std::max<int64_t>(1, kGrain * tasks / std::max<int64_t>(1, p.work()));
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const typename Factors::Session session;
    Factors packed(kDepth, pixels.tile());
    Scratch<T> sums(rows * row);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t o = task % count_parts * rows, count = std::min(rows, p.outputs - o);
      if (count <= 0) continue;
      pixels.tiles(task / count_parts, [&](int64_t index, int64_t n, int64_t columns, int64_t first) {
        const auto target = pixels.from<S>(out, index, n).from(o, 0);
        write_once<S, T>(target, count, columns, p.channels, {sums.get(), row}, [&](Matrix<T> to) {
          const auto block = [&](int64_t c, int64_t channels) {
            each_image(x, c, c + channels, [&](size_t i, int64_t from, int64_t at, int64_t taken) {
              packed.add(pixels.from<const S>(x[i], index, n).from(from, 0), at, taken, columns);
            });
            return packed.second_factor(channels, columns);
          };
          const auto ahead = [&](int64_t c, int64_t channels) {
            const bool last = c + channels >= p.channels, in_place = p.channels <= kDepth;
            Prefetches next;
            const int64_t from_channel = last ? 0 : c + channels;
            each_image(x, from_channel, from_channel + channels, [&](size_t i, int64_t from, int64_t at, int64_t taken) {
              const auto source = pixels.from<const S>(x[i], index, last ? n + columns : n).from(from, 0);
              if (at == 0) next.first = Prefetch(source, taken, columns);
            });
            const auto written = pixels.from<S>(out, index, in_place ? n + columns : n).from(o, 0);
            if (last) next.second = Prefetch(written, count, columns, true);
            return next;
          };
          const Addend<T> biases = bias ? Addend<T>{{ones.data(), 0}, bias->const_data_ptr<T>() + o} : Addend<T>{};
          multiply_in_stretches<Factors, T>(weights[p.weight_of(first)].from(o, 0), block, to, count, columns, p.channels,
                                            biases, ahead);
        });
      });
    }
  });
}

// What backward makes. A share is the gradients of weight and bias from some of the pixels of a weight.
struct Results {
  std::vector<Tensor> x;  // those not wanted are undefined
  Tensor shares;  // weights x shares x (outputs * channels, if the weight's is wanted, + outputs)
  bool weight, bias;
};

// Backward of the tiles that one thread has, for some of the input's channels.
template <typename Factors>
class BackwardTiles {
  using S = typename Factors::Number;
  using T = Accumulate<S>;

 public:
  BackwardTiles(const Tensor& grad_out, TensorList x, const Problem& problem, const FirstFactors<Factors>& weights,
                const Pixels& pixels, const Results& results, int64_t most_channels)
      : grad_out_(grad_out), x_(x), p_(problem), weights_(weights), pixels_(pixels), results_(results),
        row_(pitch(pixels.tile())), across_(std::min(most_channels, kColumns)), grad_(p_.outputs, pixels.tile()),
        columns_(across_, pixels.tile()), sums_(most_channels * row_) {}

  // What follows is of these channels, and its share of the gradients of weight and bias starts from zero.
  void start(int64_t begin, int64_t end, T* share) {
    begin_ = begin, end_ = end, of_weight_ = share;
    of_bias_ = share + (results_.weight ? p_.outputs * p_.channels : 0);
    for (int64_t o = 0; results_.weight && o < p_.outputs; ++o)
      std::fill(of_weight_ + o * p_.channels + begin, of_weight_ + o * p_.channels + end, T(0));
    if (begin == 0) std::fill_n(of_bias_, p_.outputs, T(0));
  }

  void operator()(int64_t index, int64_t n, int64_t columns, int64_t first) const {
    grad_.add(pixels_.from<const S>(grad_out_, index, n), 0, p_.outputs, columns);
    if (results_.bias && begin_ == 0) grad_.add_row_sums(of_bias_, p_.outputs, columns);
    const Matrix<const T> grad = grad_.second_factor(p_.outputs, columns);
    for (int64_t c = begin_; results_.weight && c < end_; c += across_)
      add_to_weight(index, n, columns, c, std::min(across_, end_ - c));
    each_image(x_, begin_, end_, [&](size_t i, int64_t from, int64_t at, int64_t taken) {
      const auto weight = weights_[p_.weight_of(first)].from(begin_ + at, 0);
      if (results_.x[i].defined()) make_image(index, n, columns, i, from, taken, weight, grad);
    });
  }

 private:
  // Adds grad_out xᵀ, for `count` channels from c on.
  void add_to_weight(int64_t index, int64_t n, int64_t columns, int64_t c, int64_t count) const {
    const Matrix<T> to{of_weight_ + c, p_.channels};
    each_image(x_, c, c + count, [&](size_t i, int64_t from, int64_t at, int64_t taken) {
      columns_.add_columns(pixels_.from<const S>(x_[i], index, n).from(from, 0), at, taken, columns);
    });
    const auto block = [&](int64_t i, int64_t) { return columns_.columns().from(i / Factors::kTogether, 0); };
    const auto ahead = [&](int64_t i, int64_t stretch) {
      Prefetches next;
      each_image(x_, c, c + count, [&](size_t image, int64_t from, int64_t at, int64_t taken) {
        if (at > 0 || !results_.x[image].defined()) return;
        const auto written = pixels_.from<S>(results_.x[image], index, n + i).from(from, 0);
        next.first = Prefetch(written, taken, stretch, true);
      });
      return next;
    };
    multiply_in_stretches<Factors, T>(grad_.first_factor(), block, to, p_.outputs, count, columns, {to}, ahead);
  }

  // weightᵀ grad_out for `count` channels of image i.
  void make_image(int64_t index, int64_t n, int64_t columns, size_t i, int64_t channel, int64_t count,
                  Matrix<const T> weight, Matrix<const T> grad) const {
    const auto block = [&](int64_t o, int64_t) { return grad.from(o / Factors::kTogether, 0); };
    const auto ahead = [&](int64_t o, int64_t outputs) {
      const int64_t from = o * count / p_.outputs, to = (o + outputs) * count / p_.outputs;  // the same part of x
      const auto next_grad = pixels_.from<const S>(grad_out_, index, n + columns).from(o, 0);
      Prefetches next{Prefetch(next_grad, outputs, columns), {}};
      if (results_.weight) {
        const auto next_x = pixels_.from<const S>(x_[i], index, n + columns).from(channel + from, 0);
        next.second = Prefetch(next_x, to - from, columns);
      }
      return next;
    };
    const auto target = pixels_.from<S>(results_.x[i], index, n).from(channel, 0);
    write_once<S, T>(target, count, columns, p_.outputs, {sums_.get(), row_}, [&](Matrix<T> to) {
      multiply_in_stretches<Factors, T>(weight, block, to, count, columns, p_.outputs, {}, ahead);
    });
  }

  const Tensor& grad_out_;
  TensorList x_;
  const Problem& p_;
  const FirstFactors<Factors>& weights_;  // transposed
  const Pixels& pixels_;
  const Results& results_;
  int64_t row_, across_, begin_ = 0, end_ = 0;
  T *of_weight_ = nullptr, *of_bias_ = nullptr;
  Factors grad_, columns_;
  Scratch<T> sums_;
};

template <typename Factors>
void backward(const Tensor& grad_out, TensorList x, const Tensor& weight, const Pixels& pixels, const Results& results) {
  using T = Accumulate<typename Factors::Number>;
  const Problem p(grad_out, weight);
  // Down the columns of a weight numbers lie in cache lines of their own, and those of some distances in the same sets.
  // With pixels enough a turned copy takes no time; of some weights it saves a fifth of the product's.
  constexpr int64_t kManyPixels = 4096;
  const bool turns = (p.per_image ? p.image_pixels : p.pixels) >= kManyPixels;
  const FirstFactors<Factors> transposed(turns ? weight.transpose(-4, -3) : weight, !turns);
  const int64_t weights = results.shares.size(0), shares = results.shares.size(1), size = results.shares.size(2);
  const int64_t count_parts = parts(weights * shares, 2 * p.work(), p.channels), tasks = weights * shares * count_parts;
  const int64_t part = ceil_div(ceil_div(p.channels, count_parts), kSide) * kSide, runs = pixels.tasks() / std::max<int64_t>(weights, 1);
  const int64_t grain = std::max<int64_t>(1, kGrain * tasks / std::max<int64_t>(1, 2 * p.work()));
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const typename Factors::Session session;
    BackwardTiles<Factors> tiles(grad_out, x, p, transposed, pixels, results, part);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c = task % count_parts * part, share = task / count_parts, i = share % shares;
      if (c >= p.channels) continue;
      tiles.start(c, std::min(c + part, p.channels), results.shares.mutable_data_ptr<T>() + share * size);
      const int64_t first = share / shares * runs;  // of the weight
      for (int64_t run = first + i * runs / shares; run < first + (i + 1) * runs / shares; ++run)
        pixels.tiles(run, std::cref(tiles));
    }
  });
}

// The sum of the shares of every weight, in their order: (weights, shares, n) -> (weights, n).
template <typename T>
Tensor added_up(const Tensor& shares) {
  constexpr int64_t kGrainOfSum = 4096;
  const int64_t weights = shares.size(0), count = shares.size(1), n = shares.size(2);
  if (count == 1) return shares.view({weights, n});
  const Tensor sums = empty_result({weights, n}, shares.options());
  at::parallel_for(0, weights * n, kGrainOfSum, [&](int64_t begin, int64_t end) {
    T* total = sums.mutable_data_ptr<T>();
    for (int64_t first = begin; first < end;) {  // of one weight
      const int64_t w = first / n, last = std::min(end, (w + 1) * n);
      const T* from = shares.const_data_ptr<T>() + w * count * n - w * n;
      std::copy(from + first, from + last, total + first);
      for (int64_t share = 1; share < count; ++share)
        for (int64_t i = first; i < last; ++i) total[i] += from[share * n + i];
      first = last;
    }
  });
  return sums;
}

// f with the factors that products of these numbers have here.
template <typename F>
void with_factors(at::ScalarType type, F f) {
  if (type == at::kBFloat16 && pairs::supported()) return f(Pairs(0, 0));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "pointwise_conv", [&] { f(Numbers<scalar_t>(0, 0)); });
}

Tensor pointwise_conv(TensorList x, const Tensor& weight, const OptionalTensor& bias) {
  const Tensor out = empty_image_like(x[0], weight.size(-4));
  const OptionalTensor biases = bias ? OptionalTensor(in_working_type(*bias)) : std::nullopt;
  with_factors(out.scalar_type(), [&](const auto& factors) {
    forward<std::decay_t<decltype(factors)>>(x, weight, biases, out);
  });
  return out;
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> pointwise_conv_backward(const Tensor& grad_out, TensorList x,
                                                                        const Tensor& weight,
                                                                        const c10::List<bool>& wanted) {
  constexpr int64_t kMostShares = 16, kElementsOfShares = 2 << 20;
  const int64_t outputs = weight.size(-4), channels = weight.size(-3), of = weight.dim() == 5 ? weight.size(0) : 1;
  Results results{{}, {}, wanted[x.size()], wanted[x.size() + 1]};
  std::vector<Tensor> images{grad_out};
  for (size_t i = 0; i < x.size(); ++i) {
    results.x.push_back(wanted[i] ? empty_image_like(x[i], x[i].size(1)) : Tensor());
    images.push_back(x[i]);
    if (wanted[i]) images.push_back(results.x[i]);
  }
  const Pixels pixels(images, kTile * outputs);
  const int64_t runs = pixels.tasks() / std::max<int64_t>(of, 1);
  const int64_t most = std::clamp<int64_t>(runs, 1, kMostShares);
  const int64_t shares = std::clamp<int64_t>(kElementsOfShares / (outputs * channels), 1, most);
  const int64_t of_weight = results.weight ? outputs * channels : 0;
  const bool wide = weight.scalar_type() == at::kDouble;
  results.shares = empty_result({of, shares, of_weight + outputs}, weight.options().dtype(wide ? at::kDouble : at::kFloat));
  with_factors(grad_out.scalar_type(), [&](const auto& factors) {
    backward<std::decay_t<decltype(factors)>>(grad_out, x, weight, pixels, results);
  });
  Tensor grad_weight = at::empty({0}, weight.options()), grad_bias = at::empty({0}, weight.options());
  for (Tensor& grad : results.x)
    if (!grad.defined()) grad = at::empty({0}, weight.options());
  if (results.weight || results.bias) {
    const Tensor sums = wide ? added_up<double>(results.shares) : added_up<float>(results.shares);
    if (results.weight)
      grad_weight = sums.narrow(1, 0, of_weight).to(weight.scalar_type()).contiguous().view(weight.sizes());
    if (results.bias) grad_bias = sums.narrow(1, of_weight, outputs).sum(0).to(weight.scalar_type());
  }
  return {results.x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace pointwise
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(restore_kernels, CPU, m) {
  m.impl("pointwise_conv.cpu", pointwise::pointwise_conv);
  m.impl("pointwise_conv_backward.cpu", pointwise::pointwise_conv_backward);
}

}  // namespace restore_kernels

// Dense 3x3 convolution on the CPU by Winograd's minimal filtering (winograd.h): the operators of ops.py.
//
// Schedule. A task owns a block of tiles, some rows of them or a part of one: as many as leave their transforms in L2
// and fill the vectors of the products.
//   forward    transforms the block's input, channel by channel, multiplies by the transformed weight, point by point,
//              and transforms the sums to the result.
//   backward   of the input: the same with the weight turned and transposed. Of the weight: the products of the
//              gradient's transforms and the input's, summed over the blocks of a share.
// During the products the memory system is asked for the pixels of the next block, and for those that will be written.
// Nothing that grows with the image is stored beside the result.
// Bound: for each pixel, 4 C C_out multiply-adds with tiles of 2x2 pixels, 2.25 with those of 4x4, 9 without the
// transforms; and for each channel about 6 and 9 operations for those of input and result each.
// Images of few tiles have a schedule of their own, dense_few_tiles.h.
//
// Blocks and shares depend on shapes alone and are added in their order, so results are the same for any number of
// threads.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "dense_blocks.h"
#include "dense_few_tiles.h"
#include "image_pixels.h"
#include "tile_gemm.h"
#include "winograd_weights.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace dense {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Transforms of all weights (outputs, channels, 3, 3): 16 matrices of outputs x channels or, `backwards`, turned, of
// channels x outputs: products go along their rows, and down the columns of a matrix every number has a cache line of
// its own, many of them in the same sets.
template <typename Filter>
class Weights {
  using T = typename Filter::T;

 public:
  Weights(const Tensor& weight, bool backwards)
      : memory_(empty_result({Filter::kPoints * weight.size(0) * weight.size(1)}, weight.options())),
        all_{memory_.mutable_data_ptr<T>(), weight.size(backwards ? 0 : 1), weight.size(0) * weight.size(1)} {
    const int64_t outputs = weight.size(0), channels = weight.size(1);
    const Tensor dense = weight.contiguous();
    const T* source = dense.const_data_ptr<T>();
    if (backwards)
      in_groups(channels, Filter::kPoints * outputs, [&](int64_t first, int64_t count) {
        winograd::weights_transposed<Filter>(source + first * kTaps, channels, true, all_.from(first, 0), outputs, count);
      });
    else
      at::parallel_for(0, outputs, ceil_div(1 << 12, channels), [&](int64_t begin, int64_t end) {
        winograd::weights<Filter>(source + begin * channels * kTaps, false, all_.at(begin, 0), all_.plane, (end - begin) * channels);
      });
  }

  Matrix<const T> operator[](int point) const { return all_[point]; }

 private:
  Tensor memory_;
  winograd::PointMatrices<T> all_;
};

// out = x convolved by the weights.
template <typename Filter, typename T = typename Filter::T>
void convolve(const Tensor& x, const Weights<Filter>& weights, const T* bias, const Tensor& out) {
  constexpr int64_t kDepth = 64;  // channels that are summed up in one go: rounding grows with them
  const int64_t channels = x.size(1), outputs = out.size(1);
  const int64_t depth = ceil_div(channels, ceil_div(channels, kDepth));
  const Blocks<Filter> blocks(x.size(2), x.size(3), channels + outputs);
  at::parallel_for(0, x.size(0) * blocks.count(), 1, [&](int64_t begin, int64_t end) {
    const auto rows = rows_of<Filter>(blocks.rows(), blocks.columns());
    const winograd::Planes<Filter> inputs(channels, blocks.tiles()), sums(outputs, blocks.tiles());
    for (int64_t task = begin; task < end; ++task) {
      const auto [image, block] = blocks[task];
      transform(Channels<const T>(x, image), channels, block, rows, inputs.all());
      const Channels<T> target(out, image);
      const auto ahead = [&](int p) -> Prefetches {
        if (task + 1 == end) return {{}, part_of_output<Filter>(target, outputs, block, p)};
        const auto [next_image, next] = blocks[task + 1];
        return {part_of_input<Filter>(Channels<const T>(x, next_image), channels, next, p), part_of_output<Filter>(target, outputs, block, p)};
      };
      for (int p = 0; p < Filter::kPoints; ++p) {
        const auto [next_rows, own_rows, of_next, of_own] = ahead(p);
        for (int64_t c = 0; c < channels; c += depth)
          multiply<T>(weights[p].from(0, c), inputs[p].from(c, 0), sums[p], outputs, block.tiles(),
                      std::min(depth, channels - c), c == 0 ? Addend<T>{} : Addend<T>{sums[p]},
                      {c == 0 ? own_rows : Prefetch{}, c + depth >= channels ? next_rows : Prefetch{}});
      }
      write<Filter>(sums.all(), block, bias, target, outputs);
    }
  });
}

// Adds the products of the transforms of grad_out's channels from `first` on and of x's to of_weight, 16 matrices of
// `outputs` x channels, and the sums of grad_out to of_bias.
template <typename Filter>
class WeightSums {
  using T = typename Filter::T;

 public:
  WeightSums(const Tensor& grad_out, const Tensor& x, const Blocks<Filter>& blocks, int64_t most_outputs)
      : grad_out_(grad_out), x_(x), row_((ceil_div(x.size(1), kLine) | 1) * kLine),
        rows_(rows_of<Filter>(blocks.rows(), blocks.columns())), inputs_(x.size(1), blocks.tiles()),
        gradients_(most_outputs, blocks.tiles()), columns_(blocks.tiles() * row_) {}

  // `next` is the block after this one, if there is one.
  void add(const Place& place, const std::optional<Place>& next, int64_t first, int64_t outputs, T* of_weight,
           T* of_bias) const {
    const int64_t channels = x_.size(1), tiles = place.block.tiles();
    const Block& block = place.block;
    const Channels<const T> grad = outputs_from(first, place);
    const auto ahead = [&](int p) -> Prefetches {
      if (!next) return {};
      return {part_of_input<Filter>(Channels<const T>(x_, next->image), channels, next->block, p),
              part_of_output<Filter>(outputs_from(first, *next), outputs, next->block, p)};
    };
    transform(Channels<const T>(x_, place.image), channels, block, rows_, inputs_.all());
    transform_gradient(grad, outputs, block, rows_, gradients_.all(), of_bias);
    for (int p = 0; p < Filter::kPoints; ++p) {
      copy_tile<T, T>(Matrix<const T>(inputs_[p]), Matrix<T>{columns_.get(), row_}.transposed(), channels, tiles);
      multiply_add<T>(gradients_[p], {columns_.get(), row_}, {of_weight + p * outputs * channels, channels}, outputs,
                      channels, tiles, ahead(p));
    }
  }

 private:
  Channels<const T> outputs_from(int64_t first, const Place& place) const {
    return Channels<const T>(grad_out_, place.image).from(first);
  }

  static constexpr int64_t kLine = 64 / sizeof(T);
  const Tensor &grad_out_, &x_;
  int64_t row_;
  winograd::SplitRows<Filter> rows_;
  winograd::Planes<Filter> inputs_, gradients_;
  Scratch<T> columns_;  // of inputs_, transposed
};

// The gradients of weight and bias. A share is theirs from some of the blocks; where there can be but few shares, a
// task makes that of some of the outputs.
template <typename Filter, typename T = typename Filter::T>
void add_up(const Tensor& grad_out, const Tensor& x, const Tensor& grad_weight, const Tensor& grad_bias) {
  constexpr int64_t kMostShares = 16, kTasks = 4, kBlocks = 3, kElementsOfShares = 4 << 20, kGrain = 4096;
  const int64_t outputs = grad_out.size(1), channels = x.size(1);
  const Blocks<Filter> blocks(x.size(2), x.size(3), channels + outputs);
  const int64_t count = x.size(0) * blocks.count(), size = (Filter::kPoints * channels + 1) * outputs;
  const int64_t shares = std::clamp<int64_t>(std::min(count / kBlocks, kElementsOfShares / size), 1, kMostShares);
  const int64_t part = ceil_div(outputs, ceil_div(kTasks, shares)), parts = ceil_div(outputs, part);
  const Tensor sums = empty_result({shares, size}, x.options());
  T* total = sums.mutable_data_ptr<T>();
  at::parallel_for(0, shares * parts, 1, [&](int64_t begin, int64_t end) {
    const WeightSums<Filter> weight_sums(grad_out, x, blocks, part);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t share = task / parts, first = task % parts * part, own = std::min(part, outputs - first);
      T *of_weight = total + share * size + first * (Filter::kPoints * channels + 1), *of_bias = of_weight + own * Filter::kPoints * channels;
      std::fill(of_weight, of_bias + own, T(0));
      const int64_t last = (share + 1) * count / shares - 1;
      for (int64_t i = share * count / shares; i <= last; ++i)
        weight_sums.add(blocks[i], i < last ? std::optional(blocks[i + 1]) : std::nullopt, first, own, of_weight, of_bias);
    }
  });
  at::parallel_for(0, size, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t share = 1; share < shares; ++share)
      for (int64_t i = begin; i < end; ++i) total[i] += total[share * size + i];
  });
  at::parallel_for(0, outputs, ceil_div(kGrain, channels), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      const int64_t first = o / part * part, own = std::min(part, outputs - first);
      const T *of_weight = total + first * (Filter::kPoints * channels + 1), *of_bias = of_weight + own * Filter::kPoints * channels;
      if (grad_weight.numel())
        winograd::weight_gradients<Filter>(of_weight + (o - first) * channels, own * channels,
                                   grad_weight.mutable_data_ptr<T>() + o * channels * kTaps, channels);
      if (grad_bias.numel()) grad_bias.mutable_data_ptr<T>()[o] = of_bias[o - first];
    }
  });
}

constexpr int64_t kManyTiles = 256;

// Whether the transforms of the weight would take longer than those of the pixels.
template <typename Filter>
bool has_few_tiles(const Tensor& x) {
  const int64_t tiles = FewTiles<Filter>(x).count();
  return tiles > 0 && tiles < kManyTiles;
}

// Runs f with the filter for a convolution of x, between as many channels: tiles of 4x4 pixels save the more products,
// those of 2x2 are made from the pixels, and the weights, in less time. float64, asked for where errors count, has these.
template <typename T, typename F>
void with_filter(const Tensor& x, int64_t other_channels, F f) {
  constexpr int64_t kFewest = 16, kProducts = 1 << 19;
  if constexpr (std::is_same_v<T, float>) {
    const int64_t tiles = FewTiles<winograd::Four<T>>(x).count();
    if (tiles >= kManyTiles || (tiles >= kFewest && tiles * x.size(1) * other_channels >= kProducts))
      return f(winograd::Four<T>());
  }
  f(winograd::Two<T>());
}

template <typename T>
void convolve_by_size(const Tensor& x, const Tensor& weight, bool backwards, const T* bias, const Tensor& out) {
  with_filter<T>(x, out.size(1), [&](auto filter) {
    using Filter = decltype(filter);
    if (has_few_tiles<Filter>(x)) convolve_few<Filter>(x, weight, backwards, bias, out);
    else convolve(x, Weights<Filter>(weight, backwards), bias, out);
  });
}

template <typename T>
void add_up_by_size(const Tensor& grad_out, const Tensor& x, const Tensor& grad_weight, const Tensor& grad_bias) {
  with_filter<T>(x, grad_out.size(1), [&](auto filter) {
    using Filter = decltype(filter);
    if (has_few_tiles<Filter>(x)) add_up_few<Filter>(grad_out, x, grad_weight, grad_bias);
    else add_up<Filter>(grad_out, x, grad_weight, grad_bias);
  });
}

Tensor dense_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const Tensor out = empty_image_like(x, weight.size(0));
  const Tensor rows = with_dense_rows(out);  // channels_last is computed elsewhere and copied
  const OptionalTensor biases = bias ? OptionalTensor(bias->contiguous()) : std::nullopt;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "dense_conv", [&] {
    convolve_by_size<scalar_t>(with_dense_rows(x), weight, false,
                               biases ? biases->const_data_ptr<scalar_t>() : nullptr, rows);
  });
  if (!rows.is_same(out)) out.copy_(rows);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> dense_conv_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                                       const c10::List<bool>& wanted) {
  const Tensor grad = with_dense_rows(grad_out);
  const Tensor grad_x = wanted[0] ? empty_image_like(x, x.size(1)) : at::empty({0}, x.options());
  const Tensor grad_weight = empty_result(wanted[1] ? weight.sizes() : at::IntArrayRef{0}, weight.options());
  const Tensor grad_bias = at::empty({wanted[2] ? weight.size(0) : 0}, weight.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "dense_conv_backward", [&] {
    if (wanted[0]) {
      const Tensor rows = with_dense_rows(grad_x);
      convolve_by_size<scalar_t>(grad, weight, true, nullptr, rows);
      if (!rows.is_same(grad_x)) grad_x.copy_(rows);
    }
    if (wanted[1] || wanted[2]) add_up_by_size<scalar_t>(grad, with_dense_rows(x), grad_weight, grad_bias);
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace dense
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(restore_kernels, CPU, m) {
  m.impl("dense_conv.cpu", dense::dense_conv);
  m.impl("dense_conv_backward.cpu", dense::dense_conv_backward);
}

}  // namespace restore_kernels

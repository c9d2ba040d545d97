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
// Bound: 4 C C_out multiply-adds per pixel, 9 without the transforms; and about 6 vector operations per pixel and
// channel for those of input and result each, an eighth of the products' at 48 channels.
//
// Blocks and shares depend on shapes alone and are added in their order, so results are the same for any number of
// threads.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "image_pixels.h"
#include "tile_gemm.h"
#include "winograd_weights.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace dense {
namespace {

using OptionalTensor = std::optional<Tensor>;
using winograd::kPoints, winograd::kTaps;

// Some tiles of an image: rows x columns of them.
struct Block {
  int64_t row, column, rows, columns;
  int64_t tiles() const { return rows * columns; }
};

// A block of one of several images.
struct Place {
  int64_t image;
  Block block;
};

// How the tiles of an image are divided into blocks.
class Blocks {
 public:
  // Of images of height x width, whose tiles have this many channels on both sides together.
  Blocks(int64_t height, int64_t width, int64_t channels)
      : tile_rows_(ceil_div(height, 2)), tile_columns_(ceil_div(width, 2)) {
    constexpr int64_t kElements = 8192, kPanel = 48, kMost = 192;  // of the 16 planes: half a MiB of float32
    const int64_t most = std::clamp(kElements / std::max<int64_t>(channels, 1), kPanel, kMost);
    double best = 0;
    for (int64_t parts = 1; parts <= tile_columns_; ++parts) {
      const int64_t columns = ceil_div(tile_columns_, parts);
      if (columns > most) continue;
      for (int64_t rows = 1; rows <= std::min(most / columns, tile_rows_); ++rows) {
        const double cost = static_cast<double>(parts * ceil_div(tile_rows_, rows)) * vectors(rows * columns);
        if (best == 0 || cost < best) best = cost, rows_ = rows, columns_ = columns;
      }
      if (columns < kPanel / 3) break;
    }
    across_ = ceil_div(tile_columns_, columns_);
  }

  int64_t count() const { return ceil_div(tile_rows_, rows_) * across_; }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t tiles() const { return rows_ * columns_; }

  Place operator[](int64_t i) const {
    const int64_t row = i % count() / across_ * rows_, column = i % across_ * columns_;
    return {i / count(), {row, column, std::min(rows_, tile_rows_ - row), std::min(columns_, tile_columns_ - column)}};
  }

 private:
  // What products of so many columns cost, in vectors of 16: a panel that is not full has less work to hide its loads.
  static double vectors(int64_t columns) {
    constexpr double of_rest[] = {0, 1.3, 2.2, 3};
    return static_cast<double>(columns / 48 * 3) + of_rest[ceil_div(columns % 48, 16)];
  }

  int64_t tile_rows_, tile_columns_, rows_ = 1, columns_ = 1, across_ = 1;
};

// Contiguous, but for the distances of images and channels.
Tensor with_dense_rows(const Tensor& x) {
  const bool fits = x.stride(3) == 1 || x.size(3) == 1;
  return fits && (x.size(2) == 1 || x.stride(2) >= x.size(3)) ? x : x.contiguous();
}

// The channels of an image whose rows are dense.
template <typename T>
struct Channels {
  T* data;
  int64_t channel, row, height, width;

  Channels(const Tensor& x, int64_t image)
      : data(const_cast<T*>(x.const_data_ptr<std::remove_const_t<T>>()) + image * x.stride(0)), channel(x.stride(1)),
        row(x.stride(2)), height(x.size(2)), width(x.size(3)) {}

  T* operator[](int64_t i) const { return data + i * channel; }
};

// Of rows of pixels, in all channels, what the memory system is asked for while the product of a point is computed. Of
// more rows than points, which only narrow images have, the last are not asked for.
template <typename T>
Prefetch part_of_rows(const Channels<T>& image, int64_t channels, int64_t y, int64_t rows, int64_t x, int64_t columns, int point) {
  const int64_t parts = std::max<int64_t>(1, kPoints / rows), i = point / parts, part = point % parts;
  if (i >= rows || y + i < 0 || y + i >= image.height) return {};
  const int64_t first = part * channels / parts, last = (part + 1) * channels / parts;
  const Matrix<T> pixels{image[first] + (y + i) * image.row + x, image.channel};
  return {pixels, last - first, std::min(columns, image.width - x), !std::is_const_v<T>};
}

// Of what a block's tiles see, and of what it makes or has the gradient of.
template <typename T>
Prefetch part_of_input(const Channels<const T>& image, int64_t channels, const Block& block, int point) {
  return part_of_rows(image, channels, 2 * block.row - 1, 2 * block.rows + 2, 2 * block.column, 2 * block.columns, point);
}
template <typename T>
Prefetch part_of_output(const Channels<T>& image, int64_t channels, const Block& block, int point) {
  return part_of_rows(image, channels, 2 * block.row, 2 * block.rows, 2 * block.column, 2 * block.columns, point);
}

// Transforms of all weights (outputs, channels, 3, 3): 16 matrices of outputs x channels.
template <typename T>
class Weights {
 public:
  explicit Weights(const Tensor& weight) : outputs_(weight.size(0)), channels_(weight.size(1)),
        memory_(empty_result({kPoints * plane()}, weight.options())), data_(memory_.mutable_data_ptr<T>()) {
    const Tensor dense = weight.contiguous();
    at::parallel_for(0, outputs_, ceil_div(1 << 12, channels_), [&](int64_t begin, int64_t end) {
      winograd::weights(dense.const_data_ptr<T>() + begin * channels_ * kTaps, data_ + begin * channels_, plane(),
                        (end - begin) * channels_);
    });
  }

  Matrix<const T> operator()(int point, bool backwards) const {
    const Matrix<const T> matrix{data_ + (backwards ? winograd::turned(point) : point) * plane(), channels_};
    return backwards ? matrix.transposed() : matrix;
  }

 private:
  int64_t plane() const { return outputs_ * channels_; }
  int64_t outputs_, channels_;
  Tensor memory_;
  T* data_;
};

// Transforms of one block of an image: f(rows, first of their rows, target, plane, tiles, room) makes a row of tiles.
template <typename T, typename F>
void transform(const Channels<const T>& image, int64_t channels, const Block& block, const winograd::SplitRows<T>& rows,
               const winograd::Planes<T>& planes, F f) {
  for (int64_t c = 0; c < channels; ++c) {
    rows.load(image[c], image.row, image.height, image.width, 2 * block.row - 1, 2 * block.column, 2 * block.rows + 2,
              block.columns);
    for (int64_t i = 0; i < block.rows; ++i)
      f(rows, 2 * i, planes.at(c, i * block.columns), planes.plane(), block.columns, (block.rows - i) * block.columns);
  }
}

// out = x convolved by the weights, or, `backwards`, by the weights turned and transposed.
template <typename T>
void convolve(const Tensor& x, const Weights<T>& weights, bool backwards, const T* bias, const Tensor& out) {
  const int64_t channels = x.size(1), outputs = out.size(1);
  const Blocks blocks(x.size(2), x.size(3), channels + outputs);
  at::parallel_for(0, x.size(0) * blocks.count(), 1, [&](int64_t begin, int64_t end) {
    const winograd::SplitRows<T> rows(2 * blocks.rows() + 2, blocks.columns());
    const winograd::Planes<T> inputs(channels, blocks.tiles()), sums(outputs, blocks.tiles());
    for (int64_t task = begin; task < end; ++task) {
      const auto [image, block] = blocks[task];
      transform(Channels<const T>(x, image), channels, block, rows, inputs, winograd::input<T>);
      const Channels<T> target(out, image);
      const auto ahead = [&](int p) -> Prefetches {
        if (task + 1 == end) return {{}, part_of_output(target, outputs, block, p)};
        const auto [next_image, next] = blocks[task + 1];
        return {part_of_input(Channels<const T>(x, next_image), channels, next, p), part_of_output(target, outputs, block, p)};
      };
      for (int p = 0; p < kPoints; ++p)
        multiply<T>(weights(p, backwards), inputs[p], sums[p], outputs, block.tiles(), channels, {}, ahead(p));
      const int64_t width = std::min(2 * block.columns, target.width - 2 * block.column);
      for (int64_t o = 0; o < outputs; ++o)
        for (int64_t i = 0; i < block.rows; ++i) {
          const int64_t y = 2 * (block.row + i);
          winograd::output(sums.at(o, i * block.columns), sums.plane(), bias ? bias[o] : T(0),
                           target[o] + y * target.row + 2 * block.column, target.row, block.columns,
                           (block.rows - i) * block.columns, std::min<int64_t>(2, target.height - y), width);
        }
    }
  });
}

// Adds the products of the transforms of grad_out's channels from `first` on and of x's to of_weight, 16 matrices of
// `outputs` x channels, and the sums of grad_out to of_bias.
template <typename T>
class WeightSums {
 public:
  WeightSums(const Tensor& grad_out, const Tensor& x, const Blocks& blocks, int64_t most_outputs)
      : grad_out_(grad_out), x_(x), row_((ceil_div(x.size(1), kLine) | 1) * kLine),
        rows_(2 * blocks.rows() + 2, blocks.columns()), inputs_(x.size(1), blocks.tiles()),
        gradients_(most_outputs, blocks.tiles()), columns_(blocks.tiles() * row_) {}

  // `next` is the block after this one, if there is one.
  void add(const Place& place, const std::optional<Place>& next, int64_t first, int64_t outputs, T* of_weight,
           T* of_bias) const {
    const int64_t channels = x_.size(1), tiles = place.block.tiles();
    const Block& block = place.block;
    const Channels<const T> grad = outputs_from(first, place);
    const auto ahead = [&](int p) -> Prefetches {
      if (!next) return {};
      return {part_of_input(Channels<const T>(x_, next->image), channels, next->block, p),
              part_of_output(outputs_from(first, *next), outputs, next->block, p)};
    };
    transform(Channels<const T>(x_, place.image), channels, block, rows_, inputs_, winograd::input<T>);
    transform(grad, outputs, block, rows_, gradients_, [](const auto& rows, int64_t i, auto... rest) {
      winograd::output_gradient(rows, i + 1, rest...);
    });
    for (int p = 0; p < kPoints; ++p) {
      copy_tile<T, T>(Matrix<const T>(inputs_[p]), Matrix<T>{columns_.get(), row_}.transposed(), channels, tiles);
      multiply_add<T>(gradients_[p], {columns_.get(), row_}, {of_weight + p * outputs * channels, channels}, outputs,
                      channels, tiles, ahead(p));
    }
    constexpr int kSum = 5;  // the point that holds the sum of a tile
    for (int64_t o = 0; o < outputs; ++o)
      of_bias[o] += at::vec::reduce_all<T>([](auto a, auto b) { return a + b; }, gradients_[kSum].from(o, 0).data, tiles);
  }

 private:
  Channels<const T> outputs_from(int64_t first, const Place& place) const {
    Channels<const T> grad(grad_out_, place.image);
    grad.data = grad[first];
    return grad;
  }

  static constexpr int64_t kLine = 64 / sizeof(T);
  const Tensor &grad_out_, &x_;
  int64_t row_;
  winograd::SplitRows<T> rows_;
  winograd::Planes<T> inputs_, gradients_;
  Scratch<T> columns_;  // of inputs_, transposed
};

// The gradients of weight and bias. A share is theirs from some of the blocks; where there can be but few shares, a
// task makes that of some of the outputs.
template <typename T>
void add_up(const Tensor& grad_out, const Tensor& x, const Tensor& grad_weight, const Tensor& grad_bias) {
  constexpr int64_t kMostShares = 16, kTasks = 4, kBlocks = 3, kElementsOfShares = 4 << 20, kGrain = 4096;
  const int64_t outputs = grad_out.size(1), channels = x.size(1);
  const Blocks blocks(x.size(2), x.size(3), channels + outputs);
  const int64_t count = x.size(0) * blocks.count(), size = (kPoints * channels + 1) * outputs;
  const int64_t shares = std::clamp<int64_t>(std::min(count / kBlocks, kElementsOfShares / size), 1, kMostShares);
  const int64_t part = ceil_div(outputs, ceil_div(kTasks, shares)), parts = ceil_div(outputs, part);
  const Tensor sums = empty_result({shares, size}, x.options());
  T* total = sums.mutable_data_ptr<T>();
  at::parallel_for(0, shares * parts, 1, [&](int64_t begin, int64_t end) {
    const WeightSums<T> weight_sums(grad_out, x, blocks, part);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t share = task / parts, first = task % parts * part, own = std::min(part, outputs - first);
      T *of_weight = total + share * size + first * (kPoints * channels + 1), *of_bias = of_weight + own * kPoints * channels;
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
      const T *of_weight = total + first * (kPoints * channels + 1), *of_bias = of_weight + own * kPoints * channels;
      if (grad_weight.numel())
        winograd::weight_gradients(of_weight + (o - first) * channels, own * channels,
                                   grad_weight.mutable_data_ptr<T>() + o * channels * kTaps, channels);
      if (grad_bias.numel()) grad_bias.mutable_data_ptr<T>()[o] = of_bias[o - first];
    }
  });
}

Tensor dense_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const Tensor out = empty_image_like(x, weight.size(0));
  const Tensor rows = with_dense_rows(out);  // channels_last is computed elsewhere and copied
  const OptionalTensor biases = bias ? OptionalTensor(bias->contiguous()) : std::nullopt;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "dense_conv", [&] {
    convolve<scalar_t>(with_dense_rows(x), Weights<scalar_t>(weight), false,
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
      convolve<scalar_t>(grad, Weights<scalar_t>(weight), true, nullptr, rows);
      if (!rows.is_same(grad_x)) grad_x.copy_(rows);
    }
    if (wanted[1] || wanted[2]) add_up<scalar_t>(grad, with_dense_rows(x), grad_weight, grad_bias);
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

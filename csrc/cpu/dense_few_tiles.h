// Dense convolution of images of few tiles, whose weights are larger than they are.
//
// Schedule. First the pixels of all images are transformed: a task owns some channels. Then
//   forward    a task owns the outputs of one panel of the products. It transforms their weights, of some channels at a
//              time, so that they stay in L2, multiplies the tiles by them, point by point, and transforms the sums to
//              the result. Tiles are the rows of these products and outputs the columns: few tiles would leave vectors
//              empty.
//   backward   of the input: the same with the weight turned and transposed. Of the weight: a task owns some outputs and
//              channels, as many as leave the 16 matrices of their sums in L2, and transforms these to the gradient.
// Every weight is read once and every number of its gradient written once; during the products the memory system is
// asked for the next weights, and for what the gradient will be written to.
// Bound: for every channel and output 16 multiply-adds per tile, and some 60 vector operations per vector of weights;
// the transfer of the weight, where there are fewer than some 10 tiles.
//
// Parts depend on shapes alone and no sum is of several tasks: results are the same for any number of threads.
#pragma once

#include <ATen/Parallel.h>

#include "dense_blocks.h"
#include "winograd_weights.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace dense {

// Images whose tiles are together the columns of a matrix: those of an image follow those of the one before.
class FewTiles {
 public:
  explicit FewTiles(const Tensor& x)
      : images_(x.size(0)), block_{0, 0, ceil_div(x.size(2), 2), ceil_div(x.size(3), 2)} {}

  int64_t count() const { return images_ * block_.tiles(); }

  // Transforms of the channels of x from `first` on, see transform().
  template <typename T, typename F>
  void transform(const Tensor& x, int64_t first, int64_t channels, const winograd::PointMatrices<T>& to, F f) const {
    const winograd::SplitRows<T> rows(2 * block_.rows + 2, block_.columns);
    for (int64_t i = 0; i < images_; ++i)
      dense::transform(Channels<const T>(x, i).from(first), channels, block_, rows, to.from(0, i * block_.tiles()), f);
  }

  // The outputs from `first` on.
  template <typename T>
  void write(const winograd::PointMatrices<T>& sums, const T* bias, const Tensor& out, int64_t first,
             int64_t outputs) const {
    for (int64_t i = 0; i < images_; ++i)
      dense::write(sums.from(0, i * block_.tiles()), block_, bias ? bias + first : nullptr,
                   Channels<T>(out, i).from(first), outputs);
  }

 private:
  int64_t images_;
  Block block_;
};

// Some outputs and channels of a convolution.
struct Part {
  int64_t output, outputs, channel, channels;
};

// Rows of a matrix of which each point of the products has the memory system asked for its share.
template <typename T>
Prefetch share_of_rows(const Matrix<T>& matrix, int64_t rows, int64_t columns, int point) {
  const int64_t begin = point * rows / kPoints, end = (point + 1) * rows / kPoints;
  return {matrix.from(begin, 0), end - begin, columns, !std::is_const_v<T>};
}

// The weight as the convolution sees it or, `backwards`, the one that makes the gradient of the input, whose outputs are
// the weight's channels.
template <typename T>
class PartsOfWeight {
 public:
  PartsOfWeight(const Tensor& weight, bool backwards)
      : weight_(weight.contiguous()), data_(weight_.const_data_ptr<T>()), row_(weight.size(1)), backwards_(backwards) {}

  // Transforms of a part, matrices of channels x outputs.
  void transform(const Part& part, const winograd::PointMatrices<T>& target) const {
    if (!backwards_) return winograd::weights_transposed(from(part), row_, target, part.outputs, part.channels);
    for (int64_t i = 0; i < part.channels; ++i)
      winograd::weights(from(part) + i * row_ * kTaps, target.at(i, 0), target.plane, part.outputs);
  }

  // The point of those that the products of a point take.
  int point(int p) const { return backwards_ ? winograd::turned(p) : p; }

  Prefetches ahead(const Part& part, int point) const {
    const int64_t rows = backwards_ ? part.channels : part.outputs, columns = backwards_ ? part.outputs : part.channels;
    return {share_of_rows(Matrix<const T>{from(part), row_ * kTaps}, rows, columns * kTaps, point), {}};
  }

 private:
  const T* from(const Part& part) const {
    return data_ + (backwards_ ? part.channel * row_ + part.output : part.output * row_ + part.channel) * kTaps;
  }

  const Tensor weight_;
  const T* data_;
  int64_t row_;
  bool backwards_;
};

constexpr int64_t kGroup = 16;  // channels that are transformed together: whole vectors

// Runs f(first, channels) for groups of them.
template <typename F>
void in_groups(int64_t channels, int64_t tiles, F f) {
  constexpr int64_t kGrain = 1 << 12;
  at::parallel_for(0, ceil_div(channels, kGroup), ceil_div(kGrain, kGroup * tiles), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kGroup; first < std::min(end * kGroup, channels); first += kGroup)
      f(first, std::min(kGroup, channels - first));
  });
}

// out = x convolved by the weight, or, `backwards`, by the weight turned and transposed.
template <typename T>
void convolve_few(const Tensor& x, const Tensor& weight, bool backwards, const T* bias, const Tensor& out) {
  constexpr int64_t kPanel = gemm::kVectors * at::vec::Vectorized<T>::size();
  constexpr int64_t kDepth = 5 * kGroup;  // the transformed weights: an eighth of a MiB, or a quarter with AVX-512
  const int64_t channels = x.size(1), outputs = out.size(1);
  const int64_t depth = ceil_div(ceil_div(channels, ceil_div(channels, kDepth)), kGroup) * kGroup;
  const FewTiles few(x);
  const int64_t tiles = few.count();
  const winograd::Planes<T> inputs(channels, tiles);
  in_groups(channels, tiles, [&](int64_t first, int64_t count) {
    few.transform(x, first, count, inputs.all().from(first, 0), winograd::input<T>);
  });
  const PartsOfWeight<T> parts(weight, backwards);
  at::parallel_for(0, ceil_div(outputs, kPanel), 1, [&](int64_t begin, int64_t end) {
    const winograd::Planes<T> weights(depth, kPanel, kPanel), sums(tiles, kPanel, kPanel), results(kPanel, tiles);
    const auto part_at = [&](int64_t task, int64_t c) -> Part {
      return {task * kPanel, std::min(kPanel, outputs - task * kPanel), c, std::min(depth, channels - c)};
    };
    for (int64_t task = begin; task < end; ++task) {
      for (int64_t c = 0; c < channels; c += depth) {
        const Part part = part_at(task, c);
        const bool is_last = c + depth >= channels, none_left = is_last && task + 1 == end;
        const Part next = is_last ? part_at(task + 1, 0) : part_at(task, c + depth);
        parts.transform(part, weights.all());
        for (int p = 0; p < kPoints; ++p) {
          const Addend<T> before = c == 0 ? Addend<T>{} : Addend<T>{sums[p]};
          multiply<T>(inputs[p].from(c, 0).transposed(), weights[parts.point(p)], sums[p], tiles, part.outputs,
                      part.channels, before, none_left ? Prefetches{} : parts.ahead(next, p));
        }
      }
      const int64_t first = task * kPanel, own = std::min(kPanel, outputs - first);
      for (int p = 0; p < kPoints; ++p) copy_tile<T, T>(Matrix<const T>(sums[p]).transposed(), results[p], own, tiles);
      few.write(results.all(), bias, out, first, own);
    }
  });
}

// The gradients of weight and bias; those that are empty are not wanted.
template <typename T>
void add_up_few(const Tensor& grad_out, const Tensor& x, const Tensor& grad_weight, const Tensor& grad_bias) {
  constexpr int64_t kOutputs = 32, kChannels = 96;  // of a task: whole panels
  const int64_t outputs = grad_out.size(1), channels = x.size(1);
  const FewTiles few(x);
  const int64_t tiles = few.count();
  const winograd::Planes<T> gradients(outputs, tiles);
  in_groups(outputs, tiles, [&](int64_t first, int64_t count) {
    few.transform(grad_out, first, count, gradients.all().from(first, 0), kOutputGradient);
    if (grad_bias.numel())
      for (int64_t o = first; o < first + count; ++o)
        grad_bias.mutable_data_ptr<T>()[o] = sum_of_pixels(gradients.all(), o, tiles);
  });
  if (!grad_weight.numel()) return;
  const winograd::Planes<T> inputs(tiles, channels);  // transposed, as products read what has their columns
  in_groups(channels, tiles, [&](int64_t first, int64_t count) {
    const winograd::Planes<T> group(kGroup, tiles);
    few.transform(x, first, count, group.all(), winograd::input<T>);
    for (int p = 0; p < kPoints; ++p)
      copy_tile<T, T>(Matrix<const T>(group[p]).transposed(), inputs[p].from(0, first), tiles, count);
  });
  const int64_t across = ceil_div(channels, kChannels);
  at::parallel_for(0, ceil_div(outputs, kOutputs) * across, 1, [&](int64_t begin, int64_t end) {
    const winograd::Planes<T> sums(kOutputs, kChannels, kChannels);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t o = task / across * kOutputs, c = task % across * kChannels;
      const int64_t rows = std::min(kOutputs, outputs - o), columns = std::min(kChannels, channels - c);
      const Matrix<T> target{grad_weight.mutable_data_ptr<T>() + (o * channels + c) * kTaps, channels * kTaps};
      for (int p = 0; p < kPoints; ++p)
        multiply<T>(gradients[p].from(o, 0), inputs[p].from(0, c), sums[p], rows, columns, tiles, {},
                    {share_of_rows(target, rows, columns * kTaps, p), {}});
      for (int64_t i = 0; i < rows; ++i)
        winograd::weight_gradients(sums.all().at(i, 0), sums.all().plane, target.from(i, 0).data, columns);
    }
  });
}

}  // namespace dense
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

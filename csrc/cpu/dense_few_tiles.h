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
template <typename Filter>
class FewTiles {
  using T = typename Filter::T;

 public:
  explicit FewTiles(const Tensor& x)
      : images_(x.size(0)), block_{0, 0, ceil_div(x.size(2), Filter::kTile), ceil_div(x.size(3), Filter::kTile)} {}

  int64_t count() const { return images_ * block_.tiles(); }

  // Transforms of the channels of x from `first` on.
  void transform(const Tensor& x, int64_t first, int64_t channels, const winograd::PointMatrices<T>& to) const {
    const auto rows = rows_of<Filter>(block_.rows, block_.columns);
    for (int64_t i = 0; i < images_; ++i)
      dense::transform(Channels<const T>(x, i).from(first), channels, block_, rows, to.from(0, i * block_.tiles()));
  }

  // The same of grad_out; the sum of its pixels in every channel is added to `sums`.
  void transform_gradient(const Tensor& grad_out, int64_t first, int64_t channels, const winograd::PointMatrices<T>& to,
                          T* sums) const {
    const auto rows = rows_of<Filter>(block_.rows, block_.columns);
    for (int64_t i = 0; i < images_; ++i)
      dense::transform_gradient(Channels<const T>(grad_out, i).from(first), channels, block_, rows,
                                to.from(0, i * block_.tiles()), sums);
  }

  // The outputs from `first` on.
  void write(const winograd::PointMatrices<T>& sums, const T* bias, const Tensor& out, int64_t first,
             int64_t outputs) const {
    for (int64_t i = 0; i < images_; ++i)
      dense::write<Filter>(sums.from(0, i * block_.tiles()), block_, bias ? bias + first : nullptr,
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
template <typename Filter, typename T>
Prefetch share_of_rows(const Matrix<T>& matrix, int64_t rows, int64_t columns, int point) {
  const int64_t begin = point * rows / Filter::kPoints, end = (point + 1) * rows / Filter::kPoints;
  return {matrix.from(begin, 0), end - begin, columns, !std::is_const_v<T>};
}

// The weight as the convolution sees it or, `backwards`, the one that makes the gradient of the input, whose outputs are
// the weight's channels.
template <typename Filter>
class PartsOfWeight {
  using T = typename Filter::T;

 public:
  PartsOfWeight(const Tensor& weight, bool backwards)
      : weight_(weight.contiguous()), data_(weight_.const_data_ptr<T>()), row_(weight.size(1)), backwards_(backwards) {}

  // Transforms of a part, matrices of channels x outputs.
  void transform(const Part& part, const winograd::PointMatrices<T>& target) const {
    if (!backwards_)
      return winograd::weights_transposed<Filter>(from(part), row_, false, target, part.outputs, part.channels);
    for (int64_t i = 0; i < part.channels; ++i)
      winograd::weights<Filter>(from(part) + i * row_ * kTaps, true, target.at(i, 0), target.plane, part.outputs);
  }

  Prefetches ahead(const Part& part, int point) const {
    const int64_t rows = backwards_ ? part.channels : part.outputs, columns = backwards_ ? part.outputs : part.channels;
    return {share_of_rows<Filter>(Matrix<const T>{from(part), row_ * kTaps}, rows, columns * kTaps, point), {}};
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

// Runs f(first, channels) for groups of them, which take this long: in numbers that a transform writes.
template <typename F>
void in_groups(int64_t channels, int64_t each, F f) {
  constexpr int64_t kGrain = 1 << 16;
  at::parallel_for(0, ceil_div(channels, kGroup), ceil_div(kGrain, kGroup * each), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kGroup; first < std::min(end * kGroup, channels); first += kGroup)
      f(first, std::min(kGroup, channels - first));
  });
}

// Outputs of a task: whole vectors, so many that two threads have the same to do. What products of a panel cost, in
// vectors: one that is not full has less work to hide its loads.
template <typename T>
int64_t outputs_of_task(int64_t outputs) {
  constexpr double costs[] = {0, 1.3, 2.2, 3};
  static_assert(gemm::kVectors <= 3);
  int64_t best = 0;
  double least = 0;
  for (int64_t vectors = gemm::kVectors; vectors > 0; --vectors) {
    const int64_t own = vectors * at::vec::Vectorized<T>::size(), pairs = ceil_div(outputs, 2 * own);
    if (best == 0 || pairs * costs[vectors] < least) best = own, least = pairs * costs[vectors];
  }
  return best;
}

// out = x convolved by the weight, or, `backwards`, by the weight turned and transposed.
template <typename Filter, typename T = typename Filter::T>
void convolve_few(const Tensor& x, const Tensor& weight, bool backwards, const T* bias, const Tensor& out) {
  constexpr int64_t kDepth = 5 * kGroup;  // the transformed weights: an eighth of a MiB, or a quarter with AVX-512
  const int64_t channels = x.size(1), outputs = out.size(1);
  const int64_t depth = ceil_div(ceil_div(channels, ceil_div(channels, kDepth)), kGroup) * kGroup;
  const int64_t panel = outputs_of_task<T>(outputs);
  const FewTiles<Filter> few(x);
  const int64_t tiles = few.count();
  const winograd::Planes<Filter> inputs(channels, tiles);
  in_groups(channels, Filter::kPoints * tiles, [&](int64_t first, int64_t count) {
    few.transform(x, first, count, inputs.all().from(first, 0));
  });
  const PartsOfWeight<Filter> parts(weight, backwards);
  at::parallel_for(0, ceil_div(outputs, panel), 1, [&](int64_t begin, int64_t end) {
    const winograd::Planes<Filter> weights(depth, panel, panel), sums(tiles, panel, panel), results(panel, tiles);
    const auto part_at = [&](int64_t task, int64_t c) -> Part {
      return {task * panel, std::min(panel, outputs - task * panel), c, std::min(depth, channels - c)};
    };
    for (int64_t task = begin; task < end; ++task) {
      for (int64_t c = 0; c < channels; c += depth) {
        const Part part = part_at(task, c);
        const bool is_last = c + depth >= channels, none_left = is_last && task + 1 == end;
        const Part next = is_last ? part_at(task + 1, 0) : part_at(task, c + depth);
        parts.transform(part, weights.all());
        for (int p = 0; p < Filter::kPoints; ++p) {
          const Addend<T> before = c == 0 ? Addend<T>{} : Addend<T>{sums[p]};
          multiply<T>(inputs[p].from(c, 0).transposed(), weights[p], sums[p], tiles, part.outputs,
                      part.channels, before, none_left ? Prefetches{} : parts.ahead(next, p));
        }
      }
      const int64_t first = task * panel, own = std::min(panel, outputs - first);
      for (int p = 0; p < Filter::kPoints; ++p) copy_tile<T, T>(Matrix<const T>(sums[p]).transposed(), results[p], own, tiles);
      few.write(results.all(), bias, out, first, own);
    }
  });
}

// The gradients of weight and bias; those that are empty are not wanted.
template <typename Filter, typename T = typename Filter::T>
void add_up_few(const Tensor& grad_out, const Tensor& x, const Tensor& grad_weight, const Tensor& grad_bias) {
  constexpr int64_t kOutputs = 32, kChannels = 96;  // of a task: whole panels
  const int64_t outputs = grad_out.size(1), channels = x.size(1);
  const FewTiles<Filter> few(x);
  const int64_t tiles = few.count();
  const winograd::Planes<Filter> gradients(outputs, tiles);
  Scratch<T> sums_of_pixels(outputs);
  std::fill_n(sums_of_pixels.get(), outputs, T(0));
  in_groups(outputs, Filter::kPoints * tiles, [&](int64_t first, int64_t count) {
    few.transform_gradient(grad_out, first, count, gradients.all().from(first, 0), sums_of_pixels.get() + first);
  });
  if (grad_bias.numel()) std::copy_n(sums_of_pixels.get(), outputs, grad_bias.mutable_data_ptr<T>());
  if (!grad_weight.numel()) return;
  const winograd::Planes<Filter> inputs(tiles, channels);  // transposed, as products read what has their columns
  in_groups(channels, Filter::kPoints * tiles, [&](int64_t first, int64_t count) {
    const winograd::Planes<Filter> group(kGroup, tiles);
    few.transform(x, first, count, group.all());
    for (int p = 0; p < Filter::kPoints; ++p)
      copy_tile<T, T>(Matrix<const T>(group[p]).transposed(), inputs[p].from(0, first), tiles, count);
  });
  const int64_t across = ceil_div(channels, kChannels);
  at::parallel_for(0, ceil_div(outputs, kOutputs) * across, 1, [&](int64_t begin, int64_t end) {
    const winograd::Planes<Filter> sums(kOutputs, kChannels, kChannels);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t o = task / across * kOutputs, c = task % across * kChannels;
      const int64_t rows = std::min(kOutputs, outputs - o), columns = std::min(kChannels, channels - c);
      const Matrix<T> target{grad_weight.mutable_data_ptr<T>() + (o * channels + c) * kTaps, channels * kTaps};
      for (int p = 0; p < Filter::kPoints; ++p)
        multiply<T>(gradients[p].from(o, 0), inputs[p].from(0, c), sums[p], rows, columns, tiles, {},
                    {share_of_rows<Filter>(target, rows, columns * kTaps, p), {}});
      for (int64_t i = 0; i < rows; ++i)
        winograd::weight_gradients<Filter>(sums.all().at(i, 0), sums.all().plane, target.from(i, 0).data, columns);
    }
  });
}

}  // namespace dense
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

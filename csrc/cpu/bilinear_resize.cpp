// Bilinear resizing to twice and half of the size on the CPU: the operators of ops.py.
//
// Schedule. A task owns some rows of the smaller image, of one channel. Rows are mixed first and columns then: of the
// rows that a result sees a weighted sum is made, which stays in L1 and of which every other element is a neighbour.
//   doubling   of two rows of x the mixtures 1/4 3/4 and 3/4 1/4, of each of those the same along the row.
//              Backward: of four rows of the gradient the mixture 1/8 3/8 3/8 1/8, then the same along the row.
//   halving    of two rows the sum, then a quarter of the sums of two columns. Backward: a quarter, spread.
// At the border of a doubled image the outermost pixels count again, and so do their gradients; where rows or columns of
// it were cut off, their gradients are zeros. Of an odd side that is halved the last pixels count twice.
// Bound: memory: both images once, and the residual.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "image_pixels.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace resize {
namespace {

using OptionalTensor = std::optional<Tensor>;

// The rows of one channel of an image, whose pixels lie side by side.
template <typename S>
struct Plane {
  S* data;
  int64_t row, height, width;

  Plane(const Tensor& x, int64_t index)
      : data(const_cast<S*>(x.const_data_ptr<std::remove_const_t<S>>()) + index / x.size(1) * x.stride(0) +
             index % x.size(1) * x.stride(1)),
        row(x.stride(2)), height(x.size(2)), width(x.size(3)) {}

  S* operator[](int64_t y) const { return data + y * row; }
};

// Scratch rows, with room for a vector before their first element and for vectors that begin at their last.
template <typename T>
class Rows {
 public:
  Rows(int64_t count, int64_t width) : row_((width + 4 * size() - 1) / size() * size()), data_(count * row_) {
    std::fill_n(data_.get(), count * row_, T(0));
  }
  T* operator[](int64_t i) const { return data_.get() + i * row_ + size(); }

 private:
  static constexpr int64_t size() { return at::vec::Vectorized<T>::size(); }
  int64_t row_;
  Scratch<T> data_;
};

// A row in the accumulation type: where it lies if it is of it, else in scratch.
template <typename S, typename T>
const T* widened(const S* row, int64_t width, T* scratch) {
  if constexpr (std::is_same_v<S, T>) return row;
  at::vec::convert(row, scratch, width);
  return scratch;
}

// What a thread needs to resize between a small image (height x width) and a large one.
template <typename S, typename T>
class Resizer {
  using Vec = at::vec::Vectorized<T>;

 public:
  explicit Resizer(int64_t width) : width_(width), rows_(kRows, 2 * width + 2) {}

  // Two rows of the large image, or one at its end, from row y of the small one.
  void double_row(const Plane<const S>& x, const Plane<const S>* residual, const Plane<S>& out, int64_t y) const {
    const T* middle = widened(x[y], width_, rows_[kMiddle]);
    for (int64_t i = 0; i < 2 && 2 * y + i < out.height; ++i) {
      const int64_t beside = std::clamp<int64_t>(y + 2 * i - 1, 0, x.height - 1);
      const T* far = widened(x[beside], width_, rows_[kFar]);
      T *mixed = rows_[kMixed], *line = rows_[kLine];
      at::vec::map2([](Vec a, Vec b) { return Vec(T(0.25)) * a + Vec(T(0.75)) * b; }, mixed, far, middle, width_);
      mixed[-1] = mixed[0], mixed[width_] = mixed[width_ - 1];
      for (int64_t j = 0; j < width_; j += Vec::size()) {
        const Vec near = Vec(T(0.75)) * Vec::loadu(mixed + j);
        const auto [first, second] = at::vec::interleave2(near + Vec(T(0.25)) * Vec::loadu(mixed + j - 1),
                                                          near + Vec(T(0.25)) * Vec::loadu(mixed + j + 1));
        first.store(line + 2 * j);
        second.store(line + 2 * j + Vec::size());
      }
      finish(line, residual, out, 2 * y + i);
    }
  }

  // Row y of the small image's gradient from that of the doubled one.
  void gather_row(const Plane<const S>& grad, const Plane<S>& out, int64_t y) const {
    constexpr T kWeights[] = {0.25, 0.75, 0.75, 0.25};
    T* mixed = rows_[kMixed];
    std::fill_n(mixed, 2 * width_, T(0));
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t row = std::clamp<int64_t>(2 * y + i - 1, 0, 2 * out.height - 1);
      if (row >= grad.height) continue;
      at::vec::map2([weight = Vec(kWeights[i])](Vec sum, Vec g) { return sum + weight * g; }, mixed, mixed,
                    widened(grad[row], grad.width, rows_[kFar]), grad.width);
    }
    T *even = rows_[kEven], *odd = rows_[kOdd], *line = rows_[kLine];
    split(mixed, even, odd);
    odd[-1] = even[0], even[width_] = odd[width_ - 1];
    for (int64_t j = 0; j < width_; j += Vec::size())
      (Vec(T(0.75)) * (Vec::loadu(even + j) + Vec::loadu(odd + j)) +
       Vec(T(0.25)) * (Vec::loadu(odd + j - 1) + Vec::loadu(even + j + 1))).store(line + j);
    finish(line, nullptr, out, y);
  }

  // Row y of the small image from two rows of the large one.
  void halve_row(const Plane<const S>& x, const Plane<const S>* residual, const Plane<S>& out, int64_t y) const {
    const T* upper = widened(x[2 * y], x.width, rows_[kMiddle]);
    const T* lower = widened(x[std::min(2 * y + 1, x.height - 1)], x.width, rows_[kFar]);
    T *mixed = rows_[kMixed], *even = rows_[kEven], *odd = rows_[kOdd], *line = rows_[kLine];
    at::vec::map2([](Vec a, Vec b) { return a + b; }, mixed, upper, lower, x.width);
    if (x.width % 2) mixed[x.width] = mixed[x.width - 1];
    split(mixed, even, odd);
    at::vec::map2([](Vec a, Vec b) { return Vec(T(0.25)) * (a + b); }, line, even, odd, width_);
    finish(line, residual, out, y);
  }

  // Two rows of the large image's gradient, or one at its end, from row y of that of the halved one.
  void spread_row(const Plane<const S>& grad, const Plane<S>& out, int64_t y) const {
    const T* row = widened(grad[y], width_, rows_[kMiddle]);
    const bool alone = 2 * y + 1 == out.height;
    T *mixed = rows_[kMixed], *line = rows_[kLine];
    at::vec::map([share = Vec(alone ? T(0.5) : T(0.25))](Vec g) { return share * g; }, mixed, row, width_);
    for (int64_t j = 0; j < width_; j += Vec::size()) {
      const Vec g = Vec::loadu(mixed + j);
      const auto [first, second] = at::vec::interleave2(g, g);
      first.store(line + 2 * j);
      second.store(line + 2 * j + Vec::size());
    }
    if (out.width % 2) line[out.width - 1] *= 2;
    for (int64_t i = 0; i < (alone ? 1 : 2); ++i) finish(line, nullptr, out, 2 * y + i);
  }

 private:
  enum { kMiddle, kFar, kMixed, kEven, kOdd, kLine, kRows };

  void split(const T* row, T* even, T* odd) const {
    for (int64_t j = 0; j < width_; j += Vec::size()) {
      const auto [evens, odds] = at::vec::deinterleave2(Vec::loadu(row + 2 * j), Vec::loadu(row + 2 * j + Vec::size()));
      evens.store(even + j);
      odds.store(odd + j);
    }
  }

  void finish(T* line, const Plane<const S>* residual, const Plane<S>& out, int64_t y) const {
    if (residual)
      at::vec::map2([](Vec a, Vec b) { return a + b; }, line, line, widened((*residual)[y], out.width, rows_[kFar]), out.width);
    at::vec::convert(line, out[y], out.width);
  }

  int64_t width_;  // of the small image
  Rows<T> rows_;
};

// f(resizer, plane, row) for all rows of the small image, which has this size.
template <typename S, typename T, typename F>
void each_row(int64_t planes, int64_t height, int64_t width, F f) {
  constexpr int64_t kGrain = 16384;  // elements
  const int64_t rows = std::min(height, ceil_div(kGrain, width)), chunks = ceil_div(height, rows);
  at::parallel_for(0, planes * chunks, ceil_div(kGrain, rows * width), [&](int64_t begin, int64_t end) {
    const Resizer<S, T> resizer(width);
    for (int64_t task = begin; task < end; ++task)
      for (int64_t y = task % chunks * rows; y < std::min(height, (task % chunks + 1) * rows); ++y) f(resizer, task / chunks, y);
  });
}

Tensor with_dense_pixels(const Tensor& x) { return x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous(); }

// make(dense result) for a result of this size like x, which may be in channels_last.
template <typename F>
Tensor resized(const Tensor& x, int64_t height, int64_t width, F make) {
  const Tensor out = empty_image_like(x, x.size(1), height, width);
  const Tensor dense = with_dense_pixels(out);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "bilinear_resize", [&] { make(scalar_t(), dense); });
  if (!dense.is_same(out)) out.copy_(dense);
  return out;
}

Tensor bilinear_resize(const Tensor& x, const OptionalTensor& residual, bool doubles, int64_t height, int64_t width) {
  const Tensor image = with_dense_pixels(x), added = residual ? with_dense_pixels(*residual) : x;
  return resized(x, height, width, [&](auto number, const Tensor& out) {
    using S = decltype(number);
    using T = Accumulate<S>;
    const Tensor& small = doubles ? image : out;
    each_row<S, T>(x.size(0) * x.size(1), small.size(2), small.size(3), [&](const auto& resizer, int64_t plane, int64_t y) {
      const Plane<const S> from(image, plane), of_residual(added, plane);
      const auto* also = residual ? &of_residual : nullptr;
      if (doubles) resizer.double_row(from, also, Plane<S>(out, plane), y);
      else resizer.halve_row(from, also, Plane<S>(out, plane), y);
    });
  });
}

Tensor bilinear_resize_backward(const Tensor& grad_out, bool doubles, int64_t height, int64_t width) {
  const Tensor grad = with_dense_pixels(grad_out);
  return resized(grad_out, height, width, [&](auto number, const Tensor& out) {
    using S = decltype(number);
    using T = Accumulate<S>;
    const Tensor& small = doubles ? out : grad;
    each_row<S, T>(grad.size(0) * grad.size(1), small.size(2), small.size(3), [&](const auto& resizer, int64_t plane, int64_t y) {
      if (doubles) resizer.gather_row(Plane<const S>(grad, plane), Plane<S>(out, plane), y);
      else resizer.spread_row(Plane<const S>(grad, plane), Plane<S>(out, plane), y);
    });
  });
}

}  // namespace
}  // namespace resize
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(restore_kernels, CPU, m) {
  m.impl("bilinear_resize.cpu", resize::bilinear_resize);
  m.impl("bilinear_resize_backward.cpu", resize::bilinear_resize_backward);
}

}  // namespace restore_kernels

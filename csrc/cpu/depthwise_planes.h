// Images, alone or joined along their channels, and planes of them in scratch, with zeros around.
//
// Packed, every dtype and memory layout is the same to the sums, no tap needs to ask whether it is inside
// of the image, and the rows of neighbouring taps stay in cache.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <c10/util/ArrayRef.h>

#include <vector>

#include "image_tiles.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace depthwise {

// Zeros between two rows: whole vectors, and no fewer than seven taps of dilation 2 reach.
constexpr int64_t kMargin = 16;
constexpr int kRows = 4;  // computed together: what they read overlaps

inline int64_t round_up(int64_t x, int64_t multiple) { return ceil_div(x, multiple) * multiple; }

// Images (B, C, H, W) of any strides.
template <typename S>
struct Images {
  S* data;
  int64_t image, channel, row, column;  // strides

  bool pixel_major() const { return channel == 1 && column != 1; }
  Images from(int64_t c) const { return {data + c * channel, image, channel, row, column}; }
};

template <typename S>
Images<const S> read(const Tensor& x) {
  return {x.const_data_ptr<S>(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

template <typename S>
Images<S> write(const Tensor& x) {
  return {x.mutable_data_ptr<S>(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// Whether results in these rows are better written past the caches, which a large result would clear of all else.
template <typename S>
bool streams(const Images<S>& images, int64_t elements) {
  constexpr int64_t kLarge = 2 << 20, kVector = 64;  // bytes
  const auto aligned = [](int64_t stride) { return stride * static_cast<int64_t>(sizeof(S)) % kVector == 0; };
  return (std::is_same_v<S, float> || std::is_same_v<S, double>) && images.column == 1 &&
         elements * static_cast<int64_t>(sizeof(S)) >= kLarge && reinterpret_cast<uintptr_t>(images.data) % kVector == 0 &&
         aligned(images.image) && aligned(images.channel) && aligned(images.row);
}

// Images that count as one along their channels.
template <typename S>
struct Joined {
  struct Part {
    Images<S> images;
    int64_t first, end;  // channels of the whole
    bool streamed;
  };
  std::vector<Part> parts;

  const Part& at(int64_t channel) const {
    size_t i = 0;
    while (channel >= parts[i].end) ++i;
    return parts[i];
  }

  // f(images from their first such channel on, how many, how many before) for those of c ... c + count.
  template <typename F>
  void each(int64_t c, int64_t count, F f) const {
    for (const Part& part : parts) {
      const int64_t first = std::max(c, part.first), end = std::min(c + count, part.end);
      if (first < end) f(part.images.from(first - part.first), end - first, first - c);
    }
  }
};

// Images that nobody wants may be empty.
template <typename S>
Joined<S> join(at::ArrayRef<Tensor> images, at::ArrayRef<Tensor> channels_of) {
  Joined<S> whole;
  int64_t first = 0;
  for (size_t i = 0; i < images.size(); ++i) {
    const int64_t end = first + channels_of[i].size(1);
    if (images[i].dim() == 4) {
      Images<S> part;
      if constexpr (std::is_const_v<S>) part = read<std::remove_const_t<S>>(images[i]);
      else part = write<S>(images[i]);
      whole.parts.push_back({part, first, end, streams(part, images[i].numel())});
    } else {
      whole.parts.push_back({{nullptr, 0, 0, 0, 0}, first, end, false});
    }
    first = end;
  }
  return whole;
}

// `count` planes of `rows` rows, and `reach` more above and below; all zero at first.
template <typename T>
class Planes {
 public:
  Planes(int64_t count, int64_t rows, int64_t reach, int64_t width)
      : pitch(round_up(width, kMargin) + kMargin),
        plane((reach + round_up(rows, kRows) + round_up(reach, kRows)) * pitch),
        first_(kMargin + reach * pitch),
        memory_(kMargin + count * plane + kMargin) {
    std::fill_n(memory_.get(), kMargin + count * plane + kMargin, T(0));
  }

  const int64_t pitch, plane;  // from row to row, from plane to plane
  T* at(int64_t index, int64_t y) const { return memory_.get() + first_ + index * plane + y * pitch; }

 private:
  int64_t first_;
  Scratch<T> memory_;
};

struct Rows {
  int64_t begin, end;
};

// Rows [begin, end) of a plane.
template <typename T>
void clear(const Planes<T>& planes, int64_t plane, int64_t begin, int64_t end, int64_t width) {
  for (int64_t y = begin; y < end; ++y) std::fill_n(planes.at(plane, y), width, T(0));
}

// These rows of the first `count` channels of image b come to `row` of the planes from `plane` on; those that are
// not in [0, height) are zero.
template <typename S, typename T>
void load(const Images<const S>& images, int64_t b, int64_t count, Rows rows, int64_t height, int64_t width,
          const Planes<T>& planes, int64_t plane, int64_t row) {
  const auto [begin, end] = rows;
  const S* source = images.data + b * images.image;
  const int64_t first = std::clamp<int64_t>(0, begin, end), last = std::clamp(height, first, end);
  for (int64_t i = 0; i < count; ++i) {
    clear(planes, plane + i, row, row + first - begin, width);
    clear(planes, plane + i, row + last - begin, row + end - begin, width);
  }
  if (images.pixel_major()) {
    for (int64_t y = first; y < last; ++y)
      copy_tile<S, T>({source + y * images.row, images.channel, images.column},
                      {planes.at(plane, row + y - begin), planes.plane, 1}, count, width);
  } else {
    for (int64_t i = 0; i < count; ++i)
      copy_tile<S, T>({source + i * images.channel + first * images.row, images.row, images.column},
                      {planes.at(plane + i, row + first - begin), planes.pitch, 1}, last - first, width);
  }
}

// The same of channels c ... c + count of joined images.
template <typename S, typename T>
void load(const Joined<const S>& images, int64_t b, int64_t c, int64_t count, Rows rows, int64_t height, int64_t width,
          const Planes<T>& planes, int64_t row) {
  images.each(c, count, [&](const Images<const S>& part, int64_t channels, int64_t plane) {
    load(part, b, channels, rows, height, width, planes, plane, row);
  });
}

// What load() will read of channel 0 of image b. Of images whose pixels are not side by side nothing is asked for.
template <typename S>
Prefetch prefetch(const Images<const S>& images, int64_t b, Rows rows, int64_t height, int64_t width) {
  if (images.column != 1) return {};
  const int64_t first = std::clamp<int64_t>(0, rows.begin, rows.end), last = std::clamp(height, first, rows.end);
  const Matrix<const S> part{images.data + b * images.image + first * images.row, images.row};
  return images.row == width ? Prefetch(part, 1, (last - first) * width) : Prefetch(part, last - first, width);
}

// Rows [0, rows) of the planes from `plane` on become rows y and on of the first `count` channels of image b.
template <typename S, typename T>
void store(const Planes<T>& planes, int64_t plane, int64_t rows, int64_t width, const Images<S>& images, int64_t b,
           int64_t count, int64_t y) {
  S* target = images.data + b * images.image + y * images.row;
  if (images.pixel_major()) {
    for (int64_t i = 0; i < rows; ++i)
      copy_tile<T, S>({planes.at(plane, i), planes.plane, 1}, {target + i * images.row, images.channel, images.column}, count,
                      width);
  } else {
    for (int64_t i = 0; i < count; ++i)
      copy_tile<T, S>({planes.at(plane + i, 0), planes.pitch, 1}, {target + i * images.channel, images.row, images.column}, rows,
                      width);
  }
}

// Whether rows of T can be computed where they lie, without a plane.
template <typename T, typename S>
bool is_in_place(const Images<S>& images) {
  return std::is_same_v<std::remove_const_t<S>, T> && images.column == 1;
}

// Row y and on of channel 0 of image b where they lie if they can be computed there, else row `row` and on of a plane.
template <typename S, typename T>
auto rows_of(const Images<S>& images, int64_t b, int64_t y, const Planes<T>& planes, int64_t plane, int64_t row) {
  using Row = Matrix<std::conditional_t<std::is_const_v<S>, const T, T>>;
  if constexpr (std::is_same_v<std::remove_const_t<S>, T>)
    if (images.column == 1) return Row{images.data + b * images.image + y * images.row, images.row};
  return Row{planes.at(plane, row), planes.pitch};
}

// Past the caches; a whole aligned vector.
template <typename T>
void stream(at::vec::Vectorized<T> x, T* target) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) _mm512_stream_ps(target, x);
  else _mm512_stream_pd(target, x);
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) _mm256_stream_ps(target, x);
  else _mm256_stream_pd(target, x);
#else
  x.store(target);
#endif
}

// Before other threads read what was streamed.
inline void finish_streaming() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

}  // namespace depthwise
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

// A call of pyramid attention for one image, packed.
#pragma once

#include <ATen/ops/empty.h>

#include <type_traits>
#include <vector>

#include "pyramid_levels.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace pyramid {

using at::TensorList;

struct Settings {
  int64_t patch_size;
  double softmax_scale, eps, out_scale;
};

inline Tensor empty_image(const Tensor& like, int64_t channels, at::IntArrayRef size) {
  const bool pixel_major = like.stride(1) == 1 && like.stride(3) > 1;
  return at::empty({like.size(0), channels, size[0], size[1]},
                   like.options().memory_format(pixel_major ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous));
}

inline Tensor empty_like_image(const Tensor& x) { return empty_image(x, x.size(1), x.sizes().slice(2)); }

// One image and its pyramid.
template <typename T>
struct Problem {
  int64_t height, width, depth, channels, radius;  // of the query image; channels of keys, of values
  std::vector<Level<T>> levels;
  std::vector<Band> bands;
  std::vector<Scratch<T>> queries;    // per band, H x Cq x lanes
  std::vector<Scratch<T>> gradients;  // of the output, per band, H x Cv x lanes; backward only

  int64_t most_rows() const {  // of a tile
    int64_t most = 0;
    for (const auto& level : levels) most = std::max(most, level.width);
    return most;
  }
  int64_t most_lanes() const {
    int64_t most = 0;
    for (const Band& band : bands) most = std::max(most, band.lanes);
    return most;
  }
};

// x (H x W) lane by lane, H x lanes for every band: of its own columns and of `halo` columns beside them;
// `elsewhere` at the other lanes.
template <typename T>
std::vector<Scratch<T>> lanes_of_bands(const T* x, const Problem<T>& p, int64_t halo, T elsewhere) {
  std::vector<Scratch<T>> bands;
  for (const Band& band : p.bands) {
    T* lanes = bands.emplace_back(p.height * band.lanes).get();
    std::fill_n(lanes, p.height * band.lanes, elsewhere);
    const int64_t begin = std::max<int64_t>(band.begin - halo, 0), end = std::min(band.end + halo, p.width);
    for (int64_t y = 0; y < p.height; ++y)
      std::copy_n(x + y * p.width + begin, end - begin, lanes + y * band.lanes + begin - band.left);
  }
  return bands;
}

template <typename T>
Problem<T> pack(const Tensor& query, TensorList keys, TensorList values, const Settings& settings, int64_t b) {
  Problem<T> p{query.size(2), query.size(3), query.size(1), values[0].size(1), settings.patch_size / 2, {}, {}, {}, {}};
  int64_t first = 0, widest = 0;
  for (size_t i = 0; i < keys.size(); ++i) {
    p.levels.emplace_back(keys[i], values[i], b, first, p.radius, T(settings.softmax_scale), T(settings.eps));
    first += p.levels.back().pixels();
    widest = std::max(widest, p.levels.back().width);
  }
  p.bands = bands<T>(p.width, widest, p.radius);
  for (const Band& band : p.bands) p.queries.push_back(band_rows<T>(query, b, band));
  return p;
}

// Calls f(an integral constant: the radius, 0 for any) of the walk for this patch size.
template <typename F>
void for_radius(int64_t patch_size, F f) {
  if (patch_size == 3) f(std::integral_constant<int, 1>());
  else f(std::integral_constant<int, 0>());
}

template <typename F>
void for_type(const Tensor& x, F f) {
  if (x.scalar_type() == at::kDouble) f(double());
  else f(float());
}

}  // namespace pyramid
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels

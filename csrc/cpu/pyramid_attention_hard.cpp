// Hard pyramid attention on the CPU: every query takes the patch of its best match.
//
//   forward   the position of the largest score of every query: q k, filtered (pyramid_filters.h),
//             Cq multiply-adds per pair; then every pixel adds up the pixels of patch_size² matches
//   backward  the same additions from the gradient's pixels to the values'
// Bound: the multiply-adds of the scores. Both additions move patch_size² * Cv numbers per pixel, from cache.
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "pyramid_problem.h"
#include "pyramid_walk.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace {

using namespace pyramid;

// The position of the best match of every query of image b.
template <typename T, int kRadius>
void find_matches(const Problem<T>& p, int64_t* index) {
  const std::vector<T> lowest(p.height * p.width, std::numeric_limits<T>::lowest());
  const auto start = lanes_of_bands<T>(lowest.data(), p, 0, std::numeric_limits<T>::infinity());
  const int64_t bands = p.bands.size();
  const Division division(p.height, p.bands, p.levels, 0, p.levels.size());
  Shares<T> largest(division, bands);
  Shares<int64_t> position(division, bands);
  division.run([&](int64_t task, const Chain* begin, const Chain* end) {
    Walk<T, kRadius> walk(p);
    for (const Chain* chain = begin; chain < end; ++chain) {
      const int64_t count = p.height * p.bands[chain->band].lanes;
      walk.best(*chain, largest.of(task, chain->band, count, start[chain->band].get()),
                position.of(task, chain->band, count));
    }
  });
  for (int64_t i = 0; i < bands; ++i) {
    const Band& band = p.bands[i];
    const auto scores = largest.all(i);
    const auto positions = position.all(i);
    for (int64_t y = 0; y < p.height; ++y)
      for (int64_t x = band.begin; x < band.end; ++x) {
        const int64_t lane = y * band.lanes + x - band.left;
        size_t best = 0;
        for (size_t s = 1; s < scores.size(); ++s)
          if (scores[s][lane] > scores[best][lane] ||
              (scores[s][lane] == scores[best][lane] && positions[s][lane] < positions[best][lane]))
            best = s;
        index[y * p.width + x] = positions[best][lane];
      }
  }
}

// A level's pixels among those of all levels.
struct Extent {
  int64_t first, height, width;

  int64_t end() const { return first + height * width; }
};

std::vector<Extent> extents(TensorList levels) {
  std::vector<Extent> result;
  for (const Tensor& level : levels) result.push_back({result.empty() ? 0 : result.back().end(), level.size(2), level.size(3)});
  return result;
}

// Calls f(pixel n + d of the query image, pixel l + d among those of all levels) for every query n, its match
// l and every shift d at which both exist.
template <typename F>
void each_matched_pixel(const std::vector<Extent>& levels, const int64_t* index, int64_t height, int64_t width,
                        int64_t radius, F f) {
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; ++x) {
      const int64_t match = index[y * width + x];
      const Extent* level = levels.data();
      while (match >= level->end()) ++level;
      const int64_t key_y = (match - level->first) / level->width, key_x = (match - level->first) % level->width;
      const int64_t up = -std::min({radius, y, key_y}), down = std::min({radius, height - 1 - y, level->height - 1 - key_y});
      const int64_t left = -std::min({radius, x, key_x}), right = std::min({radius, width - 1 - x, level->width - 1 - key_x});
      for (int64_t dy = up; dy <= down; ++dy)
        for (int64_t dx = left; dx <= right; ++dx) f((y + dy) * width + x + dx, match + dy * level->width + dx);
    }
}

// Channel by channel, the pixels of all images one after another: C x pixels.
template <typename T>
Scratch<T> channel_major(TensorList images, int64_t b) {
  const auto all = extents(images);
  const int64_t pixels = all.back().end();
  Scratch<T> packed(images[0].size(1) * pixels);
  for (size_t i = 0; i < all.size(); ++i)
    each_row(all[i].height, [&](int64_t y) {
      load_row<T>(images[i], b, y, 0, all[i].width, {packed.get() + all[i].first + y * all[i].width, pixels});
    });
  return packed;
}

template <typename T>
void write_channel_major(const Scratch<T>& packed, TensorList images, int64_t b) {
  const auto all = extents(images);
  const int64_t pixels = all.back().end();
  for (size_t i = 0; i < all.size(); ++i)
    each_row(all[i].height, [&](int64_t y) {
      store_row<T>({packed.get() + all[i].first + y * all[i].width, pixels}, images[i], b, y, 0, all[i].width);
    });
}

// Sums over matched pixels: to the query image from all levels if `to_query`, else the other way round.
template <typename T>
Scratch<T> add_matches(const Scratch<T>& source, const std::vector<Extent>& levels, const int64_t* index, int64_t channels,
                       int64_t height, int64_t width, int64_t radius, T scale, bool to_query) {
  const int64_t of_query = height * width, of_levels = levels.back().end();
  const int64_t from = to_query ? of_levels : of_query, to = to_query ? of_query : of_levels;
  Scratch<T> sums(channels * to);
  at::parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const T* x = source.get() + c * from;
      T* sum = sums.get() + c * to;
      std::fill_n(sum, to, T(0));
      each_matched_pixel(levels, index, height, width, radius, [&](int64_t query, int64_t key) {
        if (to_query) sum[query] += x[key];
        else sum[key] += x[query];
      });
      for (int64_t i = 0; i < to; ++i) sum[i] *= scale;
    }
  });
  return sums;
}

std::tuple<Tensor, Tensor> pyramid_attention_hard(const Tensor& query, TensorList keys, TensorList values,
                                                  int64_t patch_size, double softmax_scale, double eps, double out_scale) {
  const Settings settings{patch_size, softmax_scale, eps, out_scale};
  const Tensor out = empty_image(query, values[0].size(1), query.sizes().slice(2));
  const Tensor index = at::empty({query.size(0), query.size(2), query.size(3)}, query.options().dtype(at::kLong));
  const auto levels = extents(values);
  for_type(query, [&](auto type) {
    using T = decltype(type);
    for (int64_t b = 0; b < query.size(0); ++b) {
      int64_t* matches = index.mutable_data_ptr<int64_t>() + b * query.size(2) * query.size(3);
      for_radius(patch_size, [&](auto radius) {
        find_matches<T, radius()>(pack<T>(query, keys, values, settings, b), matches);
      });
      write_channel_major(add_matches<T>(channel_major<T>(values, b), levels, matches, out.size(1), out.size(2), out.size(3),
                                         patch_size / 2, T(out_scale), true),
                          {out}, b);
    }
  });
  return {out, index};
}

std::vector<Tensor> pyramid_attention_hard_backward(const Tensor& grad_out, TensorList values, const Tensor& index,
                                                    int64_t patch_size, double out_scale) {
  std::vector<Tensor> grads;
  for (const Tensor& value : values) grads.push_back(empty_like_image(value));
  const auto levels = extents(values);
  const Tensor matches = index.contiguous();
  for_type(grad_out, [&](auto type) {
    using T = decltype(type);
    for (int64_t b = 0; b < grad_out.size(0); ++b)
      write_channel_major(
          add_matches<T>(channel_major<T>({grad_out}, b), levels,
                         matches.const_data_ptr<int64_t>() + b * grad_out.size(2) * grad_out.size(3), grad_out.size(1),
                         grad_out.size(2), grad_out.size(3), patch_size / 2, T(out_scale), false),
          grads, b);
  });
  return grads;
}

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(restore_kernels, CPU, m) {
  m.impl("pyramid_attention_hard.cpu", pyramid_attention_hard);
  m.impl("pyramid_attention_hard_backward.cpu", pyramid_attention_hard_backward);
}

}  // namespace restore_kernels

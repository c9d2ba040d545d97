// Pyramid attention on the CPU, forward and backward, in memory proportional to the number of pixels.
//
// Patch attention is pixel attention between two diagonal box filters (pyramid_filters.h): with
// s = q kᵀ of pixels, S = factor box(s), P = softmax(S), out = out_scale box(P) v. A tile is the product
// of a row of queries and a row of keys, and stays in the cache while it is filtered; rows of P need
// their log-sum-exp before the second filter mixes them, hence two passes each way:
//   forward   1  log-sum-exp of every query: q k, filter                            Cq
//             2  again, P, filter, times v                                          Cq + Cv
//   backward  1  delta = Σ P dP / Σ P of every query, dP = out_scale box(do vᵀ)      Cq + Cv
//             2  again, dS = P (dP - delta), filters, products                      3 Cq + 2 Cv
// multiply-adds per pair of a query pixel and a key pixel, 1 / patch_size² of what patches would take. Beside
// them a vector of pairs needs 10 loads, stores and additions per filter and 12 operations per exponential.
// Bound: multiply-adds. Extra memory: the images packed (pyramid_levels.h) and, per task, what it adds to
// the output of its bands or the gradients of a level.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "pyramid_problem.h"
#include "pyramid_walk.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace {

using namespace pyramid;

// The log-sum-exp at lanes where no patch is, or none that matters to the band.
template <typename T>
constexpr T kNoWeight = std::numeric_limits<T>::infinity();

// The log-sum-exp of every query, H x W.
template <typename T, int kRadius>
Scratch<T> log_sum_exps(const Problem<T>& p, const Division& division) {
  const int64_t bands = p.bands.size();
  Shares<T> largest(division, bands), sums(division, bands);
  division.run([&](int64_t task, const Chain* begin, const Chain* end) {
    Walk<T, kRadius> walk(p);
    for (const Chain* chain = begin; chain < end; ++chain) {
      const int64_t count = p.height * p.bands[chain->band].lanes;
      walk.statistics(*chain, largest.of(task, chain->band, count, std::numeric_limits<T>::lowest()),
                      sums.of(task, chain->band, count));
    }
  });
  Scratch<T> result(p.height * p.width);
  for (int64_t i = 0; i < bands; ++i) {
    const Band& band = p.bands[i];
    const auto shares_of_largest = largest.all(i), shares_of_sums = sums.all(i);
    for (int64_t y = 0; y < p.height; ++y)
      for (int64_t x = band.begin; x < band.end; ++x) {
        const int64_t lane = y * band.lanes + x - band.left;
        T top = std::numeric_limits<T>::lowest(), sum = 0;
        for (const T* share : shares_of_largest) top = std::max(top, share[lane]);
        for (size_t s = 0; s < shares_of_sums.size(); ++s)
          sum += shares_of_sums[s][lane] * std::exp(shares_of_largest[s][lane] - top);
        result.get()[y * p.width + x] = top + std::log(sum);
      }
  }
  return result;
}

// Writes the sum of the tasks' shares of every band, each H x C x lanes, to image b.
template <typename T>
void write_bands(const Shares<T>& shares, const Problem<T>& p, T scale, const Tensor& image, int64_t b) {
  const int64_t channels = image.size(1);
  for (size_t i = 0; i < p.bands.size(); ++i) {
    const Band& band = p.bands[i];
    const auto of_band = shares.all(i);
    each_row(p.height, [&](int64_t y) {
      const int64_t size = channels * band.lanes;
      Scratch<T> row(size);
      add_up(of_band, y * size, size, scale, row.get());
      store_row<T>({row.get() + band.begin - band.left, band.lanes}, image, b, y, band.begin, band.end - band.begin);
    });
  }
}

template <typename T, int kRadius>
void forward(const Tensor& query, TensorList keys, TensorList values, const Settings& settings, const Tensor& out,
             const Tensor& log_sum_exp, int64_t b) {
  const Problem<T> p = pack<T>(query, keys, values, settings, b);
  const Division division(p.height, p.bands, p.levels, 0, p.levels.size());
  const Scratch<T> statistics = log_sum_exps<T, kRadius>(p, division);
  std::copy_n(statistics.get(), p.height * p.width, log_sum_exp.mutable_data_ptr<T>() + b * p.height * p.width);

  const auto lanes = lanes_of_bands<T>(statistics.get(), p, p.radius, kNoWeight<T>);
  Shares<T> shares(division, p.bands.size());
  division.run([&](int64_t task, const Chain* begin, const Chain* end) {
    Walk<T, kRadius> walk(p);
    for (const Chain* chain = begin; chain < end; ++chain)
      walk.output(*chain, lanes[chain->band].get(),
                  shares.of(task, chain->band, p.height * p.channels * p.bands[chain->band].lanes));
  });
  write_bands(shares, p, T(settings.out_scale), out, b);
}

// Writes the gradient of a level's keys: the tasks' shares, less what changes the norms of the patches.
template <typename T>
void write_keys(const Shares<T>& shares, const Shares<T>& shares_of_products, const Level<T>& level, int64_t channels,
                int64_t radius, const Tensor& grad, int64_t b) {
  Scratch<T> through_norms(level.pixels());
  add_up(shares_of_products.all(0), 0, level.pixels(), T(1), through_norms.get());
  for (int64_t l = 0; l < level.pixels(); ++l) {
    const T square = level.squares.get()[l];
    through_norms.get()[l] = square > level.eps * level.eps ? through_norms.get()[l] / square : T(0);
  }
  const Scratch<T> of_pixels = box_sums(through_norms.get(), level.height, level.width, radius);
  const auto all = shares.all(0);
  each_row(level.height, [&](int64_t y) {
    const int64_t size = level.width * channels;
    Scratch<T> row(size);
    add_up(all, y * size, size, T(1), row.get());
    const T* keys = level.keys.get() + y * size;
    for (int64_t x = 0; x < level.width; ++x)
      for (int64_t c = 0; c < channels; ++c)
        row.get()[x * channels + c] =
            (row.get()[x * channels + c] - of_pixels.get()[y * level.width + x] * keys[x * channels + c]) / level.unit;
    store_row<T>({row.get(), 1, channels}, grad, b, y, 0, level.width);
  });
}

template <typename T>
void write_values(const Shares<T>& shares, const Level<T>& level, int64_t channels, T scale, const Tensor& grad, int64_t b) {
  const auto all = shares.all(0);
  each_row(level.height, [&](int64_t y) {
    const int64_t size = level.width * channels;
    Scratch<T> row(size);
    add_up(all, y * size, size, scale, row.get());
    store_row<T>({row.get(), 1, channels}, grad, b, y, 0, level.width);
  });
}

template <typename T, int kRadius>
void backward(const Tensor& grad_out, const Tensor& query, TensorList keys, TensorList values, const Tensor& log_sum_exp,
              const Settings& settings, const Tensor& grad_query, TensorList grad_keys, TensorList grad_values, int64_t b) {
  Problem<T> p = pack<T>(query, keys, values, settings, b);
  for (const Band& band : p.bands) p.gradients.push_back(band_rows<T>(grad_out, b, band));
  const Scratch<T> queries = pixel_major<T>(query, b), gradients = pixel_major<T>(grad_out, b);
  const T out_scale = T(settings.out_scale);
  const auto lse = lanes_of_bands<T>(log_sum_exp.const_data_ptr<T>() + b * p.height * p.width, p, p.radius, kNoWeight<T>);

  const int64_t bands = p.bands.size();
  const Division all(p.height, p.bands, p.levels, 0, p.levels.size());
  Shares<T> shares_of_delta(all, bands);
  all.run([&](int64_t task, const Chain* begin, const Chain* end) {
    Walk<T, kRadius> walk(p);
    for (const Chain* chain = begin; chain < end; ++chain) {
      const int64_t count = p.height * p.bands[chain->band].lanes;
      T* sums = shares_of_delta.of(task, chain->band, 2 * count);
      walk.delta(*chain, lse[chain->band].get(), sums, sums + count);
    }
  });
  Scratch<T> delta(p.height * p.width);
  std::vector<Scratch<T>> own;
  for (int64_t i = 0; i < bands; ++i) {
    const Band& band = p.bands[i];
    const int64_t count = p.height * band.lanes;
    Scratch<T> sums(2 * count);
    add_up(shares_of_delta.all(i), 0, 2 * count, T(1), sums.get());
    // P has the rounding of its log-sum-exp, one factor for all of a query: divided by the sum of P, delta leaves none
    // of itself in the sum of dS.
    for (int64_t y = 0; y < p.height; ++y)
      for (int64_t x = band.begin; x < band.end; ++x) {
        const T* sum = sums.get() + y * band.lanes + x - band.left;
        delta.get()[y * p.width + x] = out_scale * sum[0] / sum[count];
      }
    own.emplace_back(band.lanes);
    std::fill_n(own.back().get(), band.lanes, T(0));
    std::fill_n(own.back().get() + band.begin - band.left, band.end - band.begin, T(1));
  }
  const auto deltas = lanes_of_bands<T>(delta.get(), p, p.radius, T(0));

  Shares<T> of_query(all, bands);
  for (size_t i = 0; i < p.levels.size(); ++i) {  // one by one, so that tasks hold the gradients of one level
    const Level<T>& level = p.levels[i];
    const Division division(p.height, p.bands, p.levels, i, i + 1);
    Shares<T> of_keys(division, 1), of_values(division, 1), of_products(division, 1);
    division.run([&](int64_t task, const Chain* begin, const Chain* end) {
      Walk<T, kRadius> walk(p);
      for (const Chain* chain = begin; chain < end; ++chain) {
        const int64_t band = chain->band;
        walk.gradients(*chain, lse[band].get(), deltas[band].get(), own[band].get(), out_scale, queries, gradients,
                       {of_query.of(task, band, p.height * p.depth * p.bands[band].lanes),
                        of_keys.of(task, 0, level.pixels() * p.depth), of_values.of(task, 0, level.pixels() * p.channels),
                        of_products.of(task, 0, level.pixels())});
      }
    });
    write_keys(of_keys, of_products, level, p.depth, p.radius, grad_keys[i], b);
    write_values(of_values, level, p.channels, out_scale, grad_values[i], b);
  }
  write_bands(of_query, p, T(1), grad_query, b);
}

std::tuple<Tensor, Tensor> pyramid_attention(const Tensor& query, TensorList keys, TensorList values, int64_t patch_size,
                                             double softmax_scale, double eps, double out_scale) {
  const Settings settings{patch_size, softmax_scale, eps, out_scale};
  const Tensor out = empty_image(query, values[0].size(1), query.sizes().slice(2));
  const auto wide = query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor log_sum_exp = at::empty({query.size(0), query.size(2), query.size(3)}, query.options().dtype(wide));
  for_type(query, [&](auto type) {
    for_radius(patch_size, [&](auto radius) {
      for (int64_t b = 0; b < query.size(0); ++b)
        forward<decltype(type), radius()>(query, keys, values, settings, out, log_sum_exp, b);
    });
  });
  return {out, log_sum_exp};
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> pyramid_attention_backward(
    const Tensor& grad_out, const Tensor& query, TensorList keys, TensorList values, const Tensor& log_sum_exp,
    int64_t patch_size, double softmax_scale, double eps, double out_scale) {
  const Settings settings{patch_size, softmax_scale, eps, out_scale};
  const Tensor grad_query = empty_like_image(query), statistics = log_sum_exp.contiguous();
  std::vector<Tensor> grad_keys, grad_values;
  for (const Tensor& key : keys) grad_keys.push_back(empty_like_image(key));
  for (const Tensor& value : values) grad_values.push_back(empty_like_image(value));
  for_type(query, [&](auto type) {
    for_radius(patch_size, [&](auto radius) {
      for (int64_t b = 0; b < query.size(0); ++b)
        backward<decltype(type), radius()>(grad_out, query, keys, values, statistics, settings, grad_query, grad_keys,
                                           grad_values, b);
    });
  });
  return {grad_query, grad_keys, grad_values};
}

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(restore_kernels, CPU, m) {
  m.impl("pyramid_attention.cpu", pyramid_attention);
  m.impl("pyramid_attention_backward.cpu", pyramid_attention_backward);
}

}  // namespace restore_kernels

// Launches the CUDA kernels of pyramid attention: operands, shares of sums, grids, results.
#include <tuple>

#include "launch.h"
#include "pyramid_attention.cuh"
#include "tensors.h"

namespace restore_kernels::pyramid {

namespace {

struct Settings {
  float softmax_scale, eps, out_scale;
};

int64_t blocks(int64_t count) { return (count + kThreads - 1) / kThreads; }

// Uninitialised (B, channels, H, W) in the dtype and memory format of x, as restore_kernels/tensors.py's
// empty_image.
Tensor empty_image(const Tensor& x, int64_t channels, int64_t height, int64_t width) {
  using torch::stable::transpose;
  if (x.stride(1) != 1 || x.stride(3) <= 1) return empty(x, {x.size(0), channels, height, width});
  // (B, H, W, C) -> (B, C, W, H) -> (B, C, H, W)
  return transpose(transpose(empty(x, {x.size(0), height, width, channels}), 1, 3), 2, 3);
}

float* floats(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

// An image as operands of T, which are X, the tensor's dtype, or float.
template <typename X, typename T>
struct Packed {
  Tensor data;
  int64_t batch, channels, height, width;

  explicit Packed(const Tensor& x)
      : batch(x.size(0)), channels((x.size(1) + 8 * kElements<T> - 1) / (8 * kElements<T>) * 8 * kElements<T>),
        height(x.size(2)), width(x.size(3)) {
    const std::vector<int64_t> shape{batch, pixels(), channels};
    data = sizeof(T) == 4 ? empty_float32(x, shape) : empty(x, shape);
    launch(pack_kernel<X, T>, blocks(count() * channels), kThreads, 0, strided<X>(x), x.size(1), pixels(), width,
           channels, count() * channels, elements());
  }

  int64_t pixels() const { return height * width; }
  int64_t count() const { return batch * pixels(); }
  T* elements() const { return static_cast<T*>(data.data_ptr()); }
  Image image() const {
    return {static_cast<const unsigned*>(data.data_ptr()), static_cast<int>(height), static_cast<int>(width),
            static_cast<int>(channels / kElements<T>)};
  }
};

template <typename X, typename T>
struct Level {
  Packed<X, T> keys, values;
  Tensor norms, scales;  // (B, h * w)

  Level(const Tensor& key, const Tensor& value, const Settings& settings)
      : keys(key), values(value), norms(empty_float32(key, {keys.batch, keys.pixels()})),
        scales(empty_float32(key, {keys.batch, keys.pixels()})) {
    launch(norms_kernel<T>, blocks(keys.count()), kThreads, 0, static_cast<const T*>(keys.elements()), keys.channels,
           keys.height, keys.width, keys.count(), settings.softmax_scale, settings.eps, floats(norms), floats(scales));
  }
};

template <typename X, typename T>
std::vector<Level<X, T>> make_levels(const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                                     const Settings& settings) {
  std::vector<Level<X, T>> levels;
  for (size_t i = 0; i < keys.size(); ++i) levels.emplace_back(keys[i], values[i], settings);
  return levels;
}

// Grid and splits of a pass over these images: as many splits as fill the device, if the columns allow.
template <typename T, Pass PASS>
void divide(Problem& p) {
  using Of = Shape<T, PASS>;
  p.tiles_x = (p.owned[0].width + Of::kColumns - 1) / Of::kColumns;
  p.tiles_y = (p.owned[0].height + Of::R - 1) / Of::R;
  const int64_t tiles = (p.streamed[0].width + 8 * Of::B - 1) / (8 * Of::B);
  const int64_t programs = std::max<int64_t>(1, p.batch * p.tiles_x * p.tiles_y);
  const int64_t wanted = std::min<int64_t>(tiles, (2 * processors() + programs - 1) / programs);
  p.tiles_per_split = static_cast<int>((tiles + wanted - 1) / wanted);
  p.splits = static_cast<int>((tiles + p.tiles_per_split - 1) / p.tiles_per_split);
}

// Runs a pass over every problem, each of which is divided, one after another into `shares`: `numbers` floats
// for each owned pixel.
template <typename T, Pass PASS>
void run(std::vector<Problem>& problems, const Tensor& shares, int64_t numbers) {
  static_assert(Shape<T, PASS>::fits(kSharedOfMany));
  float* result = floats(shares);
  for (Problem& p : problems) {
    p.result = result;
    result += p.splits * p.batch * p.owned[0].pixels() * numbers;
    launch(pyramid_kernel<T, PASS>, p.batch * p.tiles_y * p.tiles_x * p.splits, Shape<T, PASS>::kThreads,
           Shape<T, PASS>::shared_bytes(p), p);
  }
}

// Sums of a pass over all problems, which own the same image.
struct Shares {
  Tensor data;  // (parts, B, pixels, numbers)
  int64_t parts;
};

template <typename T, Pass PASS>
Shares shares_of(std::vector<Problem> problems, const Tensor& like, int64_t numbers) {
  int64_t parts = 0;
  for (Problem& p : problems) {
    divide<T, PASS>(p);
    parts += p.splits;
  }
  const Problem& any = problems[0];
  const Shares shares{empty_float32(like, {parts, any.batch, any.owned[0].pixels(), numbers}), parts};
  run<T, PASS>(problems, shares.data, numbers);
  return shares;
}

// The channels of the sums, times a factor.
template <typename X>
Tensor written(const Shares& shares, const Tensor& like, int64_t channels, float factor) {
  const Tensor out = empty_image(like, channels, like.size(2), like.size(3));
  const int64_t count = like.size(0) * channels * like.size(2) * like.size(3);
  launch(write_kernel<X>, blocks(count), kThreads, 0, static_cast<const float*>(floats(shares.data)), shares.parts,
         shares.data.size(3), factor, like.size(2), like.size(3), channels, count, strided_result<X>(out));
  return out;
}

// query and keys, the gradient of the output and values: the first of both pairs owned, or the second.
template <typename X, typename T>
Problem problem_of(bool owns_keys, const Packed<X, T>& query, const Packed<X, T>* grad, const Level<X, T>& level,
                   const Settings& settings) {
  const Image of_query[2] = {query.image(), grad ? grad->image() : Image{}};
  const Image of_level[2] = {level.keys.image(), level.values.image()};
  Problem p{};
  for (int i = 0; i < 2; ++i) {
    p.owned[i] = owns_keys ? of_level[i] : of_query[i];
    p.streamed[i] = owns_keys ? of_query[i] : of_level[i];
  }
  p.scales = floats(level.scales);
  p.out_scale = settings.out_scale;
  p.batch = query.batch;
  return p;
}

template <typename X>
std::tuple<Tensor, Tensor> forward(const Tensor& query, const std::vector<Tensor>& keys,
                                   const std::vector<Tensor>& values, const Settings& settings) {
  const Packed<X, X> q(query);
  const auto levels = make_levels<X, X>(keys, values, settings);
  std::vector<Problem> problems;
  for (const auto& level : levels) problems.push_back(problem_of<X, X>(false, q, nullptr, level, settings));
  const Tensor log_sum_exp = empty_float32(query, {q.batch, q.height, q.width});
  const Shares statistics = shares_of<X, Pass::kStatistics>(problems, query, 2);
  launch(log_sum_exp_kernel, blocks(q.count()), kThreads, 0, static_cast<const Statistics*>(statistics.data.data_ptr()),
         statistics.parts, q.count(), floats(log_sum_exp));
  for (Problem& p : problems) p.log_sum_exp = floats(log_sum_exp);
  const Shares shares = shares_of<X, Pass::kOut>(problems, query, levels[0].values.channels);
  return {written<X>(shares, query, values[0].size(1), settings.out_scale), log_sum_exp};
}

std::tuple<Tensor, Tensor> pyramid_attention(const Tensor& query, const std::vector<Tensor>& keys,
                                             const std::vector<Tensor>& values, int64_t, double softmax_scale,
                                             double eps, double out_scale) {
  const OnDevice guard(query.get_device_index());
  const Settings settings{static_cast<float>(softmax_scale), static_cast<float>(eps), static_cast<float>(out_scale)};
  return with_dtype(query, [&]<typename X>() { return forward<X>(query, keys, values, settings); });
}

template <typename X, typename T>
Tensor grad_query(const std::vector<Problem>& problems, const Tensor& query, int64_t channels) {
  const Shares shares = shares_of<T, Pass::kGradQuery>(problems, query, channels);
  return written<X>(shares, query, query.size(1), 1);
}

template <typename X, typename T>
Tensor grad_value(const Problem& problem, const Tensor& value, int64_t channels, const Settings& settings) {
  const Shares shares = shares_of<T, Pass::kGradValue>({problem}, value, channels);
  return written<X>(shares, value, value.size(1), settings.out_scale);
}

template <typename X, typename T>
Tensor grad_key(Problem problem, const Tensor& key, const Level<X, T>& level, const Settings& settings) {
  divide<T, Pass::kGradKey>(problem);
  const Tensor radial = empty_float32(key, {problem.splits, level.keys.count()});
  problem.radial = floats(radial);
  const Shares shares = shares_of<T, Pass::kGradKey>({problem}, key, level.keys.channels);
  const Tensor grad = empty_image(key, key.size(1), key.size(2), key.size(3));
  const int64_t count = level.keys.count() * key.size(1);
  launch(write_grad_key_kernel<X>, blocks(count), kThreads, 0, static_cast<const float*>(floats(shares.data)),
         static_cast<const float*>(floats(radial)), shares.parts, level.keys.channels,
         static_cast<const float*>(floats(level.norms)), settings.eps, level.keys.height, level.keys.width,
         key.size(1), count, strided<X>(key), strided_result<X>(grad));
  return grad;
}

using Gradients = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>>;

// float16 has not the range of gradients over norms: T is float for it.
template <typename X, typename T>
Gradients backward(const Tensor& grad_out, const Tensor& query, const std::vector<Tensor>& keys,
                   const std::vector<Tensor>& values, const Tensor& log_sum_exp, const Settings& settings) {
  const Packed<X, T> q(query), grad(grad_out);
  const auto levels = make_levels<X, T>(keys, values, settings);
  std::vector<Problem> by_query, by_keys;
  for (const auto& level : levels) {
    by_query.push_back(problem_of<X, T>(false, q, &grad, level, settings));
    by_keys.push_back(problem_of<X, T>(true, q, &grad, level, settings));
  }
  const Tensor row_sums = empty_float32(query, {q.batch, q.pixels()});
  for (auto* problems : {&by_query, &by_keys}) {
    for (Problem& p : *problems) p.log_sum_exp = floats(log_sum_exp), p.row_sums = floats(row_sums);
  }
  const Shares shares = shares_of<T, Pass::kRowSums>(by_query, query, 1);
  launch(sum_kernel, blocks(q.count()), kThreads, 0, static_cast<const float*>(floats(shares.data)), shares.parts,
         q.count(), floats(row_sums));

  Gradients gradients{grad_query<X, T>(by_query, query, q.channels), {}, {}};
  for (size_t i = 0; i < levels.size(); ++i) {
    std::get<1>(gradients).push_back(grad_key<X, T>(by_keys[i], keys[i], levels[i], settings));
    std::get<2>(gradients).push_back(grad_value<X, T>(by_keys[i], values[i], grad.channels, settings));
  }
  return gradients;
}

Gradients pyramid_attention_backward(const Tensor& grad_out, const Tensor& query, const std::vector<Tensor>& keys,
                                     const std::vector<Tensor>& values, const Tensor& log_sum_exp, int64_t,
                                     double softmax_scale, double eps, double out_scale) {
  const OnDevice guard(query.get_device_index());
  const Settings settings{static_cast<float>(softmax_scale), static_cast<float>(eps), static_cast<float>(out_scale)};
  const Tensor dense = torch::stable::contiguous(log_sum_exp);
  return with_dtype(query, [&]<typename X>() {
    using T = std::conditional_t<std::is_same_v<X, float16>, float, X>;
    return backward<X, T>(grad_out, query, keys, values, dense, settings);
  });
}

}  // namespace

REGISTER(library) {
  library.impl("pyramid_attention.cuda", TORCH_BOX(pyramid_attention));
  library.impl("pyramid_attention_backward.cuda", TORCH_BOX(pyramid_attention_backward));
}

}  // namespace restore_kernels::pyramid

// Top-k attention between channels on the CPU, forward and backward.
//
// Schedule. The pixels of every image are cut into chunks that threads own; a chunk is walked in
// tiles that stay in the L2 cache, packed (tile_io.h), converted to the accumulation type.
//   forward   1. chunks: Gram matrix q kᵀ and squared norms, partial sums per chunk
//             2. per head: add the partials in order, normalise, rank, mix the branches: P (C x C);
//                with an output projection W: M = W blockdiag(P) (C_out x HC)
//             3. chunks: out = P v, or M v
//   backward  1. chunks: dM = do vᵀ (partials) and dv = Mᵀ do
//             2. per head: dP, through the branches to dS; the products with the norms become
//                E = D_q dA D_k and the diagonals -rowsum(dA∘A)/|q|², -colsum(dA∘A)/|k|²
//             3. chunks: dq = E k + diag q, dk = Eᵀ q + diag k
// Moves q, k, v in and out once forward, and do, v, q, k in and dq, dk, dv out once backward; nothing
// else grows with N. 2·2·C²·N operations per head forward, 2·4·C²·N backward: with C = 48 that is 12
// and 14 operations per byte, so on a core with 30 GFLOP/s for every GB/s arithmetic is the bound.
// Partial sums are per chunk, not per thread, so results do not depend on the number of threads.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "image_tiles.h"
#include "tile_gemm.h"
#include "tile_io.h"
#include "topk_rows.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr double kNormFloor = 1e-12;

// Follows the memory format of x: pixel-major where x is.
Tensor empty_like_rows(const Tensor& x, at::IntArrayRef rows) {
  std::vector<int64_t> sizes{x.size(0)};
  const bool pixel_major = x.stride(-2) == 1 && x.stride(-1) > 1;
  if (pixel_major) sizes.push_back(x.size(-1));
  sizes.insert(sizes.end(), rows.begin(), rows.end());
  if (!pixel_major) sizes.push_back(x.size(-1));
  Tensor out = at::empty(sizes, x.options());
  return pixel_major ? out.movedim(1, -1) : out;
}

// target (count) = sum over chunks of partial (chunks x count), in order.
template <typename T>
void add_partials(const T* partial, int64_t chunks, int64_t stride, T* target, int64_t count) {
  std::copy_n(partial, count, target);
  for (int64_t c = 1; c < chunks; ++c)
    for (int64_t i = 0; i < count; ++i) target[i] += partial[c * stride + i];
}

// What every pass needs to know of a call, and the small matrices it keeps.
template <typename T>
struct Problem {
  int64_t batch, heads, channels, pixels, branches;
  c10::ArrayRef<int64_t> topk;
  const Tensor &temperature, &weights;
  const OptionalTensor& out_proj;
  bool normalize;

  Problem(const Tensor& q, const Tensor& temperature, const Tensor& weights, const OptionalTensor& out_proj,
          c10::ArrayRef<int64_t> topk, bool normalize)
      : batch(q.size(0)), heads(q.size(1)), channels(q.size(2)), pixels(q.size(3)),
        branches(static_cast<int64_t>(topk.size())), topk(topk), temperature(temperature), weights(weights),
        out_proj(out_proj), normalize(normalize) {}

  // Rows that one product with v makes and takes: of one head, or of all heads when they are projected.
  int64_t groups() const { return out_proj ? batch : batch * heads; }
  int64_t rows_in() const { return out_proj ? heads * channels : channels; }
  int64_t rows_out() const { return out_proj ? out_proj->size(0) : channels; }
  int64_t square() const { return channels * channels; }

  T scale(int64_t bh) const {
    return temperature.const_data_ptr<T>()[bh / heads * temperature.stride(0) + bh % heads * temperature.stride(1)];
  }
  const T* branch_weights(int64_t bh) const {
    return weights.const_data_ptr<T>() + bh / heads * weights.stride(0) + bh % heads * weights.stride(1);
  }

  // mixture (B, H, C, C) from the similarities.
  void mix(const T* similarity, T* mixture) const {
    at::parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
      RowMixture<T> row(channels, topk);
      for (int64_t bh = begin; bh < end; ++bh)
        for (int64_t i = bh * channels; i < (bh + 1) * channels; ++i) {
          row.set(similarity + i * channels, scale(bh), branch_weights(bh), weights.stride(2));
          row.mixture(mixture + i * channels);
        }
    });
  }

  // W_h (C_out x C), in the accumulation type, is what the projection applies to head h.
  void load_projection(T* target) const {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out_proj->scalar_type(), "out_proj", [&] {
      copy_tile<scalar_t, T>({out_proj->const_data_ptr<scalar_t>(), out_proj->stride(0), out_proj->stride(1)},
                             {target, rows_in()}, rows_out(), rows_in());
    });
  }

  // The matrix that v is multiplied with, per group: the mixture itself, or W blockdiag(mixture).
  void fold(const T* mixture, const T* projection, T* folded) const {
    at::parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t bh = begin; bh < end; ++bh) {
        const int64_t b = bh / heads, column = bh % heads * channels;
        multiply<T>({projection + column, rows_in()}, {mixture + bh * square(), channels},
                    {folded + b * rows_out() * rows_in() + column, rows_in()}, rows_out(), channels, channels);
      }
    });
  }
};

template <typename S, typename T>
void gram_and_norms(const Problem<T>& p, const Tensor& q, const Tensor& k, T* similarity, T* norms) {
  const int64_t C = p.channels, groups = p.batch * p.heads, partial_size = C * C + 2 * C;
  const Division division(p.pixels, C, groups);
  Scratch<T> partials(groups * division.chunks * partial_size);
  at::parallel_for(0, groups * division.chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> q_tile(C * division.tile), k_tile(C * division.tile);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t bh = task / division.chunks;
      const auto q_image = one_head<const S>(q, bh / p.heads, bh % p.heads);
      const auto k_image = one_head<const S>(k, bh / p.heads, bh % p.heads);
      T* gram = partials.get() + task * partial_size;
      std::fill_n(gram, partial_size, T(0));
      division.tiles(task % division.chunks, [&](int64_t n, int64_t count) {
        const Matrix<T> rows{q_tile.get(), division.tile}, columns{k_tile.get(), C};  // C x tile, tile x C
        load_rows<S, T>(q_image, n, count, rows);
        load_columns<S, T>(k_image, n, count, columns);
        const int64_t calls = idle_calls<T>(C, C, count);
        auto next_q = prefetch(q_image, n + count, division.after(n), calls);
        auto next_k = prefetch(k_image, n + count, division.after(n), calls);
        multiply_add<T>(rows, columns, {gram, C}, C, C, count, [&] { next_q(); next_k(); });
        if (p.normalize) {
          add_squares<T>(rows, gram + C * C, C, count);
          add_column_squares<T>(columns, gram + C * C + C, count, C);
        }
      });
    }
  });
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> sum(partial_size);
    for (int64_t bh = begin; bh < end; ++bh) {
      add_partials(partials.get() + bh * division.chunks * partial_size, division.chunks, partial_size, sum.data(),
                   partial_size);
      T* norm = norms + bh * 2 * C;
      for (int64_t i = 0; i < 2 * C; ++i)
        norm[i] = p.normalize ? std::max<T>(std::sqrt(sum[C * C + i]), T(kNormFloor)) : T(1);
      for (int64_t i = 0; i < C; ++i)
        for (int64_t j = 0; j < C; ++j) {
          // One quotient, so that a single pixel gives exactly 1 or -1, tied as it should be. Where
          // norms overflow, x / |x| is 0, not inf / inf; NaN stays NaN.
          const T norm_ij = norm[i] * norm[C + j];
          similarity[(bh * C + i) * C + j] = std::isinf(norm_ij) ? T(0) : sum[i * C + j] / norm_ij;
        }
    }
  });
}

template <typename S, typename T>
std::tuple<Tensor, Tensor, Tensor> forward(const Problem<T>& p, const Tensor& q, const Tensor& k, const Tensor& v) {
  const auto options = q.options().dtype(c10::CppTypeToScalarType<T>::value);
  const Tensor similarity = at::empty({p.batch, p.heads, p.channels, p.channels}, options);
  const Tensor norms = at::empty({p.batch, p.heads, 2, p.channels}, options);
  gram_and_norms<S, T>(p, q, k, similarity.mutable_data_ptr<T>(), norms.mutable_data_ptr<T>());

  Scratch<T> mixture(p.batch * p.heads * p.square());
  p.mix(similarity.const_data_ptr<T>(), mixture.get());
  const int64_t in = p.rows_in(), rows_out = p.rows_out();
  Scratch<T> projection(p.out_proj ? rows_out * in : 0), folded(p.out_proj ? p.batch * rows_out * in : 0);
  if (p.out_proj) {
    p.load_projection(projection.get());
    p.fold(mixture.get(), projection.get(), folded.get());
  }
  const T* matrix = p.out_proj ? folded.get() : mixture.get();

  const Tensor out = p.out_proj ? empty_like_rows(v, {rows_out}) : empty_like_rows(v, {p.heads, p.channels});
  const Division division(p.pixels, std::max(in, rows_out), p.groups());
  at::parallel_for(0, p.groups() * division.chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> v_tile(in * division.tile), out_tile(rows_out * division.tile);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / division.chunks;
      const auto v_image = p.out_proj ? all_heads<const S>(v, group) : one_head<const S>(v, group / p.heads, group % p.heads);
      const auto out_image = p.out_proj ? projected<S>(out, group) : one_head<S>(out, group / p.heads, group % p.heads);
      division.tiles(task % division.chunks, [&](int64_t n, int64_t count) {
        const Matrix<T> source{v_tile.get(), division.tile}, scratch{out_tile.get(), division.tile};
        load_rows<S, T>(v_image, n, count, source);
        const int64_t calls = idle_calls<T>(rows_out, count, in);
        auto next_v = prefetch(v_image, n + count, division.after(n), calls);
        write_rows<S, T>(out_image, n, count, scratch, [&](Matrix<T> target) {
          multiply<T>({matrix + group * rows_out * in, in}, source, target, rows_out, count, in, {},
                      next_v);
        });
      });
    }
  });
  return {out, similarity, norms};
}

// grad_matrix (groups, rows_out, rows_in) = do vᵀ, and grad_v = matrixᵀ do.
template <typename S, typename T>
void backward_values(const Problem<T>& p, const Tensor& grad_out, const Tensor& v, const T* matrix, T* grad_matrix,
                     const Tensor& grad_v) {
  const int64_t in = p.rows_in(), rows_out = p.rows_out(), size = rows_out * in;
  const Division division(p.pixels, std::max(in, rows_out), p.groups());
  Scratch<T> partials(p.groups() * division.chunks * size);
  at::parallel_for(0, p.groups() * division.chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> v_tile(in * division.tile), do_tile(rows_out * division.tile), dv_tile(in * division.tile);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / division.chunks, b = group / p.heads, h = group % p.heads;
      const auto v_image = p.out_proj ? all_heads<const S>(v, group) : one_head<const S>(v, b, h);
      const auto do_image = p.out_proj ? projected<const S>(grad_out, group) : one_head<const S>(grad_out, b, h);
      const auto dv_image = p.out_proj ? all_heads<S>(grad_v, group) : one_head<S>(grad_v, b, h);
      T* partial = partials.get() + task * size;
      std::fill_n(partial, size, T(0));
      division.tiles(task % division.chunks, [&](int64_t n, int64_t count) {
        const Matrix<T> rows{do_tile.get(), division.tile}, columns{v_tile.get(), in}, scratch{dv_tile.get(), division.tile};
        load_rows<S, T>(do_image, n, count, rows);
        load_columns<S, T>(v_image, n, count, columns);
        auto this_dv = prefetch_for_writing(dv_image, n, count, idle_calls<T>(rows_out, in, count));
        const int64_t calls = idle_calls<T>(in, count, rows_out);
        auto next_do = prefetch(do_image, n + count, division.after(n), calls);
        auto next_v = prefetch(v_image, n + count, division.after(n), calls);
        multiply_add<T>(rows, columns, {partial, in}, rows_out, in, count, this_dv);
        write_rows<S, T>(dv_image, n, count, scratch, [&](Matrix<T> dv) {
          multiply<T>(Matrix<const T>{matrix + group * size, in}.transposed(), rows, dv, in, count, rows_out, {},
                      [&] { next_do(); next_v(); });
        });
      });
    }
  });
  at::parallel_for(0, p.groups(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group)
      add_partials(partials.get() + group * division.chunks * size, division.chunks, size, grad_matrix + group * size, size);
  });
}

// grad_mixture (B, H, C, C) from the gradient of the folded matrix; also the projection's gradient.
template <typename T>
void unfold(const Problem<T>& p, const T* grad_matrix, const T* projection, const T* mixture, T* grad_mixture,
            T* grad_projection) {
  const int64_t in = p.rows_in(), rows_out = p.rows_out(), C = p.channels;
  at::parallel_for(0, p.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h)
      for (int64_t b = 0; b < p.batch; ++b) {
        const int64_t bh = b * p.heads + h, column = h * C;
        const Matrix<const T> grad{grad_matrix + b * rows_out * in + column, in}, w{projection + column, in};
        multiply<T>(w.transposed(), grad, {grad_mixture + bh * C * C, C}, C, C, rows_out);
        std::vector<T> mixture_transposed(C * C);
        copy_tile<T, T>(Matrix<const T>{mixture + bh * C * C, C}.transposed(), {mixture_transposed.data(), C}, C, C);
        const Matrix<T> target{grad_projection + column, in};
        multiply<T>(grad, {mixture_transposed.data(), C}, target, rows_out, C, C, b > 0 ? Addend<T>{target} : Addend<T>{});
      }
  });
}

// Per head: E (C x C), the two diagonals (2C), and the gradients of temperature and weights.
template <typename T>
void backward_scores(const Problem<T>& p, const T* similarity, const T* norms, const T* grad_mixture, T* e, T* diagonals,
                     T* grad_temperature, T* grad_weights) {
  using Vec = at::vec::Vectorized<T>;
  const int64_t C = p.channels;
  at::parallel_for(0, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
    RowMixture<T> row(C, p.topk);
    std::vector<T> grad_row(row.padded()), grad(row.padded());
    for (int64_t bh = begin; bh < end; ++bh) {
      const T scale = p.scale(bh);
      const T *norm_q = norms + bh * 2 * C, *norm_k = norm_q + C;
      T *diagonal_q = diagonals + bh * 2 * C, *diagonal_k = diagonal_q + C;
      std::fill_n(diagonal_q, 2 * C, T(0));
      std::fill_n(grad_weights + bh * p.branches, p.branches, T(0));
      grad_temperature[bh] = 0;
      for (int64_t i = 0; i < C; ++i) {
        const T* a = similarity + (bh * C + i) * C;
        row.set(a, scale, p.branch_weights(bh), p.weights.stride(2));
        std::copy_n(grad_mixture + (bh * C + i) * C, C, grad_row.data());
        row.backward(grad_row.data(), grad.data(), grad_weights + bh * p.branches);
        const T share = at::vec::map2_reduce_all<T>([](Vec x, Vec y) { return x * y; },
                                                    [](Vec x, Vec y) { return x + y; }, grad.data(), a, C);
        grad_temperature[bh] += share;
        diagonal_q[i] -= scale * share;
        at::vec::map3([scale](Vec sum, Vec g, Vec x) { return sum - Vec(scale) * g * x; }, diagonal_k, diagonal_k,
                      grad.data(), a, C);
        at::vec::map2([factor = scale, n = norm_q[i]](Vec g, Vec m) { return Vec(factor) * g / (Vec(n) * m); },
                      e + (bh * C + i) * C, grad.data(), norm_k, C);
      }
      for (int64_t i = 0; i < 2 * C; ++i) {
        // Where the norm is clamped it is a constant and has no gradient of its own.
        const bool differentiable = p.normalize && norm_q[i] > T(kNormFloor);
        diagonal_q[i] = differentiable ? diagonal_q[i] / norm_q[i] / norm_q[i] : T(0);
      }
    }
  });
}

template <typename S, typename T>
void backward_queries_keys(const Problem<T>& p, const Tensor& q, const Tensor& k, const T* e, const T* diagonals,
                           const Tensor& grad_q, const Tensor& grad_k) {
  const int64_t C = p.channels, groups = p.batch * p.heads;
  const Division division(p.pixels, C, groups);
  at::parallel_for(0, groups * division.chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> q_scratch(C * division.tile), k_scratch(C * division.tile), grad_scratch(C * division.tile);
    const Matrix<T> q_tile{q_scratch.get(), division.tile}, k_tile{k_scratch.get(), division.tile},
        scratch{grad_scratch.get(), division.tile};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t bh = task / division.chunks, b = bh / p.heads, h = bh % p.heads;
      const auto q_image = one_head<const S>(q, b, h), k_image = one_head<const S>(k, b, h);
      const auto dq_image = one_head<S>(grad_q, b, h), dk_image = one_head<S>(grad_k, b, h);
      const Matrix<const T> e_head{e + bh * C * C, C};
      const T* diagonal = diagonals + bh * 2 * C;
      division.tiles(task % division.chunks, [&](int64_t n, int64_t count) {
        load_rows<S, T>(q_image, n, count, q_tile);
        load_rows<S, T>(k_image, n, count, k_tile);
        const int64_t calls = idle_calls<T>(C, count, C);
        auto next_q = prefetch(q_image, n + count, division.after(n), calls);
        auto next_k = prefetch(k_image, n + count, division.after(n), calls);
        auto this_dk = prefetch_for_writing(dk_image, n, count, calls);
        write_rows<S, T>(dq_image, n, count, scratch, [&](Matrix<T> dq) {
          multiply<T>(e_head, k_tile, dq, C, count, C, {q_tile, diagonal}, [&] { this_dk(); next_q(); });
        });
        write_rows<S, T>(dk_image, n, count, scratch, [&](Matrix<T> dk) {
          multiply<T>(e_head.transposed(), q_tile, dk, C, count, C, {k_tile, diagonal + C},
                      next_k);
        });
      });
    }
  });
}

template <typename S, typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Problem<T>& p, const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& similarity, const Tensor& norms) {
  const int64_t heads = p.batch * p.heads, in = p.rows_in(), rows_out = p.rows_out();
  const auto options = similarity.options();
  const Tensor grad_q = empty_like_rows(q, {p.heads, p.channels}), grad_k = empty_like_rows(k, {p.heads, p.channels}),
               grad_v = empty_like_rows(v, {p.heads, p.channels});
  const Tensor grad_temperature = at::empty({p.batch, p.heads}, options);
  const Tensor grad_weights = at::empty({p.batch, p.heads, p.branches}, options);
  Tensor grad_out_proj = at::empty({0}, options);

  Scratch<T> mixture(heads * p.square()), grad_mixture(heads * p.square());
  p.mix(similarity.const_data_ptr<T>(), mixture.get());
  if (p.out_proj) {
    grad_out_proj = at::empty({rows_out, in}, options);
    if (p.batch == 0) grad_out_proj.zero_();
    Scratch<T> projection(rows_out * in), folded(p.batch * rows_out * in), grad_folded(p.batch * rows_out * in);
    p.load_projection(projection.get());
    p.fold(mixture.get(), projection.get(), folded.get());
    backward_values<S, T>(p, grad_out, v, folded.get(), grad_folded.get(), grad_v);
    unfold<T>(p, grad_folded.get(), projection.get(), mixture.get(), grad_mixture.get(),
              grad_out_proj.mutable_data_ptr<T>());
  } else {
    backward_values<S, T>(p, grad_out, v, mixture.get(), grad_mixture.get(), grad_v);
  }
  Scratch<T> e(heads * p.square()), diagonals(heads * 2 * p.channels);
  backward_scores<T>(p, similarity.const_data_ptr<T>(), norms.const_data_ptr<T>(), grad_mixture.get(), e.get(),
                     diagonals.get(), grad_temperature.mutable_data_ptr<T>(), grad_weights.mutable_data_ptr<T>());
  backward_queries_keys<S, T>(p, q, k, e.get(), diagonals.get(), grad_q, grad_k);
  return {grad_q, grad_k, grad_v, grad_temperature, grad_weights, grad_out_proj};
}

template <typename S>
using Accumulate = std::conditional_t<std::is_same_v<S, double>, double, float>;

std::tuple<Tensor, Tensor, Tensor> topk_attention_channel(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature, const Tensor& weights,
    const OptionalTensor& out_proj, at::IntArrayRef topk, bool normalize) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "topk_attention_channel", [&] {
    using T = Accumulate<scalar_t>;
    return forward<scalar_t, T>(Problem<T>(q, temperature, weights, out_proj, topk, normalize), q, k, v);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> topk_attention_channel_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature,
    const Tensor& weights, const OptionalTensor& out_proj, const Tensor& similarity, const Tensor& norms,
    at::IntArrayRef topk, bool normalize) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "topk_attention_channel_backward", [&] {
    using T = Accumulate<scalar_t>;
    return backward<scalar_t, T>(Problem<T>(q, temperature, weights, out_proj, topk, normalize), grad_out, q, k, v,
                                 similarity.contiguous(), norms.contiguous());
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(restore_kernels, CPU, m) {
  m.impl("topk_attention_channel.cpu", topk_attention_channel);
  m.impl("topk_attention_channel_backward.cpu", topk_attention_channel_backward);
}

}  // namespace restore_kernels
